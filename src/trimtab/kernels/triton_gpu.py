"""The operators of `dequantize` on a GPU, in Triton: weights, levels, their gradients (`triton_parts` says how tiles lie).

Every kernel has one program a tile. Gradients of scales are sums over a group, which may have several tiles: each leaves
its own part, and a second pass adds them in their order, so that no atomics are needed and sums always come out alike.

Forward, folding and backward must round the same levels, so all kernels of levels have one size of tile for a shape and
one way to multiply (`level_arguments`): the same instructions add the same products in the same order.

Speed on a GPU is UNMEASURED: tests compile these kernels for three, read registers and instructions from what comes out,
and run them in Triton's interpreter, no more.

Every function takes what `arguments` has checked, and fills `out`.

Legend: N out features, K in features, G groups in a row, R rank. In kernels, names in capitals are known when compiling.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.arguments import checked
from trimtab.kernels.triton_parts import (
    LEVELS_WIDTH,
    MOST,
    TILE,
    affine_values,
    as_bits,
    jit,
    level_arguments,
    of_each_row,
    place,
    power,
    put,
    rounded,
    shifted_levels,
    stored_rows,
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


# ---- kernels ----------------------------------------------------------------------------------------------------


@jit
def _affine_kernel(
    out: tensor, codes: tensor, row_bytes: tensor, rows: tensor, N: tensor, G: tensor, scale: tensor, zero: tensor,
    offset: tensor, center: tensor, K: constexpr, BITS: constexpr, BF16: constexpr, GROUP: constexpr,
    PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = place(G, PIECES, HEIGHT, WIDTH)
    inside, k = n < N, j * GROUP + w
    mask = inside[:, None] & (w < GROUP)[None, :]
    source = stored_rows(rows, n, inside)
    q = unpacked(codes, row_bytes, source, k, mask, K, BITS).to(tl.float32)
    made = affine_values(q, source * G + j, inside, scale, zero, offset, center)
    put(out + n[:, None] * K + k[None, :], made, mask, BF16)


@jit
def _codebook_kernel(
    out: tensor, codes: tensor, row_bytes: tensor, rows: tensor, N: tensor, G: tensor, table: tensor,
    absmax: tensor, dynamic_map: tensor, block_scale: tensor, mean: tensor, offset: tensor, DOUBLE: constexpr,
    K: constexpr, BITS: constexpr, BF16: constexpr, GROUP: constexpr, PIECES: constexpr, HEIGHT: constexpr,
    WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = place(G, PIECES, HEIGHT, WIDTH)
    inside, k = n < N, j * GROUP + w
    mask = inside[:, None] & (w < GROUP)[None, :]
    source = stored_rows(rows, n, inside)
    q, at = unpacked(codes, row_bytes, source, k, mask, K, BITS), source * G + j
    made = table_values(q, at, inside, table, absmax, dynamic_map, block_scale, mean, offset, DOUBLE)
    put(out + n[:, None] * K + k[None, :], made, mask, BF16)


@jit
def _levels_kernel(
    out: tensor, phi: tensor, row_bytes: tensor, half: tensor, unit: tensor, a: tensor, b: tensor, gain: tensor,
    top: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor, N: tensor, G: tensor, R: constexpr,
    BLOCK: constexpr, NARROW: constexpr, CORES: constexpr, CODES: constexpr, K: constexpr, BITS: constexpr,
    BF16: constexpr, GROUP: constexpr, PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = place(G, PIECES, HEIGHT, WIDTH)
    inside, k = n < N, j * GROUP + w
    u = shifted_levels(
        phi, row_bytes, half, unit, a, b, gain, n, k, inside, w < GROUP, K, BITS, R, BLOCK, NARROW, CORES
    )
    made = rounded(u, top)
    if not CODES:
        made = affine_values(made, n * G + j, inside, scale, zero, offset, center)
    put(out + n[:, None] * K + k[None, :], made, inside[:, None] & (w < GROUP)[None, :], BF16)


@jit
def _gradients_kernel(
    grad: tensor, of_scale: tensor, of_offset: tensor, phi: tensor, row_bytes: tensor, half: tensor, unit: tensor,
    a: tensor, b: tensor, gain: tensor, top: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor,
    N: tensor, G: tensor, R: constexpr, BLOCK: constexpr, NARROW: constexpr, CORES: constexpr, K: constexpr,
    BITS: constexpr, BF16: constexpr, GROUP: constexpr, PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = place(G, PIECES, HEIGHT, WIDTH)
    inside, at, k = n < N, n * G + j, j * GROUP + w
    mask = inside[:, None] & (w < GROUP)[None, :]
    u = shifted_levels(
        phi, row_bytes, half, unit, a, b, gain, n, k, inside, w < GROUP, K, BITS, R, BLOCK, NARROW, CORES
    )
    to = grad + n[:, None] * K + k[None, :]
    d = widened(tl.load(to, mask=mask, other=0))
    z = center
    if offset is not None:
        z = 0.0
    elif zero is not None:
        z = of_each_row(zero, at, inside)
    # (N, G, PIECES): what this tile has of its group's sums.
    part = at * PIECES + tl.program_id(0) % PIECES
    tl.store(of_scale + part, tl.sum(d * (rounded(u, top) - z), 1), mask=inside)
    if of_offset is not None:
        tl.store(of_offset + part, tl.sum(d, 1), mask=inside)
    # Half to even: -0.5 rounds to code 0, and top + 0.5, top being odd, to top + 1, which is clipped.
    s = of_each_row(scale, at, inside)
    put(to, tl.where((u >= -0.5) & (u < top + 0.5), d * s, 0.0), mask, BF16)


# ---- launching --------------------------------------------------------------------------------------------------


def _launch(kernel: Any, out: Tensor, groups: int, *arguments: Any, most: int = MOST, **known: Any) -> None:
    """Run a kernel over `out` (N, K) in tiles."""
    n, k = out.shape
    group = k // groups
    width = power(group, most=most)
    height, pieces = TILE // width, triton.cdiv(group, width)
    programs = triton.cdiv(n, height) * groups * pieces
    if programs == 0:
        return
    with torch.cuda.device_of(out):
        kernel[(programs,)](
            as_bits(out), *arguments,
            K=k, BF16=out.dtype == torch.bfloat16, GROUP=group, PIECES=pieces, HEIGHT=height, WIDTH=width,
            enable_fp_fusion=False, **known,
        )  # fmt: skip


@checked("triton")
def affine(
    out: Tensor, codes: Tensor, rows: Tensor | None, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
    bits: int, center: float,
) -> None:  # fmt: skip
    """s * (q - z), or s * q + o, of packed codes into `out` (N, K) of a float dtype; scales and zeros as stored."""
    groups = scale.shape[1]
    _launch(
        _affine_kernel, out, groups, codes, codes.shape[1], rows, out.shape[0], groups, as_bits(scale), as_bits(zero),
        as_bits(offset), center, BITS=bits,
    )  # fmt: skip


@checked("triton")
def codebook(
    out: Tensor, codes: Tensor, rows: Tensor | None, table: Tensor, absmax: Tensor, dynamic_map: Tensor | None,
    block_scale: Tensor | None, mean: Tensor | None, offset: Tensor | None, bits: int,
) -> None:  # fmt: skip
    """absmax * table[q] + o of packed codes into `out` (N, K); absmax is float32, or uint8 with the three after it."""
    groups = absmax.shape[1]
    _launch(
        _codebook_kernel, out, groups, codes, codes.shape[1], rows, out.shape[0], groups, table, absmax, dynamic_map,
        block_scale, mean, offset, DOUBLE=DOUBLE_BLOCK, BITS=bits,
    )  # fmt: skip


@checked("triton")
def levels(out: Tensor, *about: Any) -> None:
    """What levels round to into `out` (N, K): codes if it is uint8, else weights of a float dtype."""
    arguments, known = level_arguments(*about)
    _launch(_levels_kernel, out, arguments[-1], *arguments, most=LEVELS_WIDTH, CODES=out.dtype == torch.uint8, **known)


@checked("triton")
def level_gradients(grad: Tensor, of_scale: Tensor, of_offset: Tensor | None, *about: Any) -> None:
    """From dL/dW in `grad` to dL/du in its place, and to the gradients of scale and offset."""
    arguments, known = level_arguments(*about)
    pieces = triton.cdiv(grad.shape[1] // of_scale.shape[1], LEVELS_WIDTH)
    sums = [t if t is None or pieces == 1 else t.new_empty(*t.shape, pieces) for t in (of_scale, of_offset)]
    _launch(_gradients_kernel, grad, arguments[-1], *sums, *arguments, most=LEVELS_WIDTH, **known)
    for total, parts in zip((of_scale, of_offset), sums, strict=True):
        if total is not None and parts is not None and parts is not total:
            torch.sum(parts, -1, out=total)


__all__ = ["affine", "codebook", "level_gradients", "levels"]
