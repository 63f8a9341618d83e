"""Rows of preferences as training sees them: token ids, with every count and check that needs no weight.

TRL's trainers take `prompt_ids` and the ids of answers as they are, and only cut, order and batch them. The tokens are
those of `data.tokens`, by which the same rows would be trained as answers alone: one beginning, one end, the chat template
read in whole.

    dpo     prompt_ids  chosen_ids  rejected_ids        both answers are cut where prompt and answer reach block_tokens
    kto     prompt_ids  completion_ids  label
    grpo    prompt, and the columns of the reward       TRL renders prompts itself, to answer them
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np

from trimtab.data.conversations import end_of_turns, rendered
from trimtab.data.learned import tokens_of_row
from trimtab.data.objectives import answers
from trimtab.data.portions import batches
from trimtab.data.rows import conversational
from trimtab.data.stored import collect, find, sought
from trimtab.data.tokens import Tokens, answer_features, check_ids, head_of
from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe
from trimtab.training.labelled import check_rows, key_of_tokens, places_of, rows_of, unused_note
from trimtab.training.tokenizing import Row, worked

_ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",)}


@dataclass(frozen=True)
class Preferred:
    """Rows of preferences with their token ids."""

    rows: Any
    """Prompts with good answers, as `load_rows` would give them: for calibration, and to describe."""
    sequences: Any
    """In the columns above; a row of which no answer is left is left out."""
    end: int | None
    """The token that ends an answer, or None where it is not a token of its own."""
    notes: tuple[str, ...]
    """What is to be known before training, a line each."""


def prefer(recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int) -> Preferred:
    """Tokenize rows of preferences, and look at what is left to learn.

    Args:
        recipe: `data` and `train.objective` are read.
        tokenizer: the model's.
        rows: of `texts.training_of`, or what this function made of them, which is given back.
        vocabulary: rows of the model's embedding.

    Raises:
        UserError: for rows that cannot be rendered, tokens that the model does not have, or nothing to learn.
    """
    if isinstance(rows, Preferred):
        return rows
    return _Maker(recipe, tokenizer, rows, vocabulary).preferred()


@dataclass
class _Tally:
    """What there is in rows of preferences."""

    rows: int = 0
    kept: int = 0
    good: int = 0
    """Rows that are kept and hold a good answer."""
    gone: int = 0
    cut: int = 0
    first: int = 0
    """The first row that is cut or gone, from 1."""
    longest: int = 0
    """Tokens of the longest prompt with an answer."""
    end: int | None = None


_Made = tuple[list[dict[str, Any]], tuple[int | None] | None]
"""Token ids of some rows, and the token that ends an answer, if one of them tells."""


@dataclass(frozen=True)
class _Preferring:
    """What is done with rows; can be sent to another process."""

    tokenizer: Any
    vocabulary: int
    objective: str
    talk: bool

    def __call__(self, rows: list[Row]) -> _Made:
        """The columns of every row, checked."""
        head, ends = head_of(self.tokenizer), list[int | None]()
        made: list[dict[str, Any]] = []
        for row in rows:
            found = {name: self._of(row, name, head, ends) for name in _ANSWERS[self.objective]}
            given = min(tokens.learned_from for tokens in found.values())
            ids: dict[str, Any] = {"prompt_ids": np.array(next(iter(found.values())).ids[:given], np.int64)}
            ids |= {f"{name}_ids": np.array(tokens.ids[given:], np.int64) for name, tokens in found.items()}
            made.append(ids | ({"label": row.values["label"]} if self.objective == "kto" else {}))
        return made, (ends[0],) if ends else None

    def _of(self, row: Row, name: str, head: list[int], ends: list[int | None]) -> Tokens:
        """Prompt and one of the answers."""
        one = {**row.values, "completion": row.values[name]}
        text = rendered(one, self.tokenizer, row.where) if self.talk else None
        if text is not None and not ends and one["completion"][-1]["content"].strip():
            ends.append(end_of_turns(one, text, self.tokenizer)[0])
        tokens = tokens_of_row(one, self.tokenizer, row.where, head, text, "last")
        check_ids(tokens.ids, self.tokenizer, self.vocabulary, row.where)
        return tokens


class _Maker:
    """Goes through the rows once, or finds what was made of them."""

    def __init__(self, recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int) -> None:
        assert recipe.data is not None
        self._block, self._tokenizer, self._rows, self._vocabulary = recipe.data, tokenizer, rows, vocabulary
        self._objective, self._seed = recipe.train.objective, recipe.train.seed
        self._place = places_of(recipe.data, rows)
        self._names = [f"{name}_ids" for name in _ANSWERS.get(self._objective, ())]

    def preferred(self) -> Preferred:
        """The whole."""
        check_rows(self._tokenizer, self._rows, "give strings, or name a chat template in data.template")
        notes = unused_note(self._rows)
        if self._objective == "grpo":
            return Preferred(answers(self._rows, self._objective), self._rows, None, tuple(notes))
        found = find(self._key) if sought(self._rows.data.nbytes) else None
        if found is None:
            tally = _Tally(end=self._tokenizer.eos_token_id)
            features = answer_features(["prompt_ids", *self._names], label=self._objective == "kto")
            found = collect(features, batches(self._kept(tally)), lambda: self._key, lambda: asdict(tally))
        tally = _Tally(**found.about)
        notes += self._lengths(tally)
        notes += self._labels(tally) if self._objective == "kto" else []
        # KTO's trainer takes rows as they come.
        sequences = found.rows.shuffle(seed=self._seed)
        return Preferred(answers(self._rows, self._objective), sequences, tally.end, tuple(notes))

    @cached_property
    def _key(self) -> str:
        """Of all that the ids follow from."""
        return key_of_tokens(
            "preferences", self._tokenizer, self._rows, [self._objective, self._block.block_tokens, self._vocabulary]
        )

    def _kept(self, tally: _Tally) -> Iterator[dict[str, Any]]:
        """The rows of which an answer is left, all of them counted."""
        work = _Preferring(self._tokenizer, self._vocabulary, self._objective, conversational(self._rows))
        size, seen = self._block.block_tokens, False
        for made, end in worked(work, rows_of(self._block, self._rows), self._block.num_proc):
            if end is not None and not seen:
                tally.end, seen = end[0], True
            for row in made:
                self._count(row, tally)
                if len(row["prompt_ids"]) < size:
                    yield row
        if not tally.kept:
            raise UserError(
                f"data: nothing to learn in {tally.rows} rows: every prompt alone fills data.block_tokens = {size}; raise "
                "it, or shorten the prompts"
            )

    def _count(self, row: dict[str, Any], tally: _Tally) -> None:
        size, prompt = self._block.block_tokens, len(row["prompt_ids"])
        length = prompt + max(len(row[name]) for name in self._names)
        tally.rows, tally.longest = tally.rows + 1, max(tally.longest, length)
        if prompt >= size:
            tally.gone += 1
        else:
            tally.kept, tally.good = tally.kept + 1, tally.good + bool(row.get("label"))
            tally.cut += length > size
        if length > size or prompt >= size:
            tally.first = tally.first or tally.rows

    def _lengths(self, tally: _Tally) -> Iterator[str]:
        """A line on what is cut."""
        if tally.cut or tally.gone:
            yield (
                f"data: of {tally.rows} rows, {tally.cut} lose a part of an answer and {tally.gone} are left out: they are "
                f"longer than data.block_tokens = {self._block.block_tokens} (the longest has {tally.longest}); the first "
                f"is {self._place(tally.first)}"
            )

    @staticmethod
    def _labels(tally: _Tally) -> Iterator[str]:
        """A line on how many are good, where one side has to weigh more."""
        good, rows = tally.good, tally.kept
        if good in (0, rows):
            kind = "good" if good else "bad"
            yield f"data: all {rows} answers are {kind}: kto learns from good and bad ones, so give some of the other"
        elif good != rows - good:
            few, times = ("bad", good / (rows - good)) if 2 * good > rows else ("good", rows / good - 1)
            of = f"{good} of {rows} answers are good"
            yield f"data: {of}: each {few} one counts {times:.2f} times, so that both sides weigh alike"
