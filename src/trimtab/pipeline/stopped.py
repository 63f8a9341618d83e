"""What is said when a run was stopped by Ctrl-C or SIGTERM: what was kept, and the command that continues."""

import shlex
from collections.abc import Sequence

from trimtab.pipeline.output import Work
from trimtab.recipe.recipe import read
from trimtab.training.checkpoints import step_of


def stopped(given: str, overrides: Sequence[str] = ()) -> str:
    """One line.

    Args:
        given: the recipe's file as it was named on the command line.
        overrides: as they stood there.
    """
    recipe = read(given, overrides)
    staged = recipe.prune is not None or recipe.search is not None
    last = Work.of(recipe.moved(recipe.out / "model") if staged else recipe).stopped_at
    command = shlex.join(["trimtab", "run", given, *overrides])
    if last is None:
        done = "; stages that were finished are kept" if staged else ", and nothing was trained yet that could be kept"
        return f"stopped{done}: the same command begins again"
    return (
        f"stopped after step {step_of(last)} of {recipe.train.steps}: {last} is kept. Continue with: {command} --resume"
    )
