"""MXFP4: four-bit floats in blocks of 32 under a power of two, as gpt-oss and GGUF store them.

    w = 2^(e - 127) v(c)      c = sign (bit 3), exponent (bits 2, 1), fraction (bit 0);  e one byte for each block

    c     0   1    2   3    4   5   6   7      8 .. 15: the same, negative; 8 is -0
    v     0  0.5   1  1.5   2   3   4   6

The code is e2m1 and the scale e8m0 of the Open Compute Project's microscaling formats. Here it is a codebook: the fifteen
values in ascending order, which is what rounding looks through, have our codes 0 to 14, and -0 has 15, so that a file is
written back bit for bit. A product of a power of two and three significant bits is exact in every dtype that reaches it.

Two codes share a byte, the first in its low half (gpt-oss, compressed-tensors); GGUF lays halves of a block over one
another (`formats.gguf`). Fused experts are the same with dimensions in front, so nothing here asks how many there are.

Legend: N out features, K in features, G = K / 32 blocks in a row.
"""

import torch
from torch import Tensor

BLOCK = 32
"""Weights that share a scale."""
_POSITIVE = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
VALUES = (*(-v for v in reversed(_POSITIVE)), 0.0, *_POSITIVE)
"""Of our codes 0 to 14."""
NAN = 255
"""The exponent that stands for no number."""
_BIAS = 127
_TOP = 2
"""Exponent of the largest value, 6 = 1.5 * 2^2."""
_OURS = (7, 8, 9, 10, 11, 12, 13, 14, 15, 6, 5, 4, 3, 2, 1, 0)
"""Our code of each of theirs."""
_THEIRS = tuple(_OURS.index(code) for code in range(16))


def ours(codes: Tensor) -> Tensor:
    """Codes of a codebook, uint8, of e2m1 codes, uint8 of the same shape."""
    return torch.tensor(_OURS, dtype=torch.uint8, device=codes.device)[codes.long()]


def theirs(codes: Tensor) -> Tensor:
    """The inverse of `ours`."""
    return torch.tensor(_THEIRS, dtype=torch.uint8, device=codes.device)[codes.long()]


def exponents(absmax_NG: Tensor) -> Tensor:
    """The standard's scale of each block: the largest power of two that its largest weight reaches, less that of 6.

    Args:
        absmax_NG: largest magnitudes, float32 of any shape.

    Returns:
        uint8 of the same shape; 0 for a block of zeros.
    """
    biased = absmax_NG.float().contiguous().view(torch.int32) >> 23  # floor(log2) + 127 of a positive float32
    return (biased - _TOP).clamp(0, NAN - 1).to(torch.uint8)


def exponents_of(scale_NG: Tensor) -> Tensor:
    """The inverse of `scales`, for powers of two from 2^-127 to 2^127."""
    return (scale_NG.contiguous().view(torch.int32) >> 23).to(torch.uint8)


def scales(exponents_NG: Tensor) -> Tensor:
    """2^(e - 127), float32 of the same shape; 2^-127 is a subnormal number, and still exact."""
    e = exponents_NG.int()
    return torch.where(e > 0, e << 23, 1 << 22).to(torch.int32).view(torch.float32)


def from_blocks(blocks: Tensor) -> Tensor:
    """Our codes of gpt-oss's bytes.

    Args:
        blocks: uint8 (..., G, 16), the `*_blocks` of a checkpoint: fused experts are (experts, N, G, 16).

    Returns:
        uint8 (..., K); the `*_scales`, (..., G), are exponents as they stand.
    """
    return ours(torch.stack([blocks & 0xF, blocks >> 4], -1).flatten(-3))


def to_blocks(codes: Tensor) -> Tensor:
    """The inverse of `from_blocks`: uint8 (..., G, 16) of codes (..., K)."""
    pairs = theirs(codes).unflatten(-1, (-1, BLOCK // 2, 2))
    return pairs[..., 0] | pairs[..., 1] << 4
