"""What a recipe asks of training that this machine may not have: found out before a model is loaded."""

from importlib.util import find_spec

import torch
from transformers.integrations import get_available_reporting_integrations

from trimtab.errors import UserError, nearest
from trimtab.recipe.recipe import Recipe


def check_training(recipe: Recipe) -> None:
    """Raise a `UserError` for what the trainer would only complain of later: a missing logger, optimizer or GPU."""
    loggers = ["none", "all", *get_available_reporting_integrations()]
    if recipe.train.report_to not in loggers:
        hint = nearest(recipe.train.report_to, loggers)
        raise UserError(
            f"train.report_to: {recipe.train.report_to!r} is not installed or unknown{hint}; here are {', '.join(loggers)}"
        )
    if recipe.train.optimizer != "adamw" and find_spec("bitsandbytes") is None:
        raise UserError(f"train.optimizer: {recipe.train.optimizer} is bitsandbytes', which is not installed")
    if not torch.cuda.is_available():
        if "paged" in recipe.train.optimizer:
            raise UserError(
                "train.optimizer: pages between a GPU's memory and the computer's, and there is no GPU here"
            )
        if recipe.train.offload_activations:
            raise UserError("train.offload_activations: moves from a GPU's memory, and there is no GPU here")
