"""Levels to weights, `from_codes(round_clamp(u))`, with its gradients written out: fewer passes over (N, K).

    W = s * (clamp(round(u), 0, top) - z)        G = dL/dW, q - z kept from forward
    du = s * G * inside       ds = sum over the group of G * (q - z)       do = sum over the group of G  (real zero)

The values are those of `grid.from_codes`, bit for bit, since they are made by it. What autograd would keep and pass over
(the rounded levels, their difference to the levels, the clamp's input, a product's both factors) is kept here once. The
plain composition is the reference that tests hold this to.

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.quant.grid import Grid, Range, from_codes


class _FromLevels(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, levels_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, offset_NG: Tensor | None,
        grid: Grid, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        rounded_NK = levels_NK.round()
        codes_NK = rounded_NK.clamp(0, grid.top)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(codes_NK, scale_NG, zero_NG, codes_NK == rounded_NK)
            ctx.center = 0.0 if offset_NG is not None else float(grid.center)
        return from_codes(codes_NK, Range(scale_NG, zero_NG, offset_NG), grid, dtype)

    @staticmethod
    def backward(ctx: Any, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        codes_NK, scale_NG, zero_NG, inside_NK = ctx.saved_tensors
        groups = scale_NG.shape[1]
        grad_NGg = grad_NK.to(scale_NG.dtype).unflatten(1, (groups, -1))
        of_scale = of_offset = of_levels = None
        if ctx.needs_input_grad[1]:
            # sum of G (q - z) = sum of G q - z sum of G, which spares a pass for q - z
            total_NG = grad_NGg.sum(-1)
            center = ctx.center if zero_NG is None else zero_NG
            of_scale = (grad_NGg * codes_NK.unflatten(1, (groups, -1))).sum(-1) - center * total_NG
            of_offset = total_NG if ctx.needs_input_grad[3] else None
        if ctx.needs_input_grad[0]:
            of_levels = (grad_NGg * scale_NG.unsqueeze(-1)).flatten(1).mul_(inside_NK)
        return of_levels, of_scale, None, of_offset, None, None


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
    weight: Tensor = _FromLevels.apply(levels_NK, *range_, grid, dtype)  # type: ignore[no-untyped-call]
    return weight
