"""A section of docs/quality.md: what a start is worth, before tuning and after it, on each grid that was run."""

import statistics
from collections.abc import Iterable
from math import exp
from typing import Any

from benchmarks.files import RESULTS, read
from benchmarks.quality.starts import SETTINGS, STARTS, TUNED
from benchmarks.tables import interval, table

TEXT = (
    "Each decoder block trained through its rounding before the method begins (`start: {name: block}`): weights, scales",
    "and zeros (`all`), scales and zeros alone (`scales`), or weights by at most half a step, by signs (`shift`); beside",
    "round-to-nearest and GPTQ on the same calibration tokens. Integer zeros, the default rates of more than 2 bits.",
    "Numbers are held-out nats a token, after ± the 95 % interval of the mean over seeds; seconds are of one processor, of",
    "the start and of tuning. `python benchmarks/quality/starts.py --data DIR` fills `starts.jsonl`.",
)
NAMES = {"rtn": "round to nearest", "gptq": "GPTQ", **{name: f"block, {name}" for name in ("all", "scales", "shift")}}


def _shown(runs: list[dict[str, Any]]) -> str:
    if not runs:
        return ""
    half = interval([r["loss"] for r in runs])
    mean = statistics.mean(r["loss"] for r in runs)
    return f"{mean:.3f}" if half is None else f"{mean:.3f} ± {half:.3f}"


def _seconds(runs: Iterable[dict[str, Any]], key: str) -> str:
    spent = [r[key] for r in runs]
    return f"{statistics.median(spent):.0f}" if spent else "-"


def _grid(rows: list[dict[str, Any]], model: str, bits: int, group: int | None) -> list[str]:
    """The table of one grid."""
    own = [r for r in rows if (r["bits"], r["group"]) == (bits, group)]
    columns = [("rtn", None), *((method, rank) for method, rank, _ in TUNED)]
    named = [f"{method}{f' r {rank}' if rank else ''}" for method, rank in columns[1:]]
    lines = []
    for start in STARTS:
        some = [r for r in own if r["start"] == start]
        if not some:
            continue
        cells = [[r for r in some if (r["method"], r["rank"]) == column] for column in columns]
        tuned = [r for r in some if r["steps"] and (r["method"], r["rank"]) == ("lr-qat", 32)]
        seconds = f"{_seconds(cells[0], 'start_s')} + {_seconds(tuned, 'tune_s')}"
        lines.append([NAMES[start], *(_shown(cell) for cell in cells), seconds])
    steps, batch = SETTINGS[model].steps, SETTINGS[model].batch * SETTINGS[model].length
    title = (
        f"**{model}, {bits} bits, {f'group {group}' if group else 'per channel'}**, {steps} steps of {batch:,} tokens"
    )
    return ["", title, "", *table(f"start | untuned | {' | '.join(named)} | seconds", lines)]


def section() -> list[str]:
    """All grids of all models; nothing where nothing was run."""
    rows = read(RESULTS / "starts.jsonl")
    lines = ["## Starts", "", *TEXT] if rows else []
    for model in SETTINGS:
        own = [r for r in rows if r["model"] == model]
        floats = [r["loss"] for r in own if r["start"] == "float"]
        runs = [r for r in own if r["start"] != "float"]
        if floats:
            lines += ["", f"{model} in float: {floats[0]:.3f} (perplexity {exp(floats[0]):.2f})."]
        for bits, group in dict.fromkeys((r["bits"], r["group"]) for r in runs):
            lines += _grid(runs, model, bits, group)
    return lines
