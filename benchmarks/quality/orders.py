"""The papers' orders on a model that never was quantized: every method on the same grids, text, steps and seeds.

stories260K (float32, trained on TinyStories) is tuned on the same text where rounding is to be repaired, which is what the
LR-QAT paper does, and on Shakespeare where another domain is to be learned, which is what papers on adapters do. 4 x 64
tokens a step, the library's own rates, scheduled as by `trimtab run`; the value is the loss on held-out text.

    python benchmarks/quality/orders.py --data DIR [--seeds 0 1 2] [--steps 300] [--rows w3 nf4] [--minutes 60]
    python benchmarks/report.py quality                     a section of docs/quality.md

Every run is a line of benchmarks/results/orders.jsonl; what stands there is not run again. DIR holds stories260k,
tinystories and tinyshakespeare.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from benchmarks.files import RESULTS, add, read, say
from benchmarks.quality.rates import loss_on, text_windows, train
from trimtab import Activations, Blockwise, Gptq, KvCache, methods, prepare, simulate
from trimtab.models.load import load, load_float, open_source
from trimtab.models.transformers_bridge import quant_layers

OUT = RESULTS / "orders.jsonl"
MODEL = "stories260k"
STORIES, SHAKESPEARE = "TinyStories", "Shakespeare"
SEEDS, STEPS = (0, 1, 2), (300, 100, 1000)
LENGTH, TRAINED, HELD, CALIBRATION = 128, 64, 96, 128
"""Tokens of a window, and of its beginning that is trained on; windows that are measured, and that a start sees."""


@dataclass(frozen=True)
class Row:
    """A method on a grid, from a start."""

    name: str
    table: str
    method: dict[str, Any]
    grid: dict[str, Any] | None
    """None for a float model."""
    text: str = STORIES
    start: str = "rtn"
    rounded: int | None = None
    """Bits of inputs, keys and values."""
    again: dict[str, Any] | None = None
    """Merge, then round the merged weights to this grid."""

    @property
    def trained(self) -> bool:
        return self.method["name"] != "rtn"

    @property
    def rules(self) -> list[dict[str, Any]] | None:
        return rules_of(self.grid) if self.grid else None


def rules_of(grid: dict[str, Any]) -> list[dict[str, Any]]:
    """The MLP is 172 wide, 4 x 43, which no group of 32 divides."""
    down = grid | {"group": 43} if grid.get("group") else grid
    return [{"match": "*.down_proj", "grid": down}, {"match": "*", "grid": grid}]


def _repairs() -> Iterator[Row]:
    """What the LR-QAT paper compares, per channel and in groups, and what of LR-QAT may be varied."""
    for bits in (3, 2, 4):
        for group, name in ((None, f"w{bits}"), (32, f"w{bits}-g32")):
            grid = {"bits": bits, "group": group, "zero": "integer"}
            yield Row(f"{name}-rtn", name, {"name": "rtn"}, grid)
            yield Row(f"{name}-gptq", name, {"name": "rtn"}, grid, start="gptq")
            yield Row(f"{name}-block", name, {"name": "rtn"}, grid, start="block")
            yield Row(f"{name}-peqa", name, {"name": "peqa"}, grid)
            yield Row(f"{name}-lr-qat", name, {"name": "lr-qat", "rank": 32}, grid)
            yield Row(f"{name}-qat", name, {"name": "qat"}, grid)
            if bits < 4:
                yield Row(f"{name}-block-lr-qat", name, {"name": "lr-qat", "rank": 32}, grid, start="block")
    w3, w4 = ({"bits": bits, "group": None, "zero": "integer"} for bits in (3, 4))
    for rank in (2, 8):
        yield Row(f"rank-{rank}", "detail", {"name": "lr-qat", "rank": rank}, w3)
    yield Row("rank-8-balanced", "detail", {"name": "lr-qat", "rank": 8, "k": 2}, w3)
    for storage in ("fp32", "int"):
        yield Row(f"storage-{storage}", "detail", {"name": "lr-qat", "rank": 32, "storage": storage}, w3)
    for bits in (8, 4):
        for name in ("rtn", "peqa", "lr-qat", "qat"):
            yield Row(f"a{bits}-{name}", f"a{bits}", {"name": name}, w4, rounded=bits)


def _adapters() -> Iterator[Row]:
    """What papers on adapters compare: kept beside NF4 and NF2, or folded into 4, 3 and 2 bits."""
    yield Row("float-lora", "float", {"name": "lora", "rank": 8}, None, SHAKESPEARE)
    for codebook in ("nf4", "nf2"):
        grid = {"codebook": codebook, "group": 32}
        yield Row(f"{codebook}-rtn", codebook, {"name": "rtn"}, grid, SHAKESPEARE)
        for rank in (4, 16):
            for name in ("qlora", "loftq", "q-bara"):
                yield Row(f"{codebook}-r{rank}-{name}", codebook, {"name": name, "rank": rank}, grid, SHAKESPEARE)
    equal = {"qa-hira": {}, "qa-lora": {"rank": 2}, "qa-blora": {"rank": 4}}  # trainable parameters, within 8 %
    for bits in (3, 2, 4):
        grid, name = {"bits": bits, "group": 32, "zero": "real"}, f"int{bits}"
        yield Row(f"{name}-rtn", name, {"name": "rtn"}, grid, SHAKESPEARE)
        for method, options in equal.items():
            yield Row(f"{name}-{method}", name, {"name": method, **options}, grid, SHAKESPEARE)
        qlora = {"name": "qlora", "rank": 4}
        yield Row(f"{name}-qlora-again", name, qlora, {"codebook": "nf4", "group": 32}, SHAKESPEARE, again=grid)
        whole = grid | {"zero": "integer"}
        yield Row(f"{name}-qa-hira-integer", name, {"name": "qa-hira"}, whole, SHAKESPEARE)
        yield Row(f"{name}-lr-qat", name, {"name": "lr-qat", "rank": 8}, whole, SHAKESPEARE)
        yield Row(f"{name}-qa-hira-mean", name, {"name": "qa-hira", "mean": True}, grid, SHAKESPEARE)
        yield Row(f"{name}-qa-lora-r16", name, {"name": "qa-lora", "rank": 16}, grid, SHAKESPEARE)


ROWS = {row.name: row for row in (*_repairs(), *_adapters())}


class Study:
    """The model's texts, read once: (windows to train on, windows to measure)."""

    def __init__(self, data: Path) -> None:
        self.path = str(data / MODEL)
        tokenizer = open_source(self.path).tokenizer()
        files = "tinystories/train.jsonl", "tinystories/valid.jsonl", "tinyshakespeare/input.txt"
        learned, held, plays = (text_windows(data / file, tokenizer, LENGTH) for file in files)
        last = len(plays) // 10
        self.texts = {STORIES: (learned, held[:HELD]), SHAKESPEARE: (plays[:-last], plays[-last:][:HELD])}

    def float_loss(self, text: str) -> float:
        """Of the untuned model."""
        return loss_on(load_float(self.path, dtype=torch.float32), self.texts[text][1])

    def run(self, row: Row, steps: int, seed: int) -> dict[str, Any]:
        """What is measured of a row."""
        torch.manual_seed(seed)
        text, held = self.texts[row.text]
        began = time.process_time()
        model, _ = load(
            self.path,
            methods.make(**row.method),
            row.rules,
            dtype=torch.float32,
            quiet=True,
            start=_start(row, text[:CALIBRATION], seed),
        )
        if row.rounded:
            activations, kv = Activations(row.rounded), KvCache(row.rounded)  # type: ignore[arg-type]
            simulate(model, activations=activations, kv=kv)
        if row.trained:
            train(model, text[:, :TRAINED], None, steps, seed)
        found = {"loss": loss_on(model, held)}
        if row.again:
            found |= {"before": found["loss"], "loss": loss_on(_rounded_again(self.path, model, row.again), held)}
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return found | {"trainable": trainable, "seconds": round(time.process_time() - began)}


