"""Several stages from one recipe: prune, search, tune. Each leaves what the next begins with.

    <output>/pruned     an ordinary float checkpoint                 where the recipe has a `prune` block
    <output>/search     trials, front, a recipe for each point       where it has a `search` block
    <output>/model      the tuned, folded, saved model

A recipe with neither block is one run, into <output> itself. A stage that is finished is not repeated.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trimtab.errors import UserError
from trimtab.pipeline import run as one
from trimtab.pipeline.checks import check_apart, check_extras, check_output, gather
from trimtab.pipeline.pruned import prune_options, pruned
from trimtab.pruning import Pruned
from trimtab.recipe.recipe import Recipe

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search


class Observer(one.Observer, Protocol):
    """Whoever watches all stages."""

    def pruned(self, done: Pruned, out: str) -> None:
        """The model was pruned."""

    def search(self, search: "Search") -> None:
        """A trial began or ended."""


class Quiet(one.Quiet):
    """Watches in silence."""

    def pruned(self, done: Pruned, out: str) -> None:
        """Nothing."""

    def search(self, search: "Search") -> None:
        """Nothing."""


def run(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, show: Observer | None = None
) -> dict[str, Any]:
    """Carry out a recipe with all its stages; arguments and result as of `run.run`."""
    check_extras(recipe)
    watch = show or Quiet()
    if recipe.prune is None and recipe.search is None:
        return one.run(recipe, overwrite=overwrite, resume=resume, show=watch)
    check_apart(recipe)  # before anything is removed
    final = recipe.out / "model"
    check_output(final, overwrite, resume)
    if overwrite:
        if recipe.prune is not None:
            prune_options(recipe)  # refused before anything is removed
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
    return one.run(chosen, overwrite=overwrite, resume=resume, show=watch)


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
