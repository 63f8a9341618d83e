"""The pruning stage: from a recipe with a `prune` block to the recipe of what is left, pruned once and kept."""

import math
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from trimtab.errors import UserError
from trimtab.formats.file_size import parse_bytes
from trimtab.models import contents
from trimtab.models.architecture import architecture_of
from trimtab.models.sources import open_source
from trimtab.pruning import Options, Pruned, checkpoint, prune_checkpoint
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe import texts
from trimtab.recipe.fields import DataBlock
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Placement


class Observer(Protocol):
    """The observer of pruning."""

    def say(self, text: str) -> None:
        """A line about a stage."""

    def pruned(self, done: Pruned, out: str) -> None:
        """The model was pruned."""


def pruned(recipe: Recipe, show: Observer | None = None) -> Recipe:
    """The recipe of what is left after pruning; the pruned model is made if it is not there."""
    block = recipe.prune
    if block is None:
        return recipe
    out, options = recipe.out / "pruned", prune_options(recipe)
    if options.reads_text and recipe.data is None:
        raise UserError("prune: needs calibration text; set data.path")
    text = ("", "") if recipe.data is None else (recipe.data.named, recipe.data.split)
    sizes = block.tokens, block.block_tokens
    decides = contents.of_data(recipe.data) if options.reads_text and recipe.data is not None else None
    made = checkpoint.made_from(out)
    if made is None:
        if show is not None:
            show.say(f"pruning {recipe.model.path}")
        done = prune_checkpoint(
            recipe.model.path,
            out,
            options,
            text=text[0],
            split=text[1],
            tokens=sizes[0],
            block_tokens=sizes[1],
            dtype=recipe.model.dtype,
            device=recipe.device,
            rows=None if recipe.data is None else partial(_rows, recipe.data),
            template=None if recipe.data is None else recipe.data.template,
            read=decides,
        )
        if show is not None:
            show.pruned(done, str(out))
    elif why := checkpoint.other(
        made, checkpoint.asked(recipe.model.path, options, *text, *sizes, recipe.model.dtype, decides)
    ):
        raise UserError(
            f"prune: {out} was pruned from another model, with other options or on other text: {why}; remove it to prune "
            "again (`trimtab run --overwrite` does), or set another `output`"
        )
    model = recipe.model.model_copy(update={"path": str(Path(out))})
    return recipe.model_copy(update={"model": model, "prune": None})


def _rows(block: DataBlock) -> Any:
    """What a block has to train on, which is calibrated on, too."""
    return texts.training(block).rows


def pruned_already(recipe: Recipe) -> Recipe:
    """The recipe after its pruning, if the pruned model is there; else the recipe as it is."""
    there = recipe.prune is not None and (recipe.out / "pruned" / "pruning.json").exists()
    return pruned(recipe) if there else recipe


def prune_options(recipe: Recipe) -> Options:
    """How to prune: what is left is in whole groups of every grid that the recipe gives to what may be cut."""
    block = recipe.prune
    assert block is not None
    model = open_source(recipe.model.path).layout()
    family = architecture_of(model)
    cut = family.attention.output, family.mlp.down  # their inputs become fewer
    names = [name for name, _ in model.named_modules() if name.endswith(cut)]
    grids: list[Placement] = [recipe.method.grid]
    if recipe.rules is not None:
        grids = [next((r.grid for r in recipe.rules if fnmatchcase(name, r.match)), None) for name in names]
    groups = {grid.group for grid in grids if isinstance(grid, Grid | CodebookGrid) and grid.group}
    return Options(
        ratio=block.ratio,
        target_bytes=None if block.bytes is None else parse_bytes(block.bytes, "prune.bytes"),
        layers=block.layers,
        what=block.what,
        importance=block.importance,
        keep=block.keep,
        count_embeddings=block.count_embeddings,
        multiple_of=math.lcm(block.multiple_of, *groups),
        seed=block.seed,
    )
