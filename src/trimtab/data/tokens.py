"""From text to token ids: for training, for measuring and for asking, by the same functions.

A text begins as the tokenizer begins every text, once: Llama, Mistral and Gemma were never shown a text without their
beginning-of-sequence token, nor one with two, and many texts have it written out (`<s>Once upon a time.`). A conversation
begins as its chat template says, since servers add nothing to what a template renders. Which tokens of a row are learned is
in `learned`.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab.errors import UserError

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
"""From and to, the end not included."""


def head_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before every text: one beginning-of-sequence token, as a rule, or nothing."""
    plain, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return list(whole[: next(starts, 0)])


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase, head: list[int] | None = None) -> list[int]:
    """A text's tokens, begun once and not ended.

    Args:
        text: with or without the beginning-of-sequence token written out.
        tokenizer: the model's.
        head: of `head_of`, if it is at hand.
    """
    head = head_of(tokenizer) if head is None else head
    return head + bare(text, tokenizer, head)


def bare(text: str, tokenizer: PreTrainedTokenizerBase, head: list[int]) -> list[int]:
    """A text's tokens without those that begin it, written out or not."""
    return bare_of([text], tokenizer, head)[0]


def bare_of(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, head: list[int]) -> list[list[int]]:
    """The same of several texts, in one call: twice as quick as one after another."""
    # verbose=False: a document longer than the model's context is expected here.
    found = [list(ids) for ids in tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]]
    for number, ids in enumerate(found):
        while head and ids[: len(head)] == head:
            ids = found[number] = ids[len(head) :]
    return found


class Encoded:
    """A rendered conversation's tokens, and where each stands in its text.

    Args:
        text: of a chat template.
        tokenizer: the model's.
        head: what may stand at its beginning once at most: a template writes it, and the first message may have it, too.
    """

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase, head: list[int]) -> None:
        self.text, self._tokenizer = text, tokenizer
        options = {"return_offsets_mapping": True} if tokenizer.is_fast else {}
        found = tokenizer(text, add_special_tokens=False, verbose=False, **options)
        self._all: list[int] = list(found["input_ids"])
        self._places: list[Span] | None = found.get("offset_mapping")
        self._skipped = 0
        while head and self._all[self._skipped : self._skipped + 2 * len(head)] == head * 2:
            self._skipped += len(head)
        self.ids = self._all[self._skipped :]
        self._ends: list[int] | None = None
        if self._places is not None:  # where the ends do not rise (they do in every tokenizer we know) none is searched
            ends = [end for _, end in self._places]
            self._ends = ends if all(a <= b for a, b in pairwise(ends)) else None

    def tokens(self, start: int, end: int) -> Span:
        """The tokens that hold any of the characters from `start` to `end`, which may share their first and last one."""
        if self._ends is None or self._places is None:
            first, (last, broken) = self._before(start)[0], self._before(end)
            last += broken
        else:
            first = bisect_right(self._ends, start)
            last = bisect_right(self._ends, end)
            last += last < len(self._places) and self._places[last][0] < end
        return max(0, first - self._skipped), max(0, last - self._skipped)

    def apart(self, other: str) -> int:
        """The character from which on the tokens of another text are other ones."""
        if self.text.startswith(other):
            return len(other)
        ids = list(self._tokenizer(other, add_special_tokens=False, verbose=False)["input_ids"])
        shared = shared_head(ids, self._all)
        if self._places is not None:
            return self._places[shared][0] if shared < len(self._places) else len(self.text)
        at = next((i for i, (a, b) in enumerate(zip(self.text, other, strict=False)) if a != b), len(self.text))
        while at and self._before(at)[1]:  # back to where a token begins
            at -= 1
        return at

    def special_at(self, at: int) -> int | None:
        """Where the special token ends that stands at a character; None if none does."""
        special = set(self._tokenizer.all_special_ids)
        special |= {i for i, token in self._tokenizer.added_tokens_decoder.items() if token.special}
        for id_, (start, end) in zip(self._all, self._places or (), strict=False):
            if start >= at:
                return end if id_ in special and not self.text[at:start].strip() else None
        return None

    def _before(self, at: int) -> tuple[int, bool]:
        """Tokens before a character, and whether it stands inside of one."""
        ids = list(self._tokenizer(self.text[:at], add_special_tokens=False, verbose=False)["input_ids"])
        shared = shared_head(ids, self._all)
        return shared, shared < len(ids)


def shared_head(one: Sequence[int], other: Sequence[int]) -> int:
    """Tokens that two sequences begin with."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


class Tokens(NamedTuple):
    """A row as the model is shown it."""

    ids: Sequence[int]
    spans: tuple[Span, ...]
    """The tokens that are learned, in order; all others are given. The first of all cannot be learned."""
    merged: bool = False
    """Whether the prompt alone has other tokens than at the head of prompt and answer."""

    @property
    def learned_from(self) -> int:
        """The first token that is learned; all of them, where none is."""
        return self.spans[0][0] if self.spans else len(self.ids)

    def learned(self, length: int | None = None) -> int:
        """Tokens that are learned of the first `length`."""
        there = len(self.ids) if length is None else min(length, len(self.ids))
        return sum(max(0, min(end, there) - max(1, start)) for start, end in self.spans)

    def labels(self, ignored: int) -> list[int]:
        """The token ids, `ignored` where they are given."""
        made = [ignored] * len(self.ids)
        for start, end in self.spans:
            made[start:end] = self.ids[start:end]
        return made

    def compact(self) -> Tokens:
        """The same in four bytes a token, where a list takes up to 36: all rows of a data set are held at once."""
        return Tokens(array("i", self.ids), self.spans, self.merged)


def check_ids(ids: Sequence[int], tokenizer: Any, vocabulary: int, where: object) -> None:
    """Raise a `UserError` for a token that the model's embedding has no row for."""
    if max(ids, default=0) < vocabulary:
        return
    id_ = next(i for i in ids if i >= vocabulary)
    raise UserError(
        f"data, {where}: holds {tokenizer.convert_ids_to_tokens(id_)!r}, token {id_} of the tokenizer, but the model's "
        f"embedding has {vocabulary} rows; take the model's own tokenizer, or resize the model's embeddings "
        "(`model.resize_token_embeddings`) before it is tuned"
    )


def sequence_features() -> Features:
    """The columns that TRL takes as they are: `input_ids` and `labels`."""
    from datasets import Features, List, Value

    return Features({name: List(Value("int32")) for name in ("input_ids", "labels")})


def answer_features(names: Sequence[str], *, label: bool) -> Features:
    """The columns of token ids that TRL's trainers of preferences take as they are, and whether an answer is good."""
    from datasets import Features, List, Value

    return Features({name: List(Value("int64")) for name in names} | ({"label": Value("bool")} if label else {}))


def sequence_columns(lengths: Any, ids: Any, labels: Any) -> dict[str, Any]:
    """Sequences in these columns.

    Args:
        lengths: of each sequence.
        ids: int32, of all sequences one after another.
        labels: the same.
    """
    import pyarrow  # type: ignore[import-untyped, unused-ignore]

    edges = pyarrow.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    columns = {"input_ids": ids, "labels": labels}
    return {name: pyarrow.ListArray.from_arrays(edges, pyarrow.array(values)) for name, values in columns.items()}
