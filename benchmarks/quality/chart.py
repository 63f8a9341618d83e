"""docs/merged.svg, the chart of README.md: what rounding a merged QLoRA again costs, from results/quality.jsonl.

python benchmarks/quality/chart.py             writes it
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import DOCS, RESULTS, read
from benchmarks.tables import interval

OUT = DOCS / "merged.svg"
BARS = (
    ("float", "value", "float model, not tuned", "#9e9e9e"),
    ("int3-qa-lora", "value", "QA-LoRA, folded: what is served", "#1a7f5a"),
    ("int3-qa-blora", "value", "QA-BLoRA, folded: what is served", "#1a7f5a"),
    ("int3-qa-hira", "value", "QA-HiRA, folded: what is served", "#1a7f5a"),
    ("int3-qlora", "before_rounding", "QLoRA, merged: no longer 3 bits", "#c98a1b"),
    ("int3-qlora", "value", "QLoRA, merged and rounded again", "#c0392b"),
    ("int3-rtn", "value", "rounded, not tuned", "#9e9e9e"),
)
"""Row, the number of it, what the bar says, its colour."""
LEFT, SCALE, ROW, TOP = 268, 3.6, 30, 62


def bars() -> list[tuple[str, str, float, float | None]]:
    """Label, colour, mean over seeds, and half of its 95 % interval, of each bar."""
    rows = [row for row in read(RESULTS / "quality.jsonl") if row["model"] == "smollm2-135m"]
    found = []
    for name, key, label, colour in BARS:
        values = [row[key] for row in rows if row["row"] == name and row["metric"] == "perplexity"]
        found.append((label, colour, statistics.fmean(values), interval(values)))
    return found


def svg() -> str:
    """The chart."""
    measured = bars()
    height = TOP + ROW * len(measured) + 12
    text = 'font-family="system-ui, sans-serif"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" {text} font-size="14" role="img" '
        'aria-label="Held-out perplexity of seven models at 3 bits">',
        f'<rect width="840" height="{height}" rx="6" fill="#ffffff"/>',
        '<text x="16" y="26" font-size="16" font-weight="600" fill="#222">Held-out perplexity at 3 bits '
        "(lower is better)</text>",
        '<text x="16" y="46" font-size="12" fill="#666">SmolLM2-135M-Instruct, groups of 32, 32 steps on WikiText-2; '
        "mean of 3 seeds and its 95 % interval where trained</text>",
    ]
    for number, (label, colour, value, half) in enumerate(measured):
        y, end = TOP + number * ROW, LEFT + value * SCALE
        lines.append(f'<text x="{LEFT - 10}" y="{y + 19}" text-anchor="end" fill="#222">{label}</text>')
        lines.append(
            f'<rect x="{LEFT}" y="{y + 4}" width="{value * SCALE:.1f}" height="{ROW - 9}" rx="2" fill="{colour}"/>'
        )
        if half is not None:
            first, last, middle = end - half * SCALE, end + half * SCALE, y + ROW / 2
            lines.append(
                f'<path d="M {first:.1f} {middle} H {last:.1f}" stroke="#222" stroke-width="1.5" fill="none"/>'
            )
            end = last
        lines.append(f'<text x="{end + 8:.1f}" y="{y + 19}" fill="#222">{value:.2f}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    OUT.write_text(svg(), encoding="utf-8")
