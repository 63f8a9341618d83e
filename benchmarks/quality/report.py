"""docs/quality.md from benchmarks/results/quality.jsonl: tables, paired differences, what was not run.

Intervals are Student's t over seeds. Seeds pair: a seed draws the same order of the data for every row, so a difference
of two rows is a mean of differences. A verdict is computed from that interval, never typed.
`python benchmarks/report.py quality` writes the page.
"""

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.files import RESULTS, read
from benchmarks.quality import harness, orders_report, starts_report
from benchmarks.quality.quality import MODEL, SEEDS, STEP_TOKENS, STEPS, TASK_ITEMS, TEST_TOKENS, WINDOW, seeds_of
from benchmarks.quality.rows import HEADLINES, ROWS
from benchmarks.tables import interval

Cells = dict[str, dict[int, dict[str, Any]]]
"""By row, then seed."""

TITLES = {
    "w3": "3 bits, group 64, integer zeros",
    "w2": "2 bits, group 64, integer zeros",
    "nf4": "NF4, group 64, double quantization",
    "int3": "3 bits, group 32: what folds into the zeros, at equal trainable parameters",
    "w4": "4 bits, group 64",
    "w4-channel": "4 bits, per channel",
    "w3-channel": "3 bits, per channel",
    "int2": "2 bits, group 32: what folds into the zeros, at equal trainable parameters",
    "activations": "4 bits, group 64, with rounded activations and KV cache",
    "detail": "LR-QAT at 3 bits, group 64: details against the row w3-lr-qat",
    "polarity": "Sentence polarity",
}
YES = "yes"
CLAIMS = [
    ("w{}-gptq", "w{}-rtn", "GPTQ below round to nearest"),
    ("w{}-peqa", "w{}-rtn", "PEQA below round to nearest (LR-QAT paper, tables 3 to 5)"),
    ("w{}-lr-qat", "w{}-peqa", "LR-QAT below PEQA (LR-QAT paper)"),
    ("w{}-lr-qat", "w{}-qat", "LR-QAT no worse than full QAT (LR-QAT paper)"),
    ("nf4-q-bara", "nf4-qlora", "Q-BaRA below QLoRA (Q-BaRA paper)"),
    ("nf4-loftq", "nf4-qlora", "LoftQ below QLoRA (LoftQ paper)"),
    ("nf4-q-bara", "nf4-loftq", "Q-BaRA below LoftQ"),
    ("int3-qa-hira", "int3-qa-lora", "QA-HiRA below QA-LoRA (QA-HiRA paper)"),
    ("int3-qa-blora", "int3-qa-lora", "QA-BLoRA below QA-LoRA (published version)"),
    ("int3-qa-hira", "int3-qlora", "QA-HiRA below QLoRA merged and rounded again"),
    ("int3-qa-hira", "int3-mean-qa-hira", "QA-HiRA pooling by sum below pooling by mean"),
    ("int3-qa-hira", "int3-integer-qa-hira", "real zeros below integer zeros"),
    ("int2-qa-hira", "int2-qa-lora", "QA-HiRA below QA-LoRA, 2 bits"),
    ("int2-qa-hira", "int2-qlora", "QA-HiRA below QLoRA merged and rounded again, 2 bits"),
    ("w4a8kv8-lr-qat", "w4a8kv8-rtn", "LR-QAT below round to nearest, W4A8KV8"),
    ("w4a4kv4-lr-qat", "w4a4kv4-rtn", "LR-QAT below round to nearest, W4A4KV4"),
    ("detail-storage-fp32", "w3-lr-qat", "Phi in float32 below fixed8 (the paper: no difference)"),
    ("detail-adapter-float32", "w3-lr-qat", "factors acting in float32 below bfloat16"),
    ("detail-adam-8bit", "w3-lr-qat", "8-bit Adam below float32 moments"),
    ("detail-balanced", "w3-lr-qat", "balanced LR-QAT (k 2) below LR-QAT"),
]
"""(a, b, what is claimed of a's perplexity against b's); on the supervised task, of 1 - accuracy."""


def _value(row: str) -> Callable[[Cells], str]:
    return lambda cells: _number(statistics.fmean(c["value"] for c in cells[row].values())) if row in cells else "?"


def _share(row: str) -> Callable[[Cells], str]:
    return lambda cells: _moved(list(cells[row].values()))


def _wins(first: str, second: str) -> Callable[[Cells], str]:
    def counted(cells: Cells) -> str:
        differences, _ = _compared(first, second, cells)
        return f"{sum(d < 0 for d in differences)} of {len(differences)} seeds"

    return counted


