"""The header of a GGUF file, walked through before gguf's own reader: every length in it stays inside the file.

That reader takes what is beyond the end for empty, and continues: an array that claims to have 2^60 items is read for ever.

    "GGUF" version tensors keys | key type value ... | name dimensions type place ... | padding | tensors

All numbers are little-endian; a text is its length and its bytes, an array its items' type, their number and they.
"""

import mmap
from pathlib import Path

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_MOST_DIMENSIONS = 4
_ALIGNMENT = "general.alignment"


class Damaged(ValueError):
    """What is wrong with a file, in a few words."""


class _Walk:
    """A place in a file, which is never beyond its end."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at, self.end = data, 0, len(data)
        self.alignment = 32

    def past(self, size: int) -> int:
        """Move past so many bytes; returns where they began."""
        at = self.at
        self.at += size
        if self.at > self.end:
            raise Damaged(f"it is cut off, or a length in its header is wrong (at byte {at:,})")
        return at

    def number(self, size: int) -> int:
        at = self.past(size)
        return int.from_bytes(self.data[at : at + size], "little")

    def text(self) -> bytes:
        size = self.number(8)
        at = self.past(size)
        return self.data[at : at + size]

    def value(self, kind: int, inside: int = 0) -> int | None:
        """Past a value; it itself if it is an integer."""
        if kind in _SIZES:
            return self.number(_SIZES[kind])
        if kind == _TEXT:
            self.past(self.number(8))
        elif kind == _ARRAY and inside < 2:
            of, count = self.number(4), self.number(8)
            if of in _SIZES:
                self.past(_SIZES[of] * count)
            else:
                self.past(8 * count)  # at least so much, before so many are looked for
                self.at -= 8 * count
                for _ in range(count):
                    self.value(of, inside + 1)
        else:
            raise Damaged(f"a value of type {kind}, which there is not (at byte {self.at:,})")
        return None


def check(path: Path) -> None:
    """Raise `Damaged` if a GGUF file is none, or is not whole.

    Args:
        path: a regular file.
    """
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise Damaged("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check(_Walk(data))


def _check(walk: _Walk) -> None:
    if walk.number(4) != int.from_bytes(b"GGUF", "little"):
        raise Damaged("it does not begin with GGUF")
    version, tensors, keys = walk.number(4), walk.number(8), walk.number(8)
    if version not in _VERSIONS:
        raise Damaged(f"it is of version {version}, and read are 2 and 3, little-endian")
    for _ in range(keys):
        name = walk.text()
        value = walk.value(walk.number(4))
        if name == _ALIGNMENT.encode():
            walk.alignment = value or 0
    if walk.alignment <= 0 or walk.alignment & (walk.alignment - 1) or walk.alignment > 2**20:
        raise Damaged(f"{_ALIGNMENT} is {walk.alignment}, no power of two")
    extents = [_extent(walk) for _ in range(tensors)]
    begin = -(-walk.at // walk.alignment) * walk.alignment
    taken = 0
    for place, size, tensor in sorted(extents):
        if place % walk.alignment or place < taken or begin + place + size > walk.end:
            raise Damaged(f"tensor {tensor} is said to lie where the file ends, or another tensor is")
        taken = place + size


def _extent(walk: _Walk) -> tuple[int, int, str]:
    """Where a tensor lies and how many bytes it has."""
    name = walk.text().decode("utf-8", "replace")[:100]
    dimensions = walk.number(4)
    if not 0 < dimensions <= _MOST_DIMENSIONS:
        raise Damaged(f"tensor {name} has {dimensions:,} dimensions")
    shape = [walk.number(8) for _ in range(dimensions)]
    kind, place = walk.number(4), walk.number(8)
    count = 1
    for size in shape:
        count *= size
    try:
        block, bytes_of_one = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    except (ValueError, KeyError):
        raise Damaged(f"tensor {name} is of type {kind}, which is not known here") from None
    if not count or shape[0] % block:
        raise Damaged(f"tensor {name} has shape {tuple(reversed(shape))}, which its type does not have")
    return place, count // block * bytes_of_one, name
