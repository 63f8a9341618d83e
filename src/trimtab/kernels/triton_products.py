"""x W^T of a few rows in Triton, W read in its few bits and never written: one token of generation, of each sequence.

Reading W is all the work, so a program goes through whole rows of it: HEIGHT rows, a stretch of GROUPS groups (or of a part
of one) at a time, their scales read once a group.

    one row of x     every number of the stretch has its own sum; they are added at the end
    several          the stretch is multiplied as a tile of 16 rows of x, on tensor cores where x is bfloat16

In both, sums are float32. W is rounded to bfloat16 only for tensor cores, as the ordinary way rounds it.

Speed on a GPU is UNMEASURED.

Legend: T rows of x, N out features, K in features, G groups in a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.arguments import checked
from trimtab.kernels.triton_parts import (
    LEAST,
    affine_values,
    as_bits,
    jit,
    on_tensor_cores,
    power,
    product,
    put,
    table_values,
    unpacked,
    widened,
)
from trimtab.quant.codebook import DOUBLE_BLOCK

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    triton = None

_ONE, _SEVERAL = (8, 256), (16, 128)
"""Rows and columns of a stretch, for one row of x and for several."""


@jit
def _columns(
    stretch: tensor, G: constexpr, GROUP: constexpr, PIECES: constexpr, GROUPS: constexpr, WIDTH: constexpr
) -> tensor:
    """Columns of a stretch, and which of them are there."""
    c = tl.arange(0, GROUPS * WIDTH)
    if GROUP == WIDTH:  # no gaps, which the compiler does not find out from the general form
        k = stretch * (GROUPS * WIDTH) + c
        there = k < G * GROUP
    else:
        j = stretch // PIECES * GROUPS + c // WIDTH
        w = stretch % PIECES * WIDTH + c % WIDTH
        k = j * GROUP + w
        there = (j < G) & (w < GROUP)
    return k, there


@jit
def _read(
    codes: tensor, row_bytes: tensor, stretch: tensor, n: tensor, inside: tensor, G: constexpr, BITS: constexpr,
    K: constexpr, GROUP: constexpr, PIECES: constexpr, GROUPS: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    """int32 codes of a stretch (HEIGHT, GROUPS, WIDTH), where its groups lie and which are there, its columns likewise."""
    j = stretch // PIECES * GROUPS + tl.arange(0, GROUPS)
    k, there = _columns(stretch, G, GROUP, PIECES, GROUPS, WIDTH)
    q = unpacked(codes, row_bytes, n, k, inside[:, None] & there[None, :], K, BITS)
    at, kept = n[:, None] * G + j[None, :], inside[:, None] & (j < G)[None, :]
    return tl.reshape(q, [HEIGHT, GROUPS, WIDTH]), at, kept, k, there


@jit
def _added(
    total: tensor, w: tensor, x: tensor, k: tensor, there: tensor, T: tensor, K: constexpr, NARROW: constexpr,
    CORES: constexpr, ONE: constexpr,
) -> tensor:  # fmt: skip
    """total + the product of a stretch of weights and the same columns of x."""
    if ONE:
        total += w * widened(tl.load(x + k, mask=there, other=0))[None, :]
    else:
        t = tl.arange(0, 16)
        x_TK = tl.load(x + t[:, None] * K + k[None, :], mask=(t < T)[:, None] & there[None, :], other=0)
        total = product(widened(x_TK), tl.trans(w), total, NARROW, CORES)
    return total


@jit
def _written(
    y: tensor, total: tensor, n: tensor, inside: tensor, T: tensor, N: tensor, BF16: constexpr, ONE: constexpr
) -> tensor:
    if ONE:
        put(y + n, tl.sum(total, 1), inside, BF16)
    else:
        t = tl.arange(0, 16)
        put(y + t[:, None] * N + n[None, :], total, (t < T)[:, None] & inside[None, :], BF16)


@jit
def _affine_product_kernel(
    y: tensor, x: tensor, codes: tensor, row_bytes: tensor, scale: tensor, zero: tensor, offset: tensor,
    center: tensor, T: tensor, N: tensor, G: constexpr, BITS: constexpr, K: constexpr, GROUP: constexpr,
    PIECES: constexpr, GROUPS: constexpr, HEIGHT: constexpr, WIDTH: constexpr, NARROW: constexpr, CORES: constexpr,
    BF16: constexpr, ONE: constexpr,
) -> tensor:  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    inside = n < N
    total = tl.zeros([HEIGHT, GROUPS * WIDTH] if ONE else [16, HEIGHT], tl.float32)
    for stretch in range((G + GROUPS - 1) // GROUPS * PIECES):
        q, at, kept, k, there = _read(
            codes, row_bytes, stretch, n, inside, G, BITS, K, GROUP, PIECES, GROUPS, HEIGHT, WIDTH
        )
        w = affine_values(q.to(tl.float32), at, kept, scale, zero, offset, center)
        w = tl.reshape(w, [HEIGHT, GROUPS * WIDTH])
        total = _added(total, w, x, k, there, T, K, NARROW, CORES, ONE)
    _written(y, total, n, inside, T, N, BF16, ONE)


@jit
def _codebook_product_kernel(
    y: tensor, x: tensor, codes: tensor, row_bytes: tensor, table: tensor, absmax: tensor, dynamic_map: tensor,
    block_scale: tensor, mean: tensor, offset: tensor, T: tensor, N: tensor, DOUBLE: constexpr, G: constexpr,
    BITS: constexpr, K: constexpr, GROUP: constexpr, PIECES: constexpr, GROUPS: constexpr, HEIGHT: constexpr,
    WIDTH: constexpr, NARROW: constexpr, CORES: constexpr, BF16: constexpr, ONE: constexpr,
) -> tensor:  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    inside = n < N
    total = tl.zeros([HEIGHT, GROUPS * WIDTH] if ONE else [16, HEIGHT], tl.float32)
    for stretch in range((G + GROUPS - 1) // GROUPS * PIECES):
        q, at, kept, k, there = _read(
            codes, row_bytes, stretch, n, inside, G, BITS, K, GROUP, PIECES, GROUPS, HEIGHT, WIDTH
        )
        w = table_values(q, at, kept, table, absmax, dynamic_map, block_scale, mean, offset, DOUBLE)
        w = tl.reshape(w, [HEIGHT, GROUPS * WIDTH])
        total = _added(total, w, x, k, there, T, K, NARROW, CORES, ONE)
    _written(y, total, n, inside, T, N, BF16, ONE)


def _launch(kernel: Any, y: Tensor, x: Tensor, codes: Tensor, groups: int, *about: Any, **known: Any) -> None:
    (t, n), k = y.shape, x.shape[1]
    height, columns = _ONE if t == 1 else _SEVERAL
    width = power(k // groups, most=columns)
    narrow = x.dtype == torch.bfloat16
    if not n * t:
        return
    assert t <= LEAST, "a tile holds no more rows of x"
    with torch.cuda.device_of(y):
        kernel[(triton.cdiv(n, height),)](
            as_bits(y), as_bits(x), codes, codes.shape[1], *about, t, n,
            G=groups, K=k, GROUP=k // groups, PIECES=triton.cdiv(k // groups, width), GROUPS=columns // width,
            HEIGHT=height, WIDTH=width, NARROW=narrow, CORES=on_tensor_cores(narrow), BF16=y.dtype == torch.bfloat16,
            ONE=t == 1, enable_fp_fusion=False, **known,
        )  # fmt: skip


@checked("triton")
def affine_product(
    y: Tensor, x: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, bits: int,
    center: float,
) -> None:  # fmt: skip
    """x W^T of up to 16 rows x (T, K), summed in float32, into `y` (T, N)."""
    kept = as_bits(scale), as_bits(zero), as_bits(offset)
    _launch(_affine_product_kernel, y, x, codes, scale.shape[1], *kept, center, BITS=bits)


@checked("triton")
def codebook_product(
    y: Tensor, x: Tensor, codes: Tensor, table: Tensor, absmax: Tensor, dynamic_map: Tensor | None,
    block_scale: Tensor | None, mean: Tensor | None, offset: Tensor | None, bits: int,
) -> None:  # fmt: skip
    """The same for codebook codes."""
    kept = table, absmax, dynamic_map, block_scale, mean, offset
    _launch(
        _codebook_product_kernel, y, x, codes, absmax.shape[1], *kept, DOUBLE=DOUBLE_BLOCK, BITS=bits
    )  # fmt: skip


__all__ = ["affine_product", "codebook_product"]
