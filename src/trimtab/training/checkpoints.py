"""Checkpoints: what is trained, on disk, and which of a folder's is the last that is what was written.

checkpoints/checkpoint-<step>/    trainable tensors, optimizer, schedule, random state: what training continues from; the
                                  recipe, with hashes of all that it reads, and versions: what may continue from it; and a
                                  manifest with the SHA-256 of each of these files
checkpoints/best/                 trainable tensors alone, of the lowest held-out loss (see `best`)
checkpoints/.writing/             one that is not whole yet, nor under its name (see `saving`)

A checkpoint is one only if its manifest says so and every file is what the manifest says. One that is not is named, passed
over, and the one before is taken. Those of earlier versions have no manifest: nothing says that they are whole.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import TrainerState

from trimtab.errors import UserError
from trimtab.formats.manifest import MANIFEST, damage, kind_of, listed
from trimtab.models.sharding import like, to_first
from trimtab.recipe.recipe import Recipe

CHECKPOINT = "trainable.safetensors"
"""Trainable tensors of a checkpoint, by parameter name."""
RECIPE = "recipe.yaml"
"""The resolved recipe that a checkpoint belongs to."""
VERSIONS = "versions.json"
"""Of the libraries that wrote it."""
STATE = "trainer_state.json"
_NEEDED = (CHECKPOINT, RECIPE, VERSIONS, STATE, "optimizer.pt", "scheduler.pt")
_NAME = re.compile(r"checkpoint-(\d+)")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Their values, whole and on the CPU, in the first process, which alone writes; every process has to ask."""
    return {name: to_first(p.detach()) for name, p in trainable(model).items()}


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
                parameter.copy_(like(parameter, tensor))


@dataclass(frozen=True)
class Found:
    """What a folder of checkpoints holds."""

    last: Path | None
    """The newest that is whole."""
    damaged: dict[Path, str]
    """Newer ones that are not, and what is wrong with each, newest first."""

    @property
    def lines(self) -> list[str]:
        """What is to be said of those that are passed over."""
        after = "" if self.last is None else f"; continuing from {self.last.name}"
        return [f"{checkpoint}: is damaged and passed over: {why}{after}" for checkpoint, why in self.damaged.items()]


def checkpoints_in(checkpoints: Path) -> Iterator[Path]:
    """Folders named as checkpoints are, whole or not, newest first."""
    if checkpoints.is_dir():
        named = (f for f in checkpoints.iterdir() if _NAME.fullmatch(f.name) and f.is_dir())
        yield from sorted(named, key=step_of, reverse=True)


def find(checkpoints: Path) -> Found:
    """The newest checkpoint that is whole; its files are read, once by a process as long as they do not change."""
    damaged: dict[Path, str] = {}
    for checkpoint in checkpoints_in(checkpoints):
        why = what_is_wrong(checkpoint)
        if not why:
            return Found(checkpoint, damaged)
        damaged[checkpoint] = why
    return Found(None, damaged)


def what_is_wrong(checkpoint: Path, needed: tuple[str, ...] = _NEEDED) -> str:
    """Why nothing can continue from a checkpoint; "" where it is what was written.

    Args:
        checkpoint: its folder.
        needed: files that it must have, for a model that is kept without all that training needs.
    """
    try:
        if not (checkpoint / MANIFEST).is_file():
            return f"it has no {MANIFEST}: it was not written to its end, or by an earlier version"
        if kind_of(checkpoint) != "checkpoint":
            return f"its {MANIFEST} is that of something else"
        files = listed(checkpoint)
        missing = [name for name in needed if name not in files]
        if missing:
            return f"its {MANIFEST} does not list {missing[0]}"
        why = damage(checkpoint)
        if why or STATE not in needed:
            return why
        step = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))["global_step"]
    except UserError as error:
        return str(error)
    except (OSError, KeyError, ValueError, TypeError) as error:
        return f"it cannot be read ({error!r})"
    return "" if step == step_of(checkpoint) else f"it is that of step {step}"


def whole_checkpoint(checkpoints: Path) -> Path | None:
    """The newest checkpoint that is whole, if there is one."""
    return find(checkpoints).last


def last_checkpoint(recipe: Recipe) -> Path:
    """The checkpoint that training continues from; a `UserError` if there is none, or if it is past the last step."""
    last = whole_checkpoint(recipe.out / "checkpoints")
    if last is None:
        raise UserError(f"--resume: {recipe.out / 'checkpoints'} holds no checkpoint; run without it")
    check_reached(last, recipe)
    return last


def check_reached(last: Path, recipe: Recipe) -> None:
    """Raise a `UserError` if a checkpoint is past the last step of a recipe."""
    if recipe.train.epochs is None and step_of(last) > recipe.train.steps:  # epochs become steps as rows are counted
        raise UserError(f"--resume: {last} is past train.steps = {recipe.train.steps}; raise it, or start over")


def step_of(checkpoint: Path) -> int:
    """The step after which it was written."""
    return int(checkpoint.name.rpartition("-")[2])


def state_of(checkpoint: Path) -> TrainerState:
    """The trainer's state that a checkpoint was written with."""
    return TrainerState.load_from_json(str(checkpoint / STATE))


def losses_of(state: TrainerState) -> list[float]:
    """Training loss of each step that was logged, by whichever process of a run that was stopped and continued."""
    return [float(entry["loss"]) for entry in state.log_history if "loss" in entry]
