"""What each method makes of a model: a table of method x bits x seed, filled cell by cell, each a run of a recipe.

A cell trains on one part of a text, folds, saves, reloads and measures perplexity on the test text: what is measured is
what is served. Learning rates are chosen for each row (and so for each pooling) on a slice held out of the *training*
text, with half a cell's steps: candidates lie a factor apart, and while the best one is the last of its side, one more is
tried there. Scales get the rate that was best where they are all that is trained (PEQA on the same grid).

Every finished cell is a line of benchmarks/results/quality.jsonl, every tried rate one of quality_rates.jsonl. What stands
there is not run again, so that the command can be stopped and given again until the table is full.

    python benchmarks/quality/quality.py --data DIR                     all rows
    python benchmarks/quality/quality.py --data DIR --rows w3 --seeds 0 --minutes 60
    python benchmarks/quality/quality.py --list                         what is done and what is not
    python benchmarks/quality/quality.py --model FILE.gguf --data DIR   the headline rows of another model
    python benchmarks/report.py quality                         docs/quality.md

DIR holds train.part.txt and test.raw.txt; beside it lies sentence_polarity, with {sentence, label} in train.jsonl and
test.jsonl, for the rows of a supervised task: there the accuracy is measured, by lm-evaluation-harness.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS, add, read, say
from benchmarks.quality.rows import HEADLINES, ROWS, Row

MODEL = "smollm2-135m"
SEEDS = (0, 1, 2)
STEPS, STEP_TOKENS, WINDOW, TASK_WINDOW = 32, 1024, 512, 128
TEST_TOKENS, CHOICE_TOKENS = 65536, 8192
TASK_ITEMS, CHOICE_ITEMS = 400, 200
CHOICE_STEPS = STEPS // 2
HELD_OUT = 0.1
"""Share of the training text that rates are chosen on; nothing trains on it."""
APART = 10**0.5
"""Factor between neighbouring rates."""
FURTHER = 4
"""Rates tried at most beyond the end of a row's own list."""
MOVING = ("peqa", "lr-qat", "qat")
"""Methods that train codes or the scales around them: how many codes they moved is counted. PEQA moves none."""
MOVED = "moved.json"

Rate = tuple[float | None, float | None]
"""(of deltas and master weights, of scales and offsets); None is not trained."""


def recipe(model: str, row: Row, rate: Rate, seed: int, data: Path, out: Path, *, choosing: bool) -> dict[str, Any]:
    """The recipe of a cell, or of a tried rate."""
    steps = (CHOICE_STEPS if choosing else STEPS) if row.trained else 0
    window = TASK_WINDOW if row.task else WINDOW
    values: dict[str, Any] = {
        "model": {"path": model},
        "method": row.method,
        "rules": [{"match": "*", "grid": row.grid or None}] if row.grid else None,
        "data": {"path": str(data / "train.txt"), "block_tokens": window},
        "train": {
            "steps": steps,
            "batch_tokens": STEP_TOKENS,
            "micro_batch": STEP_TOKENS // window,
            "lr": rate[0],
            "lr_scale": rate[1],
            "seed": seed,
            "activation_checkpointing": False,
            "save_steps": 10_000,
        },
        "evaluate": {"parity": False},
        "output": str(out),
    }
    if row.task:
        values["data"] |= {"path": str(data / f"{row.task}.jsonl"), "packing": "none"}
        tasks = str(data / ("tasks-heldout" if choosing else "tasks"))
        limit = CHOICE_ITEMS if choosing else TASK_ITEMS
        values["evaluate"] |= {"tasks": [row.task], "tasks_data": tasks, "tasks_limit": limit}
    else:
        values["data"] |= {
            "eval_path": str(data / ("heldout.txt" if choosing else "test.txt")),
            "eval_tokens": CHOICE_TOKENS if choosing else TEST_TOKENS,
        }
    for key, value in row.more.items():
        values[key] = values[key] | value if key in values else value
    return values


