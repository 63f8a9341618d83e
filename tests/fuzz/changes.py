"""Hostile changes of files, by what they hold. Each returns new bytes and what was done, drawn from a `random.Random`."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from fuzz import trees
from fuzz.templates import hostile_template

Change = Callable[[random.Random, bytes], tuple[bytes, str]]
Extra = dict[str, list[Any]]


def bytes_changed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Some bytes flipped, left out, put in or doubled, in a file of any kind."""
    what = rng.choice(("flip", "flip", "flip", "cut", "remove", "insert", "double", "empty", "zero", "end"))
    at = rng.randrange(len(data)) if data else 0
    if rng.random() < 0.5:  # where headers are
        at = min(at, rng.randrange(512))
    length = min(rng.choice((1, 2, 8, 64, 1000)), max(1, len(data) - at))
    if what == "flip":
        flipped = bytearray(data)
        flipped[at : at + 1] = bytes([(data[at] if data else 0) ^ (1 << rng.randrange(8))])
        return bytes(flipped), f"bit of byte {at} flipped"
    if what == "cut":
        return data[:at], f"cut at {at}"
    if what == "remove":
        return data[:at] + data[at + length :], f"{length} bytes at {at} left out"
    if what == "insert":
        return data[:at] + rng.randbytes(length) + data[at:], f"{length} bytes at {at} put in"
    if what == "double":
        return data[: at + length] + data[at:], f"{length} bytes at {at} twice"
    if what == "zero":
        return data[:at] + bytes(length) + data[at + length :], f"{length} bytes at {at} zero"
    return (b"", "empty") if what == "empty" else (data + rng.randbytes(length), f"{length} bytes behind the end")


_WHOLE = (
    b"null",
    b"[]",
    b"{}",
    b"3",
    b'"x"',
    b"\xef\xbb\xbf{}",
    b"\xff\xfe{\x00}\x00",
    b"[" * trees.DEEP,
    b'{"a":' * trees.DEEP,
)


def _text(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """What may befall a text file as a whole."""
    what = rng.choice(("whole", "mark", "not utf-8", "bytes", "bytes", "bytes"))
    if what == "whole":
        whole = rng.choice(_WHOLE)
        return whole, f"is {whole[:12]!r} ({len(whole)} bytes)"
    if what == "mark":
        return b"\xef\xbb\xbf" + data, "begins with a byte order mark"
    if what == "not utf-8":
        at = rng.randrange(len(data) + 1)
        return data[:at] + b"\xff\xc0" + data[at:], f"is not UTF-8 at {at}"
    return bytes_changed(rng, data)


def json_changed(extra: Extra | None = None) -> Change:
    """Of a JSON file: a change of its values, a key that stands there twice, or one of its text."""

    def change(rng: random.Random, data: bytes) -> tuple[bytes, str]:
        if rng.random() < 0.2:
            return _text(rng, data)
        tree, what = trees.changed(rng, json.loads(data), extra)
        if rng.random() < 0.1:
            tree, more = trees.changed(rng, tree, extra)
            what = f"{what}; {more}"
        text = trees.dumped(tree)
        if isinstance(tree, dict) and tree and rng.random() < 0.04:
            key = rng.choice(list(tree))
            text = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(rng.choice(trees.ANYTHING))}}}"
            what = f"{what}; {key} twice"
        return text.encode("utf-8", "surrogatepass"), what

    return change


def _bomb(first: str, tenfold: Callable[[str], str]) -> str:
    """Ten to the tenth values in ten lines."""
    lines = [f"{y}: &{y} {tenfold(x)}" for x, y in zip("abcdefghi", "bcdefghij", strict=True)]
    return "\n".join([f"a: &a {first}", *lines, ""])


_BOMBS = (
    _bomb("[x, x, x, x, x, x, x, x, x, x]", lambda x: f"[{', '.join([f'*{x}'] * 10)}]"),
    _bomb("{k: x}", lambda x: f"{{{', '.join(f'k{i}: *{x}' for i in range(10))}}}"),
)
_YAML = (
    "&a [*a]",
    "!!python/object/apply:os.system ['true']",
    "!!python/name:os.system",
    "!custom x",
    "!!binary x",
    "!!set {a, b}",
    "2026-13-45",
    "2026-01-01",
    "1:30:00",
    "0x1F",
    "0o17",
    "1_000",
    ".inf",
    ".nan",
    "~",
    "yes",
    "? a",
    "{a: 1, a: 2}",
    "*nothing",
    "<<: 3",
    "|\n  x",
    "[" * 5000,
    "{a: " * 5000,
    "- " * 5000,
    "1" * 5000,
    "!!int x",
    "!!float x",
    "!!timestamp x",
    "!!omap [a]",
    "'" + "x" * 100_000 + "'",
    "\t",
    "\x07",
    "%YAML 3.0\n---",
    "---\na: 1\n---\nb: 2",
    "!!str",
    "!!map []",
    "{*a : 1}",
    "{[1]: 2}",
)


