"""Searched widths after fine-tuning: a pruned model, tuned at equal bytes by widths searched and uniform, LoRA and LoftQ.

A cell is a task, a share of parameters pruned, a row and a seed. Rows: `searched-3` to `searched-5` (widths found within
the bytes of the uniform model of so many bits), `uniform-2` to `uniform-8`, all by LR-QAT on whole codes, `lora` on the
pruned float model, `loftq` on NF4, and `float`, the pruned model untuned. All train on the same tokens, are folded, saved
and reloaded before they are measured. Tasks: WikiText-2 (perplexity, on pieces from all of the test text) and sentence
polarity (accuracy; trained on prompt and answer as one text). Rates are chosen for each task and row on held-out text at
the larger pruning, with half the steps, and serve both prunings; searched rows take those of the uniform row of their
bytes.

A search is made once for a task, pruning and budget, with seed 0: sensitivities, their additive optimum, short fine-tuned
trials and a few longer ones. What it took is written into every row that uses it.

Every finished cell is a line of benchmarks/results/search_tuned.jsonl, every search one of search_tuned_widths.jsonl, every
tried rate one of search_tuned_rates.jsonl. What stands there is not run again: the command can be stopped and repeated.

    python benchmarks/search_tuned.py --data DIR              DIR holds wikitext2/ and sentence_polarity/
    python benchmarks/search_tuned.py --data DIR --rows wikitext-30 --seeds 0 --minutes 60
    python benchmarks/search_tuned.py --list                  what is done and what is not
    python benchmarks/search_tuned.py --memory                training memory at 7B shapes: search_tuned_memory.json
    python benchmarks/search_report.py                        docs/search.md
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import search_tuned_process
import torch
from quality import RESULTS, add, asked, cut_text, further, read, say
from search_tuned_process import PARTS

SEEDS = (0, 1, 2)
RATIOS = (20, 30)
TASKS = ("wikitext", "polarity")
METRIC = {"wikitext": "perplexity", "polarity": "accuracy"}
SCALE_RATE, SCALE_BITS = 0.1, 4
"""Rate of scales, as a share of that of deltas (both choices in quality_rates.jsonl gave it), and the width that it is
meant for: at others it goes in proportion to their steps."""
SEARCHED_BITS = (2, 3, 4, 5, 6, 8)
PIECES, PIECE = 48, 2000
"""Pieces of the test text, from all of it, and the characters in each: one article says little about the next."""


@dataclass(frozen=True)
class Scale:
    """How large everything is: the study, or a rehearsal of it in a minute."""

    model: str = "smollm2-135m"
    group: int = 64
    steps: int = 24
    step_tokens: int = 1024
    wikitext_window: int = 512
    polarity_window: int = 256
    test_tokens: int = 16384
    choice_tokens: int = 8192
    items: int = 500
    choice_items: int = 400
    prune_tokens: int = 8192
    trials: int = 18
    trial_steps: int = 4
    promoted_steps: int = 12
    trial_tokens: int = 8192
    sensitivity_tokens: int = 8192
    units: str = "fusion"

    def window(self, task: str) -> int:
        return self.wikitext_window if task == "wikitext" else self.polarity_window


REHEARSAL: dict[str, Any] = {
    "group": 8, "steps": 4, "step_tokens": 128, "wikitext_window": 64, "polarity_window": 64, "test_tokens": 512,
    "choice_tokens": 256, "items": 8, "choice_items": 8, "prune_tokens": 256, "trials": 4, "trial_steps": 1,
    "promoted_steps": 2, "trial_tokens": 128, "sensitivity_tokens": 128, "units": "layer",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A way to tune the pruned model."""

    name: str
    method: dict[str, Any]
    bits: int | None = None
    """Of a uniform row, or whose bytes a search has; None for another base."""
    rates: tuple[float, ...] = ()
    rates_like: str | None = None
    searched: bool = False

    @property
    def trained(self) -> bool:
        return bool(self.rates or self.rates_like)


