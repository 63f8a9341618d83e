"""Rows some at a time: a thousand, or about a megabyte, whichever comes first."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
PORTION_ROWS, PORTION_LETTERS = 1000, 1 << 20


def portions(rows: Iterable[_T], values: Callable[[_T], Iterable[Any]]) -> Iterator[list[_T]]:
    """Rows some at a time, in order.

    Args:
        rows: of any kind.
        values: what a row holds.
    """
    some, letters = list[_T](), 0
    for row in rows:
        some.append(row)
        letters += sum(map(_letters, values(row)))
        if len(some) >= PORTION_ROWS or letters >= PORTION_LETTERS:
            yield some
            some, letters = [], 0
    if some:
        yield some


def batches(rows: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, list[Any]]]:
    """Rows of the same keys as columns, some at a time."""
    for some in portions(rows, lambda row: row.values()):
        yield {key: [row[key] for row in some] for key in some[0]}


def _letters(value: Any) -> int:
    if isinstance(value, list):
        return sum(len(message["content"]) for message in value)
    return len(value) if isinstance(value, str) else getattr(value, "nbytes", 8)
