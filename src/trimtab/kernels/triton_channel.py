"""What `channel` needs of a GPU, in Triton: weights with a bit for each clipped level, and the gradients of such levels.

How many levels are clipped is known on the device only, and nobody waits for it: a program for each row of W goes through
the row's bits, and makes for each one that is set

    v = s_n (g^T x)[n, k]      dA[:, k] -= B[n] v      dB[n] -= A[:, k] v

from columns of g and x, which are laid out as rows before (a column of 2-byte numbers costs 16 times its bytes to read).
Rows share columns of A, so dA is added up by atomics: its last bits in float32 depend on their order.

Speed on a GPU is UNMEASURED.

Legend: T tokens, N out features, K in features, R rank, L = ceil(K / 64) words of bits in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.arguments import checked
from trimtab.kernels.triton_parts import (
    LEVELS_WIDTH,
    TILE,
    affine_values,
    as_bits,
    jit,
    level_arguments,
    place,
    power,
    put,
    rounded,
    shifted_levels,
    widened,
)

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    triton = None


@jit
def _clipped_kernel(
    out: tensor, clipped: tensor, phi: tensor, row_bytes: tensor, half: tensor, unit: tensor, a: tensor,
    b: tensor, gain: tensor, top: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor, N: tensor,
    G: tensor, R: constexpr, BLOCK: constexpr, NARROW: constexpr, CORES: constexpr, K: constexpr, BITS: constexpr,
    PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, _, k = place(G, PIECES, HEIGHT, WIDTH)
    inside = n < N
    u = shifted_levels(phi, row_bytes, half, unit, a, b, gain, n, k, inside, k < K, K, BITS, R, BLOCK, NARROW, CORES)
    made = affine_values(rounded(u, top), n, inside, scale, zero, offset, center)
    put(out + n[:, None] * K + k[None, :], made, inside[:, None] & (k < K)[None, :], True)
    # Half to even, and a NaN is clipped, as in `_gradients_kernel`.
    hit = ~((u >= -0.5) & (u < top + 0.5)) & (k < K)[None, :]
    word = tl.sum(hit.to(tl.int64) << tl.arange(0, WIDTH)[None, :].to(tl.int64), 1)
    tl.store(clipped + n * PIECES + tl.program_id(0) % PIECES, word, mask=inside)


@jit
def _taken_out_kernel(
    of_a: tensor, of_b: tensor, count: tensor, clipped: tensor, g: tensor, x: tensor, a: tensor, b: tensor,
    scale: tensor, T: tensor, words: tensor, K: constexpr, R: constexpr, WORDS: constexpr, RANKS: constexpr,
    TOKENS: constexpr,
) -> tensor:  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, WORDS)
    row = tl.load(clipped + n * words + index, mask=index < words, other=0)
    at = tl.min(tl.where(row != 0, index, WORDS), 0)
    if at < WORDS:
        r, t0, bits = tl.arange(0, RANKS), tl.arange(0, TOKENS), tl.arange(0, 64)
        s = tl.load(scale + n)
        b_R = tl.load(b + n * R + r, mask=r < R, other=0)
        total = tl.zeros([RANKS], tl.float32)
        found = tl.zeros([1], tl.int64)
        while at < WORDS:
            word = tl.load(clipped + n * words + at)
            while word != 0:
                k = at * 64 + tl.min(tl.where(((word >> bits.to(tl.int64)) & 1) != 0, bits, 64), 0)
                v = tl.zeros([TOKENS], tl.float32)
                for start in range(0, T, TOKENS):
                    t = start + t0
                    g_T = widened(tl.load(g + n * T + t, mask=t < T, other=0))
                    v += g_T * widened(tl.load(x + k.to(tl.int64) * T + t, mask=t < T, other=0))
                taken = s * tl.sum(v, 0)
                total += taken * tl.load(a + r * K + k, mask=r < R, other=0)
                tl.atomic_add(of_a + r * K + k, -taken * b_R, mask=r < R)
                word = word & (word - 1)
                found += 1
            at = tl.min(tl.where((row != 0) & (index > at), index, WORDS), 0)
        to = of_b + n * R + r
        tl.store(to, tl.load(to, mask=r < R, other=0) - total, mask=r < R)
        tl.atomic_add(count + tl.arange(0, 1), found)


@jit
def _columns_kernel(
    out: tensor, a: tensor, b: tensor, T: tensor, N: tensor, HEIGHT: constexpr, WIDTH: constexpr
) -> tensor:
    n = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    t = tl.program_id(1) * HEIGHT + tl.arange(0, HEIGHT)
    at, mask = t[:, None].to(tl.int64) * N + n[None, :], (t < T)[:, None] & (n < N)[None, :]
    products = widened(tl.load(a + at, mask=mask, other=0)) * widened(tl.load(b + at, mask=mask, other=0))
    tl.store(out + tl.program_id(1) * N + n, tl.sum(products, 0), mask=n < N)


# ---- launching --------------------------------------------------------------------------------------------------


@checked("triton")
def level_weights_clipped(out: Tensor, clipped: Tensor, *about: Any) -> None:
    """Weights in bfloat16 into `out`, and a bit for each clipped level into `clipped`: int64 (N, L). One scale a row."""
    arguments, known = level_arguments(*about)
    n, k = out.shape
    assert arguments[-1] == 1, "per channel"
    width = power(k, most=LEVELS_WIDTH)  # that of `triton_gpu`, and then a tile has no more than a word of bits
    height = TILE // width
    with torch.cuda.device_of(out):
        _clipped_kernel[(triton.cdiv(n, height) * clipped.shape[1],)](
            as_bits(out), clipped, *arguments, K=k, PIECES=clipped.shape[1], HEIGHT=height, WIDTH=width,
            enable_fp_fusion=False, **known,
        )  # fmt: skip


@checked("triton")
def take_out(
    of_a_RK: Tensor, of_b_NR: Tensor, clipped: Tensor, g_TN: Tensor, x_TK: Tensor, a_RK: Tensor, b_NR: Tensor,
    scale_N1: Tensor,
) -> Tensor:  # fmt: skip
    """Take what clipped levels have of it out of the gradients of A and B, before their gain.

    Args:
        of_a_RK: float32, as are all but the next three.
        of_b_NR: the same.
        clipped: of `level_weights_clipped`: int64 (N, L).
        g_TN: dL/dy, bfloat16.
        x_TK: input, bfloat16.
        a_RK: factors as they act.
        b_NR: the same.
        scale_N1: scales of the rows.

    Returns:
        How many levels are clipped: int64 (1,), on the device.
    """
    count = torch.zeros(1, dtype=torch.int64, device=clipped.device)
    (rank, k), (n, words) = a_RK.shape, clipped.shape
    g, x = g_TN.t().contiguous(), x_TK.t().contiguous()
    with torch.cuda.device_of(clipped):
        _taken_out_kernel[(n,)](
            of_a_RK, of_b_NR, count, clipped, as_bits(g), as_bits(x), a_RK, b_NR, scale_N1, len(g_TN), words, K=k, R=rank,
            WORDS=triton.next_power_of_2(words), RANKS=power(rank, most=1 << 20), TOKENS=512,
        )  # fmt: skip
    return count


@checked("triton")
def column_products(a_TN: Tensor, b_TN: Tensor) -> Tensor:
    """Sums over T of a * b, both bfloat16: float32 (N,). A part for each 64 tokens, which are then added in their order."""
    (t, n), height, width = a_TN.shape, 64, 128
    parts = a_TN.new_empty(triton.cdiv(t, height), n, dtype=torch.float32)
    with torch.cuda.device_of(a_TN):
        _columns_kernel[(triton.cdiv(n, width), len(parts))](
            parts, as_bits(a_TN), as_bits(b_TN), t, n, HEIGHT=height, WIDTH=width
        )
    return parts.sum(0)


__all__ = ["column_products", "level_weights_clipped", "take_out"]