def run(
    model: str, row: Row, rate: Rate, seed: int, data: Path, work: Path, *, choosing: bool = False
) -> dict[str, Any]:
    """Metrics of one cell, from processes of its own; the model is removed."""
    out = work / "cell"
    shutil.rmtree(out, ignore_errors=True)
    values = recipe(model, row, rate, seed, data, out, choosing=choosing)
    started = time.time()
    metrics = _process(values | {"merge": True} if row.round_to else values)
    found = {**metrics, "value": _measured(row, metrics)}
    if row.round_to:
        again = work / "rounded"
        shutil.rmtree(again, ignore_errors=True)
        plain = replace(row, method={"name": "rtn"}, grid=row.round_to, rates=(), round_to=None)
        rounded = _process(recipe(str(out), plain, (None, None), seed, data, again, choosing=choosing))
        found |= {"value": _measured(row, rounded), "before_rounding": found["value"]}
        shutil.rmtree(again)
    shutil.rmtree(out)
    return found | {"seconds": time.time() - started}


def _measured(row: Row, metrics: dict[str, Any]) -> float:
    """Of the saved model, which for the row `float` is the float model."""
    return float(metrics["tasks"][f"{row.task} acc"][0] if row.task else metrics["perplexity"]["tuned"])


def _process(values: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--cell", json.dumps(values)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{json.dumps(values)}\n{done.stdout}\n{done.stderr}")
    out = Path(values["output"])
    metrics: dict[str, Any] = json.loads((out / "metrics.json").read_text())
    return metrics | json.loads((out / MOVED).read_text())


def cell(values: dict[str, Any]) -> None:
    """What a cell's own process does."""
    from trimtab.pipeline import run as pipeline
    from trimtab.recipe.recipe import from_dict

    pipeline.run(from_dict(values), overwrite=True)
    share = moved(values) if values["method"]["name"] in MOVING else None
    (Path(values["output"]) / MOVED).write_text(json.dumps({"moved": share}))


def moved(values: dict[str, Any]) -> float:
    """Share of a saved model's codes that are not those of its float model rounded to nearest."""
    import torch

    from trimtab.layers.weights import AffineWeight
    from trimtab.models.load import load, open_source
    from trimtab.models.transformers_bridge import quant_layers

    source, (saved, _) = open_source(values["model"]["path"]), load(values["output"])
    assert source is not None
    source.bind(saved)
    changed = whole = 0
    for name, layer in quant_layers(saved).items():
        assert isinstance(layer.base, AffineWeight)
        weight = source.read(f"{name}.weight")
        assert isinstance(weight, torch.Tensor)
        start = AffineWeight.quantize(weight.float(), layer.base.grid).integer_codes()
        changed += int((layer.base.integer_codes() != start).sum())
        whole += start.numel()
    return changed / whole


class Table:
    """What is measured already, and what fills it."""

    def __init__(
        self, model: str, rows: list[Row], results: Path, data: Path | None, work: Path, deadline: float
    ) -> None:
        self.name = Path(model).stem
        self.cells, self.rates = results / "quality.jsonl", results / "quality_rates.jsonl"
        self.work, self.deadline = work, deadline
        self.data, self.model = None, ""
        if data is not None:
            self.data = work / "text"
            cut_text(data, self.data)
            for task in {row.task for row in rows if row.task}:
                _cut_task(task, data.parent / task, self.data)
            self.model = str(_converted(model, work / "models" / self.name))

    def mine(self, file: Path, row: Row) -> list[dict[str, Any]]:
        """What is known of a row and this model."""
        return [c for c in read(file) if c["row"] == row.name and c.get("model", MODEL) == self.name]

    def done(self, row: Row, seed: int) -> bool:
        return any(c["seed"] == seed for c in self.mine(self.cells, row))

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
        tried = {r["rate"]: row.better(r["value"]) for r in self.mine(self.rates, row)}
        todo = list(row.rates)
        while True:
            for value in todo:
                if value in tried:
                    continue
                if self.late():
                    return None
                assert self.data is not None
                rate: Rate = (None, value) if own else (value, scales)
                found = run(self.model, row, rate, 0, self.data, self.work, choosing=True)
                tried[value] = row.better(found["value"])
                steps = {"steps": CHOICE_STEPS, "tokens": found["tokens"], "lr_scale": rate[1]}
                add(self.rates, {"row": row.name, "model": self.name, "rate": value, "value": found["value"], **steps})
                say(f"{row.name}: rate {value:g} gives {found['value']:.4g} on what is held out")
            todo = further(tried, min(tried, key=tried.__getitem__), len(row.rates))
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
        found = run(self.model, row, rate, seed, self.data, self.work)
        grid = row.grid
        add(
            self.cells,
            {
                "row": row.name,
                "model": self.name,
                "method": row.method["name"] if row.grid else "float",
                "bits": grid.get("bits", 4 if grid else 16),
                "group": grid.get("group"),
                "grid": grid,
                "seed": seed,
                "tokens": found["tokens"],
                "trainable": found["trainable"] if row.trained else 0,
                "metric": row.metric,
                "value": found["value"],
                "lr": rate[0],
                "lr_scale": rate[1],
                "seconds": round(found["seconds"], 1),
                "before_rounding": found.get("before_rounding"),
                "moved": found["moved"],
            },
        )
        say(f"{row.name} seed {seed}: {found['value']:.4g} in {found['seconds']:.0f} s")


