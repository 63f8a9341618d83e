"""Several stages from one recipe: prune, search, tune. Each leaves what the next begins with.

    <output>/pruned     an ordinary float checkpoint                 where the recipe has a `prune` block
    <output>/search     trials, front, a recipe for each point       where it has a `search` block
    <output>/model      the tuned, folded, saved model

A recipe with neither block is one run, into <output> itself. A stage that is finished is not repeated.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trimtab import processes
from trimtab.errors import UserError
from trimtab.formats.holding import holding
from trimtab.formats.manifest import Kind, keeps, remove
from trimtab.pipeline import run as one
from trimtab.pipeline.checks import check_apart, check_extras, gather, with_its_formats
from trimtab.pipeline.output import Work
from trimtab.pipeline.pruned import prune_options, pruned
from trimtab.pruning import Pruned
from trimtab.recipe.recipe import Recipe

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search


class Observer(one.Observer, Protocol):
    """The observer of all stages."""

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
    recipe = with_its_formats(recipe)
    check_extras(recipe)
    watch = show or Quiet()
    if recipe.prune is None and recipe.search is None:
        return one.run(recipe, overwrite=overwrite, resume=resume, show=watch)
    if processes.count() > 1 or (recipe.train.processes or 1) > 1:
        raise UserError(
            "prune, search: are stages of one process; carry them out first (`trimtab prune`, `trimtab search`), then "
            "train the recipe that they leave (<output>/search) with several"
        )
    check_apart(recipe, overwrite, resume)
    final = recipe.moved(recipe.out / "model")
    Work.of(final).check(overwrite, resume)
    if overwrite:
        if recipe.prune is not None:
            prune_options(recipe)  # refused before anything is moved
        _check_storage(recipe)
        _set_aside(recipe)
    chosen = pruned(recipe, watch)
    if chosen.search is not None:
        from trimtab.bit_search import results

        # Whatever the run would refuse in the end, it refuses before hours of searching.
        gather(chosen.moved(final.out).model_copy(update={"search": None}), overwrite, resume)
        chosen = results.best(search(chosen, show=watch))
        watch.say("tuning the best point within the budget")
    chosen = chosen.moved(final.out).model_copy(update={"name": recipe.name})
    metrics = one.run(chosen, overwrite=overwrite, resume=resume, show=watch)
    if overwrite:
        for folder in _STAGES:
            remove(_earlier(recipe.out / folder))
    return metrics


def _check_storage(recipe: Recipe) -> None:
    """Refuse to overwrite a search that others may be at work on: whose study lies elsewhere, or has trials that run."""
    if recipe.search is None:
        return
    from trimtab.bit_search.ledger import begun, busy
    from trimtab.bit_search.storage import shown

    url = recipe.search.storage
    if url is not None and (recipe.out / "search").resolve() not in Path(url).resolve().parents:
        if begun(url, recipe.name):
            raise UserError(
                f"search.storage: {shown(url)} holds a study {recipe.name!r}, which --overwrite does not remove and the "
                "search would continue with; set another `name`, or remove it (`optuna delete-study`)"
            )
        return
    journal = Path(url or recipe.out / "search" / "journal.log")
    if journal.is_file() and busy(str(journal), recipe.name):
        raise UserError(f"output: a search in {journal} is at work; wait for it, end it, or set `output`")


_STAGES: dict[str, Kind] = {"pruned": "pruned", "search": "search"}
"""Folders that come before the model's, and what they are."""


def _earlier(folder: Path) -> Path:
    """Where an earlier run's stage waits until the new model is whole."""
    return folder.with_name(f"{folder.name}.earlier")


def _set_aside(recipe: Recipe) -> None:
    """Move what an earlier run pruned and searched out of the way, and nothing else; it goes when the new run is whole."""
    folders = [(recipe.out / name, kind) for name, kind in _STAGES.items()]
    for folder, kind in folders:
        for there in (folder, _earlier(folder)):
            why = keeps(there, kind) if there.exists() else ""
            if why:
                raise UserError(f"output: {there} {why}; move or remove it yourself, or set `output`")
    for folder, _ in folders:
        if not folder.exists():
            continue
        with holding(folder):
            if _earlier(folder).exists():  # of the run that is still whole: this one was begun to replace it
                remove(folder)
            else:
                os.replace(folder, _earlier(folder))


def search(recipe: Recipe, *, show: Observer | None = None) -> "Search":
    """Prune if asked, then search; results are in `<output>/search`."""
    recipe = with_its_formats(recipe)
    check_extras(recipe)
    from trimtab.bit_search import workers

    watch = show or Quiet()
    return workers.run(pruned(recipe, watch), watch.search, watch.say)
