"""Codes to bytes and back, for 1 to 8 bits: `pack` and `unpack` alone know the layout.

A row of K codes is split into *parts* of 8, 4, 2 and 1 bits (3 = 2 + 1, 5 = 4 + 1, ...: the low bits first). A part of
w bits cuts the row into 8 / w equal segments and lays them over one another, segment i in bits i*w .. (i+1)*w of the
bytes. For 4 bits and K = 8:

    codes    c0 c1 c2 c3 | c4 c5 c6 c7          byte j = c_j | c_(j+4) << 4
             low nibbles | high nibbles

so unpacking is one shift and one mask over contiguous memory per segment, with no interleaving store.
(`benchmarks/speed/choices.py`: bit planes take 9 to 19 times as long in eager torch.)
The price: a row cannot be cut along K.
Rows never share a byte, so it can be cut along N. K need not divide by the number of segments: the last one is padded.

Legend: N rows, K codes in a row.
"""

import torch
from torch import Tensor

LAYOUT = "segments-v1"
"""The name of this layout in stored files; loaders check it, and `tests/stored` holds it fixed."""

_PARTS = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}


def row_bytes(bits: int, codes: int) -> int:
    """Bytes that a row of `codes` codes of `bits` bits takes."""
    return sum(-(-codes * width // 8) for width in _PARTS[bits])


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """Pack codes of `bits` bits.

    Args:
        codes_NK: uint8 of shape (N, K), every value below 2**bits.
        bits: 1 to 8.

    Returns:
        uint8 of shape (N, row_bytes(bits, K)).
    """
    assert codes_NK.dtype == torch.uint8, codes_NK.dtype
    n, k = codes_NK.shape
    parts, shift = [], 0
    for width in _PARTS[bits]:
        segments = 8 // width
        length = -(-k // segments)
        part = torch.zeros(n, segments * length, dtype=torch.uint8, device=codes_NK.device)
        part[:, :k] = (codes_NK >> shift) & ((1 << width) - 1)
        part = part.view(n, segments, length)
        packed = torch.zeros(n, length, dtype=torch.uint8, device=part.device)
        for i in range(segments):
            packed |= part[:, i] << (i * width)
        parts.append(packed)
        shift += width
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def unpack(packed: Tensor, bits: int, codes: int) -> Tensor:
    """The inverse of `pack`.

    Args:
        packed: uint8 of shape (N, row_bytes(bits, K)).
        bits: 1 to 8.
        codes: K, the number of codes in a row.

    Returns:
        uint8 codes of shape (N, K). For 8 bits this is `packed` itself, not a copy.
    """
    if bits == 8:
        return packed
    n, start, shift = packed.shape[0], 0, 0
    out: Tensor | None = None
    for width in _PARTS[bits]:
        segments = 8 // width
        length = -(-codes // segments)
        part = packed[:, start : start + length]
        values = _spread(part, width, segments).view(n, segments * length)[:, :codes]
        out = values if out is None else out.add_(values, alpha=1 << shift)
        start += length
        shift += width
    assert out is not None
    return out.contiguous()


def _spread(part: Tensor, width: int, segments: int) -> Tensor:
    """(N, length) bytes to (N, segments, length) codes."""
    out = torch.empty(part.shape[0], segments, part.shape[1], dtype=torch.uint8, device=part.device)
    mask = (1 << width) - 1
    for i in range(segments - 1):
        torch.bitwise_right_shift(part, i * width, out=out[:, i])
    out[:, : segments - 1] &= mask
    torch.bitwise_right_shift(part, (segments - 1) * width, out=out[:, segments - 1])
    return out


def owned(tensor: Tensor) -> Tensor:
    """The tensor, laid out row by row in memory of its own: kernels read it by its address, and files hold all of it.

    A number spread over a row by `expand` is neither, and a piece of a larger tensor would keep all of that alive.
    """
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)
