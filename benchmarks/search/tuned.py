"""Searched widths after fine-tuning: a pruned model, tuned at equal bytes by widths searched and uniform, LoRA and LoftQ.

A cell is a task, a share of parameters pruned, a row and a seed. Rows: `searched-3` to `searched-6` (widths found within
the bytes of the uniform model of so many bits), `uniform-2` to `uniform-8`, all by LR-QAT on whole codes, `lora` on the
pruned float model, `loftq` on NF4, and `float`, the pruned model untuned. All train on the same tokens, are folded, saved
and reloaded before they are measured. Tasks: WikiText-2 (perplexity, on pieces from all of the test text) and sentence
polarity (accuracy; trained on answers alone, in more and smaller steps), both of SmolLM2-135M, whose weights are those of
a 4-bit file; and TinyStories (perplexity) of stories260K, a small model that was never quantized. Rates are chosen for
each task and row on held-out rows at the larger pruning (of text with half the steps), and serve both prunings. LR-QAT's
are chosen at 4 and at 6 bits, first those of deltas, then (at 4) those of scales, and at other widths go with the step: a
delta counts in steps, a scale is one. Searched rows take those of their bytes.

A search is made once for a task, pruning and budget, with seed 0: sensitivities, their additive optimum, short fine-tuned
trials and a few longer ones. What it took is written into every row that uses it.

Every finished cell is a line of benchmarks/results/search_tuned.jsonl, every search one of search_tuned_widths.jsonl, every
tried rate one of search_tuned_rates.jsonl. What stands there is not run again: the command can be stopped and repeated.

    python benchmarks/search/tuned.py --data DIR              DIR holds wikitext2/, sentence_polarity/, tinystories/ and
                                                              stories260k/
    python benchmarks/search/tuned.py --data DIR --rows wikitext-30 --seeds 0 --minutes 60
    python benchmarks/search/tuned.py --list                  what is done and what is not
    python benchmarks/search/tuned_memory.py                  training memory at 7B shapes: search_tuned_memory.json
    python benchmarks/report.py search                        docs/search.md
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS, add, read, say
from benchmarks.quality.quality import HELD_OUT, Rate, asked, cut_text, further
from benchmarks.search import tuned_process
from benchmarks.search.tuned_process import PARTS

SEEDS = (0, 1, 2)
RATIOS = (20, 30)
TASKS = ("wikitext", "polarity", "tinystories")
METRIC = {"wikitext": "perplexity", "polarity": "accuracy", "tinystories": "perplexity"}
SCALE_BITS = 4
"""The width that rates of scales are meant for."""
SEARCHED_BITS = (2, 3, 4, 5, 6, 8)
PIECES, PIECE = 48, 2000
"""Pieces of the test text, from all of it, and the characters in each: one article says little about the next."""


@dataclass(frozen=True)
class Scale:
    """How large everything is: the study of a model, or a rehearsal of it in a minute."""

    model: str = "smollm2-135m"
    name: str = ""
    """Begins the names of pruned models."""
    rank: int = 16
    group: int = 64
    steps: int = 24
    step_tokens: int = 1024
    window: int = 512
    test_tokens: int = 16384
    choice_tokens: int = 8192
    items: int = 500
    choice_items: int = 400
    prune_tokens: int = 8192
    prune_window: int = 256
    trials: int = 12
    trial_steps: int = 4
    promoted_steps: int = 12
    trial_tokens: int = 8192
    sensitivity_tokens: int = 8192
    units: str = "fusion"
    choice_share: float = 0.5
    """Of the steps, that rates are chosen with."""
    instead: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]] = field(default_factory=dict)
    """Rates of deltas and of scales that a row is tried with here, where not with its own."""


# Answers of a word teach little each: all rates stay at chance in 24 steps on the reviews' whole text, 4 bits in half of
# these steps. Rates that serve text make the loss leap.
POLARITY = Scale(
    steps=64, step_tokens=512, window=256, items=1000, choice_items=1000, trials=10, trial_steps=32,
    promoted_steps=64, trial_tokens=16384, choice_share=1.0,
    instead={"uniform-4": ((1e-3, 3e-3, 1e-2), (3e-4, 1e-4, 1e-3)), "uniform-6": ((3e-3, 1e-2, 3e-2), (3e-4,))},
)  # fmt: skip
STORIES = Scale(
    model="stories260k", name="stories-", rank=4, group=16, steps=100, step_tokens=2048, window=256,
    test_tokens=32768, choice_tokens=32768, prune_tokens=65536, trials=24, trial_steps=25, promoted_steps=50,
    trial_tokens=32768, sensitivity_tokens=32768,
)  # fmt: skip
REHEARSAL: dict[str, Any] = {
    "group": 8, "steps": 4, "step_tokens": 256, "window": 256, "prune_window": 64, "test_tokens": 512,
    "choice_tokens": 256, "items": 8, "choice_items": 8, "prune_tokens": 256, "trials": 4, "trial_steps": 1,
    "promoted_steps": 2, "trial_tokens": 512, "sensitivity_tokens": 128, "units": "layer",
}  # fmt: skip


SCALES = {"wikitext": Scale(), "polarity": POLARITY, "tinystories": STORIES}


@dataclass(frozen=True)
class Row:
    """A way to tune the pruned model."""

    name: str
    method: dict[str, Any]
    bits: int | None = None
    """Of a uniform row, or whose bytes a search has; None for another base."""
    rates: tuple[float, ...] = ()
    """Of deltas, as far as no better one lies beyond them."""
    scale_rates: tuple[float, ...] = ()
    """Of scales; those of deltas are chosen at the first."""
    rates_like: str | None = None
    searched: bool = False

    @property
    def trained(self) -> bool:
        return bool(self.rates or self.rates_like)


# Whole codes are packed while they are trained, so that narrower widths take less memory there, too.
LR_QAT = {"name": "lr-qat", "storage": "int"}
_LOW = (3e-4, 1e-3, 3e-3)
_LIKE = {2: 4, 3: 4, 8: 6}
"""Width whose rates serve another."""
SEARCHED = (3, 4, 6)
ROWS = [
    Row("float", {"name": "lora"}),
    Row("lora", {"name": "lora"}, None, _LOW),
    Row("loftq", {"name": "loftq"}, None, _LOW),
    Row("uniform-4", LR_QAT, 4, (3e-3, 1e-2, 3e-2), (1e-3, 3e-4, 3e-3)),
    Row("uniform-6", LR_QAT, 6, (1e-2, 3e-2, 0.1), (1e-3,)),
    *(Row(f"uniform-{bits}", LR_QAT, bits, rates_like=f"uniform-{like}") for bits, like in _LIKE.items()),
    *(
        Row(f"searched-{bits}", LR_QAT, bits, rates_like=f"uniform-{_LIKE.get(bits, bits)}", searched=True)
        for bits in SEARCHED
    ),
]
ROWS.sort(key=lambda row: (row.searched, row.bits or 0))
BY_NAME = {row.name: row for row in ROWS}


@dataclass(frozen=True)
class Cell:
    """A row on a task, at one pruning."""

    task: str
    ratio: int
    row: Row

    @property
    def name(self) -> str:
        return f"{self.task}-{self.ratio}-{self.row.name}"


CELLS = [Cell(task, ratio, row) for task in TASKS for ratio in reversed(RATIOS) for row in ROWS]


def grid(bits: int, group: int) -> dict[str, Any]:
    return {"bits": bits, "group": group, "zero": "integer"}


def searched_rules(widths: dict[str, str], group: int) -> list[dict[str, Any]]:
    """Rules of a search's result: for each part of a layer, a digit for every layer."""
    return [
        {"match": f"model.layers.{layer}.{name}", "grid": grid(int(bits), group)}
        for part, digits in widths.items()
        for layer, bits in enumerate(digits)
        for name in PARTS[part]
    ]


