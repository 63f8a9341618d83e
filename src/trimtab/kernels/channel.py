"""LR-QAT's gradients per channel at LoRA's price: dL/dW is never formed.

With one scale s_n for a row, W = s (q - z), q = clamp(round(Phi + gain * B A)), y = x W^T and g = dL/dy, the
straight-through gradient is dU = s * (g^T x) where no level was clipped, and its products with the factors come apart:

    dA = gain * B^T dU  =  gain * (g (s B))^T x          less the clipped entries
    dB = gain * dU A^T  =  gain * s * g^T (x A^T)        less the clipped entries
    ds = sum_k (g^T x) (q - z)  =  sum_t g y / s         (with a real zero: g (y - o sum_k x) / s,  do = sum_t g sum_k x)

Each clipped entry (n, k) takes v = s_n (g^T x)[n, k] out again: dA[:, k] -= gain B[n] v, dB[n] -= gain A[:, k] v. There are
few of them: a range holds its weights, and a shift moves few levels beyond its ends. Where they are many, forming dL/dW
is cheaper (`FEW`). With groups the scales do not come out of the sums over k: dA alone would take R / g of forming dL/dW
for every group, so for g = 64 and rank 32 nothing is gained.

The price is that y, too, is kept for backward. Most layers' outputs are kept by what follows them anyway.

Legend: T tokens, N out features, K in features, R rank.
"""

import torch
from torch import Tensor

from trimtab.kernels import cpu
from trimtab.kernels.dequantize import Levels, level_values

FEW = 1 / 128
"""Share of clipped levels up to which this way is taken."""


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are kernels for it: in bfloat16 on this device."""
    return dtype == torch.bfloat16 and cpu.serves(tensor)


def weight_and_clipped(about: Levels, out_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Fill `out_NK` (bfloat16) with W; returns rows and columns of the clipped levels."""
    n, k = out_NK.shape
    bits = torch.empty(n, -(-k // 64), dtype=torch.int64)
    cpu.level_weights_clipped(out_NK, bits, *about)
    return clipped_entries(bits)


def clipped_entries(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the bits that are set in int64 words (N, ceil(K / 64))."""
    rows, words = bits.nonzero(as_tuple=True)
    hits, columns = ((bits[rows, words].unsqueeze(1) >> torch.arange(64)) & 1).nonzero(as_tuple=True)
    return rows[hits], words[hits] * 64 + columns


def clipped_levels(about: Levels, columns: int) -> tuple[Tensor, Tensor]:
    """The same from the levels themselves."""
    rounded = level_values(about, columns).round()
    rows, at = ((rounded < 0) | (rounded > 2**about.bits - 1)).nonzero(as_tuple=True)
    return rows, at


def gradients(
    about: Levels, g_TN: Tensor, x_TK: Tensor, y_TN: Tensor, clipped: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (A, B, scale, offset).

    Args:
        about: as in forward.
        g_TN: dL/dy.
        x_TK: input.
        y_TN: output, without a bias.
        clipped: rows and columns of clipped levels.
    """
    a, b, s = about.a_RK, about.b_NR, about.scale_NG
    assert a is not None
    assert b is not None
    dtype = g_TN.dtype
    of_a = ((g_TN @ (b * s).to(dtype)).t() @ x_TK).to(a.dtype)
    of_b = (g_TN.t() @ (x_TK @ a.t().to(dtype))).to(b.dtype).mul_(s)
    n, k = clipped
    if len(n):
        v = (s[n, 0] * _entries(g_TN, x_TK, n, k)).unsqueeze(1)
        of_a.t().index_add_(0, k, v * b[n], alpha=-1)
        of_b.index_add_(0, n, v * a.t()[k], alpha=-1)
    of_scale, of_offset = _columns(g_TN, y_TN), None
    if about.offset_NG is not None:
        of_offset = (x_TK.sum(1, keepdim=True, dtype=s.dtype).t() @ g_TN.to(s.dtype)).t()
        of_scale = of_scale - about.offset_NG[:, 0] * of_offset[:, 0]
    return of_a.mul_(about.gain), of_b.mul_(about.gain), of_scale.unsqueeze(1) / s, of_offset


def _columns(g_TN: Tensor, y_TN: Tensor) -> Tensor:
    if fits(g_TN, g_TN.dtype):
        return cpu.column_products(g_TN, y_TN)
    return (g_TN * y_TN).sum(0)


def _entries(g_TN: Tensor, x_TK: Tensor, n: Tensor, k: Tensor) -> Tensor:
    if fits(g_TN, g_TN.dtype):
        return cpu.entries_of_product(g_TN, x_TK, n, k)
    return (g_TN[:, n] * x_TK[:, k]).sum(0)
