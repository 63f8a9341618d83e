"""What a search writes: `<output>/search/`

trials.csv          every trial: widths, bytes, quality, seconds, why it failed, where it was made
front.csv           the Pareto front, by ascending bytes
points/<n>.yaml     a runnable recipe for each of its points: `trimtab run points/3.yaml`
front.png, bits.png (see `figures`)
search.json         what the numbers are: objective, budget, the float model's
report.html         all of it, as a page, where the search ended
"""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trimtab.bit_search import figures
from trimtab.bit_search.ledger import Trial
from trimtab.bit_search.searching import Search
from trimtab.disk import replace_text
from trimtab.formats.manifest import add, json_text
from trimtab.recipe.recipe import Recipe


def point_recipe(search: Search, trial: Trial, number: int) -> Recipe:
    """The ordinary recipe of a point: nothing downstream knows of a search."""
    recipe = search.recipe
    return recipe.model_copy(
        update={
            "name": f"{recipe.name}-{number}",
            "rules": search.space.rules(trial.wish.configuration),
            "search": None,
            "prune": None,
            "output": str(recipe.out / f"point-{number}"),
        }
    )


def write(search: Search) -> list[Path]:
    """Write everything but the page; the recipes of the front."""
    trials = search.ledger.trials()
    front = search.front(trials)
    folder = search.folder
    points = folder / "points"
    points.mkdir(parents=True, exist_ok=True)
    replace_text(folder / "trials.csv", _table(search, [t for t in trials if t.state != "duplicate"]))
    replace_text(folder / "front.csv", _table(search, front))
    written = []
    for number, trial in enumerate(front, start=1):
        file = points / f"{number}.yaml"
        replace_text(file, point_recipe(search, trial, number).to_yaml())
        written.append(file)
    for stale in set(points.glob("*.yaml")) - set(written):
        if stale.stem.isdecimal():  # another name is somebody's own copy
            stale.unlink()
    add(folder, (f"points/{file.name}" for file in written))
    if front:
        figures.draw_front(search, trials, front, folder / "front.png")
        figures.draw_bits(search, front, folder / "bits.png")
    replace_text(folder / "search.json", json_text(_about(search)))
    return written


def best(search: Search) -> Recipe:
    """The point of best quality within the budget, as a recipe: the last of the front, which must not be empty."""
    front = search.front(search.ledger.trials())
    return point_recipe(search, front[-1], len(front))


def _about(search: Search) -> dict[str, Any]:
    """What the tables do not say."""
    return {
        "folder": str(search.folder),
        "objective": search.block.objective,
        "budget": search.budget,
        "float_bytes": search.float_bytes,
        "float_quality": search.ledger.noted("float_quality"),
    }


def _table(search: Search, trials: Sequence[Trial]) -> str:
    units = [unit.name for unit in search.space.units]
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    writer.writerow(["number", "kind", "steps", "state", "bytes", "quality", "seconds", "reason", "where", *units])
    for t in trials:
        widths = [search.space.label(c) for c in t.wish.configuration]
        size = search.space.bytes(t.wish.configuration)
        row = [t.number, t.wish.kind, t.wish.steps, t.state, size, t.quality, t.seconds, t.reason, t.where]
        writer.writerow(["" if v is None else v for v in row] + widths)
    return lines.getvalue()
