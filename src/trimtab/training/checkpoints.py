"""Checkpoints on disk: which of a folder's is the last that was written to its end."""

from pathlib import Path

from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe


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
