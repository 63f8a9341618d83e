"""What the Triton kernels are made of: tiles, packed codes, scales, shifted levels, rounding.

A tile is HEIGHT rows of one group, or of WIDTH columns of it where the group is longer, so a tile has one scale a row:

    k0 = j * g + w0      columns k0 .. k0 + WIDTH of rows n0 .. n0 + HEIGHT: in group j, and never outside it
    code of column k     for each part of width b: byte (k mod L) of the part, shifted right by b * (k div L)

Where a column lies in the packed row depends on k alone, so its divisions are done once for all rows of a tile, and K and
g are compile-time constants: the compiler sees which addresses are aligned, and where L, g and the row are multiples of
16 it loads and stores 16 bytes at a time. A byte is read once for each of its codes; all but the first come from a cache.
The road not taken: one program reads a byte once and writes all its segments. That fits one part, but 3 = 2 + 1 bits
lay the same row out in segments of two lengths, which agree only for some K, and the product B A wants its columns whole.

Bit for bit what torch computes, but for sums over the rank, over a group or over tokens:

    q * s + o       rounds twice, so the compiler may not fuse a product and a sum (`tl.dot` still does, on its own)
    bfloat16        is rounded on its bits (to nearest even; a NaN stays one) and read and written as int16: Triton's
                    interpreter, in which the tests run, does not round its own conversion correctly
    B A             of bfloat16 factors on tensor cores: their products are exact in float32, which they are summed in.
                    Of other factors float32 throughout (`ieee`, not TF32). The interpreter, which takes bfloat16 for
                    integers, multiplies the same numbers as float32

Without Triton this module still imports, and `available` says no.

Legend: N out features, K in features, G groups in a row, R rank. In kernels, names in capitals are known when compiling.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr, tensor
except ImportError:
    triton = None

LEAST, MOST = 16, 128
"""The least side of a tile, which `tl.dot` asks for, and its greatest width."""
TILE = 4096
"""Elements of a tile."""
LEVELS_WIDTH, LEVELS_WARPS = 64, 8
"""Of a tile with a product: square where a group allows it, so that few numbers of B and A are read for each level, and by
so many threads that each has few registers (`test_triton_compiled.py` has their numbers)."""


def available() -> bool:
    """Whether the kernels can run: Triton is installed, and TRIMTAB_KERNELS=torch does not ask for the references."""
    return triton is not None and os.environ.get("TRIMTAB_KERNELS") != "torch"


def jit(function: Callable[..., Any]) -> Any:
    """A function compiled by Triton, where it is installed."""
    return function if triton is None else triton.jit(function)


def on_tensor_cores(narrow: bool) -> bool:
    """Whether a product of bfloat16 numbers is taken as one; the interpreter takes it in float32, of the same numbers."""
    return narrow and not triton.knobs.runtime.interpret


def power(size: int, least: int = LEAST, most: int = MOST) -> int:
    """The least power of two that holds this many, within bounds."""
    return int(min(max(triton.next_power_of_2(size), least), most))


def as_bits(tensor: Tensor | None) -> Tensor | None:
    """bfloat16 as the int16 that kernels read (see `widened`)."""
    return tensor.view(torch.int16) if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


def level_arguments(
    phi: Tensor, bits: int, fixed: bool, a: Tensor | None, b: Tensor | None, gain: float, scale: Tensor,
    zero: Tensor | None, offset: Tensor | None, center: float, narrow: bool,
) -> tuple[tuple[Any, ...], dict[str, Any]]:  # fmt: skip
    """What all kernels of levels take: arguments in their order, and what they must know when compiling."""
    rank = 0 if a is None else a.shape[0]
    half, unit = (0.5, 2.0 ** (bits - 8)) if fixed else (0.0, 1.0)
    return (
        (phi, phi.shape[1], half, unit, a, b, gain, 2.0**bits - 1, scale, zero, offset, center, *scale.shape),
        {
            "R": rank, "BLOCK": LEAST, "NARROW": narrow, "CORES": on_tensor_cores(narrow), "BITS": 8 if fixed else bits,
            "num_warps": LEVELS_WARPS,
        },
    )  # fmt: skip


# ---- tiles ------------------------------------------------------------------------------------------------------


@jit
def place(G: tensor, PIECES: constexpr, HEIGHT: constexpr, WIDTH: constexpr) -> tensor:
    """Rows, group, and columns in the group of this program's tile. Programs beside each other share their rows."""
    program = tl.program_id(0)
    tile = program // PIECES
    # N * K may pass 2^31, so rows are 64 bits wide.
    n = (tile // G).to(tl.int64) * HEIGHT + tl.arange(0, HEIGHT)
    return n, tile % G, program % PIECES * WIDTH + tl.arange(0, WIDTH)


@jit
def stored_rows(rows: tensor, n: tensor, inside: tensor) -> tensor:
    """Which stored rows become rows n of the result."""
    source = n
    if rows is not None:
        source = tl.load(rows + n, mask=inside, other=0).to(tl.int64)
    return source


@jit
def unpacked(
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


# ---- numbers ----------------------------------------------------------------------------------------------------


@jit
def widened(x: tensor) -> tensor:
    """float32 of numbers as they are stored; those of bfloat16 come as int16 (`as_bits`)."""
    if x.dtype == tl.int16:  # noqa: SIM108  Triton drops the branch that has no meaning for this dtype
        wide = (x.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@jit
def narrowed(values: tensor) -> tensor:
    """The bits of float32 values rounded to bfloat16, as uint32."""
    bits = values.to(tl.uint32, bitcast=True)
    return tl.where(values == values, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16, 0x7FC0)


@jit
def put(to: tensor, values: tensor, mask: tensor, BF16: constexpr) -> tensor:
    """float32 values into memory of their dtype; bfloat16 as its bits."""
    if BF16:
        tl.store(to, narrowed(values).to(tl.int16), mask=mask)
    else:
        tl.store(to, values, mask=mask)


@jit
def product(x: tensor, y: tensor, total: tensor, NARROW: constexpr, CORES: constexpr) -> tensor:
    """total + x y. NARROW: of both rounded to bfloat16, exact in float32; CORES: by instructions for that."""
    if CORES:
        total = tl.dot(x.to(tl.bfloat16), y.to(tl.bfloat16), total)
    elif NARROW:
        x = (narrowed(x) << 16).to(tl.float32, bitcast=True)
        y = (narrowed(y) << 16).to(tl.float32, bitcast=True)
        total = tl.dot(x, y, total, input_precision="ieee")
    else:
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@jit
def of_each_row(numbers: tensor, at: tensor, inside: tensor) -> tensor:
    """float32 numbers, one for all columns of a row of a group, to be used with the tile."""
    return tl.expand_dims(widened(tl.load(numbers + at, mask=inside, other=0)), len(at.shape))


# ---- weights ----------------------------------------------------------------------------------------------------


@jit
def affine_values(
    q: tensor, at: tensor, inside: tensor, scale: tensor, zero: tensor, offset: tensor, center: tensor
) -> tensor:
    """s * q + o or s * (q - z) of float32 codes; `at` is where the group of each row has its scale."""
    s = of_each_row(scale, at, inside)
    if offset is not None:
        made = q * s + of_each_row(offset, at, inside)
    elif zero is not None:
        made = (q - of_each_row(zero, at, inside)) * s
    else:
        made = (q - center) * s
    return made


@jit
def table_values(
    q: tensor, at: tensor, inside: tensor, table: tensor, absmax: tensor, dynamic_map: tensor, block_scale: tensor,
    mean: tensor, offset: tensor, DOUBLE: constexpr,
) -> tensor:  # fmt: skip
    """absmax * table[q] + o of int32 codes."""
    size = tl.load(absmax + at, mask=inside, other=0)
    if dynamic_map is not None:
        size = tl.load(dynamic_map + size.to(tl.int32)) * tl.load(block_scale + at // DOUBLE, mask=inside, other=0)
        size += tl.load(mean)
    made = tl.load(table + q) * tl.expand_dims(size, len(at.shape))
    if offset is not None:
        made += of_each_row(offset, at, inside)
    return made


@jit
def shifted_levels(
    phi: tensor, row_bytes: tensor, half: tensor, unit: tensor, a: tensor, b: tensor, gain: tensor, n: tensor,
    k: tensor, inside_n: tensor, inside_k: tensor, K: constexpr, BITS: constexpr, R: constexpr, BLOCK: constexpr,
    NARROW: constexpr, CORES: constexpr,
) -> tensor:  # fmt: skip
    """Levels of a tile, neither rounded nor clamped: (byte + half) * unit + gain * B A."""
    mask = inside_n[:, None] & inside_k[None, :]
    u = (unpacked(phi, row_bytes, n, k, mask, K, BITS).to(tl.float32) + half) * unit
    if a is not None:
        total = tl.zeros(mask.shape, tl.float32)
        for start in range(0, R, BLOCK):
            r = start + tl.arange(0, BLOCK)
            b_NR = tl.load(b + n[:, None] * R + r[None, :], mask=inside_n[:, None] & (r < R)[None, :], other=0)
            a_RK = tl.load(a + r[:, None] * K + k[None, :], mask=(r < R)[:, None] & inside_k[None, :], other=0)
            total = product(b_NR, a_RK, total, NARROW, CORES)
        u += gain * total
    return u


@jit
def rounded(u: tensor, top: tensor) -> tensor:
    """Half to even, then into [0, top]. Adding 1.5 * 2^23 leaves no bits for a fraction; a clamp before keeps it exact."""
    u = tl.where(u < -1, -1.0, u)
    u = tl.where(u > top + 1, top + 1, u)
    u = (u + 12582912.0) - 12582912.0
    u = tl.where(u < 0, 0.0, u)
    return tl.where(u > top, top, u)
