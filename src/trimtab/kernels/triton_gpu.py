"""The operators of `dequantize` on a GPU, in Triton.

A tile is HEIGHT rows of one group, or of WIDTH columns of it where the group is longer, so a tile has one scale a row:

    k0 = j * g + w0      columns k0 .. k0 + WIDTH of rows n0 .. n0 + HEIGHT: in group j, and never outside it
    code of column k     for each part of width b: byte (k mod L) of the part, shifted right by b * (k div L)

Where a column lies in the packed row depends on k alone, so its divisions are done once for all rows of a tile, and K and
g are compile-time constants: the compiler sees which addresses are aligned, and where L, g and the row are multiples of
16 it loads and stores 16 bytes at a time. A byte is read once for each of its codes; all but the first come from a cache.
The road not taken: one program reads a byte once and writes all its segments. That fits one part, but 3 = 2 + 1 bits
lay the same row out in segments of two lengths, which agree only for some K, and the product B A wants its columns whole.

Bit for bit what torch computes, but for sums over the rank or over a group:

    q * s + o       rounds twice, so the compiler may not fuse a product and a sum (`tl.dot` still does, on its own)
    bfloat16        is rounded on its bits (to nearest even; a NaN stays one) and read and written as int16: Triton's
                    interpreter, in which the tests run, does not round its own conversion correctly
    B A             float32 throughout (`ieee`, not TF32)

Speed on a GPU is UNMEASURED: tests compile these kernels for one and run them in the interpreter, no more.

Without Triton this module still imports, and `available` says no. Every function takes what `arguments` has checked, and
fills `out`.

Legend: N out features, K in features, G groups in a row, R rank. In kernels, names in capitals are known when compiling.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.arguments import checked
from trimtab.quant.codebook import DOUBLE_BLOCK

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    triton = None

_TILE, _LEAST, _MOST = 4096, 16, 128
"""Elements of a tile; the least of each of its sides, which `tl.dot` asks for; its greatest width."""


def available() -> bool:
    """Whether the kernels can run: Triton is installed, and TRIMTAB_KERNELS=torch does not ask for the references."""
    return triton is not None and os.environ.get("TRIMTAB_KERNELS") != "torch"


def _jit(function: Callable[..., Any]) -> Any:
    return function if triton is None else triton.jit(function)


# ---- parts of kernels -------------------------------------------------------------------------------------------


@_jit
def _place(G: tensor, PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr) -> tensor:
    """Rows, group, and columns in the group of this program's tile. Programs beside each other share their rows."""
    program = tl.program_id(0)
    tile = program // PIECES
    # N * K may pass 2^31, so rows are 64 bits wide.
    n = (tile // G).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    return n, tile % G, program % PIECES * WIDTH + tl.arange(0, WIDTH)


@_jit
def _source(rows: tensor, n: tensor, inside: tensor) -> tensor:
    """Which stored rows become rows n of the result."""
    source = n
    if rows is not None:
        source = tl.load(rows + n, mask=inside, other=0).to(tl.int64)
    return source


@_jit
def _codes(
    packed: tensor, row_bytes: tensor, n: tensor, k: tensor, mask: tensor, K: constexpr, BITS: constexpr
) -> tensor:
    """int32 codes of a tile; the parts of BITS bits are its binary digits (see packing.py)."""
    row = packed + n[:, None] * row_bytes
    codes = tl.zeros(mask.shape, tl.int32)
    start = 0
    shift = 0
    for i in tl.static_range(4):
        if BITS & (8 >> i):
            byte = tl.load(row + (start + k % ((K * (8 >> i) + 7) // 8))[None, :], mask=mask, other=0).to(tl.int32)
            down = k // ((K * (8 >> i) + 7) // 8) * (8 >> i)
            codes += ((byte >> down[None, :]) & ((1 << (8 >> i)) - 1)) << shift
            start += (K * (8 >> i) + 7) // 8
            shift += 8 >> i
    return codes


@_jit
def _weights(
    q: tensor, at: tensor, inside: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor
) -> tensor:
    """s * q + o or s * (q - z) of float32 codes; `at` is where the group of each row has its scale."""
    s = tl.load(scale + at, mask=inside, other=0)[:, None]
    if offset is not None:
        made = q * s + tl.load(offset + at, mask=inside, other=0)[:, None]
    elif zero is not None:
        made = (q - tl.load(zero + at, mask=inside, other=0)[:, None]) * s
    else:
        made = (q - center) * s
    return made


@_jit
def _store(to: tensor, values: tensor, mask: tensor, BF16: constexpr) -> tensor:
    """float32 values into memory of their dtype; bfloat16 as its bits."""
    if BF16:
        bits = values.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        tl.store(to, tl.where(values == values, rounded, 0x7FC0).to(tl.int16), mask=mask)
    else:
        tl.store(to, values, mask=mask)


@_jit
def _shifted(
    phi: tensor, row_bytes: tensor, half: tensor, unit: tensor, a: tensor, b: tensor, gain: tensor, n: tensor,
    k: tensor, inside_n: tensor, inside_k: tensor, K: constexpr, BITS: constexpr, R: constexpr, BLOCK: constexpr,
) -> tensor:  # fmt: skip
    """Levels of a tile, neither rounded nor clamped: (byte + half) * unit + gain * B A."""
    mask = inside_n[:, None] & inside_k[None, :]
    u = (_codes(phi, row_bytes, n, k, mask, K, BITS).to(tl.float32) + half) * unit
    if a is not None:
        product = tl.zeros(mask.shape, tl.float32)
        for start in range(0, R, BLOCK):
            r = start + tl.arange(0, BLOCK)
            b_NR = tl.load(b + n[:, None] * R + r[None, :], mask=inside_n[:, None] & (r < R)[None, :], other=0)
            a_RK = tl.load(a + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & inside_k[None, :], other=0)
            product = tl.dot(b_NR, a_RK, product, input_precision="ieee")
        u += gain * product
    return u


@_jit
def _rounded(u: tensor, top: tensor) -> tensor:
    """Half to even, then into [0, top]. Adding 1.5 * 2^23 leaves no bits for a fraction; a clamp before keeps it exact."""
    u = tl.where(u < -1, -1.0, u)
    u = tl.where(u > top + 1, top + 1, u)
    u = (u + 12582912.0) - 12582912.0
    u = tl.where(u < 0, 0.0, u)
    return tl.where(u > top, top, u)


# ---- kernels ----------------------------------------------------------------------------------------------------


@_jit
def _affine_kernel(
    out: tensor, codes: tensor, row_bytes: tensor, rows: tensor, N: tensor, G: tensor, scale: tensor, zero: tensor,
    offset: tensor, center: tensor, K: constexpr, BITS: constexpr, BF16: constexpr, GROUP: constexpr,
    PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = _place(G, PIECES, HEIGHT, WIDTH)
    inside, k = n < N, j * GROUP + w
    mask = inside[:, None] & (w < GROUP)[None, :]
    source = _source(rows, n, inside)
    q = _codes(codes, row_bytes, source, k, mask, K, BITS).to(tl.float32)
    made = _weights(q, source * G + j, inside, scale, zero, offset, center)
    _store(out + n[:, None] * K + k[None, :], made, mask, BF16)


@_jit
def _codebook_kernel(
    out: tensor, codes: tensor, row_bytes: tensor, rows: tensor, N: tensor, G: tensor, table: tensor,
    absmax: tensor, dynamic_map: tensor, block_scale: tensor, mean: tensor, offset: tensor, DOUBLE: constexpr,
    K: constexpr, BITS: constexpr, BF16: constexpr, GROUP: constexpr, PIECES: constexpr, HEIGHT: constexpr,
    WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = _place(G, PIECES, HEIGHT, WIDTH)
    inside, k = n < N, j * GROUP + w
    mask = inside[:, None] & (w < GROUP)[None, :]
    source = _source(rows, n, inside)
    at = source * G + j
    size = tl.load(absmax + at, mask=inside, other=0)
    if dynamic_map is not None:
        size = tl.load(dynamic_map + size.to(tl.int32)) * tl.load(block_scale + at // DOUBLE, mask=inside, other=0)
        size += tl.load(mean)
    made = tl.load(table + _codes(codes, row_bytes, source, k, mask, K, BITS)) * size[:, None]
    if offset is not None:
        made += tl.load(offset + at, mask=inside, other=0)[:, None]
    _store(out + n[:, None] * K + k[None, :], made, mask, BF16)


@_jit
def _levels_kernel(
    out: tensor, phi: tensor, row_bytes: tensor, half: tensor, unit: tensor, a: tensor, b: tensor, gain: tensor,
    top: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor, N: tensor, G: tensor, R: constexpr,
    BLOCK: constexpr, CODES: constexpr, K: constexpr, BITS: constexpr, BF16: constexpr, GROUP: constexpr,
    PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    n, j, w = _place(G, PIECES, HEIGHT, WIDTH)
    inside, k = n < N, j * GROUP + w
    u = _shifted(phi, row_bytes, half, unit, a, b, gain, n, k, inside, w < GROUP, K, BITS, R, BLOCK)
    made = _rounded(u, top)
    if not CODES:
        made = _weights(made, n * G + j, inside, scale, zero, offset, center)
    _store(out + n[:, None] * K + k[None, :], made, inside[:, None] & (w < GROUP)[None, :], BF16)


@_jit
def _gradients_kernel(
    grad: tensor, of_scale: tensor, of_offset: tensor, phi: tensor, row_bytes: tensor, half: tensor, unit: tensor,
    a: tensor, b: tensor, gain: tensor, top: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor,
    N: tensor, G: tensor, R: constexpr, BLOCK: constexpr, K: constexpr, BITS: constexpr, BF16: constexpr,
    GROUP: constexpr, PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr,
) -> tensor:  # fmt: skip
    # A program goes through all pieces of its group, so that sums over it need no atomics and always add up alike.
    n, j, first = _place(G, 1, HEIGHT, WIDTH)
    inside, at = n < N, n * G + j
    s = tl.load(scale + at, mask=inside, other=0)[:, None]
    z = tl.zeros([HEIGHT], tl.float32)
    if offset is None:
        z += center if zero is None else tl.load(zero + at, mask=inside, other=0)
    of_s = tl.zeros([HEIGHT], tl.float32)
    of_o = tl.zeros([HEIGHT], tl.float32)
    for piece in range(PIECES):
        w = piece * WIDTH + first
        k, mask = j * GROUP + w, inside[:, None] & (w < GROUP)[None, :]
        u = _shifted(phi, row_bytes, half, unit, a, b, gain, n, k, inside, w < GROUP, K, BITS, R, BLOCK)
        at_NK = grad + n[:, None] * K + k[None, :]
        d = tl.load(at_NK, mask=mask, other=0)
        if BF16:
            d = (d.to(tl.int32) << 16).to(tl.float32, bitcast=True)
        d = d.to(tl.float32)
        of_s += tl.sum(d * (_rounded(u, top) - z[:, None]), 1)
        of_o += tl.sum(d, 1)
        # Half to even: -0.5 rounds to code 0, and top + 0.5, top being odd, to top + 1, which is clipped.
        _store(at_NK, tl.where((u >= -0.5) & (u < top + 0.5), d * s, 0.0), mask, BF16)
    tl.store(of_scale + at, of_s, mask=inside)
    if of_offset is not None:
        tl.store(of_offset + at, of_o, mask=inside)


# ---- launching --------------------------------------------------------------------------------------------------


def _launch(kernel: Any, out: Tensor, groups: int, *arguments: Any, looped: bool = False, **known: Any) -> None:
    """Run a kernel over `out` (N, K) in tiles; `looped` where a program goes through all pieces of a group."""
    n, k = out.shape
    group = k // groups
    width = min(max(triton.next_power_of_2(group), _LEAST), _MOST)
    height, pieces = _TILE // width, triton.cdiv(group, width)
    programs = triton.cdiv(n, height) * groups * (1 if looped else pieces)
    if programs == 0:
        return
    bf16 = out.dtype == torch.bfloat16
    with torch.cuda.device_of(out):
        kernel[(programs,)](
            out.view(torch.int16) if bf16 else out, *arguments,
            K=k, BF16=bf16, GROUP=group, PIECES=pieces, HEIGHT=height, WIDTH=width,
            enable_fp_fusion=False, **known,
        )  # fmt: skip


@checked("triton")
def affine(
    out: Tensor, codes: Tensor, rows: Tensor | None, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
    bits: int, center: float,
) -> None:  # fmt: skip
    """s * (q - z), or s * q + o, of packed codes into `out` (N, K) of a float dtype; scales and zeros are float32."""
    groups = scale.shape[1]
    _launch(
        _affine_kernel, out, groups, codes, codes.shape[1], rows, out.shape[0], groups, scale, zero, offset, center,
        BITS=bits,
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


def _about(
    phi: Tensor, bits: int, fixed: bool, a: Tensor | None, b: Tensor | None, gain: float, scale: Tensor,
    zero: Tensor | None, offset: Tensor | None, center: float,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What both kernels of levels take: arguments in their order, and what they must know when compiling."""
    rank = 0 if a is None else a.shape[0]
    half, unit = (0.5, 2.0 ** (bits - 8)) if fixed else (0.0, 1.0)
    block = min(max(triton.next_power_of_2(rank), _LEAST), 4 * _LEAST)
    return (
        (phi, phi.shape[1], half, unit, a, b, gain, 2.0**bits - 1, scale, zero, offset, center, *scale.shape),
        {"R": rank, "BLOCK": block, "BITS": 8 if fixed else bits},
    )


@checked("triton")
def levels(out: Tensor, *about: Any) -> None:
    """What levels round to into `out` (N, K): codes if it is uint8, else weights of a float dtype."""
    arguments, known = _about(*about)
    _launch(_levels_kernel, out, arguments[-1], *arguments, CODES=out.dtype == torch.uint8, **known)


@checked("triton")
def level_gradients(grad: Tensor, of_scale: Tensor, of_offset: Tensor | None, *about: Any) -> None:
    """From dL/dW in `grad` to dL/du in its place, and to the gradients of scale and offset."""
    arguments, known = _about(*about)
    _launch(_gradients_kernel, grad, arguments[-1], of_scale, of_offset, *arguments, looped=True, **known)
