"""A trainer whose model is sharded among processes (`models.sharding`), with checkpoints of whole tensors.

transformers' trainer has a way for models that own their placement and average their gradients themselves; it is taken once
the trainer is made, since a trainer that is made with such a model refuses to write checkpoints. Ours hold no part of
anything: what is trained and its moments are gathered tensor by tensor, so any number of processes can continue from them.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from trimtab import processes
from trimtab.models.sharding import is_sharded, like, mesh_of, parameters_now, shard, to_first
from trimtab.recipe.recipe import Recipe


def in_parts(recipe: Recipe) -> bool:
    """Whether the processes of a run keep a part of the model each."""
    return recipe.train.shard == "fsdp" and processes.count() > 1


def part(trainer: Any, recipe: Recipe) -> Any:
    """The trainer, which has its groups of parameters; its model sharded where the recipe says so and there are several.

    A run's own is sharded already, since it was loaded; one that `fit` is given may not be.
    """
    assert trainer.args.world_size == processes.count(), "accelerate sees other processes than were started"
    if not in_parts(recipe):
        return trainer
    if not is_sharded(trainer.model):
        names = {id(p): name for name, p in trainer.model.named_parameters()}
        shard(trainer.model, mesh_of(recipe.device.type))
        trainer.groups = parameters_now(names, trainer.model, trainer.groups)
    trainer.is_distributed_loading_by_transformers = True
    return trainer


@contextmanager
def whole_moments(trainer: Any) -> Iterator[None]:
    """While the block runs, the first process's optimizer holds whole tensors, on the CPU, and the others' empty ones.

    Every process has to come here; the first alone writes.
    """
    if not is_sharded(trainer.model):
        yield
        return
    parted: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for state in trainer.optimizer.state.values():
        parted.append((state, dict(state)))
        state.update({k: to_first(v) for k, v in state.items() if isinstance(v, Tensor)})
    try:
        yield
    finally:
        for state, before in parted:
            state.update(before)


@torch.no_grad()
def part_moments(trainer: Any) -> None:
    """Part the whole tensors that an optimizer has read, as its parameters are."""
    if not is_sharded(trainer.model):
        return
    for parameter, state in trainer.optimizer.state.items():
        state.update({k: like(parameter, v) for k, v in state.items() if _of(v, parameter)})


def _of(value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
