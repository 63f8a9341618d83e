"""A section of docs/quality.md: the papers' orders on stories260K, each with its paired differences over seeds."""

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.files import RESULTS, read
from benchmarks.quality.orders import HELD, LENGTH, ROWS, SHAKESPEARE, STORIES, TRAINED, Row
from benchmarks.quality.rates import BATCH
from benchmarks.tables import interval, table

Found = dict[str, dict[int, dict[int, dict[str, Any]]]]
"""By row, steps, then seed; rows that are not trained have 0 steps."""

TEXT = (
    f"The papers' claims on a model that never was quantized: stories260K, float32, {BATCH} x {TRAINED} tokens a step, the",
    "library's own rates. On TinyStories, which it was trained on, rounding is repaired; on Shakespeare another domain",
    f"is learned. Values are held-out nats a token ({HELD * LENGTH:,} tokens), after ± the 95 % interval of the mean over",
    "seeds. Differences are paired by seeds: *yes* and *no* are claimed only where the interval leaves out 0.",
    "`python benchmarks/quality/orders.py --data DIR`.",
)
TITLES = {
    **{
        f"w{bits}{'-g32' if group else ''}": f"{bits} bits, {'groups of 32' if group else 'per channel'}"
        for bits in (4, 3, 2)
        for group in (False, True)
    },
    "detail": "LR-QAT at 3 bits per channel, varied",
    "a8": "4 bits per channel, inputs, keys and values of 8 bits",
    "a4": "4 bits per channel, inputs, keys and values of 4 bits",
    "float": "LoRA on the float model",
    "nf4": "NF4, groups of 32",
    "nf2": "NF2, groups of 32",
    "int4": "4 bits, groups of 32, folded into the zeros",
    "int3": "3 bits, groups of 32, folded into the zeros",
    "int2": "2 bits, groups of 32, folded into the zeros",
}


def claims() -> Iterator[tuple[str, str, str]]:
    """(what is claimed of a's loss against b's, a, b)."""
    for name in (name for name in TITLES if name.startswith("w")):
        yield "PEQA below round-to-nearest", f"{name}-peqa", f"{name}-rtn"
        yield "LR-QAT below PEQA", f"{name}-lr-qat", f"{name}-peqa"
        yield "LR-QAT below full QAT", f"{name}-lr-qat", f"{name}-qat"
        yield "LR-QAT below GPTQ", f"{name}-lr-qat", f"{name}-gptq"
        yield "LR-QAT from the block start below LR-QAT", f"{name}-block-lr-qat", f"{name}-lr-qat"
    yield "rank 8 below rank 2", "rank-8", "rank-2"
    yield "rank 32 below rank 8", "w3-lr-qat", "rank-8"
    yield "balanced (k 2) below plain, rank 8", "rank-8-balanced", "rank-8"
    yield "Phi in float32 below fixed8", "storage-fp32", "w3-lr-qat"
    yield "Phi in fixed8 below whole numbers", "w3-lr-qat", "storage-int"
    for bits in (8, 4):
        for other, words in (("rtn", "round-to-nearest"), ("peqa", "PEQA"), ("qat", "full QAT")):
            yield f"LR-QAT below {words}, W4A{bits}KV{bits}", f"a{bits}-lr-qat", f"a{bits}-{other}"
    for codebook in ("nf4", "nf2"):
        for rank in (4, 16):
            name, where = f"{codebook}-r{rank}", f"{codebook.upper()}, rank {rank}"
            yield f"Q-BaRA below QLoRA, {where}", f"{name}-q-bara", f"{name}-qlora"
            yield f"LoftQ below QLoRA, {where}", f"{name}-loftq", f"{name}-qlora"
            yield f"Q-BaRA below LoftQ, {where}", f"{name}-q-bara", f"{name}-loftq"
    for bits in (4, 3, 2):
        name, where = f"int{bits}", f"INT{bits}"
        yield f"QA-HiRA below QA-LoRA of as many parameters, {where}", f"{name}-qa-hira", f"{name}-qa-lora"
        yield f"QA-BLoRA below QA-LoRA of as many parameters, {where}", f"{name}-qa-blora", f"{name}-qa-lora"
        yield f"QA-LoRA below QLoRA merged and rounded again, {where}", f"{name}-qa-lora", f"{name}-qlora-again"
        yield f"QA-HiRA below QLoRA merged and rounded again, {where}", f"{name}-qa-hira", f"{name}-qlora-again"
        yield f"QA-HiRA by sums below QA-HiRA by means, {where}", f"{name}-qa-hira", f"{name}-qa-hira-mean"
        yield f"QA-HiRA with real zeros below whole ones, {where}", f"{name}-qa-hira", f"{name}-qa-hira-integer"
        yield f"QA-HiRA below QA-LoRA of rank 16, {where}", f"{name}-qa-hira", f"{name}-qa-lora-r16"
        yield f"QA-HiRA below LR-QAT of rank 8, {where}", f"{name}-qa-hira", f"{name}-lr-qat"


