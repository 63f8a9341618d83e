"""A plan with all that a person asks before a run: will it fit, what would, how large it gets, how long it takes.

Nothing is loaded but names and shapes: of a hub's model only the config is fetched. A model without a recipe is planned
with the defaults.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trimtab.devices import beside_tensors
from trimtab.devices import memory as memory_of
from trimtab.errors import UserError
from trimtab.formats.export_size import export_sizes
from trimtab.memory.peak import Plan
from trimtab.memory.plan import plan as planned
from trimtab.memory.process import available_bytes
from trimtab.memory.settings import settings
from trimtab.memory.speed import Speed, speed
from trimtab.models.sources import open_layout
from trimtab.models.targets import targets
from trimtab.pipeline.pruned import pruned_already
from trimtab.recipe.recipe import Recipe, as_recipe


def plan(recipe: Recipe, memory: int | None = None) -> Plan:
    """The plan of a recipe.

    Args:
        recipe: of `to_plan`.
        memory: bytes that there are for training; None for no settings.
    """
    source = open_layout(recipe.model.path)
    laid_out = source.layout()
    placed = targets(laid_out, recipe.method, recipe.rules)
    about: dict[str, Any] = {"merge": recipe.merge, "activations": recipe.activations, "kv": recipe.kv}
    sizes = export_sizes(laid_out, placed, recipe.method, dtype=recipe.dtype, **about)
    where, free = _where(recipe)
    beside = beside_tensors(where.partition(":")[0], begun=memory is None and free is not None)
    fits = None if memory is None else settings(recipe, source.layout(), memory - beside)
    found: dict[str, Any] = {"sizes": sizes, "memory": memory, "settings": fits}
    return replace(planned(recipe, laid_out), device=where, free=free, beside=beside, **found)


def _where(recipe: Recipe) -> tuple[str, int | None]:
    """The device that a recipe means, here or elsewhere, and what is free on it."""
    try:
        device = recipe.device
    except UserError:  # a plan is also made for another machine
        return recipe.model.device, None
    there = memory_of(device)
    return str(device), None if there is None else there.free


def probed(recipe: Recipe, total: int) -> Speed | str:
    """The speed of a recipe's training on this machine, or why it was not tried.

    Args:
        recipe: of `to_plan`.
        total: bytes that its training takes, context and libraries of a device among them.
    """
    if not recipe.train.steps:
        return "nothing is trained"
    _, free = _where(recipe)
    if total > (available_bytes() if free is None else free):
        return "it does not fit here"
    try:
        return speed(recipe, open_layout(recipe.model.path))
    except torch.OutOfMemoryError:
        return "it does not fit here"
    except UserError as error:
        return str(error)


def to_plan(
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Recipe, tuple[str, ...]]:
    """The recipe that is planned, and lines that say what it is not the plan of.

    Args:
        recipe: a recipe, its values, its file; or a model alone, by a directory, config.json, .gguf file or hub id.
        overrides: `key=value` with dotted keys.
    """
    if isinstance(recipe, str | os.PathLike) and _names_model(os.fspath(recipe)):
        path = os.fspath(recipe)
        values = {"name": "plan", "model": {"path": path}, "method": "lr-qat", "data": {"path": "pydoc-topics"}}
        chosen = as_recipe(values, overrides)
        assert chosen.data is not None
        sizes = f"sequences of {chosen.data.block_tokens:,} tokens, {chosen.train.batch_tokens:,} in a step"
        return chosen, (f"no recipe, so this is the plan of {chosen.method.name} with {sizes}",)
    chosen, notes = pruned_already(as_recipe(recipe, overrides)), list[str]()
    if chosen.prune is not None:
        notes.append("prune: not done yet, so this is the plan of the whole model; what is left will take less")
    if chosen.search is not None:
        notes.append("search: this is the plan of the recipe's own rules; search.budget_training bounds every trial's")
    if chosen.train.objective != "sft":
        notes.append(
            f"train.objective: this is the plan of sft; {chosen.train.objective} holds a head's matrix and a reference, too"
        )
    return chosen, tuple(notes)


def _names_model(text: str) -> bool:
    """Whether a word is that of a model, not of a recipe's file."""
    path = Path(text).expanduser()
    if path.is_dir() or path.suffix in (".json", ".gguf"):
        return True
    hub = text.count("/") == 1 and not text.startswith((".", "/", "~"))
    return not path.exists() and path.suffix not in (".yaml", ".yml") and (hub or text == "smollm2-135m")
