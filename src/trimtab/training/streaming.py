"""`data.streaming`: how many rows training needs, found by reading them until it has its tokens; the others stay unread.

What is found is a number of rows. With it the recipe is one whose `data.limit` is that number, and everything behind it is
as it is for any such recipe: what is held out, the order, the sequences, the recipe beside the model, which says how many
rows were taken. Rows that are held out count for nothing, whether their share is set or is a fiftieth of many; of few,
where none is set, all count, as the recipe beside the model says. So that recipe takes the same rows again.

    packing wrapped, bfd    train.steps x train.batch_tokens tokens, of a row at most block_tokens (bfd)
    packing none            as many rows as sequences: train.steps x train.batch_tokens / block_tokens

So training sees no row twice, unless the source ends before there are enough. Rows are tokenized twice, to be counted and
to be trained on, which is little beside training on them.
"""

from pathlib import Path
from typing import Any

from trimtab.data.conversations import rendered
from trimtab.data.digests import of_tokenizer
from trimtab.data.learned import tokens_of_row
from trimtab.data.rows import Place, on_hub, rows_until
from trimtab.data.sources import Texts
from trimtab.data.split import ROWS, content_of, share_of
from trimtab.data.templates import set_template
from trimtab.data.tokens import head_of
from trimtab.errors import UserError
from trimtab.models.located import is_commit, pinned_data
from trimtab.models.sources import open_source
from trimtab.recipe import texts
from trimtab.recipe.fields import DataBlock
from trimtab.recipe.recipe import Recipe
from trimtab.training.labelled import check_tokenizer, made_by


def streamed(recipe: Recipe, tokenizer: Any = None) -> Recipe:
    """The recipe with `data.limit`, and at one commit of the hub; as it is where nothing streams.

    Args:
        recipe: was checked.
        tokenizer: the model's, with its template; None reads it.

    Raises:
        UserError: for rows that cannot be read, or a hub that breaks off.
    """
    block = recipe.data
    if block is None or not block.streaming:
        return recipe
    if tokenizer is None:
        tokenizer = open_source(recipe.model.path).tokenizer()
        if tokenizer is None:
            return recipe  # which is refused later, by name
        set_template(tokenizer, block.template)
    recipe = at_one_commit(recipe)
    block = recipe.data
    assert block is not None
    enough = _Enough(recipe, block, tokenizer)
    source = block.sources[0]
    limit = rows_until(enough, enough.key, source.path, **source.options)
    return recipe.model_copy(update={"data": block.model_copy(update={"limit": limit})})


def at_one_commit(recipe: Recipe) -> Recipe:
    """The recipe with the commit that a stream of the hub is at now; as it is where none streams.

    Of several processes one alone asks: between two questions the hub may move on.

    Raises:
        UserError: where the hub does not say.
    """
    block = recipe.data
    if block is None or not block.streaming or not on_hub(path := block.sources[0].path):
        return recipe
    path = pinned_data(path)
    if not is_commit(path.partition("@")[2]):
        raise UserError(
            f"data.streaming: the hub did not say at which commit {path} is, and another day it may hold other rows; check "
            "the name, the revision and the network, or set data.revision to the 40 digits of a commit"
        )
    return recipe.model_copy(update={"data": block.model_copy(update={"path": path, "revision": None})})


def as_taken(recipe: Recipe, found: Texts) -> Recipe:
    """A recipe with the number of rows, and the commit of the hub, that were read by it."""
    block = recipe.data
    if block is None or not block.streaming:
        return recipe
    taken = {"path": found.sources[0].path, "revision": None, "limit": found.sources[0].limit}
    return recipe.model_copy(update={"data": block.model_copy(update=taken)})


class _Enough:
    """Counts what rows give to training, until it has enough."""

    def __init__(self, recipe: Recipe, block: DataBlock, tokenizer: Any) -> None:
        self._block, self._tokenizer, self._head = block, tokenizer, head_of(tokenizer)
        self._share, self._rows = texts.most_held_out(block), 0
        self._split_when_many = texts.share_of(block) is None
        self._given, self._held = [0, 0], [0, 0]
        """Tokens and sequences of what is trained on, and of what is held out if anything is."""
        self._wanted = recipe.train.steps * recipe.train.batch_tokens

    def key(self) -> list[Any]:
        """What its answers follow from, the code that gives them among it."""
        block = self._block
        kept = [self._wanted, self._share, self._split_when_many, block.block_tokens, block.packing, block.loss]
        return [*kept, of_tokenizer(self._tokenizer), made_by(self._tokenizer, Path(__file__), Path(texts.__file__))]

    def __call__(self, row: dict[str, Any]) -> bool:
        """Whether there are enough with this one."""
        block, source = self._block, self._block.sources[0]
        self._rows, talk = self._rows + 1, isinstance(row.get("prompt"), list)
        if self._rows == 1:
            check_tokenizer(self._tokenizer, talk)
        held = self._share and share_of(content_of(row)) < self._share
        where = Place(source.path, source.split, self._rows, source.subset, stream=True)
        packing = block.packing if block.packing != "auto" else "wrapped" if "text" in row else "bfd"
        text = rendered(row, self._tokenizer, where) if talk else None
        found = tokens_of_row(row, self._tokenizer, where, self._head, text, block.loss)
        whole = packing == "wrapped"
        if found.learned(None if whole else block.block_tokens):
            counts = self._held if held else self._given
            counts[0] += len(found.ids) if whole else min(len(found.ids), block.block_tokens)
            counts[1] += 1
        tokens, sequences = self._given
        if self._split_when_many and self._rows < ROWS:  # then none is held out
            tokens, sequences = tokens + self._held[0], sequences + self._held[1]
        return (sequences * block.block_tokens if packing == "none" else tokens) >= self._wanted
