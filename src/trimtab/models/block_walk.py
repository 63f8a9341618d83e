"""The way of a block-wise start through a model: block after block, what each came to kept, so that none is done twice.

The hidden states of all windows are there twice, as the float blocks give them (what a block's outputs are held to is the
next one's float input) and as the rounded ones do; in memory, or in two files that are gone when the walk ends.

    entered    the block is made float by the caller; y* = block(x*) takes the place of x*
    trained    its layers' roundings, until y = block(x) is near y*; or found in `kept`
    left       the caller puts what was found in place; y = block(x) takes the place of x

What a block came to is a file under a name made of all that decides it: the numbers in x and y*, the block's own tensors,
grids and options. So every later use finds it (a run that was killed, another trial of a search whose first blocks
have the same widths), and nobody finds what is not the same.

Legend: W windows, L tokens in a window, D hidden size.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.disk import replace, sync
from trimtab.errors import UserError
from trimtab.layers.weights import AffineWeight
from trimtab.models.block_start import Blockwise, Errors, Rounding, Task, train
from trimtab.models.calibrate import first_inputs, hidden_of
from trimtab.quant.grid import Grid
from trimtab.words import duration

VERSION = 1
"""Of what a block comes to from the same: raised with every change of `block_start` that changes it."""


class Steps(NamedTuple):
    """What the caller does on the way."""

    enter: Callable[[str], None]
    """Makes a block float."""
    floats: Callable[[str], Mapping[str, tuple[Tensor, Grid]]]
    """The float weights (N, K) of the layers that are to be trained, by name, and their grids."""
    leave: Callable[[str, Mapping[str, AffineWeight]], None]
    """Puts the block's layers in place, these among them."""


@torch.no_grad()
def walk(model: Any, blocks: Sequence[str], how: Blockwise, steps: Steps) -> None:
    """Give every block its start.

    Args:
        model: a transformers model whose parts outside the blocks are in place.
        blocks: their names, in their order.
        how: options and windows.
        steps: of the caller.

    Raises:
        UserError: where what a block gives in float is not finite.
    """
    training = model.training
    model.eval()
    try:
        with _room(how.on_disk) as place:
            first, calls = first_inputs(model, list(blocks), how.tokens)
            device = first[0].device
            wanted, inputs = place(first), place(first)
            del first
            began = time.monotonic()
            for number, name in enumerate(blocks):
                steps.enter(name)
                block, call = model.get_submodule(name), calls[name]
                _through(block, wanted, call, device)
                roundings = {
                    layer.removeprefix(f"{name}."): Rounding(weight, grid, how.trains)
                    for layer, (weight, grid) in steps.floats(name).items()
                }
                if not wanted.isfinite().all():
                    raise UserError(f"{name}: gives values that are not finite in {wanted.dtype}; load in float32")
                errors = _trained(Task(block, roundings, inputs, wanted, call, number), how)
                steps.leave(name, {f"{name}.{layer}": r.stored() for layer, r in roundings.items()})
                del roundings
                _through(model.get_submodule(name), inputs, call, device)
                if how.say is not None:
                    how.say(_line(number, len(blocks), errors, time.monotonic() - began))
    finally:
        model.train(training)


def _through(block: nn.Module, states: Tensor, call: dict[str, Any], device: torch.device) -> None:
    """Put what a block gives for each window in the window's place."""
    for state in states.split(1):
        state.copy_(hidden_of(block(state.to(device), **call)))


def _trained(task: Task, how: Blockwise) -> Errors | None:
    """Train a block, or take what is known of it; None where nothing in it is to be trained."""
    if not task.roundings:
        return None
    if how.kept is None:
        return train(task, how)
    file = how.kept / f"{_key(task, how)}.safetensors"
    errors = _read(file, task.roundings)
    if errors is None:
        errors = train(task, how)
        _write(file, task.roundings, errors)
    return errors


def _line(number: int, count: int, errors: Errors | None, seconds: float) -> str:
    done = number + 1
    came = "nothing to train" if errors is None else f"error {errors.before:.3g} to {errors.after:.3g}"
    left = "" if done == count else f"; {duration(seconds / done * (count - done))} left"
    return f"block {done} of {count}: {came}, {duration(seconds)}{left}"


@contextmanager
def _room(on_disk: bool) -> Iterator[Callable[[Sequence[Tensor]], Tensor]]:
    """Where hidden states (W, L, D) are put; files are gone with the block."""
    if not on_disk:
        yield lambda states: torch.cat([state.cpu() for state in states])
        return
    with tempfile.TemporaryDirectory(prefix="trimtab-hidden-", ignore_cleanup_errors=True) as folder:
        names = iter(range(2))

        def mapped(states: Sequence[Tensor]) -> Tensor:
            shape = (len(states), *states[0].shape[1:])
            file, size = Path(folder) / f"{next(names)}", torch.Size(shape).numel()
            made = torch.from_file(str(file), shared=True, size=size, dtype=states[0].dtype).view(shape)
            for row, state in zip(made.split(1), states, strict=True):
                row.copy_(state)
            return made

        yield mapped


# ---- what is kept -----------------------------------------------------------------------------------------------------


def _key(task: Task, how: Blockwise) -> str:
    """A name made of all that decides what a block comes to."""
    options = (VERSION, task.number, how.trains, how.steps, how.windows, *how.rates, how.seed)
    grids = {name: asdict(r.base.grid) for name, r in task.roundings.items()}
    made = hashlib.blake2b(json.dumps([options, grids]).encode(), digest_size=20)
    weights = (t for r in task.roundings.values() for t in (r.c, *r.start))
    for tensor in (task.inputs, task.wanted, *task.block.parameters(), *task.block.buffers(), *weights):
        if tensor is not None:
            for part in tensor.detach().reshape(-1).split(1 << 22):
                made.update(part.cpu().view(torch.uint8).numpy())
    return made.hexdigest()


def _read(file: Path, roundings: Mapping[str, Rounding]) -> Errors | None:
    """Take what a block came to from its file; None if it is not there, or not whole."""
    try:
        with safe_open(file, framework="pt") as kept:
            tensors = {name: kept.get_tensor(name) for name in kept.keys()}  # noqa: SIM118
            errors = Errors(*json.loads(kept.metadata()["errors"]))
    except (FileNotFoundError, SafetensorError):
        return None
    for layer, r in roundings.items():
        for name, p in r.trained.items():
            p.detach().copy_(tensors[f"{layer}.{name}"])
    return errors


def _write(file: Path, roundings: Mapping[str, Rounding], errors: Errors) -> None:
    tensors = {f"{layer}.{name}": p.detach().cpu() for layer, r in roundings.items() for name, p in r.trained.items()}

    def write(new: Path) -> None:
        save_file(tensors, new, metadata={"errors": json.dumps(errors)})
        sync(new)

    file.parent.mkdir(parents=True, exist_ok=True)
    replace(file, write)
