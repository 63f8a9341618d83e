"""The page of a search: the Pareto front among all trials, and the bits of every unit of every point.

search.json, trials.csv, front.csv, points/<n>.yaml     in `<output>/search`
"""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trimtab.formats.manifest import read_json
from trimtab.pages import charts
from trimtab.pages.html import Page
from trimtab.words import duration, size

_KNOWN = ("number", "kind", "steps", "state", "bytes", "quality", "seconds", "reason", "where")
_WIDTH = re.compile(r"\d+")


def page(folder: Path, name: str) -> Page:
    """The page of a search's folder.

    Args:
        folder: with the files above.
        name: of the page.
    """
    about, trials, points = (
        read_json(folder / "search.json"),
        _table(folder / "trials.csv"),
        _table(folder / "front.csv"),
    )
    tuned = about["objective"] == "tuned"
    quality = "held-out loss, nats a token" if tuned else "KL to the float model, nats a token"
    done = [t for t in trials if t["state"] == "complete"]
    seconds = sum(float(t["seconds"] or 0) for t in trials)
    made = Page(name, f"{len(done)} trials of {len(trials)} finished, {duration(seconds)} together; {quality}")
    made.cards(_first(about, points, quality))
    made.section("The front", "Every trial and the best of them for their bytes; the pointer says what each is.")
    lines: list[dict[str, Any]] = []
    if about.get("budget"):
        lines.append({"megabytes": about["budget"] / 1e6, "name": f"budget, {size(about['budget'])}"})
    if about.get("float_quality") is not None:
        lines.append({"quality": about["float_quality"], "name": "the float model"})
    shown = [{**_point(p), "recipe": f"points/{i}.yaml"} for i, p in enumerate(points, start=1)]
    chart = charts.front([_point(t) for t in done], shown, quality=quality, log=not tuned, lines=lines)
    made.figures((chart, f"The float model takes {size(about['float_bytes'])}."))
    rows = [
        (
            p["recipe"],
            size(1e6 * p["megabytes"]),
            f"{p['quality']:.4g}",
            f"{p['bits']:.2f}",
            p["kind"],
            str(p["number"]),
        )
        for p in shown
    ]
    made.table(("recipe", "bytes", quality, "mean bits", "made by", "trial"), rows, numbers=(1, 2, 3, 5))
    _bits(made, points)
    _failed(made, trials)
    made.section("Next step")
    made.code(f"trimtab run {about['folder']}/points/{max(len(points), 1)}.yaml")
    return made


def _table(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def _units(row: Mapping[str, str]) -> dict[str, int]:
    """Bits of every unit; a rank behind them is left out."""
    found = {name: _WIDTH.match(text) for name, text in row.items() if name not in _KNOWN}
    return {name: int(match[0]) for name, match in found.items() if match is not None}


def _point(row: Mapping[str, str]) -> dict[str, Any]:
    bits = list(_units(row).values())
    return {
        "number": int(row["number"]),
        "kind": row["kind"],
        "megabytes": int(row["bytes"]) / 1e6,
        "quality": float(row["quality"]),
        "bits": sum(bits) / max(len(bits), 1),
    }


def _first(about: Mapping[str, Any], points: Sequence[Mapping[str, str]], quality: str) -> list[tuple[str, str]]:
    cards = [("points on the front", str(len(points)))]
    if points:
        best = _point(points[-1])
        cards += [("the best takes", size(1e6 * best["megabytes"])), (f"its {quality}", f"{best['quality']:.4g}")]
    cards += [("budget", size(about["budget"]))] if about.get("budget") else []
    return cards


def _bits(made: Page, points: Sequence[Mapping[str, str]]) -> None:
    if not points:
        return
    made.section("Bits of every unit", "A column for each unit, a row for each point of the front.")
    rows = [
        {
            "block": re.sub(r"^\D*", "", unit) or unit,
            "unit": unit,
            "part": f"{i}: {size(int(p['bytes']))}",
            "bits": bits,
        }
        for i, p in enumerate(points, start=1)
        for unit, bits in _units(p).items()
    ]
    tooltip = [("unit", "unit", ""), ("bits", "bits", ""), ("part", "point", "")]
    chart = charts.heat(rows, value="bits", title="bits", format_="d", tooltip=tooltip, across="unit of the model")
    made.figures((chart, "What the search spends its bytes on."))


def _failed(made: Page, trials: Sequence[Mapping[str, str]]) -> None:
    failed = [(t["number"], t["state"], t["reason"]) for t in trials if t["reason"]]
    if failed:
        made.section("Trials that were not finished")
        made.table(("trial", "", "why"), failed, numbers=(0,))