def rules(row: Row, group: int, widths: dict[str, str] | None = None) -> list[dict[str, Any]] | None:
    """Of a row; the embedding is in 8 bits wherever anything is."""
    if row.method["name"] == "lora":
        return None  # on the float model, every linear layer but the head
    embedding = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": group}}
    if row.searched:
        assert widths is not None
        return [embedding, *searched_rules(widths, group)]
    table = {"codebook": "nf4", "group": group, "double_quant": True}
    return [embedding, {"match": "*", "grid": table if row.bits is None else grid(row.bits, group)}]


class Study:
    """What is measured already, and what fills it."""

    def __init__(self, scales: dict[str, Scale], results: Path, data: Path | None, work: Path, deadline: float) -> None:
        self.scales, self.work, self.deadline = scales, work, deadline
        self.cells, self.rates, self.widths = (
            results / f"search_tuned{part}.jsonl" for part in ("", "_rates", "_widths")
        )
        self._data = data

    @cached_property
    def data(self) -> Path:
        if self._data is None:
            raise SystemExit("--data: name the folder that holds wikitext2/, sentence_polarity/ and tinystories/")
        return split(self._data, self.work / "text")

    def done(self, cell: Cell, seed: int) -> bool:
        return any(c["cell"] == cell.name and c["seed"] == seed for c in read(self.cells))

    def late(self) -> bool:
        return time.time() > self.deadline

    def pruned(self, task: str, ratio: int) -> Path:
        """The pruned checkpoint, made where it is not there: Taylor importance on WikiText-2 or TinyStories."""
        s = self.scales[task]
        out = self.work / f"{s.name}pruned-{ratio}"
        if not (out / "pruning.json").exists():
            text = "tinystories/train.jsonl" if task == "tinystories" else "wikitext/train.txt"
            assert self._data is not None
            model = self._data / s.model
            values: dict[str, Any] = {"model": str(model) if model.exists() else s.model, "out": str(out)}
            values |= {"ratio": ratio / 100, "text": str(self.data / text)}
            sizes = {"multiple_of": s.group, "tokens": s.prune_tokens, "block_tokens": s.prune_window}
            process("prune", values | sizes)
            say(f"pruned {s.model} by {ratio} %")
        return out

    # ---- recipes ---------------------------------------------------------------------------------------------------

    def recipe(self, cell: Cell, rate: Rate, seed: int, *, choosing: bool, steps: int | None = None) -> Any:
        """The recipe of a cell, of a tried rate, or (without rules) of a search."""
        s, folder = self.scales[cell.task], self.data / cell.task
        whole = round(s.steps * s.choice_share) if choosing else s.steps
        values: dict[str, Any] = {
            "model": {"path": str(self.pruned(cell.task, cell.ratio))},
            "method": cell.row.method | {"rank": s.rank, "alpha": float(s.rank)},
            "data": {"path": str(next(folder.glob("train.*"))), "block_tokens": s.window},
            "train": {
                "steps": (whole if cell.row.trained else 0) if steps is None else steps,
                "batch_tokens": s.step_tokens,
                "micro_batch": s.step_tokens // s.window,
                "lr": rate[0],
                "lr_scale": rate[1],
                "lr_scale_bits": SCALE_BITS,
                "seed": seed,
                "activation_checkpointing": False,
                "save_steps": 10_000,
            },
            "evaluate": {"parity": False},
            "output": str(self.work / "cell"),
        }
        if METRIC[cell.task] == "perplexity":
            tokens = s.choice_tokens if choosing else s.test_tokens
            path = next(folder.glob("heldout.*" if choosing else "test.*"))
            values["data"] |= {"eval_path": str(path), "eval_tokens": tokens}
        else:
            items = folder / ("choice" if choosing else "test")
            limit = s.choice_items if choosing else s.items
            values["evaluate"] |= {"tasks": ["sentence_polarity"], "tasks_data": str(items), "tasks_limit": limit}
        return values

    def run(self, cell: Cell, rate: Rate, seed: int, *, choosing: bool = False) -> dict[str, Any]:
        """Metrics of one run, in a process of its own; of a searched row, after its search."""
        values, found = self.recipe(cell, rate, seed, choosing=choosing), None
        if cell.row.searched:
            found = self.search(cell, rate)
            assert found is not None
        values["rules"] = rules(cell.row, self.scales[cell.task].group, found and found["widths"])
        out = Path(values["output"])
        shutil.rmtree(out, ignore_errors=True)
        started = time.time()
        process("cell", values)
        metrics = json.loads((out / "metrics.json").read_text())
        accuracy = metrics.get("tasks", {}).get("sentence_polarity acc")
        metrics["value"] = metrics["perplexity"]["tuned"] if accuracy is None else accuracy[0]
        metrics["file_bytes"] = sum(f.stat().st_size for f in out.glob("*.safetensors"))
        shutil.rmtree(out)
        return metrics | {"search": found, "run_seconds": time.time() - started}

    def search(self, cell: Cell, rate: Rate) -> dict[str, Any] | None:
        """Widths within the bytes of the uniform model; None where it is too late to look for them."""
        assert cell.row.bits is not None
        for found in read(self.widths):
            if found["cell"] == cell.name:
                return found
        if self.late():
            return None
        s, folder = self.scales[cell.task], self.data / cell.task
        uniform = BY_NAME[f"uniform-{cell.row.bits}"]
        values = self.recipe(cell, rate, 0, choosing=True, steps=s.steps)
        values |= {"rules": rules(uniform, s.group), "name": cell.name, "output": str(self.work / cell.name)}
        values["evaluate"] = {"parity": False}
        values["data"] |= {"eval_path": str(next(folder.glob("heldout.*"))), "eval_tokens": s.trial_tokens}
        values["search"] = {
            "units": s.units,
            "bits": SEARCHED_BITS,
            "trials": s.trials,
            "objective": "tuned",
            "steps": s.trial_steps,
            "promote": s.promoted_steps,
            "tokens": s.trial_tokens,
            "sensitivity_tokens": s.sensitivity_tokens,
        }
        process("search", values)
        found = json.loads((self.work / cell.name / "found.json").read_text())
        add(self.widths, {"cell": cell.name, **found})
        say(f"{cell.name}: {found['trials']} trials and sensitivities in {found['seconds']:.0f} s")
        return found

    # ---- filling ---------------------------------------------------------------------------------------------------

    def rate(self, task: str, row: Row) -> Rate | None:
        """The best rates of a row, at the larger pruning; None if time ran out."""
        if row.rates_like:
            like = BY_NAME[row.rates_like]
            found = self.rate(task, like)
            return found and ((found[0] or 0.0) * 2.0 ** ((row.bits or 0) - (like.bits or 0)), found[1])
        cell, best = Cell(task, max(RATIOS), row), max if METRIC[task] == "accuracy" else min
        rates, scales = self.scales[task].instead.get(row.name, (row.rates, row.scale_rates))
        first = scales[0] if scales else None
        todo: list[Rate] = [(value, first) for value in rates]
        while todo:
            if not self._try(cell, todo):
                return None
            tried = {r[0]: v for r, v in self._tried(cell).items() if r[1] == first}
            todo = [(value, first) for value in further(tried, best(tried, key=tried.__getitem__), len(rates))]
        chosen = best(tried, key=tried.__getitem__)
        if not self._try(cell, [(chosen, value) for value in scales]):
            return None
        about = {r: v for r, v in self._tried(cell).items() if r[0] == chosen}
        return best(about, key=about.__getitem__)

    def _tried(self, cell: Cell) -> dict[Rate, float]:
        return {(r["rate"], r["scale_rate"]): r["value"] for r in read(self.rates) if r["cell"] == cell.name}

    def _try(self, cell: Cell, rates: list[Rate]) -> bool:
        """Measure what is not measured yet; False if time ran out."""
        for rate in (r for r in rates if r not in self._tried(cell)):
            if self.late():
                return False
            found = self.run(cell, rate, 0, choosing=True)
            about = {"cell": cell.name, "rate": rate[0], "scale_rate": rate[1], "value": found["value"]}
            add(self.rates, about | {"tokens": found["tokens"], "machine": machine()})
            say(f"{cell.name}: rates {rate} give {found['value']:.3f} on held-out text")
        return True

    def fill(self, cell: Cell, seed: int) -> None:
        """Run one cell."""
        rate = self.rate(cell.task, cell.row) if cell.row.trained else (None, None)
        if self.late() or rate is None or (cell.row.searched and self.search(cell, rate) is None):
            return
        twin = self.twin(cell, seed)
        if twin is not None:
            add(self.cells, twin)
            say(f"{cell.name} seed {seed}: its search found the uniform model, whose row it shares")
            return
        found = self.run(cell, rate, seed)
        values = {
            "cell": cell.name,
            "task": cell.task,
            "ratio": cell.ratio,
            "row": cell.row.name,
            "model": self.scales[cell.task].model,
            "seed": seed,
            "machine": machine(),
            "tokens": found["tokens"],
            "trainable": found["trainable"] if cell.row.trained else 0,
            "metric": METRIC[cell.task],
            "value": found["value"],
            "lr": rate[0],
            "lr_scale": rate[1],
            "file_bytes": found["file_bytes"],
            "peak_bytes": found["peak_memory_bytes"] - found["libraries_bytes"],
            "seconds": round(found["run_seconds"], 1),
            "search": found["search"] and cost_of(found["search"]),
        }
        add(self.cells, values)
        say(f"{cell.name} seed {seed}: {found['value']:.3f} in {found['run_seconds']:.0f} s")

    def twin(self, cell: Cell, seed: int) -> dict[str, Any] | None:
        """The finished uniform cell whose very recipe a search has come to, as a row of this cell."""
        found = next((w for w in read(self.widths) if w["cell"] == cell.name), None)
        if found is None or {*"".join(found["widths"].values())} != {str(cell.row.bits)}:
            return None
        uniform = f"{cell.task}-{cell.ratio}-uniform-{cell.row.bits}"
        same = next((c for c in read(self.cells) if c["cell"] == uniform and c["seed"] == seed), None)
        named = {"cell": cell.name, "row": cell.row.name, "search": cost_of(found), "same_as": uniform}
        return None if same is None else same | named


