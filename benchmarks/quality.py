"""What each method makes of a model: a table of method x bits x seed, filled cell by cell, each a run of a recipe.

A cell trains on one part of a text, folds, saves, reloads and measures perplexity on the test text: what is measured is
what is served. Learning rates are chosen for each row (and so for each pooling) on a slice held out of the *training*
text, with half a cell's steps: candidates lie a factor apart, and while the best one is the last of its side, one more is
tried there. Scales get the rate that was best where they are all that is trained (PEQA on the same grid).

Every finished cell is a line of benchmarks/results/quality.jsonl, every tried rate one of quality_rates.jsonl. What stands
there is not run again, so that the command can be stopped and given again until the table is full.

    python benchmarks/quality.py --data DIR                     all rows; DIR holds train.part.txt and test.raw.txt
    python benchmarks/quality.py --data DIR --rows w3 --seeds 0 --minutes 60
    python benchmarks/quality.py --list                         what is done and what is not
    python benchmarks/quality.py --write                        docs/quality.md
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m"
SEEDS = (0, 1, 2)
STEPS, STEP_TOKENS, WINDOW = 32, 1024, 512
TEST_TOKENS, CHOICE_TOKENS = 65536, 8192
CHOICE_STEPS = STEPS // 2
HELD_OUT = 0.1
"""Share of the training text that rates are chosen on; nothing trains on it."""
APART = 10**0.5
"""Factor between neighbouring rates."""
FURTHER = 2
"""Rates tried at most beyond the end of a row's own list."""

LR_QAT = {"name": "lr-qat", "rank": 32, "alpha": 32.0}
"""The paper's alpha of 1 divides the shift by 32, and 10,000 steps make up for it. In a cell's few steps it moved no level:
rates up to 0.03 gave PEQA's perplexity (rows w3-lr-qat-alpha-1 of quality_rates.jsonl)."""

Rate = tuple[float | None, float | None]
"""(of deltas and master weights, of scales and offsets); None is not trained."""


@dataclass(frozen=True)
class Row:
    """A line of the table: a method on a grid, run once for each seed."""

    name: str
    table: str
    method: dict[str, Any]
    grid: dict[str, Any]
    rates: tuple[float, ...] = ()
    """Learning rates to choose from; none for a row without training."""
    scales_like: str | None = None
    """The row whose rate the scales get; itself where only scales are trained."""
    more: dict[str, Any] = field(default_factory=dict)
    """Further keys of the recipe."""
    rates_like: str | None = None
    """The row whose rates this one takes, since it differs from it in a detail only."""
    round_to: dict[str, Any] | None = None
    """Merge, then round the merged weights to this grid."""

    @property
    def trained(self) -> bool:
        return bool(self.rates or self.rates_like)


def _rows() -> list[Row]:
    """Tier 1, then what goes beyond it."""
    rows = [Row("float", "", {"name": "rtn"}, {})]
    for bits in (3, 2):
        grid, t = {"bits": bits, "group": 64, "zero": "integer"}, f"w{bits}"
        peqa = f"{t}-peqa"
        rows += [
            Row(f"{t}-rtn", t, {"name": "rtn"}, grid),
            Row(f"{t}-gptq", t, {"name": "rtn"}, grid, more={"start": {"name": "gptq"}}),
            Row(peqa, t, {"name": "peqa"}, grid, (3e-4, 1e-3, 3e-3), peqa),
            Row(f"{t}-lr-qat", t, LR_QAT, grid, (3e-3, 1e-2, 3e-2), peqa),
            Row(f"{t}-qat", t, {"name": "qat"}, grid, (1e-4, 3e-4, 1e-3), peqa),
        ]
    nf4 = {"codebook": "nf4", "group": 64, "double_quant": True}
    low = (3e-4, 1e-3, 3e-3)
    rows += [Row("nf4-rtn", "nf4", {"name": "rtn"}, nf4)]
    rows += [Row(f"nf4-{name}", "nf4", {"name": name, "rank": 16}, nf4, low) for name in ("qlora", "loftq", "q-bara")]
    int3 = {"bits": 3, "group": 32, "zero": "real"}
    # Ranks that give every row of the table the trainable numbers of QA-HiRA, within 2 %.
    rows += [
        Row("int3-rtn", "int3", {"name": "rtn"}, int3),
        Row("int3-qa-lora", "int3", {"name": "qa-lora", "rank": 21, "alpha": 21.0}, int3, (1e-4, 3e-4, 1e-3)),
        Row("int3-qa-hira", "int3", {"name": "qa-hira"}, int3, (3e-5, 1e-4, 3e-4)),
        Row(
            "int3-qa-blora",
            "int3",
            {"name": "qa-blora", "rank": 76, "alpha": 76.0, "repeat": 4},
            int3,
            (1e-4, 3e-4, 1e-3),
        ),
        Row("int3-qlora", "int3", {"name": "qlora", "rank": 11, "alpha": 11.0}, int3, low, round_to=int3),
    ]
    return rows + _beyond()


