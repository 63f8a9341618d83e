"""The rows as training sees them: token ids and labels, with every count and check that needs no weight.

TRL's trainer takes sequences that have ids and labels as they are, and only cuts, packs and orders them. So what is counted
here is what is trained:

    packing       a row longer than block_tokens
    bfd, none     loses its end: its answer is cut, or gone, and then the row is left out
    wrapped       goes on in the next sequence: no token is lost, but an answer is learned without its prompt

Where no label is left at all the run is refused; what is less than that is told in one line, with its first row.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from trimtab.data.conversations import NO_TEMPLATE, Given, answer_of, end_of_turns, left_out, rendered
from trimtab.data.learned import tokens_of_row
from trimtab.data.rows import Place, conversational, judged, unused_keys
from trimtab.data.sources import ORIGIN, place_of
from trimtab.data.tokens import Tokens, dataset_of, head_of
from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe
from trimtab.training.loss import IGNORED


@dataclass(frozen=True)
class Counts:
    """What there is of the rows, before any is cut."""

    tokens: int
    learned: int
    """Tokens that are learned."""
    longest: int
    """Tokens of the longest row."""
    cut: int
    """Rows that lose what is beyond block_tokens."""
    left_out: int
    """Rows of which nothing is left to learn."""


@dataclass(frozen=True)
class Labelled:
    """Training rows with their token ids and labels."""

    rows: Any
    """As `load_rows` gave them."""
    sequences: Any
    """One for each row that has something to learn: `input_ids`, and `labels`, where -100 does not count."""
    end: int | None
    """The token that ends an answer, or None where it is no token of its own."""
    notes: tuple[str, ...]
    """What is to be known before training, a line each."""
    counts: Counts


def packing_of(recipe: Recipe, rows: Any) -> str:
    """wrapped, bfd or none."""
    assert recipe.data is not None
    if recipe.data.packing != "auto":
        return recipe.data.packing
    return "wrapped" if "text" in rows.column_names else "bfd"


def label(recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int, *, preferences: bool = False) -> Labelled:
    """Tokenize the training rows, and look at what is left to learn.

    Args:
        recipe: `data` is read.
        tokenizer: the model's.
        rows: of `load_rows`, or what this function made of them, which is given back.
        vocabulary: rows of the model's embedding.
        preferences: whether rows of two answers are looked at, too: as if the chosen one were learned.

    Raises:
        UserError: for rows that cannot be rendered, tokens that the model does not have, or nothing to learn.
    """
    if isinstance(rows, Labelled):
        return rows
    if not preferences:
        _check_answers(rows)
    made = _Maker(recipe, tokenizer, rows, vocabulary)
    return made.labelled()


def check_end(tokenizer: Any, rows: Any) -> None:
    """Raise a `UserError` where the tokenizer lacks the end-of-sequence token that training needs."""
    if isinstance(tokenizer.eos_token_id, int) or (conversational(rows) and tokenizer.pad_token_id is not None):
        return
    name = "data: the tokenizer has no end-of-sequence token"
    named = "" if tokenizer.eos_token is None else f" ({tokenizer.eos_token!r} is none of its tokens)"
    why = "nor a padding token" if conversational(rows) else "so that a trained text could not end"
    raise UserError(f"{name}{named}, {why}; name one of its tokens as `eos_token` in its tokenizer_config.json")


def _check_answers(rows: Any) -> None:
    """Raise a `UserError` for preferences, of which there is no one answer to learn."""
    if judged(rows):
        remedy = "set train.objective to dpo or kto" if "chosen" in rows.column_names else "set train.objective to kto"
        more = ", or name the answer: data.columns: {completion: chosen}, data.ignore: [rejected]"
        raise UserError(
            f"data: the rows are preferences ({', '.join(rows.column_names)}), of which there is no one answer to learn; "
            f"{remedy}{more if 'chosen' in rows.column_names else ''}"
        )


def check_learned(recipe: Recipe, sequences: Any) -> None:
    """Raise a `UserError` where packing has left no label behind a sequence's first token, which is never learned."""
    if any(token != IGNORED for row in sequences for token in row["labels"][1:]):
        return
    assert recipe.data is not None
    raise UserError(
        f"data: no token to learn is left in {len(sequences)} sequences of data.block_tokens = {recipe.data.block_tokens}; "
        "raise it"
    )


