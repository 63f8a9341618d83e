"""Levels to weights, `from_codes(round_clamp(u))`, as one operator with its gradients written out.

    W = s * (clamp(round(u), 0, top) - z)        G = dL/dW
    du = s * G * inside       ds = sum over the group of G * (q - z)       do = sum over the group of G  (real zero)

The values are those of `grid.from_codes`, bit for bit, since they are made by it; a compiler sees one operator (`opaque`).
What autograd would keep and pass over (the rounded levels, their difference to the levels, the clamp's input, a product's
both factors) is made again from the levels, which are all that is kept. The plain composition is the reference that tests
hold this to.

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.quant.grid import Grid, Range, ScaleDtype, from_codes
from trimtab.quant.opaque import operator


def _from_levels(
    levels: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, bits: int, scale_dtype: ScaleDtype,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    grid = Grid(bits, scale_dtype=scale_dtype)  # which kind of zero it is, the range says
    return from_codes(levels.round().clamp_(0, grid.top), Range(scale, zero, offset), grid, dtype)


def _fake(levels: Tensor, *rest: Any) -> Tensor:
    return levels.new_empty(levels.shape, dtype=rest[-1])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, scale, zero, offset, ctx.bits, _, _ = inputs
    ctx.save_for_backward(levels, scale, zero)
    ctx.center = 0 if offset is not None else 1 << (ctx.bits - 1)


def _backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
    levels_NK, scale_NG, zero_NG = ctx.saved_tensors
    wants_levels, wants_scale, _, wants_offset, *_ = ctx.needs_input_grad
    groups = scale_NG.shape[1]
    grad_NGg = grad_NK.to(scale_NG.dtype).unflatten(1, (groups, -1))
    rounded_NK = levels_NK.round()
    codes_NK = rounded_NK.clamp(0, (1 << ctx.bits) - 1)
    of_scale = of_offset = of_levels = None
    if wants_scale or wants_offset:
        # sum of G (q - z) = sum of G q - z sum of G, which spares a pass for q - z
        total_NG = grad_NGg.sum(-1)
        center = ctx.center if zero_NG is None else zero_NG
        of_scale = (grad_NGg * codes_NK.unflatten(1, (groups, -1))).sum(-1) - center * total_NG
        of_offset = total_NG if wants_offset else None
    if wants_levels:
        of_levels = (grad_NGg * scale_NG.unsqueeze(-1)).flatten(1) * (codes_NK == rounded_NK)
    return of_levels, of_scale, None, of_offset, None, None, None


_operator = operator(
    "from_levels(Tensor levels, Tensor scale, Tensor? zero, Tensor? offset, int bits, str scale_dtype, "
    "ScalarType dtype) -> Tensor",
    _from_levels,
    _fake,
    (_keep, _backward),
)


def from_levels(levels_NK: Tensor, range_: Range, grid: Grid, dtype: torch.dtype) -> Tensor:
    """Weights of levels that are neither rounded nor clamped.

    Args:
        levels_NK: float32 or float64 levels (N, K).
        range_: scales and zeros (N, G), exact in the grid's storage dtype.
        grid: the affine grid.
        dtype: dtype of the result.

    Returns:
        (N, K) of `dtype`. Differentiable in levels (straight through rounding, 0 where clipped), scale and offset.
    """
    plain = "float32" if grid.two_level is not None else grid.scale_dtype
    weight: Tensor = _operator(levels_NK, *range_, grid.bits, plain, dtype)
    return weight
