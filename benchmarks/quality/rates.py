"""Whether the default rates are near the best: every trained method, at several widths, ranks and lengths of training.

A cell is a method on a grid, with a rank and a number of steps. It is trained with the default rates, and with each of them
a factor of at most three away, the other kept; while the best stands at an end, one more is tried there. The value is the
loss on held-out text. The model is stories260K, trained on TinyStories in float32, 4 x 64 tokens a step, scheduled as by
`trimtab run`; on larger models and WikiText-2 a few cells are held against the same defaults.

    python benchmarks/quality/rates.py --data DIR [--steps 30 100 300] [--methods lr-qat ...] [--bits 2 3] [--minutes 60]
    python benchmarks/quality/rates.py --data DIR --model smollm2-135m --steps 32 100       or a file or folder
    python benchmarks/report.py rates                             docs/rates.md

Every run is a line of benchmarks/results/rates.jsonl; what stands there is not run again. DIR holds stories260k,
tinystories and wikitext2.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from torch import Tensor

from benchmarks.files import RESULTS, add, read, say
from trimtab import methods
from trimtab.layers.rates import Rates, default, param_groups
from trimtab.models.load import load, open_source

OUT = RESULTS / "rates.jsonl"
STEPS, BITS, RANKS = (30, 100, 300), (2, 3, 4, 8), (4, 32)
BATCH, LENGTH, HELD = 4, 64, 48
WARMUP, BETAS, CLIP = 0.1, (0.9, 0.95), 1.0
APART = 3.0
FURTHER = 2
"""Runs beyond the first neighbours, at most, for each rate."""
STORIES, SMOLLM2 = "stories260k", "smollm2-135m"
METHODS = ("lr-qat", "peqa", "qat", "qlora", "loftq", "q-bara", "qa-lora", "qa-blora", "qa-hira")


@dataclass(frozen=True)
class Setting:
    """Where a model's texts are, below DIR, and the groups of its grids."""

    texts: tuple[str, str]
    """To train on, and held out."""
    group: int
    down_group: int
    """Of the MLP's second matrix: stories260K's is 172 wide, 4 x 43."""


TINY = Setting(("tinystories/train.jsonl", "tinystories/valid.jsonl"), 32, 43)
REAL = Setting(("wikitext2/train.part.txt", "wikitext2/test.raw.txt"), 64, 64)
CHECKS = (("lr-qat", 3, 32), ("qlora", "nf4", 32))
"""Method, width and rank of what is tried on a larger model."""


@dataclass(frozen=True)
class Cell:
    """What is trained."""

    method: str
    bits: int | str
    """Or the name of a codebook."""
    rank: int | None
    steps: int
    model: str = STORIES

    @property
    def moves(self) -> tuple[str, ...]:
        """The rates that act."""
        kind = methods.make(self.method).kind
        return {"scales": ("scale",), "levels": ("delta", "scale"), "master": ("delta", "scale")}.get(kind, ("delta",))

    def default(self) -> Rates:
        """The library's own."""
        return default(methods.make(self.method).kind, self.steps, self.bits if isinstance(self.bits, int) else None)


def checks(steps: Iterable[int], model: str) -> Iterator[Cell]:
    """Of a larger model."""
    for length in steps:
        yield from (Cell(method, bits, rank, length, model) for method, bits, rank in CHECKS)


def cells(steps: Iterable[int], names: Iterable[str], widths: Iterable[int] = BITS) -> Iterator[Cell]:
    """Short runs first."""
    for length in steps:
        for name in names:
            ranks = RANKS if hasattr(methods.make(name), "rank") else (None,)
            for bits in widths:
                yield from (Cell(name, bits, rank, length) for rank in ranks)


