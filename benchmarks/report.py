"""Write docs/results.md and docs/performance.md from benchmarks/results: numbers in the docs are generated, not typed.

make demo && python benchmarks/report.py --demo runs/demo      also takes the demo's metrics into benchmarks/results
python benchmarks/report.py
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"


def demo(metrics: dict[str, Any], parity: dict[str, Any]) -> list[str]:
    """The demo's perplexities, parity, bytes and time."""
    p = metrics["perplexity"]
    lines = [
        "## The demo",
        "",
        "SmolLM2-135M-Instruct (`float` is the dequantized 4-bit GGUF), 3 bits, group 32, integer zeros, embedding at",
        "8 bits, tuned by LR-QAT on the documentation topics of Python's standard library; perplexity on held-out topics,",
        "after training text that they repeat was removed. `make demo`.",
        "",
        "| model | held-out perplexity |",
        "|---|---|",
        f"| float (untuned) | {p['float']:.2f} |",
        f"| rounded, before tuning | {p['rounded']:.2f} |",
        f"| tuned, folded, saved, reloaded | {p['tuned']:.2f} |",
        "",
        f"{metrics['tokens']:,} tokens in {metrics['train_seconds']:.0f} s on 2 CPU cores; {metrics['trainable']:,}",
        f"trained numbers; peak memory {metrics['peak_memory_bytes'] / 1e9:.2f} GB with interpreter and libraries;",
        f"{metrics['disk_bytes'] / 1e6:.1f} MB on disk; codes changed by folding: {metrics['codes_changed_by_fold']}.",
        "",
        "| stage | largest logit difference | top-1 agreement | same bits |",
        "|---|---|---|---|",
    ]
    for stage in parity["stages"]:
        same = "yes" if stage["identical"] else "no"
        lines.append(f"| {stage['stage']} | {stage['max_difference']:g} | {stage['top1_agreement']:.2%} | {same} |")
    return lines


def _table(head: str, rows: list[list[str]]) -> list[str]:
    columns = head.split("|")
    return [f"| {' | '.join(c.strip() for c in columns)} |", "|---" * len(columns) + "|"] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


STEP_AIMS = {"qlora": 0.85, "q-bara": 0.85, "qa-hira": 0.85, "lr-qat-channel": 1.0, "lr-qat-g64": 1.0}


def step_1b(found: dict[str, Any]) -> list[str]:
    """The same on the layers of a larger model."""
    return ["## One training step, 1B shapes", "", "Four layers of hidden 2048, `--shape 1b`.", "", *_steps(found)]


def step(found: dict[str, Any]) -> list[str]:
    """Step times beside the peers."""
    return [
        "## One training step",
        "",
        "135M Llama shapes, 4 x 256 tokens, bfloat16, AdamW, no activation checkpointing, each library with the loss that",
        "it trains with; a process a row, run in turn; median (and range) of the paired ratios to the dense LoRA step of",
        "the same round. `python benchmarks/step.py`.",
        "",
        *_steps(found),
    ]


def _steps(found: dict[str, Any]) -> list[str]:
    by_name = {row["name"]: row for row in found["rows"]}
    floor = by_name["products"]["median_step_seconds"]
    rows = []
    for name, row in by_name.items():
        aim, ratio = STEP_AIMS.get(name), row["ratio_to_dense_lora"]
        met = "" if aim is None else f"{aim:.2f}{'' if ratio <= aim else ', missed'}"
        low, high = row["ratio_to_dense_lora_range"]
        cells = [row["label"], f"{row['median_step_seconds']:.2f}", f"{ratio:.2f} ({low:.2f} to {high:.2f})", met]
        bnb = f"{row['ratio_to_bitsandbytes']:.2f}" if "ratio_to_bitsandbytes" in row else "-"
        rows.append([*cells, bnb, f"{row['median_step_seconds'] / floor:.2f}", f"{row['peak_bytes'] / 1e6:.0f}"])
    return _table("row | median s | x dense LoRA | aim | x bitsandbytes | x matrix products | peak MB", rows)


def dequantize(found: dict[str, Any]) -> list[str]:
    """Dequantizing beside copying."""
    rows = [[r["name"], f"{r['median_ms']:.2f}", f"{r['ratio_to_copy']:.2f}"] for r in found["rows"]]
    return [
        "## Making a 4096 x 4096 bfloat16 weight",
        "",
        "Aim: int4 into a reused buffer at most 1.5 times the copy. `python benchmarks/dequantize.py`.",
        "",
        *_table("form | median ms | x copy", rows),
    ]


def generate(found: dict[str, Any]) -> list[str]:
    """Tokens per second."""
    rows = [[r["name"], f"{r['tokens_per_second']:.1f}", f"{r['ratio']:.2f}"] for r in found["rows"]]
    return [
        "## Generation, one sequence",
        "",
        "1.1 billion parameters, one-token steps. Aim: int4 folded at least twice dense bfloat16.",
        "`python benchmarks/generate.py`.",
        "",
        *_table("linear layers | tokens/s | x dense", rows),
    ]