def _start(row: Row, calibration: Tensor, seed: int) -> Gptq | Blockwise | None:
    if row.start == "gptq":
        return Gptq(tokens=calibration)
    return Blockwise(tokens=calibration, seed=seed) if row.start == "block" else None


def _rounded_again(path: str, tuned: Any, grid: dict[str, Any]) -> Any:
    """A float model with the matrices that a tuned one amounts to, rounded to a grid."""
    model = load_float(path, dtype=torch.float32)
    with torch.no_grad():
        for name, layer in quant_layers(tuned).items():
            model.get_submodule(name).weight.copy_(layer.adapter.merged(layer.base, torch.float32))  # type: ignore[union-attr]
    return prepare(model, methods.Rtn(), rules_of(grid))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS[:1]))
    parser.add_argument("--rows", nargs="+", default=[""], help="beginnings of row names")
    parser.add_argument("--minutes", type=float, default=600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study, deadline = Study(given.data), time.monotonic() + 60 * given.minutes
    done = {(line["row"], line["steps"], line["seed"]) for line in read(OUT)}
    for text in (STORIES, SHAKESPEARE):
        if (f"float, {text}", 0, 0) not in done:
            add(OUT, {"row": f"float, {text}", "steps": 0, "seed": 0, "loss": study.float_loss(text)})
    for steps in given.steps:
        for seed in given.seeds:
            for row in (row for name, row in ROWS.items() if name.startswith(tuple(given.rows))):
                key = (row.name, steps if row.trained else 0, seed if row.trained or row.start == "block" else 0)
                if key in done:
                    continue
                if time.monotonic() > deadline:
                    say("out of time; run it again to go on")
                    return
                done.add(key)
                found = study.run(row, steps, seed)
                add(OUT, dict(zip(("row", "steps", "seed"), key, strict=True)) | found)
                say(f"{key}: {found}")


if __name__ == "__main__":
    main()
