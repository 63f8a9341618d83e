"""Rows of preferences as training sees them: token ids, with every count and check that needs no weight.

TRL's trainers take `prompt_ids` and the ids of answers as they are, and only cut, order and batch them. The tokens are
those of `data.tokens`, by which the same rows would be trained as answers alone: one beginning, one end, the chat template
read in whole.

    dpo     prompt_ids  chosen_ids  rejected_ids        both answers are cut where prompt and answer reach block_tokens
    kto     prompt_ids  completion_ids  label
    grpo    prompt, and the columns of the reward       TRL renders prompts itself, to answer them
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from trimtab.data.conversations import end_of_turns, rendered
from trimtab.data.learned import tokens_of_row
from trimtab.data.objectives import answers, shuffled
from trimtab.data.rows import Place, conversational, unused_keys
from trimtab.data.sources import ORIGIN, place_of
from trimtab.data.tokens import Tokens, head_of
from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe
from trimtab.training.labelled import check_end

_ANSWERS = {"dpo": ("chosen", "rejected"), "kto": ("completion",)}


@dataclass(frozen=True)
class Preferred:
    """Rows of preferences with their token ids."""

    rows: Any
    """Prompts with good answers, as `load_rows` would give them: for calibration, and to describe."""
    sequences: Any
    """In the columns above; a row of which no answer is left is left out."""
    end: int | None
    """The token that ends an answer, or None where it is no token of its own."""
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


class _Maker:
    """Goes through the rows once."""

    def __init__(self, recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int) -> None:
        assert recipe.data is not None
        self._block, self._tokenizer, self._rows, self._vocabulary = recipe.data, tokenizer, rows, vocabulary
        self._objective, self._seed = recipe.train.objective, recipe.train.seed
        self._end: int | None = tokenizer.eos_token_id
        self._talk, self._head, self._seen_end = conversational(rows), head_of(tokenizer), False

    def preferred(self) -> Preferred:
        """The whole."""
        check_end(self._tokenizer, self._rows)
        if self._talk and not self._tokenizer.chat_template:
            remedy = "give strings, or a tokenizer with a chat template"
            raise UserError(f"data: the rows are conversations, but the tokenizer has no chat template; {remedy}")
        notes = [f"data: keys of rows that are not used: {unused}"] if (unused := unused_keys(self._rows)) else []
        if self._objective == "grpo":
            return Preferred(answers(self._rows, self._objective), self._rows, None, tuple(notes))
        made = list(self._tokens())
        size = self._block.block_tokens
        kept = [row for row in made if len(row["prompt_ids"]) < size]
        if not kept:
            raise UserError(
                f"data: nothing to learn in {len(made)} rows: every prompt alone fills data.block_tokens = {size}; raise "
                "it, or shorten the prompts"
            )
        notes += self._lengths(made)
        notes += self._labels(kept) if self._objective == "kto" else []
        return Preferred(answers(self._rows, self._objective), shuffled(kept, self._seed), self._end, tuple(notes))

    def _tokens(self) -> Iterator[dict[str, Any]]:
        """The columns of every row, checked."""
        for number, row in enumerate(self._rows, start=1):
            where = self._where(number)
            found = {name: self._of(row, name, where) for name in _ANSWERS[self._objective]}
            given = min(tokens.learned_from for tokens in found.values())
            made: dict[str, Any] = {"prompt_ids": list(next(iter(found.values())).ids[:given])}
            made |= {f"{name}_ids": list(tokens.ids[given:]) for name, tokens in found.items()}
            yield made | ({"label": row["label"]} if self._objective == "kto" else {})

    def _of(self, row: Any, name: str, where: Place) -> Tokens:
        """Prompt and one of the answers."""
        one = {**row, "completion": row[name]}
        text = rendered(one, self._tokenizer, where) if self._talk else None
        if text is not None and not self._seen_end and one["completion"][-1]["content"].strip():
            self._end, self._seen_end = end_of_turns(one, text, self._tokenizer)[0], True
        tokens = tokens_of_row(one, self._tokenizer, where, self._head, text, "last")
        if max(tokens.ids, default=0) >= self._vocabulary:
            id_ = next(i for i in tokens.ids if i >= self._vocabulary)
            raise UserError(
                f"data, {where}: holds {self._tokenizer.convert_ids_to_tokens(id_)!r}, token {id_} of the tokenizer, but "
                f"the model's embedding has {self._vocabulary} rows; take the model's own tokenizer"
            )
        return tokens

    def _lengths(self, made: list[dict[str, Any]]) -> Iterator[str]:
        """A line on what is cut."""
        size, names = self._block.block_tokens, [f"{name}_ids" for name in _ANSWERS[self._objective]]
        gone = [n for n, row in enumerate(made, start=1) if len(row["prompt_ids"]) >= size]
        longest = [len(row["prompt_ids"]) + max(len(row[name]) for name in names) for row in made]
        cut = [n for n, length in enumerate(longest, start=1) if length > size and n not in set(gone)]
        if cut or gone:
            yield (
                f"data: of {len(made)} rows, {len(cut)} lose a part of an answer and {len(gone)} are left out: they are "
                f"longer than data.block_tokens = {size} (the longest has {max(longest)}); the first is "
                f"{self._where(min(cut + gone))}"
            )

    def _where(self, number: int) -> Place:
        origin = self._rows[number - 1][ORIGIN] if ORIGIN in self._rows.column_names else None
        return place_of(self._block.sources, number, origin)

    @staticmethod
    def _labels(rows: list[dict[str, Any]]) -> Iterator[str]:
        """A line on how many are good, where one side has to weigh more."""
        good = sum(row["label"] for row in rows)
        if good in (0, len(rows)):
            kind = "good" if good else "bad"
            yield f"data: all {len(rows)} answers are {kind}: kto learns from good and bad ones, so give some of the other"
        elif good != len(rows) - good:
            few, times = ("bad", good / (len(rows) - good)) if 2 * good > len(rows) else ("good", len(rows) / good - 1)
            of = f"{good} of {len(rows)} answers are good"
            yield f"data: {of}: each {few} one counts {times:.2f} times, so that both sides weigh alike"