WHY = {
    ("w3-lr-qat", "w3-peqa"): (
        "Better with {}, but the seeds lie far apart. In so few steps the scales, which both train, do most of the "
        "repair: LR-QAT moved {} of the codes. The paper trains 10,000 steps.",
        _wins("w3-lr-qat", "w3-peqa"),
        _share("w3-lr-qat"),
    ),
    ("w2-lr-qat", "w2-peqa"): (
        "Better with {}, but seeds differ more than methods; LR-QAT moved {} of the codes, full QAT {}.",
        _wins("w2-lr-qat", "w2-peqa"),
        _share("w2-lr-qat"),
        _share("w2-qat"),
    ),
    ("nf4-q-bara", "nf4-qlora"): (
        "At equal trainable parameters Q-BaRA has twice the rank; in so few steps that changes less than seeds do.",
    ),
    ("nf4-q-bara", "nf4-loftq"): (
        "LoftQ's adapter begins as the best low-rank part of what rounding lost: before the first step its model is at "
        "{}, and that of Q-BaRA at {}. A guess: such short training does not make up for that.",
        _value("nf4-loftq-start"),
        _value("nf4-rtn"),
    ),
    ("int3-qa-hira", "int3-qa-lora"): (
        "At equal trainable parameters. A guess: QA-HiRA's numbers are offsets themselves, each of which Adam moves by at "
        "most a rate a step, and a higher rate (`quality_rates.jsonl`) breaks the model; QA-LoRA's product moves all "
        "offsets of a matrix at once along few directions. The authors' scripts train 10,000 steps.",
    ),
    ("int3-qa-blora", "int3-qa-lora"): (
        "At equal trainable parameters QA-BLoRA has the higher rank, and its outputs share offsets by fours. A guess: in "
        "so few steps the rank is not the limit.",
    ),
}
"""What is thought to be behind an order that these seeds do not show, with measured numbers where there are any."""


