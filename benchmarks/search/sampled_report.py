"""A section of docs/search.md: how far random widths, each tuned, are from uniform widths of as many bytes."""

import statistics
from typing import Any

import numpy as np

from benchmarks.files import RESULTS, read
from benchmarks.search.sampled import BITS, STEPS
from benchmarks.tables import interval, table

TEXT = (
    "stories260K (float32, never quantized), four parts of each of its five layers at 2, 3 or 4 bits per channel, within",
    f"the bytes of 3 bits everywhere. Each is tuned by LR-QAT of rank 8 for {STEPS} steps. `benchmarks/search/sampled.py`.",
)


def _rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's."""
    ranks = [np.argsort(np.argsort(values)).astype(float) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


def _against(rows: list[dict[str, Any]], uniform: dict[int, float]) -> list[str]:
    """A line of the table for one configuration, over seeds."""
    losses = {row["seed"]: row["tuned"] for row in rows}
    differences = [loss - uniform[seed] for seed, loss in losses.items() if seed in uniform]
    wide = interval(differences)
    shown = f"{statistics.fmean(differences):+.4f}" + ("" if wide is None else f" ± {wide:.4f}")
    widths = "".join(str(BITS[c]) for c in rows[0]["configuration"])
    parts = " ".join(widths[i : i + 4] for i in range(0, len(widths), 4))
    tuned = f"{statistics.fmean(losses.values()):.4f}"
    return [rows[0]["kind"], parts, f"{rows[0]['untuned']:.3f}", tuned, shown, str(len(differences))]


def section() -> list[str]:
    """Nothing where nothing was run."""
    rows = read(RESULTS / "search_sampled.jsonl")
    uniform = {row["seed"]: row["tuned"] for row in rows if row["kind"] == "uniform"}
    sample = [row for row in rows if row["kind"] == "random"]
    if not uniform or not sample:
        return []
    own: dict[tuple[str, tuple[int, ...]], list[dict[str, Any]]] = {}
    for row in rows:
        if row["kind"] in ("uniform", "untuned costs", "fitted", "best of random"):
            own.setdefault((row["kind"], tuple(row["configuration"])), []).append(row)
    tuned, before = [row["tuned"] for row in sample], [row["untuned"] for row in sample]
    better = sum(loss < uniform[0] for loss in tuned)
    head = "chosen by | widths: qkv, o, gate and up, down of each layer | untuned | tuned | against uniform | seeds"
    return [
        "",
        "## Is there anything to gain?",
        "",
        *TEXT,
        "",
        *table(head, [_against(some, uniform) for some in own.values()]),
        "",
        f"Of {len(sample)} random widths of as many bytes, {better} are below uniform widths (one seed). Against those the "
        f"best of them is at {min(tuned) - uniform[0]:+.4f}, their median at {statistics.median(tuned) - uniform[0]:+.4f}, "
        f"the worst at {max(tuned) - uniform[0]:+.4f}.",
        f"Losses before tuning and after it go together: rank correlation {_rank_correlation(before, tuned):.2f}; after "
        f"tuning the sample's losses spread over {max(tuned) - min(tuned):.3f}, before it over "
        f"{max(before) - min(before):.3f}.",
    ]