def text_windows(file: Path, tokenizer: Any, length: int) -> Tensor:
    """Rows of a .jsonl file, each behind the token that begins a text, or a whole text; cut into (windows, length).

    Of a whole text each window begins with that token where the tokenizer puts it before everything (Gemma's).
    """
    text, ids, many = file.read_text(encoding="utf-8"), list[int](), file.suffix == ".jsonl"
    bos = tokenizer.bos_token_id
    for part in [json.loads(line)["text"] for line in text.splitlines()] if many else [text]:
        ids += [*([bos] if many else []), *tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]]
    before = not many and bos is not None and tokenizer("a")["input_ids"][0] == bos
    windows = torch.tensor(ids[: len(ids) // (length - before) * (length - before)]).view(-1, length - before)
    return torch.cat((torch.full((len(windows), 1), bos), windows), 1) if before else windows


class Study:
    """Model and data, read once."""

    def __init__(self, model: str, data: Path) -> None:
        self.setting = TINY if model == STORIES else REAL
        self.path = str(data / model) if (data / model).is_dir() else model
        tokenizer = open_source(self.path).tokenizer()
        self.train, held = (text_windows(data / file, tokenizer, 2 * LENGTH) for file in self.setting.texts)
        self.held = held[:HELD]

    def run(self, cell: Cell, rates: Rates) -> float:
        """The held-out loss after training; infinite where it left the numbers."""
        torch.manual_seed(0)
        options = {} if cell.rank is None else {"rank": cell.rank}
        method = methods.make(cell.method, **options)
        zero = "integer" if method.kind in ("levels", "scales", "master") else "real"
        grid = {"codebook": cell.bits} if isinstance(cell.bits, str) else {"bits": cell.bits, "zero": zero}
        groups = {"*.down_proj": self.setting.down_group, "*": self.setting.group}
        rules = [{"match": match, "grid": {**grid, "group": group}} for match, group in groups.items()]
        model, _ = load(self.path, method, rules, dtype=torch.float32, quiet=True)
        if not math.isfinite(train(model, self.train[:, :LENGTH], rates, cell.steps)):
            return math.inf
        return loss_on(model, self.held)


def train(model: Any, windows: Tensor, rates: Rates | None, steps: int, seed: int = 0, batch: int = BATCH) -> float:
    """Train what asks for gradients, as `trimtab run` schedules it, by these rates or the library's own.

    Returns the last loss, not finite where it left the numbers.
    """
    groups = param_groups(model, *(rates or ()), steps=steps)
    optimizer = torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0)
    warm = round(WARMUP * steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: s / max(1, warm) if s < warm else (steps - s) / max(1, steps - warm)
    )
    order, loss = torch.Generator().manual_seed(seed), torch.tensor(math.nan)
    trained = [p for p in model.parameters() if p.requires_grad]
    for _ in range(steps):
        loss = _loss(model, windows[torch.randint(len(windows), (batch,), generator=order)])
        if not torch.isfinite(loss):
            break
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return loss.item()


@torch.no_grad()
def loss_on(model: Any, windows: Tensor, at_once: int = 24) -> float:
    """The mean loss on windows, in nats a token."""
    return sum(_loss(model, some).item() * len(some) for some in windows.split(at_once)) / len(windows)


def _loss(model: Any, ids: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


class Runs:
    """What is known of cells, each run a line of the file, and what adds to it."""

    def __init__(self, study: Study, deadline: float) -> None:
        self.study, self.deadline = study, deadline

    def value(self, cell: Cell, rates: Rates) -> float:
        """The held-out loss, run where it is not known.

        Raises:
            TimeoutError: where there is no time for another run.
        """
        known = self._known(cell)
        if rates in known:
            return known[rates]
        if time.monotonic() > self.deadline:
            raise TimeoutError
        loss = self.study.run(cell, rates)
        add(OUT, asdict(cell) | {"lr": rates.delta, "lr_scale": rates.scale, "loss": loss})
        say(f"{cell} {rates.delta:.3g} {rates.scale:.3g}: {loss:.4f}")
        return loss

    def fill(self, cell: Cell) -> None:
        """Each rate apart: a run on either side of the default, and further ones while the best is the last of its side."""
        own = cell.default()
        self.value(cell, own)
        for name in cell.moves:
            for side in (-1, 1):
                if not any(1 < factor**side < APART * 1.01 for factor in self._around(cell, name)):
                    self.value(cell, own._replace(**{name: getattr(own, name) * APART**side}))
            for _ in range(FURTHER):
                around = self._around(cell, name)
                best = min(around, key=lambda factor: around[factor])
                if best not in (min(around), max(around)):
                    break
                beyond = best * (APART if best > 1 else 1 / APART)
                self.value(cell, own._replace(**{name: getattr(own, name) * beyond}))

    def _known(self, cell: Cell) -> dict[Rates, float]:
        about = asdict(cell).items()
        rows = [row for row in read(OUT) if all(row[key] == value for key, value in about)]
        return {Rates(row["lr"], row["lr_scale"]): row["loss"] for row in rows}

    def _around(self, cell: Cell, name: str) -> dict[float, float]:
        """Losses by what one rate is multiplied with, the other at its default."""
        own = cell.default()
        return {
            getattr(rates, name) / getattr(own, name): loss
            for rates, loss in self._known(cell).items()
            if rates == own._replace(**{name: getattr(rates, name)})
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=STORIES)
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--bits", type=int, nargs="+", default=list(BITS), choices=BITS)
    parser.add_argument("--minutes", type=float, default=600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    study, deadline = Study(given.model, given.data), time.monotonic() + 60 * given.minutes
    tiny = given.model == STORIES
    some = cells(given.steps, given.methods, given.bits) if tiny else checks(given.steps, Path(given.model).stem)
    runs, todo = Runs(study, deadline), [cell for cell in some if cell.method in given.methods]
    try:
        for cell in todo:
            runs.value(cell, cell.default())
        for cell in todo:
            runs.fill(cell)
    except TimeoutError:
        say("out of time; run it again to go on")


if __name__ == "__main__":
    main()
