"""Where the numbers stand in the header of a GGUF file, found without the library that is tried on it."""

import struct
from typing import NamedTuple

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_TEXT, _LIST = 8, 9


class Field(NamedTuple):
    """A number in the header."""

    name: str
    at: int
    size: int


class _Walk:
    def __init__(self, data: bytes) -> None:
        self.data, self.at, self.found = data, 0, list[Field]()

    def number(self, name: str, size: int) -> int:
        self.found.append(Field(name, self.at, size))
        self.at += size
        return int.from_bytes(self.data[self.at - size : self.at], "little")

    def text(self, name: str) -> str:
        length = self.number(f"length of {name}", 8)
        self.at += length
        return self.data[self.at - length : self.at].decode()

    def value(self, name: str, kind: int) -> None:
        if kind == _TEXT:
            self.text(name)
        elif kind == _LIST:
            of, count = self.number(f"type of the items of {name}", 4), self.number(f"items of {name}", 8)
            for i in range(count):
                before = len(self.found)
                self.value(f"{name}[{i}]", of)
                if i > 2:  # a vocabulary would hide all else
                    del self.found[before:]
        else:
            self.number(name, _SIZES[kind])


def fields(data: bytes) -> list[Field]:
    """Every number of a file's header."""
    assert data[:8] == b"GGUF" + struct.pack("<I", 3)
    walk = _Walk(data)
    walk.number("magic", 4)
    walk.number("version", 4)
    tensors, keys = walk.number("tensors", 8), walk.number("keys", 8)
    for i in range(keys):
        name = walk.text(f"key {i}")
        walk.value(name, walk.number(f"type of {name}", 4))
    for i in range(tensors):
        name = walk.text(f"tensor {i}")
        for j in range(walk.number(f"dimensions of {name}", 4)):
            walk.number(f"dimension {j} of {name}", 8)
        walk.number(f"type of {name}", 4)
        walk.number(f"place of {name}", 8)
    return walk.found