def _beyond() -> list[Row]:
    """Tier 2: details of a method against itself, other widths, per channel, integer zeros."""
    w3, w4 = ({"bits": bits, "group": 64, "zero": "integer"} for bits in (3, 4))
    same = {"rates_like": "w3-lr-qat"}
    rows = [
        Row("detail-storage-fp32", "detail", LR_QAT | {"storage": "fp32"}, w3, **same),
        Row("detail-storage-int", "detail", LR_QAT | {"storage": "int"}, w3, **same),
        Row("detail-adapter-float32", "detail", LR_QAT | {"adapter_dtype": "float32"}, w3, **same),
        Row("detail-adam-8bit", "detail", LR_QAT, w3, more={"train": {"optimizer": "adamw-8bit"}}, **same),
        Row("detail-balanced", "detail", LR_QAT | {"k": 2}, w3, (3e-3, 1e-2, 3e-2), "w3-peqa"),
    ]
    for name, grid in (("w4", w4), ("w4-channel", w4 | {"group": None}), ("w3-channel", w3 | {"group": None})):
        peqa = f"{name}-peqa"
        rows += [
            Row(f"{name}-rtn", name, {"name": "rtn"}, grid),
            Row(peqa, name, {"name": "peqa"}, grid, (3e-4, 1e-3, 3e-3), peqa),
            Row(f"{name}-lr-qat", name, LR_QAT, grid, (3e-3, 1e-2, 3e-2), peqa),
            Row(f"{name}-qat", name, {"name": "qat"}, grid, (1e-4, 3e-4, 1e-3), peqa),
        ]
    zeros = {"bits": 3, "group": 32, "zero": "integer"}
    rows += [
        Row(
            "int3-mean-qa-hira", "int3", {"name": "qa-hira", "mean": True}, zeros | {"zero": "real"}, (1e-3, 3e-3, 1e-2)
        ),
        Row("int3-integer-qa-hira", "int3", {"name": "qa-hira"}, zeros, (1e-4, 3e-4, 1e-3)),
    ]
    # At 4 bits and group 32 SmolLM2's own weights lie on the grid: a row there would be a fake result.
    int2 = zeros | {"bits": 2, "zero": "real"}
    return [
        *rows,
        Row("int2-rtn", "int2", {"name": "rtn"}, int2),
        Row("int2-qa-lora", "int2", {"name": "qa-lora", "rank": 21, "alpha": 21.0}, int2, (1e-4, 3e-4, 1e-3)),
        Row("int2-qa-hira", "int2", {"name": "qa-hira"}, int2, (3e-5, 1e-4, 3e-4)),
        Row(
            "int2-qlora", "int2", {"name": "qlora", "rank": 11, "alpha": 11.0}, int2, (3e-4, 1e-3, 3e-3), round_to=int2
        ),
    ]