def _number(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def table(name: str, cells: Cells) -> list[str]:
    """One table; none where nothing was run."""
    rows = [r for r in ROWS.values() if r.table == name and r.name in cells]
    if not rows:
        return []
    lines = ["", f"## {TITLES[name]}", ""]
    heads = ["row", rows[0].metric, "seeds", "trainable parameters", "learning rate", "of scales", "codes moved"]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in rows:
        found = list(cells[row.name].values())
        shown = _mean([c["value"] for c in found])
        rates = [f"{found[0][k]:g}" if found[0][k] else "-" for k in ("lr", "lr_scale")]
        trained = f"{found[0]['trainable']:,}" if row.trained else "-"
        lines.append(f"| {row.name} | {shown} | {len(found)} | {trained} | {rates[0]} | {rates[1]} | {_moved(found)} |")
        if row.round_to:
            before = _mean([c["before_rounding"] for c in found])
            lines.append(f"| {row.name}, merged but not rounded again | {before} | {len(found)} | | | | |")
    return lines


def _moved(found: list[dict[str, Any]]) -> str:
    """Share of codes that are not those of rounding to nearest, where it was counted."""
    shares = [c["moved"] for c in found if c.get("moved") is not None]
    return f"{statistics.fmean(shares):.1%}" if shares else "-"


def _mean(values: list[float]) -> str:
    wide = interval(values)
    return _number(statistics.fmean(values)) + ("" if wide is None else f" ± {_number(wide)}")


def claims(cells: Cells) -> list[str]:
    """What the papers say, each against its paired differences."""
    lines = ["", "## Claims", "", "| claim | difference (a - b) | seeds | verdict |", "|---|---|---|---|"]
    for a, b, text in CLAIMS:
        for prefix in ("", "polarity-"):
            for bits in ("3", "2", "4", "4-channel", "3-channel") if "{}" in a else ("",):
                first, second = prefix + a.format(bits), prefix + b.format(bits)
                if first in cells and second in cells:
                    lines.append(_claim(first, second, text, cells))
    return lines if len(lines) > 5 else []


def _claim(first: str, second: str, text: str, cells: Cells) -> str:
    differences, verdict = _compared(first, second, cells)
    if not differences:
        return f"| {first} against {second}: {text} | | 0 | {verdict} |"
    mean, wide = statistics.fmean(differences), interval(differences)
    shown = f"{mean:+.3f}" if ROWS[first].task else f"{mean:+.2f}" if abs(mean) < 1000 else f"{mean:+.3g}"
    shown += "" if wide is None else f" ± {_number(wide)}"
    return f"| {first} against {second}: {text} | {shown} | {len(differences)} | {verdict} |"


def _compared(first: str, second: str, cells: Cells) -> tuple[list[float], str]:
    """Differences of the seeds that both rows have, and what they say of "the first is better"."""
    # A row without seeds (round to nearest) has the same value for each.
    one = cells[second] if ROWS[second].trained else dict.fromkeys(cells[first], cells[second][0])
    shared = sorted(cells[first].keys() & one.keys())
    differences = [cells[first][s]["value"] - one[s]["value"] for s in shared]
    if not differences:
        return [], "no seed of both"
    wide, mean = interval(differences), statistics.fmean(differences)
    if wide is None and (ROWS[first].trained or ROWS[second].trained):
        return differences, "one seed: no interval"
    if wide is not None and abs(mean) <= wide:
        return differences, "no difference beyond seeds"
    return differences, YES if (mean > 0 if ROWS[first].task else mean < 0) else "no, the other way round"


def reasons(cells: Cells) -> list[str]:
    """Orders of the papers that several seeds do not show, and what is thought to be behind."""
    lines = []
    for (first, second), (text, *numbers) in WHY.items():
        if first in cells and second in cells:
            differences, verdict = _compared(first, second, cells)
            if len(differences) > 1 and verdict != YES:
                shown = text.format(*(number(cells) for number in numbers))
                lines.append(f"* **{first} against {second}**: {verdict}. {shown}")
    return ["", "## Orderings that the papers claim and these seeds do not show", "", *lines] if lines else []


def page() -> str:
    """docs/quality.md."""
    models: dict[str, Cells] = {}
    for c in read(RESULTS / "quality.jsonl"):
        models.setdefault(c["model"], {}).setdefault(c["row"], {})[c["seed"]] = c
    cells = models.pop(MODEL, {})
    lines = [
        "# Quality",
        "",
        "Generated by `python benchmarks/report.py` from `benchmarks/results/quality.jsonl`, which",
        "`python benchmarks/quality/quality.py --data DIR` fills.",
        "",
        f"SmolLM2-135M-Instruct is trained for {STEPS} steps of {STEP_TOKENS} tokens of WikiText-2's train part; its",
        f"perplexity is measured on the first {TEST_TOKENS:,} test tokens in windows of {WINDOW}, after it was folded,",
        "saved and reloaded. On the supervised task the same steps see reviews and their labels, and the accuracy is",
        f"lm-evaluation-harness's on {TASK_ITEMS} test items.",
        "`float` is the dequantized 4-bit GGUF, not the vendor's release, so these numbers compare with one another and",
        "with no published ones. Rates were chosen on text held out of the train part (`quality_rates.jsonl`). Training is",
        "short: it says which method repairs a rounded model fastest, not where each ends. ± is a 95 % interval.",
    ]
    if "float" in cells:
        lines += ["", f"Float (untuned): {_number(cells['float'][0]['value'])}."]
    for name in TITLES:
        lines += table(name, cells)
    lines += claims(cells)
    lines += reasons(cells)
    for model, others in models.items():
        lines += ["", f"# {model}"]
        for name in TITLES:
            lines += table(name, others)
        lines += claims(others)
    missing = _missing(cells, list(ROWS))
    lines += ["", "## Not run", "", ", ".join(missing) + "." if missing else "Nothing: every cell above was run."]
    lines += [] if models else [f"A second model: none of {', '.join(HEADLINES)}."]
    lines += ["", *orders_report.section(), "", *_harness(), "", *starts_report.section()]
    return "\n".join(lines).rstrip() + "\n"


def _missing(cells: Cells, names: list[str]) -> list[str]:
    left = {n: [s for s in seeds_of(ROWS[n], list(SEEDS)) if s not in cells.get(n, {})] for n in names}
    return [f"{name} (seed {', '.join(map(str, seeds))})" for name, seeds in left.items() if seeds]


def _harness() -> list[str]:
    """Accuracies on lm-evaluation-harness's tasks, where `benchmarks/quality/harness.py` was run."""
    found = harness.markdown()
    text = "Zero-shot accuracies with lm-evaluation-harness's own prompts, of one seed: the model above at 3 bits"
    rest = "(embedding at 8), rounded, and tuned as row w3-lr-qat is. `benchmarks/quality/harness.py` measured them."
    return ["## Tasks", "", f"{text} {rest}", "", *found] if found else []