# Whole codes are packed while they are trained, so that narrower widths take less memory there, too.
LR_QAT = {"name": "lr-qat", "rank": 32, "alpha": 32.0, "storage": "int"}
_LOW = (3e-4, 1e-3, 3e-3)
_LEVELS = {
    2: (3e-3, 1e-2, 3e-2),
    3: (3e-3, 1e-2, 3e-2),
    4: (3e-3, 1e-2, 3e-2),
    5: (1e-2, 3e-2, 0.1),
    8: (3e-2, 0.1, 0.3),
}
"""Rates of deltas, which are in steps: the narrower the step, the larger."""
ROWS = [
    Row("float", {"name": "lora", "rank": 16}),
    Row("lora", {"name": "lora", "rank": 16}, None, _LOW),
    Row("loftq", {"name": "loftq", "rank": 16}, None, _LOW),
    *(Row(f"uniform-{bits}", LR_QAT, bits, rates) for bits, rates in _LEVELS.items()),
    *(Row(f"searched-{bits}", LR_QAT, bits, rates_like=f"uniform-{bits}", searched=True) for bits in (3, 4, 5)),
]
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

    def __init__(self, scale: Scale, results: Path, data: Path | None, work: Path, deadline: float) -> None:
        self.scale, self.work, self.deadline = scale, work, deadline
        self.cells, self.rates, self.widths = (
            results / f"search_tuned{part}.jsonl" for part in ("", "_rates", "_widths")
        )
        self._data = data

    @cached_property
    def data(self) -> Path:
        if self._data is None:
            raise SystemExit("--data: name the folder that holds wikitext2/ and sentence_polarity/")
        return split(self._data, self.work / "text")

    def done(self, cell: Cell, seed: int) -> bool:
        return any(c["cell"] == cell.name and c["seed"] == seed for c in read(self.cells))

    def late(self) -> bool:
        return time.time() > self.deadline

    def pruned(self, ratio: int) -> Path:
        """The pruned checkpoint, made where it is not there: Taylor importance on WikiText's training part."""
        out = self.work / f"pruned-{ratio}"
        if not (out / "pruning.json").exists():
            s = self.scale
            text = str(self.data / "wikitext" / "train.txt")
            sizes = {"multiple_of": s.group, "tokens": s.prune_tokens, "block_tokens": s.polarity_window}
            process("prune", {"model": s.model, "out": str(out), "ratio": ratio / 100, "text": text, **sizes})
            say(f"pruned by {ratio} %")
        return out

    # ---- recipes ---------------------------------------------------------------------------------------------------

    def recipe(self, cell: Cell, rate: float | None, seed: int, *, choosing: bool, steps: int | None = None) -> Any:
        """The recipe of a cell, of a tried rate, or (without rules) of a search."""
        s, folder, window = self.scale, self.data / cell.task, self.scale.window(cell.task)
        whole = s.steps // 2 if choosing else s.steps
        values: dict[str, Any] = {
            "model": {"path": str(self.pruned(cell.ratio))},
            "method": cell.row.method,
            "data": {"path": str(next(folder.glob("train.*"))), "block_tokens": window},
            "train": {
                "steps": (whole if cell.row.trained else 0) if steps is None else steps,
                "batch_tokens": s.step_tokens,
                "micro_batch": s.step_tokens // window,
                "lr": rate,
                "lr_scale": None if rate is None else rate * SCALE_RATE,
                "lr_scale_bits": SCALE_BITS,
                "seed": seed,
                "activation_checkpointing": False,
                "save_steps": 10_000,
            },
            "evaluate": {"parity": False},
            "output": str(self.work / "cell"),
        }
        if cell.task == "wikitext":
            tokens = s.choice_tokens if choosing else s.test_tokens
            path = folder / ("heldout.txt" if choosing else "test.txt")
            values["data"] |= {"eval_path": str(path), "eval_tokens": tokens}
        else:
            items = folder / ("choice" if choosing else "test")
            limit = s.choice_items if choosing else s.items
            values["evaluate"] |= {"tasks": ["sentence_polarity"], "tasks_data": str(items), "tasks_limit": limit}
        return values

    def run(self, cell: Cell, rate: float | None, seed: int, *, choosing: bool = False) -> dict[str, Any] | None:
        """Metrics of one run, in a process of its own; None where its search ran out of time."""
        values, found = self.recipe(cell, rate, seed, choosing=choosing), None
        if cell.row.searched:
            found = self.search(cell, rate)
            if found is None:
                return None
        values["rules"] = rules(cell.row, self.scale.group, found and found["widths"])
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

    def search(self, cell: Cell, rate: float | None) -> dict[str, Any] | None:
        """Widths within the bytes of the uniform model; None where it is too late to look for them."""
        assert cell.row.bits is not None
        for found in read(self.widths):
            if found["cell"] == cell.name:
                return found
        if self.late():
            return None
        s, folder = self.scale, self.data / cell.task
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

    def rate(self, task: str, row: Row) -> float | None:
        """The best rate of a row, at the larger pruning; None if time ran out."""
        row = BY_NAME[row.rates_like] if row.rates_like else row
        cell, better = Cell(task, max(RATIOS), row), max if task == "polarity" else min
        tried = {r["rate"]: r["value"] for r in read(self.rates) if r["cell"] == cell.name}
        todo = list(row.rates)
        while todo:
            for value in (v for v in todo if v not in tried):
                if self.late():
                    return None
                found = self.run(cell, value, 0, choosing=True)
                assert found is not None
                tried[value] = found["value"]
                add(self.rates, {"cell": cell.name, "rate": value, "value": found["value"], "tokens": found["tokens"]})
                say(f"{cell.name}: rate {value:g} gives {found['value']:.3f} on held-out text")
            todo = further(tried, better(tried, key=tried.__getitem__), len(row.rates))
        return better(tried, key=tried.__getitem__)

    def fill(self, cell: Cell, seed: int) -> None:
        """Run one cell."""
        rate = self.rate(cell.task, cell.row) if cell.row.trained else None
        if self.late() or (rate is None and cell.row.trained):
            return
        twin = self.twin(cell, seed)
        if twin is not None:
            add(self.cells, twin)
            say(f"{cell.name} seed {seed}: its search found the uniform model, whose row it shares")
            return
        found = self.run(cell, rate, seed)
        if found is None:
            return
        values = {
            "cell": cell.name,
            "task": cell.task,
            "ratio": cell.ratio,
            "row": cell.row.name,
            "model": self.scale.model,
            "seed": seed,
            "machine": machine(),
            "tokens": found["tokens"],
            "trainable": found["trainable"] if cell.row.trained else 0,
            "metric": METRIC[cell.task],
            "value": found["value"],
            "lr": rate,
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
    """Training, held-out and test text of both tasks."""
    text, items = folder / "wikitext", folder / "polarity"
    for made in (items / "choice" / "sentence_polarity", items / "test" / "sentence_polarity"):
        made.mkdir(parents=True, exist_ok=True)
    cut_text(source / "wikitext2", text)
    whole = (text / "test.txt").read_text(encoding="utf-8")
    places = range(0, len(whole) - PIECE, len(whole) // PIECES)
    (text / "test.txt").write_text("\n".join(whole[at : at + PIECE] for at in places), encoding="utf-8")
    given = source / "sentence_polarity"
    for name, made in (("train", "train"), ("validation", "heldout")):
        rows = [json.loads(line) for line in (given / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps({"text": "".join(asked(r).values())}) + "\n" for r in rows]
        (items / f"{made}.jsonl").write_text("".join(lines), encoding="utf-8")
    # The harness asks what lies in `test.jsonl`.
    shutil.copyfile(given / "validation.jsonl", items / "choice" / "sentence_polarity" / "test.jsonl")
    shutil.copyfile(given / "test.jsonl", items / "test" / "sentence_polarity" / "test.jsonl")
    return folder


def process(what: str, values: dict[str, Any]) -> None:
    """One part of the work, in a process of its own."""
    command = [sys.executable, search_tuned_process.__file__, what, json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{what} {json.dumps(values)}\n{done.stdout}\n{done.stderr}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with wikitext2/ and sentence_polarity/")
    parser.add_argument("--rows", nargs="*", default=[""], help="beginnings of cells' names, as --list shows them")
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS))
    parser.add_argument("--minutes", type=float, default=1e6, help="begin nothing after this time")
    parser.add_argument("--work", type=Path, default=Path("runs/search_tuned"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--memory", action="store_true", help="plan training memory at 7B shapes instead")
    parser.add_argument("--rehearse", metavar="MODEL", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        from search_tuned_memory import plan_all

        plan_all(arguments.results)
        return
    scale = Scale(model=arguments.rehearse, **REHEARSAL) if arguments.rehearse else Scale()
    study = Study(scale, arguments.results, arguments.data, arguments.work, time.time() + 60 * arguments.minutes)
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
