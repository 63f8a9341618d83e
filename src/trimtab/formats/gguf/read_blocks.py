"""Raw GGUF blocks as weights on our grids, code for code.

    Q4_0, Q5_0, Q8_0   w = d * (q - 2^(b-1))        blocks of 32: float16 d
    Q4_1, Q5_1         w = d * q + m                blocks of 32: float16 d and m
    Q4_K, Q5_K, Q2_K   w = (d sc) q - dmin mn       super-blocks of 256: float16 d and dmin, integers sc and mn a group
    Q6_K, Q3_K         w = (d sc) (q - 2^(b-1))     super-blocks of 256: float16 d, an integer sc a group
    MXFP4              w = 2^(e - 127) v(q)         blocks of 32: a byte e

A k-quant's scales d * sc and offsets -dmin * mn are products of 11 bits and at most 8, so float32 holds them as they are,
and q times a scale, too: a weight is rounded once, in the sum, by llama.cpp and here. They are stored on two levels, as in
the file (`quant.two_level`).

Legend: N out features, K in features, S super-blocks, g group size, G = K / g groups in a row.
"""

from typing import NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor

from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.quant import mxfp4
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, Range, k_quant

_T = gguf.GGMLQuantizationType
GRIDS: dict[gguf.GGMLQuantizationType, AnyGrid] = {
    _T.Q4_0: Grid(4, 32, "symmetric", "float16"),
    _T.Q4_1: Grid(4, 32, "real", "float16"),
    _T.Q5_0: Grid(5, 32, "symmetric", "float16"),
    _T.Q5_1: Grid(5, 32, "real", "float16"),
    _T.Q8_0: Grid(8, 32, "symmetric", "float16"),
    _T.Q2_K: k_quant("q2_k"),
    _T.Q3_K: k_quant("q3_k"),
    _T.Q4_K: k_quant("q4_k"),
    _T.Q5_K: k_quant("q5_k"),
    _T.Q6_K: k_quant("q6_k"),
    _T.MXFP4: CodebookGrid("mxfp4", mxfp4.BLOCK),
}
"""Types that are grids of ours."""


class _Parts(NamedTuple):
    """What a tensor's blocks hold, block after block."""

    codes: Tensor
    """uint8 (S, weights in a block)."""
    scale: Tensor
    """(S, groups in a block)."""
    offset: Tensor | None


def from_blocks(blocks: np.ndarray, kind: gguf.GGMLQuantizationType, rows: int) -> AffineWeight | CodebookWeight:
    """A weight of the very codes, scales and offsets in raw GGUF blocks.

    Args:
        blocks: uint8, the tensor's bytes, row after row.
        kind: one of `GRIDS`.
        rows: N.
    """
    grid, (_, size) = GRIDS[kind], gguf.GGML_QUANT_SIZES[kind]
    raw = torch.from_numpy(np.array(blocks)).view(-1, size)
    if not isinstance(grid, Grid):
        codes = mxfp4.ours(_nibbles(raw[:, 1:]))
        return CodebookWeight.of_powers(codes.reshape(rows, -1), raw[:, 0].reshape(rows, -1).clone())
    found = _READ[kind](raw)
    scale_NG, offset = found.scale.reshape(rows, -1), found.offset
    offset_NG = None if offset is None else offset.reshape(rows, -1)
    return AffineWeight.of_stored(found.codes.reshape(rows, -1), Range(scale_NG, None, offset_NG), grid)


def _half(raw: Tensor, at: int) -> Tensor:
    """The float16 number (S, 1) that begins at a byte."""
    return raw[:, at : at + 2].contiguous().view(torch.float16)


def _nibbles(raw: Tensor) -> Tensor:
    """Of each run of bytes the low halves, then the high ones."""
    return torch.cat([raw & 0x0F, raw >> 4], -1)


def _two(raw: Tensor) -> Tensor:
    """Of each run of bytes the lowest two bits of all, then the next two, ..."""
    return torch.cat([(raw >> shift) & 3 for shift in (0, 2, 4, 6)], -1)


