"""Stored levels moved by a low-rank shift, rounded: LR-QAT's weight, with its gradients written out.

    W = s * (clamp(round(Phi + gain * B A), 0, top) - z)         G = dL/dW
    dU = s * G where no level was clipped                        dA = gain * B^T dU      dB = gain * dU A^T
    ds = sum over the group of G * (q - z)                       do = sum over the group of G       (real zero)

Forward and backward are one fused pass each over what is stored (`dequantize.levels`, `dequantize.level_gradients`);
nothing of N x K floats is kept between them. `kernels.levels` is the same for levels that are given as a tensor.

Legend: N out features, K in features, G groups in a row, R rank.
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels import dequantize
from trimtab.kernels.dequantize import Levels


def gradients(about: Levels, grad_NK: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """Gradients of (A, B, scale, offset) from dL/dW, which is overwritten.

    Args:
        about: as in forward.
        grad_NK: dL/dW in the compute dtype.
    """
    of_scale = torch.empty_like(about.scale_NG)
    of_offset = None if about.offset_NG is None else torch.empty_like(about.offset_NG)
    dequantize.level_gradients(grad_NK, of_scale, of_offset, *about)
    factors = about.acting(grad_NK.dtype)
    if factors is None:
        return None, None, of_scale, of_offset
    a, b = factors
    of_a = (b.t() @ grad_NK).float().mul_(about.gain)
    of_b = (grad_NK @ a.t()).float().mul_(about.gain)
    return of_a, of_b, of_scale, of_offset


class _Shifted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, columns: int, *about: Any) -> Tensor:
        phi, bits, fixed, a, b, gain, scale, zero, offset, *rest = about
        ctx.save_for_backward(phi, a, b, scale, zero, offset)
        ctx.rest = bits, fixed, gain, rest
        out = torch.empty(phi.shape[0], columns, dtype=dtype, device=phi.device)
        dequantize.levels(out, *about)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        phi, a, b, scale, zero, offset = ctx.saved_tensors
        bits, fixed, gain, rest = ctx.rest
        about = Levels(phi, bits, fixed, a, b, gain, scale, zero, offset, *rest)
        of_a, of_b, of_scale, of_offset = gradients(about, grad.clone(memory_format=torch.contiguous_format))
        return None, None, None, None, None, of_a, of_b, None, of_scale, None, of_offset, None, None


def weight(about: Levels, dtype: torch.dtype, columns: int) -> Tensor:
    """The (N, K) weight of shifted levels in `dtype`, differentiable in A, B, scale and offset."""
    made: Tensor = _Shifted.apply(dtype, columns, *about)  # type: ignore[no-untyped-call]
    return made
