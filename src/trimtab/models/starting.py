"""How the layers in the decoder blocks find the codes that training starts from, other than by rounding to nearest.

    gptq        columns are rounded one after another, each making up for those before it (`gptq`)
    blockwise   each block is trained through its rounding to give what the float block gives (`block_start`)

Both go through the blocks in their order, with inputs from the quantized blocks before, and both end as a stored weight on
the method's own grid (levels in float), which `methods.base.base_weight` takes code for code: a method does not know where
its weight comes from.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source
from trimtab.models import block_walk, gptq
from trimtab.models.block_start import Blockwise
from trimtab.models.calibrate import by_block, calibrate
from trimtab.models.gptq import Gptq
from trimtab.models.targets import Target
from trimtab.quant.grid import Grid, same_form
from trimtab.words import and_more

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_log = logging.getLogger("trimtab")

Start = Gptq | Blockwise
"""What finds the codes, and what it is calibrated on."""


class Filling(NamedTuple):
    """How a model that is given a start gets its layers."""

    read: Callable[[Target], Source]
    """What a layer is made of."""
    put: Callable[[Target, Callable[[Source], Source] | None], None]
    """Puts a layer in place, made of what `how` makes of that; None rounds to nearest."""
    enter: Callable[[str], None]
    """Makes a block float before it is run; `""` stands for all that is outside the blocks."""


def place_started(
    model: "PreTrainedModel", todo: Sequence[Target], method: Method, start: Start, filling: Filling
) -> None:
    """Put every layer in place, those in the decoder blocks by a start, block by block.

    Args:
        model: float where it is not meta.
        todo: from `targets`.
        method: what will train the layers.
        start: with its calibration windows.
        filling: the model's layers.

    Raises:
        UserError: where the method, a grid or a layer does not go with the start.
    """
    name = "gptq" if isinstance(start, Gptq) else "block"
    if method.rounds_itself:
        raise UserError(f"{method.name} finds its own codes, so {name} would be in vain; use `start: rtn`")
    by_name = {t.name: t for t in todo}
    inside = {block: [by_name[n] for n in names] for block, names in by_block(model, list(by_name)).items()}
    calibrated = {t.name for some in inside.values() for t in some}
    for target in todo:
        if target.name not in calibrated:
            filling.put(target, None)
    filling.enter("")
    if not any(t.grid is not None for some in inside.values() for t in some):
        raise UserError(
            f"{name}: no layer in the decoder blocks has a grid to round to under {method.name}; give it one"
        )
    if isinstance(start, Gptq):
        _by_gptq(model, inside, start, filling)
    else:
        _by_block(model, inside, start, filling)


def as_it_is(source: Source, target: Target) -> bool:
    """Whether nothing is left to round: a layer that stays float, or that is stored on its grid already."""
    return target.grid is None or (isinstance(source, Weight) and same_form(source.grid, target.grid))


def _by_gptq(model: "PreTrainedModel", inside: Mapping[str, Sequence[Target]], start: Gptq, filling: Filling) -> None:
    unseen = list[str]()

    def leave(block: str, hessians: dict[str, Tensor]) -> None:
        for target in inside[block]:
            if target.name in hessians:
                filling.put(target, partial(_round_by_gptq, target, start, hessians[target.name]))
            else:
                filling.put(target, None)
        unseen.extend(name for name in watched[block] if name not in hessians)

    watched = {block: [t.name for t in some if t.grid is not None] for block, some in inside.items()}
    calibrate(model, start.tokens, watched, filling.enter, leave)
    if unseen:
        _log.warning("gptq: no calibration token reached %s: rounded to nearest", and_more(unseen))


def _round_by_gptq(target: Target, start: Gptq, hessian_KK: Tensor, source: Source) -> Source:
    if as_it_is(source, target):
        return source
    assert target.grid is not None
    try:
        return gptq.quantize(_float(source), hessian_KK, target.grid, start)
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from None


def _by_block(
    model: "PreTrainedModel", inside: Mapping[str, Sequence[Target]], start: Blockwise, filling: Filling
) -> None:
    for target in (t for some in inside.values() for t in some):
        if target.grid is not None and not isinstance(target.grid, Grid):
            raise UserError(
                f"{target.name}: block trains the scales of an affine grid, and {target.grid.describe()} has none; "
                "use `start: gptq` or rtn, or a grid of bits, group and zero"
            )

    def floats(block: str) -> dict[str, tuple[Tensor, Grid]]:
        found = {}
        for target in inside[block]:
            source = filling.read(target)
            if as_it_is(source, target):
                continue
            if not hasattr(model.get_submodule(target.name), "weight"):
                raise UserError(
                    f"{target.name}: block trains float layers, and this one is stored as codes on another grid; start "
                    "from the float model, or leave it on its grid"
                )
            assert isinstance(target.grid, Grid)
            found[target.name] = _float(source), target.grid
        return found

    def leave(block: str, found: Mapping[str, Weight]) -> None:
        for target in inside[block]:
            weight = found.get(target.name)
            filling.put(target, None if weight is None else partial(_instead, weight))

    block_walk.walk(model, list(inside), start, block_walk.Steps(filling.enter, floats, leave))


def _instead(weight: Weight, source: Source) -> Source:
    return weight


def _float(source: Source) -> Tensor:
    return source if isinstance(source, Tensor) else source.dequantize(torch.float32)
