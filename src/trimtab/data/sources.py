"""Several sources as one set of rows: how often each counts, and what of it is held out.

path: [a.jsonl, {path: b.csv, weight: 2}]       the rows of b are there twice, those of a once
weight: 0.5                                      of every two rows one, chosen by what they hold
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trimtab.data.forms import RENDERING
from trimtab.data.rows import Place, conversational, load_rows, unused_keys
from trimtab.data.split import ROWS, SHARE, Contents, parted, share_of
from trimtab.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

ORIGIN = "origin"
"""Column that says which source a row is of, and which row of it; only where rows are not simply those of one source."""


class Source(NamedTuple):
    """Where rows come from; fields as of `load_rows`."""

    path: str
    split: str = "train"
    subset: str | None = None
    limit: int | None = None
    ignore: tuple[str, ...] = ()
    columns: Mapping[str, str] | None = None
    weight: float = 1.0
    """How often each of its rows counts."""
    stream: bool = False
    """Whether rows of the hub are taken as they come."""

    @property
    def options(self) -> dict[str, Any]:
        """All but its path, as `load_rows` takes it."""
        kept = {"split": self.split, "subset": self.subset, "limit": self.limit, "ignore": self.ignore}
        return kept | {"columns": self.columns or {}, "stream": self.stream}

    def rows(self) -> Dataset:
        """All of them, each once."""
        return load_rows(self.path, **self.options)


@dataclass(frozen=True)
class Texts:
    """What training reads."""

    rows: Dataset
    """To train on, in TRL's forms."""
    held_out: Dataset | None
    """Rows that were split off to measure on; None for none."""
    sources: tuple[Source, ...]
    counts: tuple[int, ...]
    """Rows that each source has."""
    near_duplicates: int = 0
    """Rows that are in neither: they would have been held out, but nearly the same stands in what is trained on."""

    def notes(self) -> tuple[str, ...]:
        """What is to be known before training, a line each."""
        if self.held_out is None and not self.near_duplicates:
            return ()
        there = 0 if self.held_out is None else len(self.held_out)
        line = f"held out: {there:,} of {sum(self.counts):,} rows, by what they hold (data.holdout: 0 trains on all)"
        if self.near_duplicates:
            line += f"; {self.near_duplicates:,} more were dropped, since nearly the same is trained on"
        return (line,)


def place_of(sources: Sequence[Source], number: int, origin: Mapping[str, int] | None = None) -> Place:
    """Where a row stands in its source, from its number and its value of the column `ORIGIN`, if it has one."""
    source = sources[0 if origin is None else origin["source"]]
    return Place(source.path, source.split, number if origin is None else origin["row"], source.subset, source.stream)


def mixed(sources: Sequence[Source], holdout: float | None = 0.0) -> Texts:
    """The rows of all sources, each as often as its weight says, and what is held out of them.

    Args:
        sources: at least one; their rows are of one kind (texts, conversations, ...).
        holdout: the share of the rows to split off, each once whatever its weight; 0 for none, None for a fiftieth of many.

    Raises:
        UserError: for rows of different kinds, or a share that leaves no rows on one side.
    """
    parts = [source.rows() for source in sources]
    counts = tuple(map(len, parts))
    automatic = holdout is None
    if holdout is None:
        holdout = SHARE if sum(counts) >= ROWS else 0.0
    if len(parts) == 1 and not holdout and sources[0].weight == 1:
        return Texts(parts[0], None, tuple(sources), counts)
    whole = _together(sources, parts)
    split = parted(whole, holdout) if holdout else None
    if automatic and split is not None and not split.held_out:
        split = None  # nothing would be measured on, so nothing is lost for it
    kept = np.arange(len(whole)) if split is None else split.training
    indices = np.repeat(kept, _times(sources, counts, Contents(whole))[kept])
    if not len(indices):
        raise UserError("data.path: the weights leave no row to train on; raise them")
    held_out = whole.select(split.held_out) if split is not None and split.held_out else None
    return Texts(whole.select(indices), held_out, tuple(sources), counts, 0 if split is None else split.dropped)


def _times(sources: Sequence[Source], counts: Sequence[int], contents: Sequence[str]) -> NDArray[np.int64]:
    """How often each row is there."""
    weights = np.repeat([source.weight for source in sources], counts)
    times = weights.astype(np.int64)
    if (weights > times).any():
        shares = np.fromiter((share_of(content, "weight") for content in contents), np.float64, len(contents))
        times += shares < weights - times
    return times


def _together(sources: Sequence[Source], parts: list[Dataset]) -> Dataset:
    """One data set of all, with the column `ORIGIN`."""
    from datasets import concatenate_datasets

    made: list[Any] = []
    first = set(parts[0].column_names) - {RENDERING}
    rendered = any(RENDERING in part.column_names for part in parts)
    for number, (source, part) in enumerate(zip(sources, parts, strict=True)):
        columns = set(part.column_names) - {RENDERING}
        if columns != first or any(part.features[c] != parts[0].features[c] for c in columns):
            raise UserError(
                f"data.path: rows of {source.path} are {_kind(part)}, those of {sources[0].path} {_kind(parts[0])}; bring "
                "them into one form (data.columns renames keys), or train on one after the other"
            )
        if rendered and RENDERING not in part.column_names:
            part = part.add_column(RENDERING, ["{}"] * len(part))
        part = part.add_column(ORIGIN, _origins(number, len(part)))
        made.append(part.select_columns([*sorted(first), *([RENDERING] if rendered else []), ORIGIN]))
    whole = concatenate_datasets(made)
    unused = sorted({key for part in parts for key in unused_keys(part).split(", ") if key})
    whole.info.description = ", ".join(unused)
    return whole


def _origins(source: int, rows: int) -> Any:
    """The column `ORIGIN` of a source, of 16 bytes a row."""
    import pyarrow  # type: ignore[import-untyped, unused-ignore]

    columns = [pyarrow.array(np.full(rows, source)), pyarrow.array(np.arange(1, rows + 1))]
    return pyarrow.StructArray.from_arrays(columns, names=["source", "row"])


def _kind(part: Dataset) -> str:
    names = "{" + ", ".join(name for name in part.column_names if name != RENDERING) + "}"
    return f"{names} of messages" if conversational(part) else names