ROWS = {row.name: row for row in _rows()}


def recipe(row: Row, rate: Rate, seed: int, data: Path, out: Path, *, choosing: bool) -> dict[str, Any]:
    """The recipe of a cell, or of a tried rate."""
    steps = (CHOICE_STEPS if choosing else STEPS) if row.trained else 0
    lr, lr_scale = rate
    values = {
        "model": {"path": MODEL},
        "method": row.method,
        "rules": [{"match": "*", "grid": row.grid or None}] if row.grid else None,
        "data": {
            "path": str(data / "train.txt"),
            "block_tokens": WINDOW,
            "eval_path": str(data / ("heldout.txt" if choosing else "test.txt")),
            "eval_tokens": CHOICE_TOKENS if choosing else TEST_TOKENS,
        },
        "train": {
            "steps": steps,
            "batch_tokens": STEP_TOKENS,
            "micro_batch": STEP_TOKENS // WINDOW,
            "lr": lr,
            "lr_scale": lr_scale,
            "seed": seed,
            "activation_checkpointing": False,
            "save_steps": 10_000,
        },
        "evaluate": {"parity": False, "baselines": [] if row.grid else ["float"]},
        "output": str(out),
    }
    for key, value in row.more.items():
        values[key] = values[key] | value if key in values else value
    return values


def run(row: Row, rate: Rate, seed: int, data: Path, work: Path, *, choosing: bool = False) -> dict[str, Any]:
    """Metrics of one cell, from a process of its own; the model is removed."""
    out = work / "cell"
    shutil.rmtree(out, ignore_errors=True)
    values = recipe(row, rate, seed, data, out, choosing=choosing)
    if row.round_to:
        values["merge"] = True
    started = time.time()
    metrics = _process(values)
    found = {**metrics, "value": metrics["perplexity"]["tuned" if row.grid else "float"]}
    if row.round_to:
        again = work / "rounded"
        shutil.rmtree(again, ignore_errors=True)
        plain = Row(row.name, row.table, {"name": "rtn"}, row.round_to)
        rounded = _process(
            recipe(plain, (None, None), seed, data, again, choosing=choosing) | {"model": {"path": str(out)}}
        )
        found["value"] = rounded["perplexity"]["tuned"]
        found["before_rounding"] = metrics["perplexity"]["tuned"]
        shutil.rmtree(again)
    shutil.rmtree(out)
    return found | {"seconds": time.time() - started}


def _process(values: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{json.dumps(values)}\n{done.stdout}\n{done.stderr}")
    metrics: dict[str, Any] = json.loads((Path(values["output"]) / "metrics.json").read_text())
    return metrics


def cell(values: dict[str, Any]) -> None:
    from trimtab import pipeline
    from trimtab.recipe import from_dict

    pipeline.run(from_dict(values), overwrite=True)


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, values: dict[str, Any]) -> None:
    with file.open("a") as lines:
        lines.write(json.dumps(values) + "\n")