def products(found: dict[str, Any]) -> list[str]:
    """Products in half precision through float32."""
    rows = [[r["dtype"], r["name"], *(f"{r[k]:.1f}" for k in ("torch_ms", "ours_ms", "ratio"))] for r in found["rows"]]
    return [
        "## Half precision without AVX-512",
        "",
        f"One thread of a processor whose best instructions are {found['capability']}: torch's own kernels, and trimtab's,",
        "which multiply in float32. `python benchmarks/products.py` says what the rows are. The other tables of this page",
        "come from processors that have AVX-512, where torch's kernels are left alone.",
        "",
        *_table("type | product | torch, ms | ours, ms | times faster", rows),
    ]


def seven(found: dict[str, Any]) -> list[str]:
    """7B shapes on this machine, larger ones on paper."""
    rows = []
    for r in found["rows"]:
        met = "" if r["peak_bytes"] <= r["aim_bytes"] else ", missed"
        memory = [f"{r[k] / 1e9:.2f}" for k in ("planned_bytes", "load_peak_bytes", "peak_bytes")]
        aim = f"{r['aim_bytes'] / 1e9:.1f}{met}"
        rows.append([r["label"], *memory, aim, f"{r['step_seconds']:.0f}", f"{r['load_ratio']:.1f}"])
    lines = [
        "## LLaMA-2-7B shapes",
        "",
        "Random weights, 1 x 512 tokens, activation checkpointing, bfloat16, 2 CPU cores. GB of anonymous resident memory",
        "with interpreter and libraries (0.4 GB; the plan is without them); load x read: loading and quantizing a 4-layer",
        "slice over reading its files from the page cache. `python benchmarks/seven_b.py`. Seconds were taken beside other",
        "work: they are no measure of speed.",
        "",
        *_table("row | planned | load peak | step peak | aim | step s | load x read (aim 3)", rows),
    ]
    planned = found.get("planned") or []
    if planned:
        cells = [[p["model"], p["label"], f"{p['total'] / 1e9:.1f}"] for p in planned]
        lines += ["", "On paper (`memory.plan`):", "", *_table("model | row | GB", cells)]
    return lines


LOGITS_CHUNK_TOKENS = 128
"""Of `trimtab.memory.plan`."""


def memory(found: dict[str, Any]) -> list[str]:
    """The plan against what was measured, and what was measured against the least that training can do with."""
    rows = []
    for r in found["rows"]:
        parts, vocabulary = r["parts"], found["models"][r["model"]]["vocab_size"]
        floor = sum(parts[k] for k in parts if k not in ("temporary", "teacher", "before", "apart"))
        floor += LOGITS_CHUNK_TOKENS * vocabulary * 4
        rows.append(
            [r["name"], r["model"], "yes" if r["checkpointing"] else "no"]
            + [f"{r[k] / 1e6:.0f}" for k in ("planned_bytes", "measured_bytes")]
            + [f"{r['ratio']:.2f}", f"{r['measured_bytes'] / floor:.2f}"]
        )
    return [
        "## The plan and the measured peak",
        "",
        "Training peak above interpreter and libraries. The floor is what cannot be done without: codes, float parameters,",
        "adapters, gradients, optimizer, what backward keeps, and one chunk of float32 logits (aim: at most 1.25 times).",
        "On top comes the weight (and gradient) that is being rebuilt: in `llama` that is a tied head of 32,000 rows, a",
        "quarter of so small a model. `python benchmarks/memory.py`.",
        "",
        *_table(
            "method | model | checkpointing | planned MB | measured MB | planned / measured | measured / floor", rows
        ),
    ]


def choices(found: dict[str, Any]) -> list[str]:
    """The small decisions."""
    lines = [
        "## Roads not taken",
        "",
        "`python benchmarks/choices.py`; each group's first row is what the library does.",
        "",
    ]
    for group, rows in found["groups"].items():
        lines += [f"| {group} | ms | ratio |", "|---|---|---|"]
        lines += [f"| {r['name']} | {r['median_ms']:.3f} | {r['ratio']:.2f} |" for r in rows]
        lines.append("")
    return lines


def main() -> None:
    """Collect and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="output directory of a demo run to take metrics from")
    args = parser.parse_args()
    if args.demo is not None:
        shutil.copy(args.demo / "metrics.json", RESULTS / "demo.json")
        shutil.copy(args.demo / "parity.json", RESULTS / "demo_parity.json")
    read = {file.stem: json.loads(file.read_text()) for file in RESULTS.glob("*.json")}
    results: list[list[str]] = []
    if "demo" in read:
        results.append(demo(read["demo"], read["demo_parity"]))
    if "choices" in read:
        results.append(choices(read["choices"]))
    _write("results", "Results", results)
    sections = {
        "step": step,
        "step_1b": step_1b,
        "dequantize": dequantize,
        "generate": generate,
        "products": products,
        "7b": seven,
        "memory": memory,
    }
    _write("performance", "Performance", [make(read[name]) for name, make in sections.items() if name in read])


def _write(name: str, title: str, sections: list[list[str]]) -> None:
    lines = [
        f"# {title}",
        "",
        "Generated by `benchmarks/report.py` from `benchmarks/results/`. The machines are shared and noisy:",
        "compare ratios within a table, not seconds.",
    ]
    for section in sections:
        lines += ["", *section]
    (DOCS / f"{name}.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    main()
