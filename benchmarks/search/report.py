"""Write docs/search.md from benchmarks/results: python benchmarks/search_report.py"""

import json
from pathlib import Path

import numpy as np
import search_repair
import search_tuned_report

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parent.parent / "docs"
AIM, AIM_TRIALS = 0.99, 40

Rows = list[dict[str, float]]


def interval(differences: np.ndarray) -> tuple[float, float]:
    """95 %, of the median, by resampling seeds."""
    draw = np.random.default_rng(0)
    medians = np.median(differences[draw.integers(len(differences), size=(4000, len(differences)))], axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


ABOUT = {
    "search": [
        "stories260K: five layers, 8 units, 3 widths, 6561 configurations, all measured (`benchmarks/search_truth.py`),",
        "rounded to nearest, per channel. The kernel, the number of first proposals and the sensitivity pass of ours were",
        "chosen on this model and text (before its windows began with its first token).",
    ],
    "search_smollm2": [
        "SmolLM2-135M-Instruct (its dequantized 4-bit file): thirty layers in 8 units, 3 widths, 6561 configurations, all",
        "measured (`benchmarks/search_truth.py --table smollm2-135m`), rounded to nearest in groups of 64. Nothing of ours",
        "was chosen on this table.",
    ],
}


def truths() -> list[str]:
    lines = [
        "# Search",
        "",
        "Written by `python benchmarks/search_report.py`.",
        "",
        "## Against the truth",
        "",
        "Hypervolume of bytes against log KL to the float model after so many trials, as a share of the most that any set",
        "of that size could reach: the median over seeds, and in brackets by how much ours is ahead (95 % interval of the",
        "paired median). Passes for sensitivities are charged as trials to ours, greedy and the integer program; a seed",
        "draws their labels, too. `python benchmarks/search.py`.",
    ]
    for name, about in ABOUT.items():
        file = RESULTS / f"{name}.json"
        lines += truth(json.loads(file.read_text()), about) if file.exists() else []
    return lines


def truth(found: dict, text: list[str]) -> list[str]:
    """One table."""
    rows, about = found["rows"], found["about"]
    methods = list(dict.fromkeys(r["method"] for r in sorted(rows, key=lambda r: r["method"] != "ours")))
    counts = sorted({r["trials"] for r in rows})
    value = {(r["method"], r["trials"], r["seed"]): r["hypervolume_ratio"] for r in rows}
    lines, behind = [], []
    for method in methods:
        cells = [method]
        for n in counts:
            seeds = [s for m, k, s in value if (m, k) == (method, n)]
            ratios = np.array([value[method, n, s] for s in seeds])
            cell = f"{np.median(ratios):.3f}"
            if method != "ours":
                low, high = interval(np.array([value["ours", n, s] - value[method, n, s] for s in seeds]))
                cell += f" ({low:+.3f} to {high:+.3f})"
                behind += [f"{method} at {n}"] if high < 0 else []
            cells.append(cell)
        lines.append("| " + " | ".join([*cells, str(len(seeds))]) + " |")
    reached = float(np.median([v for (m, n, _), v in value.items() if (m, n) == ("ours", AIM_TRIALS)]))
    verdict = "reached" if reached >= AIM else "missed"
    return [
        "",
        *text,
        f"Sensitivities: {about['passes'][about['prior']]:g} passes ({about['prior']}). The true front has "
        f"{about['true_front']} points. "
        "At most so many trials are",
        f"made by: {', '.join(f'{m} {n}' for m, n in about['pools'].items())}.",
        "",
        "| method | " + " | ".join(f"{n} trials" for n in counts) + " | seeds |",
        "|---" * (len(counts) + 2) + "|",
        *lines,
        "",
        f"The aim of {AIM:.0%} at {AIM_TRIALS} trials is {verdict}: {reached:.1%}; {about['for_99_percent_of_40']} of "
        f"them would have to be points of the true front. "
        + (
            "Ours is significantly behind: " + ", ".join(behind) + "."
            if behind
            else "Ours is nowhere significantly behind."
        ),
    ]


def budgets(found: dict) -> list[str]:
    """The best within a budget."""
    rows, about = found["rows"], found["about"]
    counts = sorted({r["trials"] for r in rows})
    value = {(r["method"], r["trials"]): r for r in rows}
    lines = []
    for method in dict.fromkeys(r["method"] for r in rows):
        those = [value[method, n] for n in counts]
        cells = [f"{c['mean_gap_percent']:.1f} % ({c['found']:.0%})" for c in those]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return [
        "",
        "## The best within a budget",
        "",
        f"stories260K again, {about['budgets']} budgets, {about['seeds']} seeds: how much more KL than the best model that",
        "fits, on the mean, and how often that model was found. Uniform widths and the sensitivity pass count as trials.",
        "`python benchmarks/search_budgets.py`.",
        "",
        "| method | " + " | ".join(f"{n} trials" for n in counts) + " |",
        "|---" * (len(counts) + 1) + "|",
        *lines,
    ]


def cost(found: dict) -> list[str]:
    rows = found["rows"]
    columns = sorted({(r["units"], r["after"]) for r in rows})
    value = {(r["sampler"], r["units"], r["after"]): r["seconds"] for r in rows}
    lines = []
    for sampler in dict.fromkeys(r["sampler"] for r in rows):
        cells = [f"{value[sampler, *c]:.3f}" if (sampler, *c) in value else "-" for c in columns]
        lines.append("| " + " | ".join([sampler, *cells]) + " |")
    passes = ", ".join(f"{name} {count:g}" for name, count in found["passes"].items())
    return [
        "",
        "## What a proposal costs",
        "",
        f"Seconds an ask on a shared CPU; a trial of the table above took {found['trial_seconds']:.3f} s. A fine-tune",
        f"takes minutes. Sensitivities, in forward passes: {passes}. `python benchmarks/search_cost.py`.",
        "",
        "| sampler | " + " | ".join(f"{u} units, after {n}" for u, n in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *lines,
    ]


def pruning(found: dict) -> list[str]:
    tokens, window = found["test"]
    lines = [
        f"| {r['way']} | {r['ratio']:.0%} | {r['parameters'] / 1e6:.1f} | {r.get('groups', '-')} | "
        f"{r.get('channels', '-')} | {r.get('layers', '-')} | {r['perplexity']:.4g} |"
        for r in found["rows"]
    ]
    return [
        "",
        "## Pruning, before any tuning",
        "",
        f"{found['model']} (its dequantized 4-bit file), at least this share of the decoder's parameters removed,",
        f"importance from {found['calibration']:,} tokens of WikiText-2's training part, perplexity on {tokens:,} test",
        f"tokens in windows of {window}. `python benchmarks/pruning.py --data DIR`.",
        "",
        "| importance | ratio | parameters, M | KV groups | MLP channels | layers | perplexity |",
        "|---|---|---|---|---|---|---|",
        *lines,
    ]


def main() -> None:
    lines = truths()
    within = RESULTS / "search_budgets.json"
    lines += budgets(json.loads(within.read_text())) if within.exists() else []
    costs = RESULTS / "search_cost.json"
    lines += cost(json.loads(costs.read_text())) if costs.exists() else []
    pruned = RESULTS / "pruning.json"
    lines += pruning(json.loads(pruned.read_text())) if pruned.exists() else []
    lines += search_tuned_report.section(RESULTS)
    lines += search_repair.report()
    (DOCS / "search.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
