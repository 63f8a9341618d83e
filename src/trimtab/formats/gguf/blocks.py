"""One layer's codes as raw GGUF blocks, code for code: pure functions, no model and no file in sight.

A block is 32 weights of a row, a float16 scale d before them (and a float16 minimum m where the type has one):

    Q4_0   w = d * (c - 8)         Q5_0   w = d * (c - 16)        Q8_0   w = d * c,  c signed
    Q4_1   w = d * c + m           Q5_1   w = d * c + m

    4 bits   byte j of 16 holds code j in its low nibble and code j + 16 in its high one
    5 bits   the low four bits as above; before them 4 bytes, bit j of which is the fifth bit of code j

Every form holds more codes than a narrower grid uses, so a layer goes code for code into the smallest type whose range
covers it. Without an offset only q - z counts: the center of a symmetric grid falls on the type's own center, and an
integer zero is absorbed into the code,

    symmetric, b bits    q - 2^(b-1)  in [-2^(b-1), 2^(b-1) - 1]     b <= 4 Q4_0    b = 5 Q5_0    b <= 8 Q8_0
    integer,   b bits    q - z        in [-(2^b - 1), 2^b - 1]       b <= 3 Q4_0    b = 4 Q5_0    b <= 7 Q8_0
    real,      b bits    q            in [0, 2^b - 1]                b <= 4 Q4_1    b = 5 Q5_1

never turned into a float offset m = -s z: that product needs more bits than float16 has in half of all groups. A group
of 64 repeats its scale in two blocks, a channel in all of its row. All products above are exact in float32, so ggml's
numbers are ours to the bit. The k-quants' scales are products of two levels: a grid whose scales are stored so
(`quant.two_level`) is written as that k-quant (`super_blocks`), and no other grid is.

Legend: N out features, K in features, G groups in a row, L = K / 32 blocks in a row.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.gguf.super_blocks import to_super_blocks
from trimtab.quant import mxfp4
from trimtab.quant.grid import AnyGrid, Grid, Range
from trimtab.quant.two_level import SUPER, split

BLOCK = 32
"""Weights in a block that is not a super-block."""

BlockName = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "MXFP4"]


@dataclass(frozen=True)
class BlockType:
    """A type of block: how wide its codes are and whether it has a minimum."""

    name: BlockName
    bits: int
    """Width of a code."""
    minimum: bool
    """Whether w = d c + m."""
    integers: int = 0
    """Bytes of a super-block's scales and minima; 0 for a block of 32 weights."""
    scale_bytes: int = 2
    """Of a float16, or of an exponent."""

    @property
    def weights(self) -> int:
        """Weights in a block."""
        return SUPER if self.integers else BLOCK

    @property
    def center(self) -> int:
        """The code that stands for zero (8 bits are kept with their sign bit flipped)."""
        return 0 if self.minimum else 1 << (self.bits - 1)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block."""
        return self.scale_bytes * (1 + self.minimum) + self.integers + self.weights * self.bits // 8


TYPES = {
    kind.name: kind
    for kind in (
        BlockType("Q4_0", 4, False),
        BlockType("Q4_1", 4, True),
        BlockType("Q5_0", 5, False),
        BlockType("Q5_1", 5, True),
        BlockType("Q8_0", 8, False),
    )
}
"""By name, narrowest first."""
SUPER_TYPES: dict[str, BlockType] = {
    kind.name: kind
    for kind in (
        BlockType("Q2_K", 2, True, integers=16),
        BlockType("Q3_K", 3, False, integers=12),
        BlockType("Q4_K", 4, True, integers=12),
        BlockType("Q5_K", 5, True, integers=12),
        BlockType("Q6_K", 6, False, integers=16),
    )
}
"""The k-quants, each the one type of a grid of its own."""
POWERS = BlockType("MXFP4", 4, False, scale_bytes=1)
"""Four-bit floats under a power of two (`quant.mxfp4`): a byte of exponent, and nibbles as of Q4_0."""

_RESCALE = "float16 is what GGUF keeps scales in: use `scale_dtype: portable` or `float16`"


def block_type(grid: AnyGrid, in_features: int | None = None) -> BlockType:
    """The smallest type that holds every code of a grid.

    Args:
        grid: the layer's grid.
        in_features: K, checked against the blocks of 32 if given.

    Raises:
        UserError: with the cause and the remedy, if no type does.
    """
    if not isinstance(grid, Grid):
        if grid.powers:
            return POWERS
        raise UserError(f"GGUF has no table of {grid.codebook} values: use an affine grid (bits, group, zero)")
    if grid.two_level is not None:
        return SUPER_TYPES[grid.scale_dtype.upper()]
    if grid.scale_dtype == "float32":
        raise UserError(f"float32 scales; {_RESCALE}")
    if grid.group is not None and grid.group % BLOCK:
        raise UserError(f"group {grid.group} is not a multiple of GGUF's blocks of 32: use group 32, 64 or 128")
    if in_features is not None and in_features % BLOCK:
        raise UserError(
            f"{in_features} input features are no multiple of GGUF's blocks of 32: leave the layer in float"
        )
    low, high = {
        "symmetric": (-grid.center, grid.center - 1),
        "integer": (-grid.top, grid.top),
        "real": (0, grid.top),
    }[grid.zero]
    for kind in TYPES.values():
        if kind.minimum == (grid.zero == "real") and -kind.center <= low and high < (1 << kind.bits) - kind.center:
            return kind
    remedy = {"integer": "7 bits, or `zero: symmetric`", "real": "5 bits, or `zero: symmetric`"}[grid.zero]
    raise UserError(f"no GGUF type holds {grid.describe()}: use at most {remedy}")


def to_blocks(codes_NK: Tensor, range_: Range, grid: Grid) -> tuple[BlockType, Tensor]:
    """A layer as raw blocks.

    Args:
        codes_NK: uint8 codes of the grid.
        range_: scales and zeros (N, G), every scale and offset exact in float16.
        grid: the affine grid.

    Returns:
        The type, and uint8 of shape (N, blocks in a row * block_bytes): the tensor's bytes, row after row.

    Raises:
        UserError: if no type holds the grid, or a scale or offset is not exact in float16.
    """
    kind, two = block_type(grid, codes_NK.shape[1]), grid.two_level
    if two is not None:
        j = SUPER // two.group
        scales = split(range_.scale_NG, two.scales, j)
        offsets = None if range_.offset_NG is None else split(range_.offset_NG, two.offsets, j)
        return kind, to_super_blocks(codes_NK, scales, offsets, kind.name)
    require_exact(range_, grid)
    if range_.zero_NG is not None:
        repeat = codes_NK.shape[1] // range_.zero_NG.shape[1]
        shift_NK = kind.center - range_.zero_NG.to(torch.int16).repeat_interleave(repeat, 1)
        codes_NK = (codes_NK.to(torch.int16) + shift_NK).to(torch.uint8)
    elif range_.offset_NG is None:
        codes_NK = codes_NK + (kind.center - grid.center)  # never out of range: the type was chosen so
    blocks = codes_NK.shape[1] // BLOCK
    header = [_half(value, blocks) for value in (range_.scale_NG, range_.offset_NG) if value is not None]
    body = _body(codes_NK.unflatten(1, (blocks, BLOCK)), kind.bits)
    return kind, torch.cat([*header, *body], -1).flatten(1)


def to_powers(codes_NK: Tensor, exponents_NG: Tensor) -> Tensor:
    """A layer on the MXFP4 grid as raw blocks: uint8 (N, L * 17)."""
    body = _body(mxfp4.theirs(codes_NK).unflatten(1, (-1, BLOCK)), POWERS.bits)
    return torch.cat([exponents_NG.unsqueeze(-1), *body], -1).flatten(1)


def require_exact(range_: Range, grid: Grid) -> None:
    """Raise a `UserError` if a scale or offset is not exact in float16; those on two levels are products."""
    if grid.two_level is not None:
        return
    for value_NG, what in ((range_.scale_NG, "scale"), (range_.offset_NG, "offset")):
        if value_NG is None:
            continue
        wrong = value_NG.to(torch.float16).to(torch.float32) != value_NG
        if wrong.any():
            example = value_NG[wrong][0].item()
            raise UserError(f"{int(wrong.sum())} {what}s (such as {example:g}) are not exact in float16; {_RESCALE}")


def _half(value_NG: Tensor, blocks: int) -> Tensor:
    """(N, G) floats to the two bytes of a float16 in each block: uint8 (N, L, 2)."""
    half = value_NG.to(torch.float16)
    return half.repeat_interleave(blocks // half.shape[1], 1).contiguous().view(torch.uint8).unflatten(1, (blocks, 2))


def _body(codes_NLB: Tensor, bits: int) -> list[Tensor]:
    """The bytes after the header, uint8 (N, L, ...) each."""
    if bits == 8:
        return [codes_NLB ^ 0x80]
    low = codes_NLB & 0x0F
    nibbles = low[..., : BLOCK // 2] | (low[..., BLOCK // 2 :] << 4)
    if bits == 4:
        return [nibbles]
    fifth = (codes_NLB >> 4).unflatten(-1, (BLOCK // 8, 8))
    weight = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=fifth.device)
    return [(fifth * weight).sum(-1, dtype=torch.uint8), nibbles]