class _Maker:
    """Goes through the rows once."""

    def __init__(self, recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int) -> None:
        assert recipe.data is not None
        self._block, self._tokenizer, self._rows, self._vocabulary = recipe.data, tokenizer, rows, vocabulary
        self._packing, self._seed = packing_of(recipe, rows), recipe.train.seed
        self._end: int | None = tokenizer.eos_token_id
        self._behind: str | None = None
        self._origins = rows[ORIGIN] if ORIGIN in rows.column_names else None
        self._found: dict[str, list[int]] = {}
        """Numbers of the rows, from 1, by what is to be said of them."""

    def labelled(self) -> Labelled:
        """The whole."""
        check_end(self._tokenizer, self._rows)
        tokens = list(self._tokens())
        self._count(tokens)
        length = None if self._packing == "wrapped" else self._block.block_tokens
        kept = [t for t in tokens if t.learned(length)]
        if not kept:
            raise self._nothing(tokens)
        sequences = dataset_of((t.ids, t.labels(IGNORED)) for t in kept)
        if self._packing == "wrapped" and "prompt" in self._rows.column_names:
            self._found["parted"] = _parted(kept, self._block.block_tokens, self._seed)
        counts = Counts(
            tokens=sum(len(t.ids) for t in tokens),
            learned=sum(t.learned() for t in tokens),
            longest=max(len(t.ids) for t in tokens),
            cut=len(self._found.get("cut", [])),
            left_out=len(tokens) - len(kept),
        )
        return Labelled(self._rows, sequences, self._end, tuple(self._notes(tokens)), counts)

    def _where(self, number: int) -> Place:
        origin = None if self._origins is None else self._origins[number - 1]
        return place_of(self._block.sources, number, origin)

    def _note(self, what: str, number: int) -> None:
        self._found.setdefault(what, []).append(number)

    def _tokens(self) -> Iterator[Tokens]:
        """Of every row, checked."""
        tokenizer, head, talk = self._tokenizer, head_of(self._tokenizer), conversational(self._rows)
        if talk and not tokenizer.chat_template:
            raise UserError(f"data: the rows are conversations, but the tokenizer has no chat template; {NO_TEMPLATE}")
        for number, row in enumerate(self._rows, start=1):
            text, where = None, self._where(number)
            if talk:
                text = rendered(row, tokenizer, where)
                self._look_at(row, text, number)
            elif "text" not in row and not answer_of(row).strip():
                self._note("empty", number)
            found = tokens_of_row(row, tokenizer, where, head, text, self._block.loss)
            if found.ids and max(found.ids) >= self._vocabulary:
                id_ = next(i for i in found.ids if i >= self._vocabulary)
                raise UserError(
                    f"data, {self._where(number)}: holds {tokenizer.convert_ids_to_tokens(id_)!r}, token {id_} of the "
                    f"tokenizer, but the model's embedding has {self._vocabulary} rows; take the model's own tokenizer, or "
                    "resize the model's embeddings (`model.resize_token_embeddings`) before it is tuned"
                )
            if found.merged:
                self._note("merged", number)
            yield found.compact()

    def _look_at(self, row: Any, text: str, number: int) -> None:
        """Note what becomes of a conversation in its template."""
        answer, before = left_out(row, text)
        for what, is_so in (("answer", answer), ("before", before)):
            if is_so:
                self._note(what, number)
        if not answer_of(row)[-1]["content"].strip():
            if not Given.of(row).called(-1):
                self._note("empty", number)
        elif self._behind is None:
            self._end, self._behind = end_of_turns(row, text, self._tokenizer)

    def _count(self, tokens: list[Tokens]) -> None:
        for number, row in enumerate(tokens, start=1):
            whole, kept = row.learned(), row.learned(self._block.block_tokens)
            if not whole:
                self._note("unlearned", number)
            elif self._packing != "wrapped" and kept < whole:
                self._note("cut" if kept else "gone", number)

    def _nothing(self, tokens: list[Tokens]) -> UserError:
        """Why no row has anything to learn."""
        gone = self._found.get("gone", [])
        if not gone:
            what = (
                "the chat template renders no answer" if conversational(self._rows) else "no row holds a text or answer"
            )
            return UserError(f"data: nothing to learn in {len(tokens)} rows: {what}; look at {self._where(1)}")
        lengths = sorted(max(1, tokens[number - 1].learned_from) for number in gone)
        return UserError(
            f"data: nothing to learn in {len(tokens)} rows: of {len(gone)} the prompt alone fills data.block_tokens = "
            f"{self._block.block_tokens} ({lengths[0]} to {lengths[-1]} tokens; the first is {self._where(gone[0])}); "
            "raise data.block_tokens, or shorten the prompts"
        )

    def _notes(self, tokens: list[Tokens]) -> Iterator[str]:
        of, size = f"of {len(tokens)} rows", self._block.block_tokens
        unused = unused_keys(self._rows)
        if unused:
            yield f"data: keys of rows that are not used: {unused}"
        cut, gone = self._found.get("cut", []), self._found.get("gone", [])
        if cut or gone:
            lost = sum(tokens[n - 1].learned() - tokens[n - 1].learned(size) for n in cut + gone)
            all_ = sum(row.learned() for row in tokens)
            longest = max(len(tokens[n - 1].ids) for n in cut + gone)
            kind = "text" if "text" in self._rows.column_names else "answer"
            yield (
                f"data: {of}, {len(cut)} lose a part of their {kind} and {len(gone)} all of it, {lost:,} of {all_:,} "
                f"tokens to learn: they are longer than data.block_tokens = {size} (the longest has {longest}); the first "
                f"is {self._where(min(cut + gone))}"
            )
        sayings = {
            "parted": f"have an answer that is learned in part without its prompt: packing: wrapped cuts them at "
            f"data.block_tokens = {size} (bfd keeps rows whole)",
            "empty": "have an empty answer, so that the model learns to say nothing",
            "unlearned": "hold nothing to learn and are left out",
            "answer": "have an answer of which the chat template leaves something out, which is then not learned",
            "before": "have earlier messages of which the chat template leaves something out",
            "merged": "have a prompt whose last tokens are other ones when an answer follows, and so will be when the "
            "model is asked",
        }
        for what, saying in sayings.items():
            if self._found.get(what):
                yield f"data: {of}, {len(self._found[what])} {saying}; the first is {self._where(self._found[what][0])}"
        if len(self._tokenizer) > self._vocabulary:
            yield (
                f"data: the tokenizer has {len(self._tokenizer):,} tokens, the model's embedding {self._vocabulary:,} "
                "rows; none of the tokens beyond it is in the training data"
            )
        if conversational(self._rows) and self._end is None and self._behind is not None:
            yield (
                f"data: the chat template ends an answer with {self._behind!r}, in which there is no token of its own, so "
                "that the tuned model will not know where to stop"
            )


def _parted(rows: list[Tokens], length: int, seed: int) -> list[int]:
    """Numbers of the rows of which something is learned in another sequence than the one that they begin in.

    TRL packs stand-ins, as it will pack the rows: a row's number for each token, and whether it begins it or is learned.
    """
    from trl import pack_dataset

    begins, learned = 1, 2
    stand_ins = [
        ([number] * len(row.ids), [begins, *(learned if label != IGNORED else 0 for label in row.labels(IGNORED)[1:])])
        for number, row in enumerate(rows, start=1)
    ]
    found: set[int] = set()
    for block in pack_dataset(dataset_of(stand_ins).shuffle(seed=seed), length, "wrapped"):
        numbers, marks = np.array(block["input_ids"]), np.array(block["labels"])
        found |= set(numbers[marks == learned]) - set(numbers[marks == begins])
    return sorted(map(int, found))