def machine() -> str:
    """What the last bits, and with them the pruned model, depend on."""
    return torch.backends.cpu.get_cpu_capability()


def cost_of(search: dict[str, Any]) -> dict[str, Any]:
    """What a row says of the search that it uses."""
    return {key: search[key] for key in ("trials", "tokens", "seconds", "budget_bytes")}


def split(source: Path, folder: Path) -> Path:
    """Training, held-out and test text of all tasks."""
    text, items, stories = folder / "wikitext", folder / "polarity", folder / "tinystories"
    stories.mkdir(parents=True, exist_ok=True)
    rows = (source / "tinystories" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(rows) * (1 - HELD_OUT))
    (stories / "train.jsonl").write_text("".join(rows[:cut]), encoding="utf-8")
    (stories / "heldout.jsonl").write_text("".join(rows[cut:]), encoding="utf-8")
    shutil.copyfile(source / "tinystories" / "valid.jsonl", stories / "test.jsonl")
    for made in (items / "choice" / "sentence_polarity", items / "test" / "sentence_polarity"):
        made.mkdir(parents=True, exist_ok=True)
    cut_text(source / "wikitext2", text)
    whole = (text / "test.txt").read_text(encoding="utf-8")
    places = range(0, len(whole) - PIECE, len(whole) // PIECES)
    (text / "test.txt").write_text("\n".join(whole[at : at + PIECE] for at in places), encoding="utf-8")
    given = source / "sentence_polarity"
    for name, made in (("train", "train"), ("validation", "heldout")):
        asks = [json.loads(line) for line in (given / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(asked(r)) + "\n" for r in asks]
        (items / f"{made}.jsonl").write_text("".join(lines), encoding="utf-8")
    # The harness asks what lies in `test.jsonl`.
    shutil.copyfile(given / "validation.jsonl", items / "choice" / "sentence_polarity" / "test.jsonl")
    shutil.copyfile(given / "test.jsonl", items / "test" / "sentence_polarity" / "test.jsonl")
    return folder


def process(what: str, values: dict[str, Any]) -> None:
    """One part of the work, in a process of its own."""
    command = [sys.executable, tuned_process.__file__, what, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} {json.dumps(values)}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="folder with wikitext2/, sentence_polarity/, tinystories/, stories260k/"
    )
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of cells' names, as --list shows them")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after this time")
    parser.add_argument("--work", type=Path, default=Path("runs/search_tuned"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--rehearse", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    deadline = time.time() + 60 * arguments.minutes
    scales = dict.fromkeys(TASKS, Scale(model=arguments.rehearse, **REHEARSAL)) if arguments.rehearse else SCALES
    study = Study(scales, arguments.results, arguments.data, arguments.work, deadline)
    chosen = [cell for cell in CELLS if cell.name.startswith(tuple(arguments.rows))]
    for seed in arguments.seeds:
        for cell in chosen:
            if not cell.row.trained and seed != arguments.seeds[0]:
                continue
            done = study.done(cell, seed)
            if arguments.list:
                print(f"{cell.name:<24} seed {seed}: {'done' if done else 'not run'}")
            elif not done and not study.late():
                study.fill(cell, seed)


if __name__ == "__main__":
    main()
