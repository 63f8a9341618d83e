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

On the CPU the clipped entries are listed, and counted before a way is chosen. On a GPU nobody waits for their number:
its kernels go through a bit for each level (`triton_channel`), and the number, which reaches the host in its own time,
decides about later steps (`Clipped`). There a product is cheaper beside a list, so fewer entries are few.

Legend: T tokens, N out features, K in features, R rank.
"""

import torch
from torch import Tensor

from trimtab.kernels import cpu
from trimtab.kernels.dequantize import Levels, level_values, on_gpu

FEW = 1 / 128
"""Share of clipped levels up to which this way is taken."""
FEW_ON_GPU = 1 / 512
"""The same on a GPU. Estimated: an entry reads two columns of T bfloat16 numbers, dL/dW takes 2 T products. UNMEASURED."""

Entries = tuple[Tensor, Tensor]
"""Rows and columns of clipped levels."""


class Clipped:
    """How many levels of a layer are clipped, as far as the host knows without waiting for a GPU."""

    def __init__(self) -> None:
        self._seen: Tensor | None = None

    def note(self, count: Tensor) -> None:
        """What a device counted: int64 (1,). It may arrive later."""
        if self._seen is None:
            self._seen = torch.zeros(1, dtype=torch.int64, pin_memory=count.is_cuda)
        self._seen.copy_(count, non_blocking=True)

    def many(self, levels: int) -> bool:
        """Whether too many were clipped when it was last known; it stays so, since nobody counts them then."""
        return self._seen is not None and int(self._seen) > FEW_ON_GPU * levels

    def __deepcopy__(self, memo: object) -> "Clipped":
        return Clipped()

    def __reduce__(self) -> tuple[type["Clipped"], tuple[()]]:
        return Clipped, ()


def fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether there are kernels for it: in bfloat16 on this device."""
    return dtype == torch.bfloat16 and (
        cpu.serves(tensor) or (on_gpu(tensor) and not torch.are_deterministic_algorithms_enabled())
    )


def weight_and_clipped(about: Levels, out_NK: Tensor) -> Entries | Tensor:
    """Fill `out_NK` (bfloat16) with W; returns the clipped levels, on a GPU as bits: int64 (N, ceil(K / 64))."""
    n, k = out_NK.shape
    bits = torch.empty(n, -(-k // 64), dtype=torch.int64, device=out_NK.device)
    if out_NK.is_cuda:
        from trimtab.kernels import triton_channel

        triton_channel.level_weights_clipped(out_NK, bits, *about)
        return bits
    cpu.level_weights_clipped(out_NK, bits, *about)
    return clipped_entries(bits)


def few(clipped: Entries | Tensor, levels: int) -> bool:
    """Whether this way is the cheaper one. Of bits it is not known: `Clipped` has decided before."""
    return isinstance(clipped, Tensor) or len(clipped[0]) <= FEW * levels


def clipped_entries(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of the bits that are set in int64 words (N, ceil(K / 64))."""
    rows, words = bits.nonzero(as_tuple=True)
    hits, columns = ((bits[rows, words].unsqueeze(1) >> torch.arange(64)) & 1).nonzero(as_tuple=True)
    return rows[hits], words[hits] * 64 + columns


def clipped_levels(about: Levels, columns: int) -> tuple[Tensor, Tensor]:
    """The same from the levels themselves."""
    rounded = level_values(about, columns).round()
    rows, at = (rounded != rounded.clamp(0, 2**about.bits - 1)).nonzero(as_tuple=True)  # a NaN among them
    return rows, at


def gradients(
    about: Levels, g_TN: Tensor, x_TK: Tensor, y_TN: Tensor, clipped: Entries | Tensor, count: Clipped | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of (A, B, scale, offset).

    Args:
        about: as in forward.
        g_TN: dL/dy.
        x_TK: input.
        y_TN: output, without a bias.
        clipped: rows and columns of clipped levels, or a bit for each level.
        count: told how many bits are set.
    """
    s, dtype = about.scale_NG, g_TN.dtype
    factors = about.acting(s.dtype)
    assert factors is not None
    a, b = factors
    of_a = ((g_TN @ (b * s).to(dtype)).t() @ x_TK).to(a.dtype)
    of_b = (g_TN.t() @ (x_TK @ a.t().to(dtype))).to(b.dtype).mul_(s)
    if isinstance(clipped, Tensor):
        from trimtab.kernels import triton_channel

        found = triton_channel.take_out(of_a, of_b, clipped, g_TN, x_TK, a, b, s)
        if count is not None:
            count.note(found)
    elif len(clipped[0]):
        n, k = clipped
        v = (s[n, 0] * _entries(g_TN, x_TK, n, k)).unsqueeze(1)
        of_a.t().index_add_(0, k, v * b[n], alpha=-1)
        of_b.index_add_(0, n, v * a.t()[k], alpha=-1)
    of_scale, of_offset = _columns(g_TN, y_TN), None
    if about.offset_NG is not None:
        of_offset = (x_TK.sum(1, keepdim=True, dtype=s.dtype).t() @ g_TN.to(s.dtype)).t()
        of_scale = of_scale - about.offset_NG[:, 0] * of_offset[:, 0]
    return of_a.mul_(about.gain), of_b.mul_(about.gain), of_scale.unsqueeze(1) / s, of_offset


def _columns(g_TN: Tensor, y_TN: Tensor) -> Tensor:
    if g_TN.dtype == torch.bfloat16 and on_gpu(g_TN):
        from trimtab.kernels import triton_channel

        return triton_channel.column_products(g_TN, y_TN)
    if fits(g_TN, g_TN.dtype):
        return cpu.column_products(g_TN, y_TN)
    return (g_TN * y_TN).sum(0)


def _entries(g_TN: Tensor, x_TK: Tensor, n: Tensor, k: Tensor) -> Tensor:
    if fits(g_TN, g_TN.dtype):
        return cpu.entries_of_product(g_TN, x_TK, n, k)
    return (g_TN[:, n] * x_TK[:, k]).sum(0)