def _spread(values: list[float], sign: str = "") -> str:
    wide = interval(values)
    return f"{statistics.fmean(values):{sign}.3f}" + ("" if wide is None else f" ± {wide:.3f}")


def _at(found: Found, row: Row, steps: int) -> dict[int, dict[str, Any]]:
    """By seed; what is not trained is the same whatever the steps are."""
    return found.get(row.name, {}).get(steps if row.trained else 0, {})


def _table(found: Found, name: str, lengths: list[int]) -> list[str]:
    lines = []
    for row in (row for row in ROWS.values() if row.table == name and row.name in found):
        runs = [_at(found, row, steps) for steps in lengths]
        shown = [_spread([r["loss"] for r in seeds.values()]) if seeds else "" for seeds in runs]
        trainable = max((r["trainable"] for seeds in runs for r in seeds.values()), default=0)
        lines.append([row.name, f"{trainable:,}" if row.trained else "-", *shown])
        if row.again:
            before = [_spread([r["before"] for r in seeds.values()]) if seeds else "" for seeds in runs]
            lines.append([f"{row.name}, before it was rounded again", "", *before])
    if not lines:
        return []
    head = f"row | trainable | {' | '.join(f'{steps} steps' for steps in lengths)}"
    return ["", f"**{TITLES[name]}**", "", *table(head, lines)]


def verdict(first: dict[int, dict[str, Any]], second: dict[int, dict[str, Any]], fixed: bool) -> str:
    """The paired difference of two rows, and whether the first is lower; nothing where no seed has both."""
    other = dict.fromkeys(first, next(iter(second.values()), None)) if fixed else second
    pairs = [(first[seed], other[seed]) for seed in first if other.get(seed)]
    differences = [a["loss"] - b["loss"] for a, b in pairs if b is not None]
    if not differences:
        return ""
    wide, mean = interval(differences), statistics.fmean(differences)
    words = "one seed" if wide is None else "open" if abs(mean) <= wide else "yes" if mean < 0 else "no"
    return f"{words}: {_spread(differences, '+')}"


def section() -> list[str]:
    """Tables and claims; nothing where nothing was run."""
    rows = read(RESULTS / "orders.jsonl")
    found: Found = {}
    for r in rows:
        found.setdefault(r["row"], {}).setdefault(r["steps"], {})[r["seed"]] = r
    lengths = sorted({r["steps"] for r in rows if r["steps"]})
    if not lengths:
        return []
    floats = [f"{text}: {found[f'float, {text}'][0][0]['loss']:.3f}" for text in (STORIES, SHAKESPEARE)]
    lines = ["## Orders", "", *TEXT, "", f"The untuned float model: {', '.join(floats)}."]
    for name in TITLES:
        lines += _table(found, name, lengths)
    verdicts = []
    for words, a, b in claims():
        first, second = ROWS.get(a), ROWS.get(b)
        if first is None or second is None:
            continue
        said = [verdict(_at(found, first, n), _at(found, second, n), not second.trained) for n in lengths]
        if any(said):
            where = f"{TITLES[first.table]}: " if first.table.startswith("w") and first.table == second.table else ""
            verdicts.append([where + words, *said])
    lines += ["", "**What is claimed**", "", *table(f"claim | {' | '.join(f'{n} steps' for n in lengths)}", verdicts)]
    left = sum(1 for row in ROWS.values() if row.name not in found)
    return lines + (["", f"Not run: {left} of {len(ROWS)} rows."] if left else [])