def further(tried: Collection[float], best: float, given: int) -> list[float]:
    """One more rate than the `given` ones, where the best one tried is the last of its side."""
    if len(tried) >= given + FURTHER or best not in (min(tried), max(tried)):
        return []
    return [float(f"{best / APART if best == min(tried) else best * APART:.0e}")]


def _converted(model: str, folder: Path) -> Path:
    """The same numbers in float32 safetensors: every cell reads them, and would parse the GGUF again."""
    if not folder.exists():
        import torch

        from trimtab.models.load import load_float, open_source

        source = open_source(model)
        assert source is not None, "quantized models are not rounded again"
        temporary = folder.with_name(folder.name + ".part")
        load_float(model, dtype=torch.float32).save_pretrained(temporary)
        source.tokenizer().save_pretrained(temporary)
        temporary.rename(folder)
    return folder


def cut_text(source: Path, folder: Path) -> None:
    """WikiText's training text, the slice held out of it, and its test text."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = (source / "train.part.txt").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(lines) * (1 - HELD_OUT))
    (folder / "train.txt").write_text("".join(lines[:cut]), encoding="utf-8")
    (folder / "heldout.txt").write_text("".join(lines[cut:]), encoding="utf-8")
    shutil.copyfile(source / "test.raw.txt", folder / "test.txt")


def _cut_task(task: str, source: Path, folder: Path) -> None:
    """The same of a task's rows; the harness asks what lies in `test.jsonl`."""
    rows = (source / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(rows) * (1 - HELD_OUT))
    prompts = [json.dumps(asked(json.loads(row))) + "\n" for row in rows[:cut]]
    (folder / f"{task}.jsonl").write_text("".join(prompts), encoding="utf-8")
    for name, text in (("tasks-heldout", "".join(rows[cut:])), ("tasks", (source / "test.jsonl").read_text())):
        (folder / name / task).mkdir(parents=True, exist_ok=True)
        (folder / name / task / "test.jsonl").write_text(text, encoding="utf-8")


def asked(review: dict[str, Any]) -> dict[str, str]:
    """A training row in the very words that the harness asks with."""
    from trimtab.evaluation.harness import TASKS

    words = TASKS["sentence_polarity"].prompt
    prompt = words["doc_to_text"].replace("{{sentence}}", review["sentence"])
    return {"prompt": prompt, "completion": f" {words['doc_to_choice'][review['label']]}"}


def seeds_of(row: Row, seeds: list[int]) -> list[int]:
    """Without training every seed gives the same: the first stands for all."""
    return seeds if row.trained else [seed for seed in seeds if seed == SEEDS[0]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train.part.txt and test.raw.txt")
    parser.add_argument("--model", default=MODEL, help="another model: its headline rows only")
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
    left, names = tuple(arguments.without), ROWS if Path(arguments.model).stem == MODEL else HEADLINES
    rows = [ROWS[n] for n in names if n.startswith(tuple(arguments.rows)) and not (left and n.startswith(left))]
    deadline = time.time() + 60 * arguments.minutes
    table = Table(arguments.model, rows, arguments.results, arguments.data, arguments.work, deadline)
    todo = [(row, seed) for seed in arguments.seeds for row in rows if seed in seeds_of(row, arguments.seeds)]
    for row, seed in todo:
        done = table.done(row, seed)
        if arguments.list:
            print(f"{row.name:<16} seed {seed}: {'done' if done else 'not run'}")
        elif not done and not table.late():
            table.fill(row, seed)


if __name__ == "__main__":
    main()
