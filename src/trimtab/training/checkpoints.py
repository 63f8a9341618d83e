"""Checkpoints: what is trained, on disk, and which of a folder's is the last that was written to its end.

checkpoints/checkpoint-<step>/    trainable tensors, optimizer, schedule, random state: what training goes on from
checkpoints/best/                 trainable tensors alone, of the lowest held-out loss (see `best`)
"""

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe

CHECKPOINT = "trainable.safetensors"
"""Trainable tensors of a checkpoint, by parameter name."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's trainable tensors into a prepared model.

    Raises:
        UserError: if the checkpoint belongs to another recipe.
    """
    named = trainable(model)
    with safe_open(checkpoint / CHECKPOINT, framework="pt") as file:
        if set(file.keys()) != set(named):
            odd = sorted(set(file.keys()) ^ set(named))[0]
            raise UserError(f"{checkpoint}: {odd} is in only one of checkpoint and model; resume with the same recipe")
        for name, parameter in named.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise UserError(f"{checkpoint}: {name} has another shape there; resume with the same recipe")
            with torch.no_grad():
                parameter.copy_(tensor)


def whole_checkpoint(checkpoints: Path) -> Path | None:
    """The last checkpoint that was written to its end: the trainer's state comes last."""
    whole = (file.parent for file in checkpoints.glob("checkpoint-*/trainer_state.json"))
    return max(whole, key=step_of, default=None)


def last_checkpoint(recipe: Recipe) -> Path:
    """The checkpoint that training goes on from; a `UserError` if there is none, or if it is past the last step."""
    last = whole_checkpoint(recipe.out / "checkpoints")
    if last is None:
        raise UserError(f"--resume: {recipe.out / 'checkpoints'} holds no checkpoint; run without it")
    check_reached(last, recipe)
    return last


def check_reached(last: Path, recipe: Recipe) -> None:
    """Raise a `UserError` if a checkpoint is past the last step of a recipe."""
    if recipe.train.epochs is None and step_of(last) > recipe.train.steps:  # epochs are steps once the rows are counted
        raise UserError(f"--resume: {last} is past train.steps = {recipe.train.steps}; raise it, or start anew")


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])
