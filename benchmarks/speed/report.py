"""Sections of docs/performance.md and docs/results.md on speed; `benchmarks/report.py` writes them."""

from statistics import median
from typing import Any

from benchmarks.tables import marked, table

STEP_AIMS = {"qlora": 0.85, "q-bara": 0.85, "qa-hira": 0.85, "lr-qat-channel": 1.0, "lr-qat-g64": 1.0}
"""Of a step's time over that of dense LoRA, at most."""
COPY_AIM, COPY_AIM_ROW = 1.5, "ours, int4 g64 integer zero"
"""Of making a weight over copying it, at most."""
DENSE_AIM, DENSE_AIM_ROWS = 2.0, "int4"
"""Of tokens per second over those of dense layers, at least; the rows begin so."""


def step(found: dict[str, Any]) -> list[str]:
    """Step times beside the peers."""
    return [
        "## One training step",
        "",
        "135M Llama shapes, 4 x 256 tokens, bfloat16, AdamW, no activation checkpointing, each library with the loss that",
        "it trains with; a process a row, run in turn; median (and range) of the paired ratios to the dense LoRA step of",
        "the same round. `python benchmarks/speed/step.py`.",
        "",
        *_steps(found),
    ]


def step_1b(found: dict[str, Any]) -> list[str]:
    """The same on the layers of a larger model."""
    return ["## One training step, 1B shapes", "", "Four layers of hidden 2048, `--shape 1b`.", "", *_steps(found)]


COMPILED_AIMS = {"qlora": 0.75, "q-bara": 0.8, "qa-hira": 0.6, "lr-qat-channel": 0.85, "lr-qat-g64": 0.85}
"""The same with compiled layers."""


def step_compiled(found: dict[str, Any]) -> list[str]:
    """Step times with compiled decoder layers, beside the same rows without."""
    by_name = {row["name"]: row for row in found["rows"]}
    rows = []
    for name, eager in by_name.items():
        compiled = by_name.get(f"{name}+compiled")
        if compiled is None:
            continue
        aim, ratio = COMPILED_AIMS.get(name), compiled["ratio_to_dense_lora"]
        met = "" if aim is None else marked(f"{aim:.2f}", ratio <= aim)
        paired = [b / a for a, b in zip(eager["seconds"], compiled["seconds"], strict=True)]
        peaks = f"{eager['peak_bytes'] / 1e6:.0f}, {compiled['peak_bytes'] / 1e6:.0f}"
        cells = [eager["label"], f"{eager['ratio_to_dense_lora']:.2f}", f"{ratio:.2f}", met, f"{median(paired):.2f}"]
        rows.append([*cells, f"{compiled['first_step_seconds']:.0f}", peaks])
    environment = found["environment"]
    shape, known = environment["model"], ", ".join(environment["bfloat16_instructions"]) or "none"
    head = "row | eager x dense LoRA | compiled | aim | compiled x eager | first step s | peak MB, eager and compiled"
    return [
        f"## One training step, decoder layers compiled: {shape['num_hidden_layers']} layers",
        "",
        f"{shape['num_hidden_layers']} layers of hidden {shape['hidden_size']}, {environment['dtype']} (the processor's",
        f"instructions for bfloat16: {known}); medians of paired ratios to the eager dense LoRA step of the same",
        f"round, {environment['rounds']} rounds.",
        "The first step holds what compiling takes. `python benchmarks/speed/step.py --compiled`, with `--shape` and",
        "`--dtype` as here.",
        "",
        *table(head, rows),
    ]


def _steps(found: dict[str, Any]) -> list[str]:
    by_name = {row["name"]: row for row in found["rows"]}
    floor = by_name["products"]["median_step_seconds"]
    rows = []
    for name, row in by_name.items():
        aim, ratio = STEP_AIMS.get(name), row["ratio_to_dense_lora"]
        met = "" if aim is None else marked(f"{aim:.2f}", ratio <= aim)
        low, high = row["ratio_to_dense_lora_range"]
        cells = [row["label"], f"{row['median_step_seconds']:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})", met]
        bnb = f"{row['ratio_to_bitsandbytes']:.2f}" if "ratio_to_bitsandbytes" in row else "-"
        rows.append([*cells, bnb, f"{row['median_step_seconds'] / floor:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"])
    return table("row | median s | x dense LoRA | aim | x bitsandbytes | x matrix products | peak MB", rows)


def dequantize(found: dict[str, Any]) -> list[str]:
    """Dequantizing beside copying."""
    rows = []
    for r in found["rows"]:
        met = r["name"] != COPY_AIM_ROW or r["ratio_to_copy"] <= COPY_AIM
        rows.append([r["name"], f"{r['median_ms']:.2f}", marked(f"{r['ratio_to_copy']:.2f}", met)])
    return [
        "## Making a 4096 x 4096 bfloat16 weight",
        "",
        f"Aim: int4 into a reused buffer at most {COPY_AIM} times the copy. `python benchmarks/speed/dequantize.py`.",
        "",
        *table("form | median ms | x copy", rows),
    ]


def generate(found: dict[str, Any]) -> list[str]:
    """Tokens per second."""
    rows = []
    for r in found["rows"]:
        met = not r["name"].startswith(DENSE_AIM_ROWS) or r["ratio"] >= DENSE_AIM
        rows.append([r["name"], f"{r['tokens_per_second']:.1f}", marked(f"{r['ratio']:.2f}", met)])
    return [
        "## Generation, one sequence",
        "",
        f"1.1 billion parameters, one-token steps. Aim: int4 folded at least {DENSE_AIM:g} times dense bfloat16.",
        "`python benchmarks/speed/generate.py`.",
        "",
        *table("linear layers | tokens/s | x dense", rows),
    ]


def products(found: dict[str, Any]) -> list[str]:
    """Products in half precision through float32."""
    rows = [[r["dtype"], r["name"], *(f"{r[k]:.1f}" for k in ("torch_ms", "ours_ms", "ratio"))] for r in found["rows"]]
    return [
        "## Half precision without AVX-512",
        "",
        f"One thread of a processor whose best instructions are {found['capability']}: torch's own kernels, and trimtab's,",
        "which multiply in float32. `python benchmarks/speed/products.py` says what the rows are. The other tables of this",
        "page come from processors that have AVX-512, where torch's kernels are left alone.",
        "",
        *table("type | product | torch, ms | ours, ms | times faster", rows),
    ]


def choices(found: dict[str, Any]) -> list[str]:
    """The small decisions."""
    lines = [
        "## Roads not taken",
        "",
        "`python benchmarks/speed/choices.py`; each group's first row is what the library does.",
        "",
    ]
    for group, rows in found["groups"].items():
        lines += [f"| {group} | ms | ratio |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['median_ms']:.3f} | {r['ratio']:.2f} |" for r in rows]
        lines.append("")
    return lines