class Table:
    """What is measured already, and what fills it."""

    def __init__(self, results: Path, data: Path | None, work: Path, deadline: float) -> None:
        self.cells, self.rates = results / "quality.jsonl", results / "quality_rates.jsonl"
        self.work, self.deadline = work, deadline
        self.data = None if data is None else _split(data, work)

    def done(self, row: Row, seed: int) -> bool:
        return any(c["row"] == row.name and c["seed"] == seed for c in read(self.cells))

    def late(self) -> bool:
        return time.time() > self.deadline

    def rate(self, row: Row) -> Rate | None:
        """The best rate of a row, tried first where need be; None if time ran out."""
        if not row.trained:
            return None, None
        if row.rates_like:
            return self.rate(ROWS[row.rates_like])
        own = row.scales_like == row.name
        scales: float | None = 0.0
        if row.scales_like and not own:
            best = self.rate(ROWS[row.scales_like])
            if best is None:
                return None
            scales = best[1]
        tried = {r["rate"]: r["value"] for r in read(self.rates) if r["row"] == row.name}
        todo = list(row.rates)
        while True:
            for value in todo:
                if value in tried:
                    continue
                if self.late():
                    return None
                assert self.data is not None
                rate: Rate = (None, value) if own else (value, scales)
                found = run(row, rate, 0, self.data, self.work, choosing=True)
                tried[value] = found["value"]
                steps = {"steps": CHOICE_STEPS, "tokens": found["tokens"], "lr_scale": rate[1]}
                add(self.rates, {"row": row.name, "rate": value, "value": found["value"], **steps})
                say(f"{row.name}: rate {value:g} gives {found['value']:.2f} on held-out text")
            todo = _further(row, tried)
            if not todo:
                break
        best_rate = min(tried, key=tried.__getitem__)
        return (None, best_rate) if own else (best_rate, scales)

    def fill(self, row: Row, seed: int) -> None:
        """Run one cell."""
        rate = self.rate(row)
        if rate is None or self.late():
            return
        assert self.data is not None
        found = run(row, rate, seed, self.data, self.work)
        grid = row.grid
        add(
            self.cells,
            {
                "row": row.name,
                "model": MODEL,
                "method": row.method["name"] if row.grid else "float",
                "bits": grid.get("bits", 4 if grid else 16),
                "group": grid.get("group"),
                "grid": grid,
                "seed": seed,
                "tokens": found["tokens"],
                "trainable": found["trainable"] if row.trained else 0,
                "metric": "perplexity",
                "value": found["value"],
                "lr": rate[0],
                "lr_scale": rate[1],
                "seconds": round(found["seconds"], 1),
                "before_rounding": found.get("before_rounding"),
            },
        )
        say(f"{row.name} seed {seed}: {found['value']:.2f} in {found['seconds']:.0f} s")


def _further(row: Row, tried: dict[float, float]) -> list[float]:
    """One more rate, where the best one tried is the last of its side."""
    rates = sorted(tried)
    best = min(tried, key=tried.__getitem__)
    if len(tried) >= len(row.rates) + FURTHER or best not in (rates[0], rates[-1]):
        return []
    new = best / APART if best == rates[0] else best * APART
    return [float(f"{new:.0e}")]


def _split(source: Path, work: Path) -> Path:
    """Training text, the slice held out of it, and the test text."""
    folder = work / "text"
    folder.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.part.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(lines) * (1 - HELD_OUT))
    (folder / "train.txt").write_text("".join(lines[:cut]), encoding="utf-8")
    (folder / "heldout.txt").write_text("".join(lines[cut:]), encoding="utf-8")
    shutil.copyfile(source / "test.raw.txt", folder / "test.txt")
    return folder


def seeds_of(row: Row, seeds: list[int]) -> list[int]:
    """Without training every seed gives the same."""
    return seeds if row.trained else seeds[:1]


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.part.txt and test.raw.txt")
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of row names")
    parser.add_argument("--without", nargs="*", default=[], help="beginnings of row names to leave out")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after this time")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        cell(json.loads(arguments.cell))
        return
    table = Table(arguments.results, arguments.data, arguments.work, time.time() + 60 * arguments.minutes)
    left = tuple(arguments.without)
    rows = [
        r for r in ROWS.values() if r.name.startswith(tuple(arguments.rows)) and not (left and r.name.startswith(left))
    ]
    todo = [(row, seed) for seed in arguments.seeds for row in rows if seed in seeds_of(row, arguments.seeds)]
    for row, seed in todo:
        done = table.done(row, seed)
        if arguments.list:
            print(f"{row.name:<16} seed {seed}: {'done' if done else 'not run'}")
        elif not done and not table.late():
            table.fill(row, seed)


if __name__ == "__main__":
    main()
