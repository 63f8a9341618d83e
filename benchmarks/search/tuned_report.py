"""The section of docs/search.md on searched widths after fine-tuning; a part of `report.page`.

Intervals are Student's t over seeds, which pair: a seed draws the same order of the data for every row. Verdicts are
computed from them, never typed.
"""

import json
import statistics
import textwrap
from pathlib import Path
from typing import Any

from benchmarks.files import read
from benchmarks.search.tuned import (
    CELLS,
    METRIC,
    RATIOS,
    ROWS,
    SCALE_BITS,
    SCALES,
    SEARCHED,
    SEARCHED_BITS,
    SEEDS,
    TASKS,
)
from benchmarks.search.tuned_memory import PLANNED
from benchmarks.tables import interval

AIM = 0.30
"""Less training memory than LoRA on the pruned float model."""
CLAIMS = [
    *((f"searched-{b}", f"uniform-{b}", f"searched better than uniform, {b}-bit bytes") for b in SEARCHED),
    *((f"searched-{b}", "loftq", "searched better than LoftQ (AutoMixQ paper)") for b in SEARCHED),
    *((f"searched-{b}", "lora", "searched better than LoRA on the float model (AutoMixQ paper)") for b in SEARCHED),
    ("searched-6", "uniform-8", "searched better than uniform 8 bits"),
    ("searched-3", "uniform-2", "searched better than uniform 2 bits"),
]
"""(a, b, what is claimed of a against b)."""

Cells = dict[str, dict[int, dict[str, Any]]]
"""By row and seed."""


def _shown(value: float, metric: str) -> str:
    if metric == "accuracy":
        return f"{100 * value:.1f}"
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _with_interval(values: list[float], metric: str) -> str:
    wide = interval(values)
    return _shown(statistics.fmean(values), metric) + ("" if wide is None else f" ± {_shown(wide, metric)}")


def _memory(plans: dict[tuple[str, str], int], task: str, ratio: int, row: str, setting: str) -> str:
    found = plans.get((f"{task}-{ratio}-{row}", setting), plans.get((f"{ratio}-{row}", setting)))
    lora = plans.get((f"{ratio}-lora", setting))
    if found is None or lora is None:
        return "-"
    return f"{found / 1e9:.2f}" + ("" if row == "lora" else f" ({found / lora - 1:+.0%})")


def _search(found: dict[str, Any] | None) -> str:
    if found is None:
        return "-"
    return f"{found['trials']} trials, {found['tokens']:,} tokens, {found['seconds']:,.0f} s"


