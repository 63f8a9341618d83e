"""What a run knows before it begins or continues: the recipe that its data resolves, what it reads, what was there."""

from collections.abc import Callable
from pathlib import Path

from trimtab.data.split import SHARE
from trimtab.formats.manifest import read_json
from trimtab.pipeline.output import Work
from trimtab.pipeline.reading import written_down
from trimtab.recipe import going_on, inputs
from trimtab.recipe.recipe import Recipe, read
from trimtab.training.build import RunContext
from trimtab.training.checkpoints import RECIPE, VERSIONS
from trimtab.training.streaming import as_taken
from trimtab.training.versions import versions


def resolved(recipe: Recipe, given: RunContext) -> Recipe:
    """The recipe with what only its data could tell: steps (and their rates), and whether a share of it is held out."""
    if given.overview is not None:
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"steps": given.overview.steps, "epochs": None})}
        )
    recipe = recipe.with_its_rates()
    if given.texts is not None:
        recipe = as_taken(recipe, given.texts)
    block = recipe.data
    if block is None or block.holdout is not None or block.eval_path is not None or given.texts is None:
        return recipe
    share = 0.0 if given.texts.held_out is None else SHARE
    return recipe.model_copy(update={"data": block.model_copy(update={"holdout": share})})


def begun_or_gone_on(recipe: Recipe, work: Work, resume: bool, say: Callable[[str], None]) -> Recipe:
    """The recipe with hashes of what it reads; says which of it has changed since a recipe was saved.

    Raises:
        UserError: if it is to continue from what another recipe, or other files, have trained.
    """
    down = written_down(recipe)
    if resume:
        found = work.found()
        for line in found.lines:
            say(line)
        assert found.last is not None, "looked for before (`Work.check`)"
        going_on.check(read(found.last / RECIPE), down, found.last.name)
        for line in _other_versions(found.last):
            say(line)
        return down
    now = down.inputs or {}
    for key, before in (recipe.inputs or {}).items():
        changed = inputs.changes(before, now[key]) if key in now else ""
        if changed:
            say(f"{key}: {changed} since this recipe was saved")
    return down


def _other_versions(checkpoint: Path) -> list[str]:
    """A line where the versions of libraries are not those that wrote the checkpoint: they may round differently."""
    before, now = read_json(checkpoint / VERSIONS), versions()
    other = [
        f"{name} {before.get(name, 'none')} (now {now.get(name, 'none')})"
        for name in sorted({*before, *now})
        if before.get(name) != now.get(name)
    ]
    return (
        [f"{checkpoint.name} was written with {', '.join(other)}: the run continues, but digits may differ"]
        if other
        else []
    )
