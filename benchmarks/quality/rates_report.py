"""docs/rates.md: the rule of the default rates, and how far each cell of the study is from the best rate that was tried."""

import math
from dataclasses import asdict
from typing import Any

from benchmarks.files import RESULTS, read
from benchmarks.quality.rates import APART, CHECKS, METHODS, RANKS, STEPS, STORIES, Cell, cells
from benchmarks.tables import table
from trimtab import methods
from trimtab.layers.rates import Rates, default

NEAR = 0.02
"""A default's loss may be above the best one's by this share."""
ABOUT = (
    "A learning rate is the share of a step of the grid that a weight may move in one optimizer step: a number of which",
    "width, rank and layer are divided out (the formulas stand in `src/trimtab/layers/rates.py`). Without `train.lr` and",
    "`train.lr_scale` a run takes these defaults, which fall with the square root of its length. On grids of 2 bits a run",
    "of any length takes those of 30 steps: rounding ruins the model there, and its levels have far to go. What of them",
    "was measured stands below.",
)
STUDY = (
    "stories260K on TinyStories, groups of 32 (43 in the MLP's second matrix), 4 x 64 tokens a step, one seed. Each cell",
    f"is trained with the default rates and others up to a factor of {APART:g} away, or further where an end is best. The",
    "number is the share by which the default's held-out loss lies above the best one's; in bold where that is more than",
    f"{NEAR:.0%}, with what the best run multiplied rates by. `python benchmarks/quality/rates.py --data DIR`.",
)
LARGER = (
    "Models that the rule was not made on, tuned on WikiText-2, groups of 64, 4 x 64 tokens a step, one seed, the loss of",
    "6,144 test tokens; else as above. `python benchmarks/quality/rates.py --data DIR --model MODEL --steps 32 100`.",
)


def _at(rows: list[dict[str, Any]], cell: Cell, rates: Rates) -> float | None:
    """The loss of a cell at these rates; None where it was not run."""
    about = asdict(cell)
    return next(
        (
            row["loss"]
            for row in rows
            if all(row[key] == value for key, value in about.items())
            and math.isclose(row["lr"], rates.delta)
            and math.isclose(row["lr_scale"], rates.scale)
        ),
        None,
    )


def _not_falling(rows: list[dict[str, Any]]) -> list[str]:
    """What it gives that rates do not fall at 2 bits, where both were run."""
    lines = []
    for steps in STEPS[1:]:
        some = list(cells([steps], METHODS, [2]))
        pairs = [(_at(rows, c, c.default()), _at(rows, c, default(methods.make(c.method).kind, steps))) for c in some]
        changes = [own / falling - 1 for own, falling in pairs if own is not None and falling is not None]
        if changes:
            lower = [change for change in changes if change < 0]
            lines.append(
                f"* {steps} steps: lower in {len(lower)} of {len(changes)} cells, by {-min(changes):.1%} at most, and "
                f"higher by {max(*changes, 0.0):.1%} at most."
            )
    return ["", "At 2 bits, the loss with these defaults against that with rates that fall as elsewhere:", "", *lines]


def _cell(rows: list[dict[str, Any]], cell: Cell) -> tuple[float, str] | None:
    """(share above the best, words), or None where it was not run to the end."""
    own = cell.default()
    runs = [row for row in rows if all(row[key] == value for key, value in asdict(cell).items())]
    mine = _at(runs, cell, own)
    if mine is None or len(runs) < 1 + 2 * len(cell.moves):
        return None
    best = min(runs, key=lambda r: r["loss"])
    above = mine / best["loss"] - 1
    if above <= NEAR:
        return above, f"{above:.1%}"
    factors = {"delta": ("lr", best["lr"] / own.delta), "scale": ("lr_scale", best["lr_scale"] / own.scale)}
    words = ", ".join(f"{name} x {factor:.2g}" for name, factor in (factors[rate] for rate in cell.moves))
    return above, f"**{above:.1%}** ({words})"


def _larger(rows: list[dict[str, Any]]) -> list[str]:
    """The section of larger models; none before one of their cells was run."""
    own = [row for row in rows if row["model"] != STORIES]
    lengths, found = sorted({row["steps"] for row in own}), []
    for model in dict.fromkeys(row["model"] for row in own):
        for check in CHECKS:
            results = [_cell(rows, Cell(*check, steps, model)) for steps in lengths]
            if any(results):
                shown = ("not run" if r is None else r[1] for r in results)
                found.append([model, check[0], str(check[2]), str(check[1]), *shown])
    head = "model | method | rank | grid | " + "|".join(f"{steps} steps" for steps in lengths)
    return ["## Larger models", "", *LARGER, "", *table(head, found)] if found else []


def page() -> list[list[str]]:
    """The sections of docs/rates.md; methods and lengths that were never run have no row and no column."""
    rows = read(RESULTS / "rates.jsonl")
    kinds: dict[str, list[str]] = {}
    for name in METHODS:
        kinds.setdefault(methods.make(name).kind, []).append(name)
    shares = []
    for kind, names in kinds.items():
        rates = [default(kind, steps) for steps in STEPS]  # type: ignore[arg-type]
        moves = Cell(names[0], 4, None, STEPS[0]).moves
        for key, name in (("delta", "lr"), ("scale", "lr_scale")):
            if key in moves:
                shares.append([", ".join(names), name, *(f"{getattr(r, key):.3g}" for r in rates)])
    lengths = "|".join(f"{steps} steps" for steps in STEPS)
    found, missed = [], []
    done = {cell: result for cell in cells(STEPS, METHODS) if (result := _cell(rows, cell)) is not None}
    run = [steps for steps in STEPS if any(cell.steps == steps for cell in done)]
    for name in METHODS:
        for rank in RANKS if hasattr(methods.make(name), "rank") else (None,):
            for bits in (2, 3, 4, 8):
                results = [done.get(Cell(name, bits, rank, steps)) for steps in run]
                if any(result is not None for result in results):
                    words = ["not run" if result is None else result[1] for result in results]
                    found.append([name, str(rank or "-"), str(bits), *words])
                missed += [
                    f"{name}{f' of rank {rank}' if rank else ''} at {bits} bits, {steps} steps"
                    for steps, result in zip(run, results, strict=True)
                    if result is not None and result[0] > NEAR
                ]
    total, never = len(list(cells(STEPS, METHODS))), [m for m in METHODS if not any(c.method == m for c in done)]
    verdict = [
        f"{len(done)} of the study's {total} cells have been run; in {len(done) - len(missed)} of them the default is",
        f"within {NEAR:.0%} of the best rate that was tried.",
        *([f"It is not in: {'; '.join(missed)}."] if missed else []),
        *([f"Never run: {', '.join(never)}, so their defaults are not held to anything."] if never else []),
        *([f"Nor any of {', '.join(str(s) for s in STEPS if s not in run)} steps."] if len(run) < len(STEPS) else []),
    ]
    return [
        [*ABOUT, "", *table(f"methods | rate | {lengths}", shares)],
        [
            "## The study",
            "",
            *STUDY,
            "",
            *table("method | rank | bits | " + "|".join(f"{steps} steps" for steps in run), found),
            "",
            *verdict,
            *_not_falling(rows),
        ],
        *([real] if (real := _larger(rows)) else []),
    ]
