"""Hostile changes of what JSON and YAML hold: mappings, lists, numbers, words.

Every change is drawn from a `random.Random`, so that a seed makes it again, and says in a few words what it did. What no
Python value can say (a number of 5,000 digits, a list 100,000 deep, half of a surrogate pair) is a `Raw`: text that stands
in the file as it is.
"""

import copy
import json
import random
from collections.abc import Callable
from typing import Any


class Raw(str):
    """Text of a file, where a value would stand."""


DEEP = 100_000
"""Lists in one another that no reader is to follow."""
RAW = (
    Raw("1" * 5000),
    Raw("-" + "9" * 5000),
    Raw("1e999"),
    Raw("-1e999"),
    Raw("NaN"),
    Raw("1" * 400 + ".5"),
    Raw('"\\ud800"'),
    Raw('"\\u0000"'),
    Raw("[" * DEEP + "]" * DEEP),
    Raw('{"a":' * DEEP + "1" + "}" * DEEP),
)
ANYTHING: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    3,
    7,
    2**31 - 1,
    2**31,
    2**32,
    2**63,
    2**64,
    10**9,
    10**18,
    -(2**63),
    0.5,
    -0.0,
    1e-300,
    1e300,
    "",
    " ",
    "x",
    "null",
    "0",
    "1",
    "true",
    "auto",
    "float32",
    "/dev/zero",
    "/etc/passwd",
    "../../etc/passwd",
    "..",
    "a\nb",
    "\u202e\u0000",
    "x" * 100_000,
    [],
    {},
    [[]],
    [None],
    [0],
    ["x"],
    {"x": 1},
    {"": None},
    [1, 2, 3],
    list(range(1000)),
)


def _of_int(value: int) -> list[Any]:
    return [
        value + 1,
        value - 1,
        -value,
        value * 2,
        value // 2,
        value * 1000,
        value + 0.5,
        float(value),
        str(value),
        [value],
    ]


def _of_float(value: float) -> list[Any]:
    return [-value, value * 2, value / 2, value * 1e6, 0.0, int(value), str(value), [value]]


def _of_text(value: str) -> list[Any]:
    return [
        *(value + "x", value[:-1], value.upper(), value * 2, f"../{value}", f"/{value}", value[::-1], f"{value}\n"),
        *([value], {value: value}, len(value)),
    ]


def _of_list(value: list[Any]) -> list[Any]:
    return [
        value[1:],
        value[:-1],
        value * 2,
        value[::-1],
        [value],
        dict(enumerate(map(str, value))),
        [*value, None],
        value * 100,
    ]


def _of_mapping(value: dict[str, Any]) -> list[Any]:
    return [
        list(value),
        list(value.items()),
        [value],
        {"x": value},
        {k.upper(): v for k, v in value.items()},
        str(value),
    ]


_NEAR: dict[type, Callable[[Any], list[Any]]] = {
    int: _of_int,
    float: _of_float,
    str: _of_text,
    list: _of_list,
    dict: _of_mapping,
    bool: lambda value: [not value, int(value), str(value).lower(), [value]],
}


def hostile(rng: random.Random, old: Any) -> Any:
    """A value in place of another: near it, of another type, or one that is wrong anywhere."""
    near = _NEAR.get(type(old))
    if near is not None and rng.random() < 0.5:
        return rng.choice(near(old))
    return rng.choice(RAW) if rng.random() < 0.15 else copy.deepcopy(rng.choice(ANYTHING))


def somewhere(rng: random.Random, tree: Any) -> list[Any]:
    """The keys that lead to a node other than the root; near the root more often than in a long list."""
    path: list[Any] = []
    while isinstance(tree, dict | list) and tree:
        key = rng.choice(list(tree)) if isinstance(tree, dict) else rng.randrange(len(tree))
        path.append(key)
        tree = tree[key]
        if rng.random() < 0.35:
            break
    return path


def _named(path: list[Any]) -> str:
    return ".".join(str(part)[:40] for part in path)


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Raw) else repr(value)
    return text if len(text) <= 60 else f"{text[:30]}... ({len(text)} characters)"


def changed(rng: random.Random, tree: Any, extra: dict[str, list[Any]] | None = None) -> tuple[Any, str]:
    """The tree with one change, and what it is.

    Args:
        rng: draws the change.
        tree: of JSON values; it is not changed itself.
        extra: keys that mean something where this tree is read, with values to try.
    """
    tree = copy.deepcopy(tree)
    if isinstance(tree, dict) and extra and rng.random() < 0.25:
        key = rng.choice(list(extra))
        tree[key] = copy.deepcopy(rng.choice([*extra[key], hostile(rng, extra[key][0])]))
        return tree, f"{key} = {_shown(tree[key])}"
    path = somewhere(rng, tree)
    if not path:
        value = hostile(rng, tree)
        return value, f"all = {_shown(value)}"
    *above, last = path
    parent = tree
    for key in above:
        parent = parent[key]
    what = rng.choices(("set", "remove", "rename", "swap", "copy"), (60, 15, 7, 10, 8))[0]
    if what == "remove":
        del parent[last]
        return tree, f"without {_named(path)}"
    if what == "rename" and isinstance(parent, dict):
        new = rng.choice([f"{last}x", last[:-1], last.upper(), "", "x" * 1000, "../x", rng.choice(list(parent))])
        parent[new] = parent.pop(last)
        return tree, f"{_named(path)} named {_shown(new)}"
    if what in ("swap", "copy"):
        other = rng.choice(list(parent)) if isinstance(parent, dict) else rng.randrange(len(parent))
        if what == "swap":
            parent[last], parent[other] = parent[other], parent[last]
        else:
            parent[last] = copy.deepcopy(parent[other])
        return tree, f"{_named(path)} {'and' if what == 'swap' else 'as'} {_named([*above, other])}"
    parent[last] = hostile(rng, parent[last])
    return tree, f"{_named(path)} = {_shown(parent[last])}"


def dumped(tree: Any, dump: Callable[[Any], str] = json.dumps) -> str:
    """A tree as text, each `Raw` as it is."""
    raw: dict[str, str] = {}

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            mark = f"@raw{len(raw)}@"
            raw[mark] = str(value)
            return mark
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, list) else value

    text = dump(marked(tree))
    for mark, instead in raw.items():
        text = text.replace(f'"{mark}"', instead).replace(f"'{mark}'", instead).replace(mark, instead)
    return text