def _table(task: str, ratio: int, cells: Cells, plans: dict[tuple[str, str], int], settings: list[str]) -> list[str]:
    metric = METRIC[task]
    settings = settings if task in PLANNED else []
    heads = [metric, "seeds", "file, MB", "measured peak, MB", *(f"7B plan, GB: {s}" for s in settings), "search"]
    lines = ["", f"### {task}, {ratio} % pruned", "", f"| row | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for row in (r for r in ROWS if r.name in cells):
        found = list(cells[row.name].values())
        search, peak = found[0]["search"], max(c["peak_bytes"] for c in found)
        columns = [
            _with_interval([c["value"] for c in found], metric),
            str(len(found)),
            f"{found[0]['file_bytes'] / 1e6:.2f}",
            f"{peak / 1e6:.0f}" if row.trained else "-",
            *(_memory(plans, task, ratio, row.name, s) if row.trained else "-" for s in settings),
            _search(search),
        ]
        columns[-1] += ": the uniform model" if any("same_as" in c for c in found) else ""
        lines.append(f"| {' | '.join([row.name, *columns])} |")
    return lines


def _claims(task: str, ratio: int, cells: Cells) -> list[str]:
    metric, lines = METRIC[task], []
    for a, b, text in CLAIMS:
        shared = sorted(cells.get(a, {}).keys() & cells.get(b, {}).keys())
        if not shared:
            continue
        sign = 1 if metric == "accuracy" else -1
        gains = [sign * (cells[a][s]["value"] - cells[b][s]["value"]) for s in shared]
        mean, wide = statistics.fmean(gains), interval(gains)
        if all(cells[a][s].get("same_as", "").endswith(f"-{b}") for s in shared):
            verdict = "one model: the search found the same"
        elif wide is None:
            verdict = "one seed: no interval"
        elif abs(mean) <= wide:
            verdict = "no difference beyond seeds"
        else:
            verdict = "yes" if mean > 0 else "no, the other way round"
        size = cells[a][shared[0]]["file_bytes"] / cells[b][shared[0]]["file_bytes"]
        columns = [f"{task}, {ratio} %", f"{a} against {b}: {text}", f"{size:.3f}", _with_interval(gains, metric)]
        lines.append(f"| {' | '.join([*columns, str(len(shared)), verdict])} |")
    return lines


def _verdicts(plans: dict[tuple[str, str], int], settings: list[str]) -> list[str]:
    """Whether searched rows take so much less than LoRA: the worst of each setting."""
    lines = []
    for setting in settings:
        saved = []
        for (name, s), found in plans.items():
            task, _, rest = name.partition("-")
            lora = plans.get((f"{rest.partition('-')[0]}-lora", s))
            if s == setting and task in TASKS and lora is not None:
                saved.append(1 - found / lora)
        if saved:
            verdict = "reached" if min(saved) >= AIM else "missed"
            lines.append(
                f"At least {AIM:.0%} less training memory than LoRA on the pruned float model ({setting}): {verdict}, "
                f"{min(saved):.0%} to {max(saved):.0%} over {len(saved)} searched models."
            )
    return ["", *lines] if lines else []


def section(results: Path) -> list[str]:
    s, asked, small = SCALES["wikitext"], SCALES["polarity"], SCALES["tinystories"]
    lines = [
        "",
        "## After fine-tuning",
        "",
        *textwrap.wrap(
            "SmolLM2-135M-Instruct (its dequantized 4-bit file), 20 and 30 % of the decoder's parameters pruned by Taylor "
            f"importance, then tuned for {s.steps} steps of {s.step_tokens} tokens on WikiText-2 (perplexity on "
            f"{s.test_tokens:,} test tokens) or for {asked.steps} steps of {asked.step_tokens} tokens on the answers of "
            f"sentence polarity (accuracy in % on {asked.items} test items); and "
            f"stories260K, which was never quantized, pruned alike and tuned for {small.steps} steps of "
            f"{small.step_tokens} tokens on TinyStories. Searched widths, of {', '.join(map(str, SEARCHED_BITS))} bits, "
            "fit into the bytes of the uniform model of as many bits. All rows but LoRA and LoftQ are LR-QAT on whole "
            f"codes, in groups of {s.group} ({small.group}), embedding in 8 bits; all adapters have rank {s.rank} "
            f"({small.rank}). Every model is folded, saved and reloaded before it is measured. Rates were chosen on "
            "held-out text at 30 %, those of LR-QAT at 4 and 6 bits: at others they go with the step, those of scales in "
            f"all rows from {SCALE_BITS} bits (`lr_scale_bits`). The measured peak is without libraries, "
            "in models this small mostly activations and the head; the 7B plan is `memory.plan` for Llama-7B pruned alike, "
            "widths stretched over its layers, and in brackets against LoRA.",
            118,
        ),
        "`python benchmarks/search/tuned.py --data DIR`, then `python benchmarks/search/tuned_memory.py`.",
    ]
    cells: dict[tuple[str, int], Cells] = {}
    for c in read(results / "search_tuned.jsonl"):
        cells.setdefault((c["task"], c["ratio"]), {}).setdefault(c["row"], {})[c["seed"]] = c
    file = results / "search_tuned_memory.json"
    planned = json.loads(file.read_text()) if file.exists() else {"settings": {}, "rows": []}
    plans, settings = {(r["row"], r["setting"]): r["total_bytes"] for r in planned["rows"]}, list(planned["settings"])
    both = [(task, ratio) for task in TASKS for ratio in RATIOS if (task, ratio) in cells]
    for task, ratio in both:
        lines += _table(task, ratio, cells[task, ratio], plans, settings)
    claims = [line for key in both for line in _claims(*key, cells[key])]
    if claims:
        lines += ["", "Size is that of a's file over b's; gains are positive where a is better.", ""]
        lines += ["| cell | claim | size | gain | seeds | verdict |", "|---|---|---|---|---|---|", *claims]
    lines += _verdicts(plans, settings)
    wanted = [(cell, seed) for cell in CELLS for seed in (SEEDS if cell.row.trained else SEEDS[:1])]
    missing = sum(seed not in cells.get((cell.task, cell.ratio), {}).get(cell.row.name, {}) for cell, seed in wanted)
    return [*lines, "", f"Not run: {missing} of {len(wanted)} cells; `--list` names them."]