def _one(raw: Tensor) -> Tensor:
    """Of each run of bytes the lowest bit of all, then the next, ..."""
    return torch.cat([(raw >> shift) & 1 for shift in range(8)], -1)


def _four_bits(raw: Tensor, offset: bool) -> _Parts:
    header = 4 if offset else 2
    return _Parts(_nibbles(raw[:, header:]), _half(raw, 0), _half(raw, 2) if offset else None)


def _five_bits(raw: Tensor, offset: bool) -> _Parts:
    header = 4 if offset else 2
    high = raw[:, header : header + 4]  # a word of 32 bits, of which bit j is code j's fifth
    fifth = ((high.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1).flatten(1)
    return _Parts(_nibbles(raw[:, header + 4 :]) | fifth << 4, _half(raw, 0), _half(raw, 2) if offset else None)


def _eight_bits(raw: Tensor) -> _Parts:
    # The file holds signed bytes; flipping the sign bit adds the 128 that our unsigned codes are centred on.
    return _Parts(raw[:, 2:] ^ 0x80, _half(raw, 0), None)


def _scaled(raw: Tensor, at: int, integers: Tensor) -> Tensor:
    return _half(raw, at).float() * integers.float()


def _sixes(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima, six bits each, of eight groups in twelve bytes; the last four's high bits lie with the first's."""
    d, m, both = raw.split(4, 1)
    scales = torch.cat([d & 0x3F, (both & 0x0F) | ((d >> 2) & 0x30)], 1)
    return scales, torch.cat([m & 0x3F, (both >> 4) | ((m >> 2) & 0x30)], 1)


def _q4_k(raw: Tensor) -> _Parts:
    scales, minima = _sixes(raw[:, 4:16])
    codes = _nibbles(raw[:, 16:].unflatten(1, (4, 32))).flatten(1)
    return _Parts(codes, _scaled(raw, 0, scales), -_scaled(raw, 2, minima))


def _q5_k(raw: Tensor) -> _Parts:
    scales, minima = _sixes(raw[:, 4:16])
    codes = _nibbles(raw[:, 48:].unflatten(1, (4, 32))).flatten(1) | _one(raw[:, 16:48]) << 4
    return _Parts(codes, _scaled(raw, 0, scales), -_scaled(raw, 2, minima))


def _q2_k(raw: Tensor) -> _Parts:
    codes = _two(raw[:, 16:80].unflatten(1, (2, 32))).flatten(1)
    return _Parts(codes, _scaled(raw, 80, raw[:, :16] & 0x0F), -_scaled(raw, 82, raw[:, :16] >> 4))


def _q3_k(raw: Tensor) -> _Parts:
    low, high = _nibbles(raw[:, 96:104]), _two(raw[:, 104:108])
    scales = (low | high << 4).to(torch.int16) - 32
    codes = _two(raw[:, 32:96].unflatten(1, (2, 32))).flatten(1) | _one(raw[:, :32]) << 2
    return _Parts(codes, _scaled(raw, 108, scales), None)


def _q6_k(raw: Tensor) -> _Parts:
    low, high = _nibbles(raw[:, :128].unflatten(1, (2, 64))), _two(raw[:, 128:192].unflatten(1, (2, 32)))
    scales = raw[:, 192:208].contiguous().view(torch.int8)
    return _Parts((low | high << 4).flatten(1), _scaled(raw, 208, scales), None)


_READ = {
    _T.Q4_0: lambda raw: _four_bits(raw, False),
    _T.Q4_1: lambda raw: _four_bits(raw, True),
    _T.Q5_0: lambda raw: _five_bits(raw, False),
    _T.Q5_1: lambda raw: _five_bits(raw, True),
    _T.Q8_0: _eight_bits,
    _T.Q2_K: _q2_k,
    _T.Q3_K: _q3_k,
    _T.Q4_K: _q4_k,
    _T.Q5_K: _q5_k,
    _T.Q6_K: _q6_k,
}
