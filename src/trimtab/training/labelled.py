"""The rows as training sees them: token ids and labels, with every count and check that needs no weight.

TRL's trainer takes sequences that have ids and labels as they are, and only cuts, packs and orders them. So what is counted
here is what is trained:

    packing       a row longer than block_tokens
    bfd, none     loses its end: its answer is cut, or gone, and then the row is left out
    wrapped       continues in the next sequence: no token is lost, but an answer is learned without its prompt

Where no label is left at all the run is refused; what is less than that is told in one line, with its first row.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.data.conversations import NO_TEMPLATE
from trimtab.data.digests import joined, of_code, of_rows, of_tokenizer
from trimtab.data.portions import portions
from trimtab.data.rows import Place, conversational, judged, unused_keys
from trimtab.data.sources import ORIGIN, place_of
from trimtab.data.stored import collect, each, find, mapped, sought, store
from trimtab.data.tokens import sequence_columns, sequence_features
from trimtab.errors import UserError
from trimtab.recipe.fields import DataBlock
from trimtab.recipe.recipe import Recipe
from trimtab.training.loss import IGNORED
from trimtab.training.tokenizing import Row, Tally, Tokenizing, worked


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
    """The token that ends an answer, or None where it is not a token of its own."""
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


def check_rows(tokenizer: Any, rows: Any, remedy: str = NO_TEMPLATE) -> None:
    """Raise a `UserError` where the tokenizer lacks what the rows need: a token to end with, a chat template."""
    check_tokenizer(tokenizer, conversational(rows), remedy)


def check_tokenizer(tokenizer: Any, talk: bool, remedy: str = NO_TEMPLATE) -> None:
    """The same for rows that are conversations, or are not."""
    if not isinstance(tokenizer.eos_token_id, int) and not (talk and tokenizer.pad_token_id is not None):
        name = "data: the tokenizer has no end-of-sequence token"
        named = "" if tokenizer.eos_token is None else f" ({tokenizer.eos_token!r} is none of its tokens)"
        why = "nor a padding token" if talk else "so that a trained text could not end"
        raise UserError(f"{name}{named}, {why}; name one of its tokens as `eos_token` in its tokenizer_config.json")
    if talk and not tokenizer.chat_template:
        raise UserError(f"data: the rows are conversations, but the tokenizer has no chat template; {remedy}")


def places_of(block: DataBlock, rows: Any) -> Callable[[int], Place]:
    """Where each row stands, by its number from 1."""
    origins = rows[ORIGIN] if ORIGIN in rows.column_names else None
    return lambda number: place_of(block.sources, number, None if origins is None else origins[number - 1])


def rows_of(block: DataBlock, rows: Any) -> Iterator[Row]:
    """Every row with its number and its place."""
    sources = block.sources
    for number, row in enumerate(each(rows), start=1):
        yield Row(number, row, place_of(sources, number, row.get(ORIGIN)))


def key_of_tokens(kind: str, tokenizer: Any, rows: Any, settings: list[Any]) -> str:
    """What the token ids of rows are stored under: all that they follow from, the code that makes them among it."""
    code = (Path(__file__).with_name(f"{name}.py") for name in ("labelled", "tokenizing", "preferred"))
    return joined(kind, of_rows(rows, [ORIGIN]), of_tokenizer(tokenizer), settings, *made_by(tokenizer, *code))


def made_by(tokenizer: Any, *code: Path) -> list[str]:
    """What makes tokens of rows beside the tokenizer: our code (that of data and these files), libraries, and the day."""
    today = date.today().isoformat() if "strftime_now" in str(tokenizer.chat_template) else ""  # a template may say it
    return [of_code(*code), *map(version, ("tokenizers", "transformers", "trl")), today]


def unused_note(rows: Any) -> list[str]:
    """A line on keys that nothing is done with, if there are any."""
    return [f"data: keys of rows that are not used: {unused}"] if (unused := unused_keys(rows)) else []


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
    """Goes through the rows once, or finds what was made of them."""

    def __init__(self, recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int) -> None:
        assert recipe.data is not None
        self._block, self._tokenizer, self._rows, self._vocabulary = recipe.data, tokenizer, rows, vocabulary
        self._packing, self._seed = packing_of(recipe, rows), recipe.train.seed
        self._place = places_of(self._block, rows)
        self._tally = Tally(end=tokenizer.eos_token_id)

    def labelled(self) -> Labelled:
        """The whole."""
        check_rows(self._tokenizer, self._rows)
        found = find(self._key) if sought(self._rows.data.nbytes) else None
        if found is None:
            found = collect(sequence_features(), self._parts(), lambda: self._key, self._tally.as_json)
        tally = self._tally = Tally.of_json(found.about)
        if self._packing == "wrapped" and "prompt" in self._rows.column_names:
            count, first = self._parted(found.rows)
            if count:
                tally.found["parted"] = (count, first)
        counts = Counts(
            tokens=tally.tokens,
            learned=tally.learned,
            longest=tally.longest,
            cut=tally.count("cut"),
            left_out=tally.rows - tally.kept,
        )
        return Labelled(self._rows, found.rows, tally.end, tuple(self._notes()), counts)

    def _parted(self, sequences: Any) -> tuple[int, int]:
        """Rows of which something is learned without what is before it: how many, and the first; of many it is stored."""
        of = partial(_parted, sequences, self._block.block_tokens, self._seed, lambda: joined("stand-ins", self._key))
        if not mapped(sequences):
            return of()
        key = joined("parted", self._key)
        found = find(key)
        found = store(key, {"parted": of()}, {}) if found is None else found
        count, first = found.rows[0]["parted"]
        return count, first

    @cached_property
    def _key(self) -> str:
        """Of all that the sequences, and what is said of them, follow from."""
        block = self._block
        kept = [block.loss, block.block_tokens, self._packing, self._seed, self._vocabulary]
        return key_of_tokens("answers", self._tokenizer, self._rows, kept)

    def _parts(self) -> Iterator[dict[str, Any]]:
        """Ids and labels of the rows in which something is to be learned."""
        block = self._block
        talk = conversational(self._rows)
        work = Tokenizing(self._tokenizer, self._vocabulary, block.loss, block.block_tokens, self._packing, talk)
        for portion in worked(work, rows_of(block, self._rows), block.num_proc):
            self._tally.add(portion.tally)
            yield sequence_columns(portion.lengths, portion.ids, portion.labels)
        if not self._tally.kept:
            raise self._nothing()

    def _nothing(self) -> UserError:
        """Why no row has anything to learn."""
        tally = self._tally
        if not tally.count("gone"):
            what = (
                "the chat template renders no answer" if conversational(self._rows) else "no row holds a text or answer"
            )
            return UserError(f"data: nothing to learn in {tally.rows} rows: {what}; look at {self._place(1)}")
        least, most = tally.prompts
        return UserError(
            f"data: nothing to learn in {tally.rows} rows: of {tally.count('gone')} the prompt alone fills "
            f"data.block_tokens = {self._block.block_tokens} ({least} to {most} tokens; the first is "
            f"{self._place(tally.first('gone'))}); raise data.block_tokens, or shorten the prompts"
        )

    def _notes(self) -> Iterator[str]:
        tally = self._tally
        of, size = f"of {tally.rows} rows", self._block.block_tokens
        yield from unused_note(self._rows)
        cut, gone = tally.count("cut"), tally.count("gone")
        if cut or gone:
            kind = "text" if "text" in self._rows.column_names else "answer"
            yield (
                f"data: {of}, {cut} lose a part of their {kind} and {gone} all of it, {tally.lost:,} of {tally.learned:,} "
                f"tokens to learn: they are longer than data.block_tokens = {size} (the longest has {tally.longest_lost}); "
                f"the first is {self._place(tally.first('cut', 'gone'))}"
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
            if tally.count(what):
                # A sequence has the number of its row where none is left out.
                known = what != "parted" or tally.kept == tally.rows
                where = f"; the first is {self._place(tally.first(what))}" if known else ""
                yield f"data: {of}, {tally.count(what)} {saying}{where}"
        if len(self._tokenizer) > self._vocabulary:
            yield (
                f"data: the tokenizer has {len(self._tokenizer):,} tokens, the model's embedding {self._vocabulary:,} "
                "rows; none of the tokens beyond it is in the training data"
            )
        if conversational(self._rows) and tally.end is None and tally.behind is not None:
            yield (
                f"data: the chat template ends an answer with {tally.behind!r}, in which there is no token of its own, so "
                "that the tuned model will not know where to stop"
            )


def _parted(sequences: Any, length: int, seed: int, key: Callable[[], str]) -> tuple[int, int]:
    """How many sequences have something that is learned in another block than they begin in, and the first one's number.

    TRL packs stand-ins, as it will pack the sequences: a number for each token, and whether it begins it or is learned.
    """
    from trl import pack_dataset

    begins, learned = 1, 2

    def stand_ins() -> Iterator[dict[str, Any]]:
        number = 1
        for some in portions(each(sequences.with_format("numpy")), lambda row: [row["labels"]]):
            lengths = np.array([len(row["labels"]) for row in some])
            marks = np.where(np.concatenate([row["labels"] for row in some]) == IGNORED, 0, learned).astype(np.int32)
            marks[lengths.cumsum() - lengths] = begins
            numbers = np.arange(number, number + len(some), dtype=np.int32)
            yield sequence_columns(lengths, np.repeat(numbers, lengths), marks)
            number += len(some)

    made = collect(sequence_features(), stand_ins(), key).rows
    found = np.zeros(len(sequences) + 1, bool)
    for block in each(pack_dataset(made.shuffle(seed=seed), length, "wrapped").with_format("numpy")):
        numbers, marks = block["input_ids"], block["labels"]
        found[np.setdiff1d(numbers[marks == learned], numbers[marks == begins])] = True
    return int(found.sum()), int(found.argmax())
