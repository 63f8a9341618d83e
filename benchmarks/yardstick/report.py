"""docs/yardstick.md: what each library makes of the same model in few bits, with what it takes."""

from typing import Any

from benchmarks.files import RESULTS, read
from benchmarks.tables import table
from benchmarks.yardstick.run import LIBRARIES, MODELS, WIDTHS, Row, known_of
from benchmarks.yardstick.run import rows as wanted

ABOUT = (
    "The same float model, calibration windows (64 of 512 tokens of WikiText-2's train part) and test text (8,192 tokens,",
    "windows of 512), groups of 64 with integer zeros; every row is measured by one function, on the float weights",
    "that it left. Tuning is 96 steps of 1,024 tokens of the train part at the library's default rates. Minutes are of",
    "processors, all cores together, and peak memory is the process's. Peers run in environments of their own, with their",
    "own defaults. `python benchmarks/yardstick/run.py --data DIR` fills `yardstick.jsonl`.",
)


def _table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        [
            row["method"],
            row["library"],
            f"{row['perplexity']:.5g}" if row["perplexity"] < 1e4 else f"{row['perplexity']:.1e}",
            f"{row['perplexity'] / row['float_perplexity']:.2f}" if row["perplexity"] < 1e4 else "-",
            f"{row['minutes']:.1f}",
            f"{row['peak_mb']:,}",
        ]
        for row in sorted(rows, key=lambda row: row["perplexity"])
    ]
    return table("method | library | perplexity | times the untuned float model's | minutes | peak MB", lines)


def page() -> list[list[str]]:
    """The sections of docs/yardstick.md: a table for each model and width that was run, the best row first."""
    rows = read(RESULTS / "yardstick.jsonl")
    sections = [list(ABOUT)]
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        section = [f"## {model}", "", f"Untuned and in float: {own[0]['float_perplexity']:.2f}."]
        for bits in sorted({row["bits"] for row in own if row["bits"]}):
            section += ["", f"### {bits} bits", "", *_table([row for row in own if row["bits"] == bits])]
        if tuned := [row for row in own if row["bits"] is None]:
            section += ["", "### Float, tuned", "", "What tuning on this text alone gives.", "", *_table(tuned)]
        sections.append(section)
    todo: dict[str, list[Row]] = {}
    for row in wanted(MODELS, WIDTHS, list(LIBRARIES)):
        todo.setdefault(f"{row.model}, {f'{row.bits} bits' if row.bits else 'float'}", []).append(row)
    missing = {place: [row.method for row in some if known_of(row, rows) is None] for place, some in todo.items()}
    lines = [
        f"* {place}: {'all' if len(names) == len(todo[place]) else ', '.join(names)}"
        for place, names in missing.items()
        if names
    ]
    if lines:
        sections.append(["## Not run", "", *lines])
    return sections
