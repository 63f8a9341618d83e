"""Sections of docs/performance.md on memory; `benchmarks/report.py` writes them."""

import textwrap
from collections import Counter
from typing import Any

from benchmarks.tables import marked, table
from trimtab.training.divergence import LOGITS_CHUNK_TOKENS

LOAD_AIM = 3
"""Of loading over reading the files, at most."""
FLOOR_AIM = 1.25
"""Of what was measured over the floor, at most."""


def seven(found: dict[str, Any]) -> list[str]:
    """7B shapes on this machine, larger ones on paper."""
    rows = []
    for r in found["rows"]:
        memory = [f"{r[k] / 1e9:.2f}" for k in ("planned_bytes", "load_peak_bytes", "peak_bytes")]
        aim = marked(f"{r['aim_bytes'] / 1e9:.1f}", r["peak_bytes"] <= r["aim_bytes"])
        load = marked(f"{r['load_ratio']:.1f}", r["load_ratio"] <= LOAD_AIM)
        rows.append([r["label"], *memory, aim, f"{r['step_seconds']:.0f}", load])
    lines = [
        "## LLaMA-2-7B shapes",
        "",
        "Random weights, 1 x 512 tokens, activation checkpointing, bfloat16, 2 CPU cores. GB of anonymous resident memory",
        "with interpreter and libraries (0.4 GB; the plan is without them); load x read: loading and quantizing a 4-layer",
        "slice over reading its files from the page cache. `python benchmarks/memory/seven_b.py`. Seconds were taken",
        "beside other work: they are no measure of speed.",
        "",
        *table(f"row | planned | load peak | step peak | aim | step s | load x read (aim {LOAD_AIM})", rows),
    ]
    planned = found.get("planned") or []
    if planned:
        cells = [[p["model"], p["label"], f"{p['total'] / 1e9:.1f}"] for p in planned]
        lines += ["", "On paper (`memory.plan`):", "", *table("model | row | GB", cells)]
    return lines


def memory(found: dict[str, Any]) -> list[str]:
    """The plan against what was measured, and what was measured against the least that training can do with."""
    cells, misses = [], []
    for r in found["rows"]:
        times = r["measured_bytes"] / _floor(found, r)
        misses += [r] if times > FLOOR_AIM else []
        cells.append(
            [r["name"], r["model"], "yes" if r["checkpointing"] else "no"]
            + [f"{r[k] / 1e6:.0f}" for k in ("planned_bytes", "measured_bytes")]
            + [f"{r['ratio']:.2f}", marked(f"{times:.2f}", times <= FLOOR_AIM)]
        )
    return [
        "## The plan and the measured peak",
        "",
        *textwrap.wrap(
            "Training peak above interpreter and libraries. The floor is what cannot be done without: codes, float "
            "parameters, adapters, gradients, optimizer, what backward keeps, and one chunk of float32 logits. The aim is "
            f"at most {FLOOR_AIM} times the floor. {_missed(found, misses)} `python benchmarks/memory/memory.py`.",
            118,
        ),
        "",
        *table(
            "method | model | checkpointing | planned MB | measured MB | planned / measured | measured / floor", cells
        ),
    ]


def _floor(found: dict[str, Any], row: dict[str, Any]) -> int:
    kept = sum(v for k, v in row["parts"].items() if k not in ("temporary", "teacher", "before", "apart"))
    return int(kept + LOGITS_CHUNK_TOKENS * found["models"][row["model"]]["vocab_size"] * 4)


def _missed(found: dict[str, Any], misses: list[dict[str, Any]]) -> str:
    """How many rows miss the aim, by how much, and what is known of why."""
    rows = found["rows"]
    if not misses:
        return f"All {len(rows)} rows meet it."
    of, missed = Counter(r["model"] for r in rows), Counter(r["model"] for r in misses)
    each = ", ".join(f"{missed[model]} of {count} in `{model}`" for model, count in of.items())
    worst = max(r["measured_bytes"] / _floor(found, r) for r in misses)
    lines = [
        f"{len(misses)} of {len(rows)} rows miss it ({each}), the worst with {worst:.2f} times: these steps hold more for",
        "a moment than the aim allows. The floor leaves out the weight (and gradient) that is being rebuilt.",
    ]
    for model, shape in found["models"].items():
        above = [(r["measured_bytes"] - _floor(found, r)) / 1e6 for r in misses if r["model"] == model]
        if above and shape["tie_word_embeddings"]:
            head = 2 * shape["vocab_size"] * shape["hidden_size"] / 1e6
            lines += [
                f"In `{model}` that is a tied head of {shape['vocab_size']:,} rows: {head:.0f} MB in bfloat16, of the",
                f"{min(above):.0f} to {max(above):.0f} MB that missed rows lie above their floors.",
            ]
    return " ".join(lines)
