"""Numbers that their dtype holds: what is not finite, too large or too small for it is said by the tensor's name.

    float16     nothing above 65,504            a cast makes it infinite
    portable    scales within 2^-24 .. 65,280   beyond, `quant.grid.stored` clamps them, and the weights are others

Weights whose scales would have to be larger are refused. Smaller ones are rounded to the least scale, some of them to zero:
that is said, in one line, and so are layers of which nothing is left.

Legend: N out features, K in features, G groups in a row.
"""

import logging
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.layers.weights import AffineWeight, Weight
from trimtab.quant.grid import Grid, same_form, stored
from trimtab.quant.opaque import LARGEST_PORTABLE
from trimtab.words import and_more, beyond

_log = logging.getLogger("trimtab")
_LARGEST = {"portable": LARGEST_PORTABLE, "float16": torch.finfo(torch.float16).max}
_LEAST = 2.0**-24
"""The least scale that `quant.grid` gives a group that is not zero, of those two."""
_NOTED = "_trimtab_small"
_ROWS = 1024


def require_finite(source: Tensor | Weight, name: str) -> None:
    """Raise a `UserError` naming the tensor if it, or of a stored weight a scale or offset, is NaN or infinite."""
    if isinstance(source, Weight):
        for part, tensor in source.named_parameters():
            require_finite(tensor.detach(), f"{name}: {part}")
        return
    # NaN spreads to the extremes, and they are one pass: a sixteenth of `isfinite`'s time (`benchmarks/speed/choices.py`).
    if source.is_floating_point() and source.numel() and not all(x.isfinite() for x in torch.aminmax(source)):
        raise UserError(
            f"{name}: holds NaN or infinite values{beyond(source.dtype)}; the checkpoint is damaged, fetch or convert it "
            "again"
        )


def require_held(name: str, values_NG: Tensor, grid: Grid) -> None:
    """Refuse scales or offsets that their dtype does not hold.

    Args:
        name: of the layer.
        values_NG: as they were computed or trained, or as they were stored.
        grid: of the layer.

    Raises:
        UserError: naming the layer, the largest value and what to set.
    """
    largest, kind = values_NG.detach().float().abs().amax(), grid.two_level
    if kind is None:
        largest = stored(largest, grid.scale_dtype)
    bound = _LARGEST.get(grid.scale_dtype, torch.inf) if kind is None else kind.largest
    if not largest.isfinite() or largest >= bound:
        most = min(bound, torch.finfo(grid.storage).max)
        remedy = "float32" if grid.scale_dtype == "bfloat16" else "bfloat16"
        raise UserError(
            f"{name}: its weights need scales of {most:,.6g} or more, and `scale_dtype: {grid.scale_dtype}` holds none "
            f"larger; set `scale_dtype: {remedy}` in its grid, or take more bits"
        )


def look_at(model: nn.Module, name: str, base: Weight, source: Tensor | Weight) -> None:
    """Refuse a layer's stored weight if its scales went out of their range; note what of it was too small.

    Args:
        model: that the layer is in; `tell_small` says what was noted.
        name: of the layer.
        base: what is stored of it.
        source: what that was made of.

    Raises:
        UserError: as `require_held`.
    """
    if not isinstance(base, AffineWeight) or base.scale.is_meta:
        return
    if isinstance(source, AffineWeight) and source.packed and same_form(source.grid, base.grid):
        return  # taken as it was
    scale_NG, _, offset_NG = base.range()
    require_held(name, scale_NG, base.grid)
    if offset_NG is not None:
        require_held(name, offset_NG, base.grid)
    if base.grid.scale_dtype not in _LARGEST:
        return  # it holds smaller ones
    size_NG = scale_NG.detach().abs()
    small_NG = size_NG <= _LEAST
    if not small_NG.any():
        return
    noted: dict[str, tuple[int, int, bool]] = vars(model).setdefault(_NOTED, {})
    nothing = bool((small_NG | (size_NG == 1)).all()) and not _any(base)  # 1 is the scale of what was zero before
    noted[name] = int(small_NG.sum()), small_NG.numel(), nothing


@torch.no_grad()
def _any(weight: Weight) -> bool:
    """Whether a weight is anything but zeros."""
    device = next(weight.parameters()).device
    starts = range(0, weight.shape[0], _ROWS)
    rows = (torch.arange(i, min(i + _ROWS, weight.shape[0]), device=device) for i in starts)
    return any(bool(weight.dequantize(torch.float32, rows=some).any()) for some in rows)


def tell_small(model: nn.Module) -> None:
    """Say by the logger `trimtab` what was noted of a model's layers, in one line for each kind."""
    noted: dict[str, Any] = vars(model).pop(_NOTED, {})
    nothing = [name for name, (_, _, zero) in noted.items() if zero]
    if nothing:
        _log.warning(
            "%s: all zero once rounded: the weights are below half of the least scale, 2^-24", and_more(nothing)
        )
    partly = {name: f"{name} ({few} of {all_})" for name, (few, all_, zero) in noted.items() if not zero}
    if partly:
        _log.warning(
            "%s: groups of weights so small that they take the least scale, 2^-24, and are rounded coarsely or to zero; "
            "`scale_dtype: bfloat16` in the grid holds smaller ones",
            and_more(list(partly.values())),
        )
