"""Several stages from one recipe: prune, search, tune. Each leaves what the next begins with.

    <output>/pruned     an ordinary float checkpoint                 where the recipe has a `prune` block
    <output>/search     trials, front, a recipe for each point       where it has a `search` block
    <output>/model      the tuned, folded, saved model

A recipe with neither block is one run, into <output> itself. A stage that is finished is not repeated.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from trimtab import inputs, pipeline
from trimtab.errors import UserError
from trimtab.prune import Options, Pruned, prune_checkpoint
from trimtab.recipe import Recipe
from trimtab.storage import parse_bytes

if TYPE_CHECKING:
    from trimtab.search.searching import Search


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
    watch = show or Quiet()
    if recipe.prune is None and recipe.search is None:
        return pipeline.run(recipe, overwrite=overwrite, resume=resume, show=watch)
    inputs.check_apart(recipe)  # before anything is removed
    final = recipe.out / "model"
    if overwrite:
        for stage in ("pruned", "search"):
            shutil.rmtree(recipe.out / stage, ignore_errors=True)
    else:
        inputs.check_output(final, overwrite, resume)
    chosen = pruned(recipe, watch)
    if chosen.search is not None:
        from trimtab.search import results

        chosen = results.best(search(chosen, show=watch))
        watch.say("tuning the best point within the budget")
    chosen = chosen.model_copy(update={"name": recipe.name, "output": str(final)})
    return pipeline.run(chosen, overwrite=overwrite, resume=resume, show=watch)


def pruned(recipe: Recipe, show: Observer | None = None) -> Recipe:
    """The recipe as it goes on after pruning; the pruned model is made if it is not there."""
    block = recipe.prune
    if block is None:
        return recipe
    out = recipe.out / "pruned"
    options = Options(
        ratio=block.ratio,
        target_bytes=None if block.bytes is None else parse_bytes(block.bytes, "prune.bytes"),
        layers=block.layers,
        what=block.what,
        importance=block.importance,
        keep=block.keep,
        count_embeddings=block.count_embeddings,
        multiple_of=block.multiple_of,
        seed=block.seed,
    )
    if (out / "pruning.json").exists():
        _check_same(out, recipe.model.path, options)
    else:
        watch = show or Quiet()
        watch.say(f"pruning {recipe.model.path}")
        if recipe.data is None:
            raise UserError("prune: needs calibration text; set data.path")
        done = prune_checkpoint(
            recipe.model.path,
            out,
            options,
            text=recipe.data.path,
            split=recipe.data.split,
            tokens=block.tokens,
            block_tokens=block.block_tokens,
            dtype=recipe.model.dtype,
        )
        watch.pruned(done, str(out))
    model = recipe.model.model_copy(update={"path": str(Path(out))})
    return recipe.model_copy(update={"model": model, "prune": None})


def _check_same(out: Path, model: str, options: Options) -> None:
    """Refuse to go on from a model that was pruned otherwise than the recipe now says."""
    made = json.loads((out / "pruning.json").read_text(encoding="utf-8"))
    asked = json.loads(json.dumps({"model": model, "options": asdict(options)}))
    if {key: made.get(key) for key in asked} != asked:
        raise UserError(
            f"prune: {out} was pruned from another model or with other options; pass --overwrite to prune again, "
            "or set another `output`"
        )


def search(recipe: Recipe, *, show: Observer | None = None) -> "Search":
    """Prune if asked, then search; results are in `<output>/search`."""
    from trimtab.search import workers

    watch = show or Quiet()
    return workers.run(pruned(recipe, watch), watch.search)
