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

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.data.digests import joined, of_code, of_rows
from trimtab.data.forms import RENDERING, listed
from trimtab.data.stored import each, find, mapped, scratch, store
from trimtab.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

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
_AT_ONCE = 1 << 20
"""Pieces of held-out texts, about, that are sorted at once."""
_BASE = 0x9E3779B97F4A7C15
"""An odd number, so that it has an inverse modulo 2^64."""

_Pieces = NDArray[np.uint64]


class Split(NamedTuple):
    """Numbers of rows, from 0."""

    training: NDArray[np.int64]
    held_out: list[int]
    dropped: int


class Contents(Sequence[str]):
    """What every row of a data set says, made when it is asked for: all of it at once would fill memory.

    Args:
        rows: of `load_rows`, or several of these.
    """

    def __init__(self, rows: Dataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return content_of(self._rows[index])

    def __iter__(self) -> Iterator[str]:
        return map(content_of, each(self._rows))


class _Some(Sequence[str]):
    """Those of some contents that have the numbers, which rise."""

    def __init__(self, contents: Sequence[str], numbers: NDArray[np.int64]) -> None:
        self._contents, self._numbers = contents, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        return self._contents[int(self._numbers[index])]

    def __iter__(self) -> Iterator[str]:
        numbers = iter(self._numbers)
        wanted = next(numbers, None)
        for number, content in enumerate(self._contents):
            if number == wanted:
                yield content
                wanted = next(numbers, None)


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
    numbers = np.fromiter(map(share_of, contents), np.float64, len(contents))
    chosen = numbers < share
    if not chosen.any():  # of few rows none may fall below it
        chosen = numbers == numbers.min()
    held_out, training = np.flatnonzero(chosen).tolist(), np.flatnonzero(~chosen)
    if not len(training):
        raise UserError(
            f"data.holdout: {share} leaves none of {len(contents)} rows to train on; lower it, or set it to 0"
        )
    near = near_duplicates([contents[n] for n in held_out], _Some(contents, training))
    kept = [n for i, n in enumerate(held_out) if i not in near]
    return Split(training, kept, len(held_out) - len(kept))


def parted(rows: Dataset, share: float) -> Split:
    """The same of a data set; of one that is mapped it is found once, and stored."""
    if not mapped(rows):
        return apart(Contents(rows), share)
    key = joined("split", of_rows(rows), share, of_code())
    stored = find(key)
    if stored is None:
        found = apart(Contents(rows), share)
        stored = store(key, {"training": found.training, "held_out": found.held_out}, {"dropped": found.dropped})
    training, held_out = (stored.rows.with_format("numpy")[0][name] for name in ("training", "held_out"))
    return Split(training, held_out.tolist(), stored.about["dropped"])


def near_duplicates(held_out: Sequence[str], training: Sequence[str]) -> set[int]:
    """Numbers of held-out texts, from 0, that are near to a text of training."""
    with scratch() as room:
        return _near(_Index.of(held_out, training, room), training)


class _Index(NamedTuple):
    """The pieces of held-out texts but for those that many texts have: 12 bytes for each, which are mapped if many."""

    keys: _Pieces
    """Sorted."""
    owners: NDArray[np.int32]
    """The text that each is of."""
    sizes: NDArray[np.int64]
    """How many each text has."""
    common: _Pieces
    """Those that many have, sorted."""

    @classmethod
    def of(cls, held_out: Sequence[str], training: Sequence[str], room: Any) -> _Index:
        """Put into classes of their first bits, each of which is sorted by itself: few are held at once, however many.

        Args:
            held_out: texts.
            training: texts, of which some are asked which pieces many have.
            room: of `stored.scratch`.
        """
        texts = [*held_out, *(training[i] for i in range(0, len(training), -(-len(training) // _SAMPLED)))]
        bits = (sum(len(text.encode()) + _PIECE for text in texts) // _AT_ONCE).bit_length()
        kept = None if bits else list(map(_pieces, texts))  # of many they are made twice: to be counted, and to be put
        counts = sum((_in_classes(p, bits) for p in kept or map(_pieces, texts)), np.zeros(1 << bits, np.int64))
        ends = counts.cumsum()
        keys, owners, free = room(int(ends[-1]), np.uint64), room(int(ends[-1]), np.int32), ends - counts
        for number, pieces in enumerate(kept or map(_pieces, texts)):
            there = _in_classes(pieces, bits)
            to = np.repeat(free - (there.cumsum() - there), there) + np.arange(len(pieces))  # pieces are sorted
            keys[to], owners[to] = pieces, number
            free += there
        sizes, common, filled = np.zeros(len(held_out), np.int64), list[_Pieces](), 0
        for end, count in zip(ends, counts, strict=True):
            own, of = np.array(keys[end - count : end]), np.array(owners[end - count : end])
            common.append(_common(own, len(texts)))
            left = (of < len(held_out)) & ~np.isin(own, common[-1])
            own, of = own[left], of[left]
            order = np.argsort(own, kind="stable")
            keys[filled : filled + len(own)], owners[filled : filled + len(own)] = own[order], of[order]
            sizes, filled = sizes + np.bincount(of, minlength=len(held_out)), filled + len(own)
        return cls(keys[:filled], owners[:filled], sizes, np.concatenate(common))


def _in_classes(pieces: _Pieces, bits: int) -> NDArray[np.int64]:
    """How many pieces there are of each class, by that many of their first bits."""
    if not bits:
        return np.array([len(pieces)])
    return np.bincount((pieces >> np.uint64(64 - bits)).astype(np.int64), minlength=1 << bits)


def _near(index: _Index, training: Sequence[str]) -> set[int]:
    keys, owners, sizes, common = index
    found = np.zeros(len(sizes), bool)
    if not len(keys):
        return set()
    for text in training:
        own = _pieces(text)
        first = np.searchsorted(keys, own)
        hit = keys[np.minimum(first, len(keys) - 1)] == own
        if not hit.any():
            continue
        first = first[hit]
        counts = np.searchsorted(keys, own[hit], "right") - first
        at = np.repeat(first, counts) + np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
        of, shared = np.unique(owners[at], return_counts=True)
        if (shared >= _NEAR * sizes[of]).any():  # else the pieces of both together are too many, too
            size = len(own) - int(np.isin(own, common).sum())
            found[of] |= shared >= _NEAR * (sizes[of] + size - shared)
    return set(map(int, np.flatnonzero(found)))


def _common(pieces: _Pieces, texts: int) -> _Pieces:
    """Pieces that many of so many texts have."""
    each, counts = np.unique(pieces, return_counts=True)
    return each[counts > max(2, _COMMON * texts)]


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