def yaml_changed(extra: Extra | None = None) -> Change:
    """Of a YAML file: a change of its values, one that only YAML can say, a bomb of aliases, or one of its text."""

    def change(rng: random.Random, data: bytes) -> tuple[bytes, str]:
        drawn = rng.random()
        if drawn < 0.15:
            return _text(rng, data)
        tree = yaml.safe_load(data)
        if drawn < 0.3:
            path = trees.somewhere(rng, tree)
            parent = tree
            for key in path[:-1]:
                parent = parent[key]
            parent[path[-1]] = trees.Raw(rng.choice(_YAML))
            shown = parent[path[-1]][:40]
            return trees.dumped(tree, _flow).encode(), f"{'.'.join(map(str, path))} is {shown!r}"
        if drawn < 0.36:
            bomb = rng.choice(_BOMBS)
            return (
                bomb + data.decode() + f"{rng.choice(('name', 'rules', 'export', 'x'))}: *j\n"
            ).encode(), "a bomb of aliases"
        tree, what = trees.changed(rng, tree, extra)
        return trees.dumped(tree, lambda t: yaml.safe_dump(t, sort_keys=False)).encode("utf-8", "surrogatepass"), what

    return change


def _flow(tree: Any) -> str:
    return str(yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=10**6))


def safetensors_changed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Of a safetensors file: of its header, of its length, of the numbers in it, or anywhere."""
    what = rng.choice(("header", "header", "header", "length", "data", "numbers", "bytes"))
    (length,) = struct.unpack("<Q", data[:8])
    head, body = data[8 : 8 + length], data[8 + length :]
    if what == "header":
        tree, said = trees.changed(
            rng, json.loads(head), {"__metadata__": [{"format": "np"}, {"format": 3}, {"x": "y" * 1000}]}
        )
        new = trees.dumped(tree).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(new)) + new + body, f"header: {said}"
    if what == "length":
        new_length = rng.choice((0, 1, length - 1, length + 1, len(data), 10**8 + 1, 2**40, 2**63, 2**64 - 1))
        return struct.pack("<Q", new_length) + data[8:], f"header of {new_length} bytes"
    if what == "data":
        at = rng.randrange(len(body))
        return data[: 8 + length] + body[:at] + bytes([body[at] ^ (1 << rng.randrange(8))]) + body[
            at + 1 :
        ], f"bit of tensor byte {at} flipped"
    if what == "numbers":
        at = rng.randrange(len(body) // 4) * 4
        name, number = rng.choice(
            (
                ("NaN", b"\xff\xff\xff\x7f"),
                ("infinity", b"\x80\x7f\x80\x7f"),
                ("largest", b"\x7f\x7f\x7f\x7f"),
                ("zero", bytes(4)),
            )
        )
        return data[: 8 + length] + body[:at] + number + body[at + 4 :], f"{name} at tensor byte {at}"
    return bytes_changed(rng, data)


def gguf_changed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Of a GGUF file: a count, a length, a type, a value or an offset of its header, or anywhere."""
    from fuzz.gguf_fields import fields

    if rng.random() < 0.2:
        return bytes_changed(rng, data)
    field = rng.choice(fields(data))
    old = int.from_bytes(data[field.at : field.at + field.size], "little")
    wide = 256**field.size
    new = rng.choice(
        (
            0,
            1,
            old + 1,
            old - 1,
            old * 2,
            old // 2,
            old ^ 1 << rng.randrange(8 * field.size),
            wide - 1,
            wide // 2,
            rng.randrange(wide),
        )
    )
    return data[: field.at] + (new % wide).to_bytes(field.size, "little") + data[
        field.at + field.size :
    ], f"{field.name}: {old} is {new % wide}"


def template_changed(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    """Of a chat template: a program that goes on for ever, fills the memory, or is none."""
    if rng.random() < 0.3:
        return _text(rng, data)
    new, what = hostile_template(rng, data.decode())
    return new.encode("utf-8", "surrogatepass"), what


# ---- where a file lies ----------------------------------------------------------------------------------------------

SPARSE = 2**30 + 2**28
"""Bytes of a file that is all hole."""
PLACES = (
    "removed",
    "folder",
    "fifo",
    "dangling link",
    "link in a circle",
    "link to a device",
    "socket",
    "hole",
    "link to a folder",
)


def misplaced(rng: random.Random, file: Path) -> str:
    """Put something else in a file's place; what it is."""
    what = rng.choice(PLACES)
    file.unlink()
    if what == "folder":
        file.mkdir()
    elif what == "fifo":
        os.mkfifo(file)
    elif what == "dangling link":
        file.symlink_to("nowhere")
    elif what == "link in a circle":
        file.symlink_to(file.name)
    elif what == "link to a device":
        file.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/dev/urandom")))
    elif what == "link to a folder":
        file.symlink_to("..")
    elif what == "socket":
        os.mknod(file, 0o140644)  # S_IFSOCK
    elif what == "hole":
        with file.open("wb") as hole:
            hole.truncate(SPARSE)
    return what
