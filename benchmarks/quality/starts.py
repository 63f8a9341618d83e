"""What a start is worth: round-to-nearest, GPTQ and the block-wise starts, as they are and after tuning from each.

    python benchmarks/quality/starts.py --data DIR [--model stories260k] [--seeds 0 1] [--minutes 60]
    python benchmarks/quality/starts.py --data DIR --model smollm2-135m --minutes 90
    python benchmarks/report.py quality                           a section of docs/quality.md

Every row is a line of benchmarks/results/starts.jsonl; what stands there is not run again, and a row that is cut off goes
on at the last whole block (`--kept`). Rows stand in the order that they are run in, what decides most first.

stories260K is float32 and never was quantized; it is calibrated and tuned on TinyStories. SmolLM2-135M-Instruct is the
dequantized 4-bit file; WikiText-2's train part, and the first 8,192 tokens of its test text. DIR holds stories260k,
tinystories and wikitext2. Rates of tuning are the defaults of more than 2 bits. Seconds are of one processor.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.files import RESULTS, add, read, say
from benchmarks.quality import rates
from benchmarks.quality.rates import loss_on, train
from trimtab import Blockwise, Gptq, methods
from trimtab.layers.rates import default
from trimtab.models.load import load, load_float, open_source

OUT = RESULTS / "starts.jsonl"
STARTS = ("rtn", "gptq", "all", "scales", "shift")
"""Round-to-nearest, GPTQ, and what a block-wise start trains."""


TUNED = (
    ("lr-qat", 32, ("rtn", "all", "gptq", "shift")),
    ("peqa", None, ("rtn", "all")),
    ("qat", None, ("rtn", "all")),
    ("lr-qat", 8, ("rtn", "all")),
)
"""Method, rank, and the starts that it is tuned from."""


@dataclass(frozen=True)
class Setting:
    """A model, and how much of what it is given."""

    path: str
    length: int
    """Tokens in a window."""
    calibration: int
    """Windows that a start sees."""
    held: int
    """Windows that the loss is measured on."""
    steps: int
    """Of tuning."""
    batch: int
    """Windows in each."""
    block_steps: int = 128
    """Updates of each block."""


SETTINGS = {
    "stories260k": Setting("stories260k", 128, 128, 96, 100, 4),
    "smollm2-135m": Setting("smollm2-135m", 512, 64, 16, 96, 2),
}


@dataclass(frozen=True)
class Row:
    """A model on a grid, from a start, tuned or not."""

    model: str
    bits: int
    group: int | None
    start: str
    method: str = "rtn"
    rank: int | None = None
    steps: int = 0
    seed: int = 0

    @property
    def grid(self) -> dict[str, Any]:
        return {"bits": self.bits, "group": self.group, "zero": "integer"}

    @property
    def rules(self) -> list[dict[str, Any]]:
        """stories260K's MLP is 172 wide, 4 x 43: no group of 64 divides it."""
        down = 43 if self.model == "stories260k" and self.group else self.group
        return [{"match": "*.down_proj", "grid": {**self.grid, "group": down}}, {"match": "*", "grid": self.grid}]


def rows(model: str, seeds: list[int]) -> Iterator[Row]:
    """In the order that they are run in."""
    steps = SETTINGS[model].steps
    grids = [[(2, 64)]] if model == "smollm2-135m" else [[(2, None), (3, None)], [(2, 64), (3, 64), (4, None)]]
    for some in grids:
        for seed in seeds:
            for bits, group in some:
                plain = [Row(model, bits, group, start, seed=seed) for start in STARTS]
                yield from (row for row in plain if seed == 0 or row.start not in ("rtn", "gptq"))
            for method, rank, starts in TUNED:
                for bits, group in some:
                    yield from (Row(model, bits, group, start, method, rank, steps, seed) for start in starts)


class Study:
    """A model's data, read once."""

    def __init__(self, setting: Setting, data: Path) -> None:
        self.setting, stories = setting, setting.path == "stories260k"
        self.path = str(data / setting.path) if stories else setting.path
        tokenizer = open_source(self.path).tokenizer()
        texts = (rates.TINY if stories else rates.REAL).texts
        self.train, held = (rates.text_windows(data / file, tokenizer, setting.length) for file in texts)
        self.held = held[: setting.held]

    def float_loss(self) -> float:
        return loss_on(load_float(self.path, dtype=torch.float32), self.held)

    def run(self, row: Row, kept: Path) -> dict[str, Any]:
        """What is measured of a row."""
        torch.manual_seed(row.seed)
        began, method = time.process_time(), methods.make(row.method, **({"rank": row.rank} if row.rank else {}))
        calibration = self.train[: self.setting.calibration]
        start: Gptq | Blockwise | None = None
        if row.start == "gptq":
            start = Gptq(tokens=calibration)
        elif row.start != "rtn":
            how: Any = {"trains": row.start, "steps": self.setting.block_steps, "seed": row.seed}
            start = Blockwise(tokens=calibration, kept=kept, say=say, **how)
        model, _ = load(self.path, method, row.rules, dtype=torch.float32, quiet=True, start=start)
        started = time.process_time()
        if row.steps:
            train(model, self.train, default(method.kind, row.steps), row.steps, row.seed, self.setting.batch)
        tuned = time.process_time()
        return {
            "loss": loss_on(model, self.held, 8),
            "start_s": round(started - began),
            "tune_s": round(tuned - started),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", choices=SETTINGS, default="stories260k")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--only", nargs="+", choices=STARTS, default=list(STARTS), help="starts (all of them unless told)"
    )
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--kept", type=Path, default=Path(tempfile.gettempdir()) / "trimtab-starts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    setting, deadline = SETTINGS[given.model], time.monotonic() + 60 * given.minutes
    study, about = Study(setting, given.data), {"calibration": setting.calibration * setting.length}
    done = read(OUT)
    if not any(line["model"] == given.model and line["start"] == "float" for line in done):
        add(OUT, {"model": given.model, "start": "float", "loss": study.float_loss()})
    for row in rows(given.model, given.seeds):
        if row.start not in given.only or any(all(line.get(k) == v for k, v in asdict(row).items()) for line in done):
            continue
        if time.monotonic() > deadline:
            say("out of time; run it again to go on")
            return
        found = study.run(row, given.kept)
        add(OUT, asdict(row) | about | found)
        say(f"{row}: {found}")


if __name__ == "__main__":
    main()
