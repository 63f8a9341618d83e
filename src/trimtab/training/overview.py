"""What training will see, in numbers and by its first example, before anything is trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from trimtab.data.rows import conversational, judged
from trimtab.data.sources import Texts
from trimtab.recipe.recipe import Recipe
from trimtab.training.epochs import sequences_of, steps_of, steps_of_epoch
from trimtab.training.labelled import Labelled, packing_of
from trimtab.training.loss import IGNORED

_SHOWN = 160
"""Characters of a part of the first example that is shown whole; of a longer one its ends."""


@dataclass(frozen=True)
class Source:
    """One of the sources."""

    path: str
    rows: int
    weight: float


@dataclass(frozen=True)
class Overview:
    """What training will see."""

    sources: tuple[Source, ...]
    kind: str
    """texts, pairs of prompt and completion, conversations, or preferences."""
    rows: int
    """To train on, each as often as its source's weight says."""
    held_out: int
    """Rows split off to measure on."""
    near_duplicates: int
    """Rows that would have been, had training not nearly the same; they are in neither."""
    tokens: int
    """Of all rows, before any is cut."""
    learned: int
    """Of these, those that are learned."""
    longest: int
    """Tokens of the longest row."""
    block_tokens: int
    """Tokens of a training sequence."""
    cut: int
    """Rows that lose what is beyond a sequence's end."""
    left_out: int
    """Rows of which nothing is left to learn."""
    packing: str
    sequences: int
    """Of one epoch."""
    steps_an_epoch: int
    steps: int
    """Of the whole training; 0 if there is none."""
    example: tuple[tuple[str, bool], ...]
    """The first sequence as text, in parts that are learned or not."""
    notes: tuple[str, ...] = ()
    """What else is to be known before training."""

    @property
    def share(self) -> float:
        """Share of the tokens that is learned."""
        return self.learned / max(1, self.tokens)

    @property
    def epochs(self) -> float:
        """How often the whole training sees every row."""
        return self.steps / max(1, self.steps_an_epoch)

    def lines(self) -> tuple[str, ...]:
        """It in a few lines."""
        of = f" of {len(self.sources)} sources" if len(self.sources) > 1 else ""
        return (
            f"training data: {self.rows:,} {self.kind}{of}, {self.tokens:,} tokens of which {self.share:.0%} are learned; "
            f"the longest has {self.longest:,}, {self.cut:,} are cut, {self.left_out:,} left out; "
            f"{self.sequences:,} sequences of at most {self.block_tokens:,} tokens, {self.steps_an_epoch:,} steps an "
            f"epoch, {self.steps:,} steps in all ({self.epochs:.3g} epochs)",
            f"first example, what is learned between ⟦ and ⟧: {shown(self.example)}",
        )


def shown(example: Sequence[tuple[str, bool]]) -> str:
    """An example as one text, what is learned marked; long parts lose their middle."""
    return "".join(f"⟦{shortened(text)}⟧" if learned else shortened(text) for text, learned in example)


def shortened(text: str, most: int = _SHOWN) -> str:
    """A text's two ends, if it is longer."""
    if len(text) <= 1.5 * most:
        return text
    half = most // 2
    return f"{text[:half]} [.. {len(text) - 2 * half:,} characters ..] {text[-half:]}"


def overview(recipe: Recipe, texts: Texts, given: Labelled, tokenizer: Any, notes: tuple[str, ...] = ()) -> Overview:
    """What training will see.

    Args:
        recipe: with a number of steps, or of epochs.
        texts: what was read.
        given: what `label` made of its rows.
        tokenizer: the model's.
        notes: what is to be known of the data besides.
    """
    assert recipe.data is not None
    sequences = sequences_of(recipe, given)
    packing, counts = packing_of(recipe, given.rows), given.counts
    return Overview(
        sources=tuple(Source(s.path, n, s.weight) for s, n in zip(texts.sources, texts.counts, strict=True)),
        kind=_kind(given.rows),
        rows=len(given.rows),
        held_out=0 if texts.held_out is None else len(texts.held_out),
        near_duplicates=texts.near_duplicates,
        tokens=counts.tokens,
        learned=counts.learned,
        longest=counts.longest,
        block_tokens=recipe.data.block_tokens,
        cut=counts.cut,
        left_out=counts.left_out,
        packing=packing,
        sequences=sequences,
        steps_an_epoch=steps_of_epoch(recipe, sequences),
        steps=steps_of(recipe, sequences),
        example=_example(given.sequences[0], tokenizer, recipe.data.block_tokens),
        notes=(*notes, *texts.notes(), *given.notes),
    )


def _kind(rows: Any) -> str:
    if judged(rows):
        return "preferences"
    return "conversations" if conversational(rows) else "texts" if "text" in rows.column_names else "pairs"


def _example(row: Any, tokenizer: Any, length: int) -> tuple[tuple[str, bool], ...]:
    """A sequence's parts; its first token is never learned."""
    ids, labels = row["input_ids"][:length], row["labels"][:length]
    learned = [i > 0 and label != IGNORED for i, label in enumerate(labels)]
    edges = [0, *(i for i in range(1, len(ids)) if learned[i] != learned[i - 1]), len(ids)]
    return tuple((tokenizer.decode(ids[a:b]), learned[a]) for a, b in pairwise(edges) if a < b)
