"""What a recipe asks of training that this machine may not have: found out before a model is loaded."""

from importlib.util import find_spec

import torch
from transformers.integrations import get_available_reporting_integrations

from trimtab.errors import UserError, nearest
from trimtab.recipe.recipe import Recipe


def check_training(recipe: Recipe) -> None:
    """Raise a `UserError` for what the trainer would only complain of later: a missing logger, optimizer or GPU."""
    _check_logger(recipe.train.report_to)
    if recipe.train.optimizer != "adamw" and find_spec("bitsandbytes") is None:
        raise UserError(f"train.optimizer: {recipe.train.optimizer} is bitsandbytes', which is not installed")
    if not torch.cuda.is_available():
        if "paged" in recipe.train.optimizer:
            raise UserError(
                "train.optimizer: pages between a GPU's memory and the computer's, and there is no GPU here"
            )
        if recipe.train.offload_activations:
            raise UserError("train.offload_activations: moves from a GPU's memory, and there is no GPU here")


_PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "neptune": "neptune",
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "codecarbon": "codecarbon",
    "dagshub": "dagshub mlflow",
    "azure_ml": "azureml-core",
}
"""What to install for each of transformers' loggers."""


def _check_logger(name: str) -> None:
    """Raise a `UserError` naming the package of a logger that is not installed, or the nearest name of one."""
    here = ["none", "all", *get_available_reporting_integrations()]
    if name in here:
        return
    if name in _PACKAGES:
        raise UserError(f"train.report_to: {name} is not installed here: pip install {_PACKAGES[name]}")
    known = list(dict.fromkeys([*here, *_PACKAGES]))
    raise UserError(f"train.report_to: no logger {name!r}{nearest(name, known)}; known are {', '.join(known)}")
