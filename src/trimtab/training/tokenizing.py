"""Rows to token ids and labels, some at a time, in this process or in several: what is found of them adds up.

Rows go out in order, a thousand or a megabyte at once, and come back in order: ids and labels as arrays, and a
`Tally` of what is to be said of them. So the first error is that of the first bad row, however many processes there are,
and no more than two portions for each are on their way.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from threading import Thread
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from trimtab.data.conversations import Given, answer_of, end_of_turns, left_out, rendered
from trimtab.data.learned import Loss, tokens_of_row, tokens_of_text
from trimtab.data.portions import portions
from trimtab.data.rows import Place
from trimtab.data.tokens import Tokens, bare_of, check_ids, head_of
from trimtab.errors import UserError
from trimtab.training.loss import IGNORED

_T = TypeVar("_T")


@dataclass
class Tally:
    """What there is in rows, before any is cut; of several portions of rows the sum."""

    rows: int = 0
    tokens: int = 0
    learned: int = 0
    """Tokens that are learned."""
    longest: int = 0
    """Tokens of the longest row."""
    kept: int = 0
    """Rows that have something to learn."""
    found: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Rows by what is to be said of them: how many, and the first one's number, from 1."""
    lost: int = 0
    """Tokens to learn beyond block_tokens."""
    longest_lost: int = 0
    """Tokens of the longest row that loses some."""
    prompts: tuple[int, int] = (0, 0)
    """Tokens of the shortest and the longest prompt that alone fills a sequence."""
    end: int | None = None
    """The token that ends an answer, by the first conversation that has one."""
    behind: str | None = None
    """What follows that answer; None where no row has one."""

    def note(self, what: str, number: int) -> None:
        """Something is to be said of a row."""
        count, first = self.found.get(what, (0, number))
        self.found[what] = (count + 1, min(first, number))

    def count(self, what: str) -> int:
        """Rows of which that is to be said."""
        return self.found.get(what, (0, 0))[0]

    def first(self, *what: str) -> int:
        """The first row of which any of that is to be said."""
        return min(self.found[name][1] for name in what if name in self.found)

    def prompt(self, length: int) -> None:
        """A prompt alone fills a sequence."""
        least, most = self.prompts
        self.prompts = (min(least or length, length), max(most, length))

    def add(self, other: "Tally") -> None:
        """The rows behind these."""
        for name in ("rows", "tokens", "learned", "kept", "lost"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.longest = max(self.longest, other.longest)
        self.longest_lost = max(self.longest_lost, other.longest_lost)
        for what, (count, first) in other.found.items():
            there, before = self.found.get(what, (0, first))
            self.found[what] = (there + count, min(before, first))
        if other.prompts[1]:
            self.prompt(other.prompts[0])
            self.prompt(other.prompts[1])
        if self.behind is None:
            self.end, self.behind = other.end, other.behind

    def as_json(self) -> dict[str, Any]:
        """To be stored."""
        return asdict(self)

    @classmethod
    def of_json(cls, stored: Mapping[str, Any]) -> "Tally":
        """What `as_json` gave."""
        found = {what: (count, first) for what, (count, first) in stored["found"].items()}
        return cls(**{**stored, "found": found, "prompts": tuple(stored["prompts"])})


class Row(NamedTuple):
    """A row on its way."""

    number: int
    """From 1."""
    values: Mapping[str, Any]
    where: Place


class Portion(NamedTuple):
    """What became of some rows."""

    lengths: NDArray[np.int32]
    """Of the rows that have something to learn."""
    ids: NDArray[np.int32]
    """One after another."""
    labels: NDArray[np.int32]
    tally: Tally


@dataclass(frozen=True)
class Tokenizing:
    """What is done with rows; can be sent to another process."""

    tokenizer: Any
    vocabulary: int
    """Rows of the model's embedding."""
    loss: Loss
    block_tokens: int
    packing: str
    talk: bool
    """Whether rows are conversations."""

    def __call__(self, rows: list[Row]) -> Portion:
        """Tokenize, check and count."""
        tally, head = Tally(end=self.tokenizer.eos_token_id), head_of(self.tokenizer)
        length = None if self.packing == "wrapped" else self.block_tokens
        kept = list[Tokens]()
        for row, tokens in zip(rows, self._all(rows, head, tally), strict=True):
            self._count(tokens, row.number, tally)
            if tokens.learned(length):
                kept.append(tokens.compact())
        tally.kept = len(kept)
        none = [np.empty(0, np.int32)]
        return Portion(
            np.array([len(tokens.ids) for tokens in kept], np.int32),
            np.concatenate([*none, *(np.asarray(tokens.ids, np.int32) for tokens in kept)]),
            np.concatenate([*none, *(np.asarray(tokens.labels(IGNORED), np.int32) for tokens in kept)]),
            tally,
        )

    def _all(self, rows: list[Row], head: list[int], tally: Tally) -> Iterator[Tokens]:
        """Of every row, checked."""
        if "text" not in rows[0].values:
            yield from (self._tokens(row, head, tally) for row in rows)
            return
        texts = bare_of([row.values["text"] for row in rows], self.tokenizer, head)
        for row, ids in zip(rows, texts, strict=True):
            found = tokens_of_text(ids, self.tokenizer.eos_token_id, head)
            check_ids(found.ids, self.tokenizer, self.vocabulary, row.where)  # what begins and ends it, too
            yield found

    def _tokens(self, row: Row, head: list[int], tally: Tally) -> Tokens:
        number, values, where = row
        text = None
        if self.talk:
            text = rendered(values, self.tokenizer, where)
            self._look_at(values, text, number, tally)
        elif not answer_of(values).strip():
            tally.note("empty", number)
        found = tokens_of_row(values, self.tokenizer, where, head, text, self.loss)
        check_ids(found.ids, self.tokenizer, self.vocabulary, where)
        if found.merged:
            tally.note("merged", number)
        return found

    def _look_at(self, values: Mapping[str, Any], text: str, number: int, tally: Tally) -> None:
        """Note what becomes of a conversation in its template."""
        for what, is_so in zip(("answer", "before"), left_out(values, text), strict=True):
            if is_so:
                tally.note(what, number)
        if not answer_of(values)[-1]["content"].strip():
            if not Given.of(values).called(-1):
                tally.note("empty", number)
        elif tally.behind is None:
            tally.end, tally.behind = end_of_turns(values, text, self.tokenizer)

    def _count(self, tokens: Tokens, number: int, tally: Tally) -> None:
        whole, kept, length = tokens.learned(), tokens.learned(self.block_tokens), len(tokens.ids)
        tally.rows, tally.tokens, tally.learned = tally.rows + 1, tally.tokens + length, tally.learned + whole
        tally.longest = max(tally.longest, length)
        if not whole:
            tally.note("unlearned", number)
        elif self.packing != "wrapped" and kept < whole:
            tally.note("cut" if kept else "gone", number)
            tally.lost, tally.longest_lost = tally.lost + whole - kept, max(tally.longest_lost, length)
            if not kept:
                tally.prompt(max(1, tokens.learned_from))


def worked(work: Callable[[list[Row]], _T], rows: Iterable[Row], processes: int = 1) -> Iterator[_T]:
    """What becomes of rows, some at a time, in order.

    Args:
        work: what is done with some; can be sent to another process.
        rows: in order.
        processes: how many do it; more than one are started fresh (spawned), with the libraries that they need.

    Raises:
        UserError: of the first row that has something wrong.
    """
    if processes == 1:
        yield from map(work, portions(rows, _values))
        return
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawned, initializer=_take, initargs=(work,)) as pool:
        coming: deque[Future[_T]] = deque()
        try:
            for portion in portions(rows, _values):
                coming.append(pool.submit(_made, portion))
                if len(coming) == 2 * processes:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"data.num_proc: one of {processes} processes that tokenize was ended, mostly for want of memory; lower it"
            ) from error
        finally:
            for future in coming:
                future.cancel()


def _values(row: Row) -> Iterable[Any]:
    return row.values.values()


_mine: list[Callable[[list[Row]], Any]] = []
"""What this process was started for."""


def _take(work: Callable[[list[Row]], Any]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; what started this process ends it
    Thread(target=_leave_with_parent, daemon=True).start()
    _mine.append(work)


def _leave_with_parent() -> None:
    """Of a parent that was killed this process would wait for rows for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _made(rows: list[Row]) -> Any:
    return _mine[0](rows)
