"""What a recipe asks of training that this machine may not have: found out before a model is loaded."""

from importlib.util import find_spec

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trimtab.errors import UserError, nearest
from trimtab.recipe.recipe import Recipe
from trimtab.training.rewards import reward


def check_training(recipe: Recipe) -> None:
    """Raise a `UserError` for what the trainer would only complain of later: a missing logger, optimizer or GPU."""
    _check_logger(recipe.train.report_to)
    if recipe.train.objective == "grpo" and recipe.train.steps:
        reward(recipe)
    if recipe.train.optimizer != "adamw" and find_spec("bitsandbytes") is None:
        raise UserError(f"train.optimizer: {recipe.train.optimizer} is bitsandbytes', which is not installed")
    if not torch.cuda.is_available():
        if "paged" in recipe.train.optimizer:
            raise UserError(
                "train.optimizer: pages between a GPU's memory and the computer's, and there is no GPU here"
            )
        if recipe.train.offload_activations:
            raise UserError("train.offload_activations: moves from a GPU's memory, and there is no GPU here")


_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""What installs a logger, where that is not its name."""


def _check_logger(name: str) -> None:
    """Raise a `UserError` for a logger that transformers does not know, or whose package is not installed."""
    known, here = ["none", "all", *INTEGRATION_TO_CALLBACK], ["none", "all", *get_available_reporting_integrations()]
    if name in here:
        return
    if name not in known:
        raise UserError(f"train.report_to: no logger {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    raise UserError(
        f"train.report_to: {name} needs a package that is not installed here: pip install {_PACKAGES.get(name, name)} (or "
        "none, to log nothing)"
    )
