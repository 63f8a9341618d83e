"""Several stages from one recipe: prune, search, tune. Each leaves what the next begins with.

    <output>/pruned     an ordinary float checkpoint                 where the recipe has a `prune` block
    <output>/search     trials, front, a recipe for each point       where it has a `search` block
    <output>/model      the tuned, folded, saved model

A recipe with neither block is one run, into <output> itself. A stage that is finished is not repeated.
"""

import math
import shutil
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trimtab.errors import UserError
from trimtab.formats.file_size import parse_bytes
from trimtab.models.sources import open_source
from trimtab.pipeline import run as pipeline
from trimtab.pipeline.checks import check_apart, check_extras, check_output, gather
from trimtab.pruning import Options, Pruned, checkpoint, prune_checkpoint
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Placement

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search

_CUT = ("o_proj", "down_proj")
"""Layers whose inputs become fewer."""


class Observer(pipeline.Observer, Protocol):
    """Whoever watches all stages."""

    def pruned(self, done: Pruned, out: str) -> None:
        """The model was pruned."""

    def search(self, search: "Search") -> None:
        """A trial began or ended."""


class Quiet(pipeline.Quiet):
    """Watches in silence."""

    def pruned(self, done: Pruned, out: str) -> None:
        """Nothing."""

    def search(self, search: "Search") -> None:
        """Nothing."""


def run(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, show: Observer | None = None
) -> dict[str, Any]:
    """Carry out a recipe with all its stages; arguments and result as of `pipeline.run`."""
    check_extras(recipe)
    watch = show or Quiet()
    if recipe.prune is None and recipe.search is None:
        return pipeline.run(recipe, overwrite=overwrite, resume=resume, show=watch)
    check_apart(recipe)  # before anything is removed
    final = recipe.out / "model"
    check_output(final, overwrite, resume)
    if overwrite:
        if recipe.prune is not None:
            _options(recipe)  # refused before anything is removed
        _check_storage(recipe)
        _remove_stages(recipe.out)
    chosen = pruned(recipe, watch)
    if chosen.search is not None:
        from trimtab.bit_search import results

        # Whatever the run would refuse in the end, it refuses before hours of searching.
        gather(chosen.model_copy(update={"search": None, "output": str(final)}), overwrite, resume)
        chosen = results.best(search(chosen, show=watch))
        watch.say("tuning the best point within the budget")
    chosen = chosen.model_copy(update={"name": recipe.name, "output": str(final)})
    return pipeline.run(chosen, overwrite=overwrite, resume=resume, show=watch)


def pruned(recipe: Recipe, show: Observer | None = None) -> Recipe:
    """The recipe as it goes on after pruning; the pruned model is made if it is not there."""
    block = recipe.prune
    if block is None:
        return recipe
    out, options = recipe.out / "pruned", _options(recipe)
    if options.reads_text and recipe.data is None:
        raise UserError("prune: needs calibration text; set data.path")
    text = ("", "") if recipe.data is None else (recipe.data.path, recipe.data.split)
    sizes = block.tokens, block.block_tokens
    made = checkpoint.made_from(out)
    if made is None:
        watch = show or Quiet()
        watch.say(f"pruning {recipe.model.path}")
        done = prune_checkpoint(
            recipe.model.path,
            out,
            options,
            text=text[0],
            split=text[1],
            tokens=sizes[0],
            block_tokens=sizes[1],
            dtype=recipe.model.dtype,
        )
        watch.pruned(done, str(out))
    elif made != checkpoint.asked(recipe.model.path, options, *text, *sizes, recipe.model.dtype):
        raise UserError(
            f"prune: {out} was pruned from another model, with other options or on other text; remove it to prune again "
            "(`trimtab run --overwrite` does), or set another `output`"
        )
    model = recipe.model.model_copy(update={"path": str(Path(out))})
    return recipe.model_copy(update={"model": model, "prune": None})


def pruned_already(recipe: Recipe) -> Recipe:
    """The recipe after its pruning, if the pruned model is there; else the recipe as it is."""
    there = recipe.prune is not None and (recipe.out / "pruned" / "pruning.json").exists()
    return pruned(recipe) if there else recipe


def _options(recipe: Recipe) -> Options:
    """How to prune: what is left is in whole groups of every grid that the recipe gives to what may be cut."""
    block = recipe.prune
    assert block is not None
    names = [name for name, _ in open_source(recipe.model.path).layout().named_modules() if name.endswith(_CUT)]
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


def _check_storage(recipe: Recipe) -> None:
    """Refuse to overwrite a search whose study lies elsewhere, where others may be at work on it."""
    url = None if recipe.search is None else recipe.search.storage
    if url is not None and (recipe.out / "search").resolve() not in Path(url).resolve().parents:
        from trimtab.bit_search.ledger import begun, shown

        if begun(url, recipe.name):
            raise UserError(
                f"search.storage: {shown(url)} holds a study {recipe.name!r}, which --overwrite does not remove and the "
                "search would go on with; set another `name`, or remove it (`optuna delete-study`)"
            )


def _remove_stages(out: Path) -> None:
    """Remove what an earlier run pruned and searched, and nothing else."""
    stages = {out / "pruned": ("pruning.json",), out / "search": ("journal.log", "trials.csv")}
    for folder, marks in stages.items():
        if folder.exists() and any(folder.iterdir()) and not any((folder / mark).exists() for mark in marks):
            raise UserError(
                f"output: {folder} holds something that trimtab did not write; remove it yourself or set `output`"
            )
    for folder in stages:
        shutil.rmtree(folder, ignore_errors=True)


def search(recipe: Recipe, *, show: Observer | None = None) -> "Search":
    """Prune if asked, then search; results are in `<output>/search`."""
    check_extras(recipe)
    from trimtab.bit_search import workers

    watch = show or Quiet()
    return workers.run(pruned(recipe, watch), watch.search)
