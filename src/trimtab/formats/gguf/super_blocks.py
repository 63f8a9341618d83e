"""One layer's codes as raw super-blocks of GGUF's k-quants: the inverse of `read_blocks`, byte for byte.

    Q2_K   16 bytes sc | mn << 4,  64 bytes codes,  d, dmin
    Q3_K   32 bytes third bits,  64 bytes codes,  12 bytes sc + 32,  d
    Q4_K   d, dmin,  12 bytes sc and mn,  128 bytes codes
    Q5_K   d, dmin,  12 bytes sc and mn,  32 bytes fifth bits,  128 bytes codes
    Q6_K   128 bytes codes,  64 bytes fifth and sixth bits,  16 bytes sc,  d

Legend: N out features, S super-blocks in a row, j groups in a super-block.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from trimtab.quant.two_level import SUPER, Split


def to_super_blocks(codes_NK: Tensor, scales: Split, offsets: Split | None, name: str) -> Tensor:
    """A layer as raw super-blocks.

    Args:
        codes_NK: uint8 codes of the k-quant's grid.
        scales: d and sc.
        offsets: -dmin and mn, where the type has them.
        name: Q2_K to Q6_K.

    Returns:
        uint8 (N, S * bytes of a super-block).
    """
    rows = codes_NK.shape[0]
    codes = codes_NK.reshape(-1, SUPER)
    j = scales.integer_NG.shape[1] // scales.super_NS.shape[1]
    sc = scales.integer_NG.reshape(-1, j)
    header = [_half(scales.super_NS)]
    mn = torch.zeros_like(sc)
    if offsets is not None:
        header.append(_half(-offsets.super_NS))
        mn = offsets.integer_NG.reshape(-1, j)
    parts = _WRITE[name](codes, sc, mn, torch.cat(header, 1))
    return torch.cat(parts, 1).reshape(rows, -1)


def _half(values: Tensor) -> Tensor:
    return values.reshape(-1, 1).contiguous().view(torch.uint8)


def _bytes(integers: Tensor) -> Tensor:
    return integers.contiguous().view(torch.uint8)


def _joined(runs: Tensor, bits: int) -> Tensor:
    """(..., 8 / bits, n) codes of few bits to (..., n) bytes: the first run in the lowest bits."""
    total = runs[..., 0, :].clone()
    for i in range(1, runs.shape[-2]):
        total |= runs[..., i, :] << (bits * i)
    return total


def _nibbles(codes: Tensor, n: int) -> Tensor:
    """The low four bits of each 2 n codes in n bytes: the first n codes low, the others high."""
    return _joined((codes & 15).unflatten(1, (-1, 2, n)), 4).flatten(1)


def _twos(codes: Tensor, n: int) -> Tensor:
    """The low two bits of each 4 n codes in n bytes."""
    return _joined((codes & 3).unflatten(1, (-1, 4, n)), 2).flatten(1)


def _ones(codes: Tensor, n: int) -> Tensor:
    """The lowest bit of each 8 n codes in n bytes."""
    return _joined((codes & 1).unflatten(1, (-1, 8, n)), 1).flatten(1)


def _sixes(sc: Tensor, mn: Tensor) -> Tensor:
    """Eight scales and minima of six bits in twelve bytes; the last four's high bits lie with the first's."""
    s, m = _bytes(sc), _bytes(mn)
    first = [x[:, :4] | (x[:, 4:] >> 4) << 6 for x in (s, m)]
    return torch.cat([*first, (s[:, 4:] & 15) | (m[:, 4:] & 15) << 4], 1)


def _q2_k(codes: Tensor, sc: Tensor, mn: Tensor, header: Tensor) -> list[Tensor]:
    return [_bytes(sc) | _bytes(mn) << 4, _twos(codes, 32), header]


def _q3_k(codes: Tensor, sc: Tensor, mn: Tensor, header: Tensor) -> list[Tensor]:
    scales = (sc + 32).to(torch.uint8)
    return [_ones(codes >> 2, 32), _twos(codes, 32), _nibbles(scales, 8), _twos(scales >> 4, 4), header]


def _q4_k(codes: Tensor, sc: Tensor, mn: Tensor, header: Tensor) -> list[Tensor]:
    return [header, _sixes(sc, mn), _nibbles(codes, 32)]


def _q5_k(codes: Tensor, sc: Tensor, mn: Tensor, header: Tensor) -> list[Tensor]:
    return [header, _sixes(sc, mn), _ones(codes >> 4, 32), _nibbles(codes, 32)]


def _q6_k(codes: Tensor, sc: Tensor, mn: Tensor, header: Tensor) -> list[Tensor]:
    return [_nibbles(codes, 64), _twos(codes >> 4, 32), _bytes(sc), header]


_WRITE: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
