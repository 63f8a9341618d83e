"""What is held out: rows chosen by what they hold, and none that training has nearly seen.

A row's side follows from the hash of its own content, so that it stays on it when rows are added, removed or moved, in
every run and on every machine; what is there twice is twice on one side.

Near duplicates (a word changed, a line added) fall on both sides, and would have a model measured on what it learned by
heart. Two texts are near if they share 70 % of their pieces of 20 bytes (Jaccard), after case and white space are levelled:
of all rows, against each one held out, with an index of the held-out pieces. Pieces that many rows have (a system prompt,
an instruction that is always the same) say nothing about two of them, and do not count. A held-out row that is near to a
trained one is dropped: training keeps all it has, and where everything is alike there is nothing left to measure on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.data.forms import RENDERING, listed
from trimtab.errors import UserError

ROWS = 500
"""Rows from which on a share is held out if nothing is said: of fewer, a fiftieth measures nothing."""
SHARE = 0.02
"""And that share."""
_PIECE = 20
_NEAR = 0.7
_COMMON = 0.05
"""Share of the rows from which on a piece says nothing."""
_SAMPLED = 256
"""Rows of training that are asked, besides those held out, which pieces many have."""
_BASE = 0x9E3779B97F4A7C15
"""An odd number, so that it has an inverse modulo 2^64."""

_Pieces = NDArray[np.uint64]


class Split(NamedTuple):
    """Numbers of rows, from 0."""

    training: list[int]
    held_out: list[int]
    dropped: int


def content_of(row: Mapping[str, Any]) -> str:
    """All that a row says, level in case and white space."""
    parts = [m if isinstance(m, str) else m["content"] for k in ("text", "prompt", "completion", "chosen", "rejected")
             for m in listed(row.get(k))]  # fmt: skip
    rendering = row.get(RENDERING) or "{}"  # the same of a row that has none, whether others have one or not
    return " ".join("\n".join([*parts, "" if rendering == "{}" else rendering]).lower().split())


def share_of(content: str, what: str = "holdout") -> float:
    """A number from 0 to 1 that follows from a content alone; another one for another purpose."""
    return int.from_bytes(blake2b(content.encode(), digest_size=8, person=what.encode()).digest(), "big") / 2**64


def apart(contents: Sequence[str], share: float) -> Split:
    """Which rows are held out, and which are dropped for being near to a row that is not.

    Args:
        contents: of `content_of`, of every row.
        share: of the rows, about.

    Raises:
        UserError: if no row would be left on one side.
    """
    numbers = [share_of(content) for content in contents]
    held_out = [n for n, number in enumerate(numbers) if number < share]
    if not held_out:  # of few rows none may fall below it
        least = min(numbers)
        held_out = [n for n, number in enumerate(numbers) if number == least]
    chosen = set(held_out)
    training = [n for n in range(len(contents)) if n not in chosen]
    if not training:
        raise UserError(
            f"data.holdout: {share} leaves none of {len(contents)} rows to train on; lower it, or set it to 0"
        )
    near = near_duplicates([contents[n] for n in held_out], [contents[n] for n in training])
    kept = [n for i, n in enumerate(held_out) if i not in near]
    return Split(training, kept, len(held_out) - len(kept))


def near_duplicates(held_out: Sequence[str], training: Sequence[str]) -> set[int]:
    """Numbers of held-out texts, from 0, that are near to a text of training."""
    pieces = [_pieces(text) for text in held_out]
    some = [_pieces(training[i]) for i in range(0, len(training), -(-len(training) // _SAMPLED))]
    common = _common([*pieces, *some])
    pieces = [p[~np.isin(p, common)] for p in pieces]
    sizes = np.array([len(p) for p in pieces])
    keys = np.concatenate(pieces) if pieces else np.empty(0, np.uint64)
    owners = np.repeat(np.arange(len(pieces)), sizes)
    order = np.argsort(keys, kind="stable")
    keys, owners = keys[order], owners[order]
    if not len(keys):
        return set()
    found = np.zeros(len(pieces), bool)
    for text in training:
        own = _pieces(text)
        first = np.searchsorted(keys, own)
        hit = keys[np.minimum(first, len(keys) - 1)] == own
        if not hit.any():
            continue
        first = first[hit]
        counts = np.searchsorted(keys, own[hit], "right") - first
        at = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        shared = np.bincount(owners[at], minlength=len(pieces))
        if (shared >= _NEAR * sizes)[shared > 0].any():  # else the pieces of both together are too many, too
            size = len(own) - int(np.isin(own, common).sum())
            found |= (shared > 0) & (shared >= _NEAR * (sizes + size - shared))
    return set(map(int, np.flatnonzero(found)))


def _common(some: Sequence[_Pieces]) -> _Pieces:
    """Pieces that many texts have."""
    if not some:
        return np.empty(0, np.uint64)
    pieces, counts = np.unique(np.concatenate(some), return_counts=True)
    return pieces[counts > max(2, _COMMON * len(some))]


def _pieces(text: str) -> _Pieces:
    """Hashes of every 20 bytes that follow one another, each once.

    With C_i = sum of b_j r^j for j < i, those of b_i .. b_(i+19) are (C_(i+20) - C_i) r^-i, modulo 2^64 as integers are.
    """
    raw = np.frombuffer(text.encode().ljust(_PIECE, b"\0"), np.uint8).astype(np.uint64)
    powers, inverses = _powers(1 << max(10, len(raw).bit_length()))
    sums = np.concatenate(
        [np.zeros(1, np.uint64), np.cumsum((raw + np.uint64(1)) * powers[: len(raw)], dtype=np.uint64)]
    )
    return np.unique((sums[_PIECE:] - sums[:-_PIECE]) * inverses[: len(raw) - _PIECE + 1])


@lru_cache(maxsize=32)
def _powers(count: int) -> tuple[_Pieces, _Pieces]:
    """The powers of the base and of its inverse, from the 0th."""

    def of(base: int) -> _Pieces:
        each = np.full(count, base, np.uint64)
        each[0] = 1
        return np.cumprod(each, dtype=np.uint64)

    return of(_BASE), of(pow(_BASE, -1, 1 << 64))
