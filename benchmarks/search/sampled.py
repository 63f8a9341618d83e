"""What a search of widths could gain at all: random widths of equal bytes, each tuned, against uniform widths, tuned.

stories260K (float32, never quantized) in 20 units, four parts of each of its five layers, 2, 3 or 4 bits per channel,
within the bytes of 3 bits everywhere; LR-QAT of rank 8 on TinyStories, 100 steps of 4 x 64 tokens, the default rates.
Beside a hundred random ones stand those that a search would choose: the best by what each unit's width costs before tuning
(`untuned costs`), and the best of an additive model of the sample's tuned losses (`fitted`). The best of a sample is the
best by luck, too: it, and the chosen ones, are tuned again with other seeds, as uniform widths are.

    python benchmarks/search/sampled.py --data DIR [--sample 100] [--minutes 60]
    python benchmarks/report.py search                        a section of docs/search.md

Every run is a line of benchmarks/results/search_sampled.jsonl; what stands there is not run again.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch

from benchmarks.files import RESULTS, add, read, say
from benchmarks.quality.orders import STORIES, TRAINED, Study
from benchmarks.quality.rates import loss_on, train
from trimtab import methods
from trimtab.bit_search.additive import Configuration, front
from trimtab.models.load import load

OUT = RESULTS / "search_sampled.jsonl"
LAYERS, BITS = 5, (2, 3, 4)
PARTS = {"qkv": (64 + 32 + 32) * 64, "o_proj": 64 * 64, "gate_up": 2 * 172 * 64, "down_proj": 172 * 64}
"""Weights of each, in a layer."""
NAMES = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o_proj": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down_proj": ("mlp.down_proj",),
}
SIZES = np.array([[size * bits for bits in BITS] for _ in range(LAYERS) for size in PARTS.values()])
"""Bits of each unit (U, C) at each width."""
BUDGET = int(SIZES[:, BITS.index(3)].sum())
NEAR = 0.99
"""Random ones use at least this share of the budget."""
STEPS, SEEDS, BEST = 100, (0, 1, 2, 3, 4), 3
UNIFORM: Configuration = (BITS.index(3),) * len(SIZES)


def rules(configuration: Configuration) -> list[dict[str, Any]]:
    """Of one choice for each unit."""
    units = [(layer, part) for layer in range(LAYERS) for part in PARTS]
    return [
        {"match": f"model.layers.{layer}.{name}", "grid": {"bits": BITS[choice], "group": None, "zero": "integer"}}
        for (layer, part), choice in zip(units, configuration, strict=True)
        for name in NAMES[part]
    ]


def bits_of(configuration: Configuration) -> int:
    """All its codes together."""
    return int(SIZES[np.arange(len(SIZES)), list(configuration)].sum())


def random_ones(number: int) -> list[Configuration]:
    """Different ones, within the budget and near it."""
    draw, found = np.random.default_rng(0), dict[Configuration, None]()
    while len(found) < number:
        some = tuple(int(c) for c in draw.integers(len(BITS), size=len(SIZES)))
        if NEAR * BUDGET <= bits_of(some) <= BUDGET and some != UNIFORM:
            found[some] = None
    return list(found)


def best_of(costs: np.ndarray) -> Configuration:
    """The best of an additive model (U, C) within the budget."""
    found = front(SIZES, costs)
    return found.configuration(found.within(BUDGET))


def fitted(rows: list[dict[str, Any]]) -> np.ndarray:
    """Costs (U, C) of tuned losses by least squares, kept small: 40 numbers from some hundred losses."""
    chosen = np.array([row["configuration"] for row in rows])
    one_hot = (chosen[:, :, None] == np.arange(len(BITS))).reshape(len(rows), -1).astype(float)
    losses = np.array([row["tuned"] for row in rows])
    inner = one_hot.T @ one_hot + np.eye(one_hot.shape[1])
    weights: np.ndarray = np.linalg.solve(inner, one_hot.T @ (losses - losses.mean()))
    return weights.reshape(len(SIZES), len(BITS))


class Runs:
    """What is measured, each once."""

    def __init__(self, data: Path, deadline: float) -> None:
        self.study, self.deadline = Study(data), deadline
        self.rows = read(OUT)

    def known(self, kind: str) -> list[dict[str, Any]]:
        """Rows of a kind."""
        return [row for row in self.rows if row["kind"] == kind]

    def measure(self, kind: str, configuration: Configuration, seed: int = 0, steps: int = STEPS) -> dict[str, Any]:
        """The losses before and after tuning."""
        about = {"kind": kind, "configuration": list(configuration), "seed": seed, "steps": steps}
        for row in self.rows:
            if all(row[key] == value for key, value in about.items()):
                return row
        if time.monotonic() > self.deadline:
            raise TimeoutError
        torch.manual_seed(seed)
        text, held = self.study.texts[STORIES]
        method = methods.LrQat(rank=8) if steps else methods.Rtn()
        model, _ = load(self.study.path, method, rules(configuration), dtype=torch.float32, quiet=True)
        row = about | {"bits": bits_of(configuration), "untuned": loss_on(model, held)}
        if steps:
            train(model, text[:, :TRAINED], None, steps, seed)
            row["tuned"] = loss_on(model, held)
        self.rows.append(row)
        add(OUT, row)
        say(f"{kind} {''.join(str(BITS[c]) for c in configuration)} {row['untuned']:.4f} {row.get('tuned', 0):.4f}")
        return row

    def untuned_costs(self) -> np.ndarray:
        """(U, C): what the loss loses by each unit at each width, all others at 3 bits."""
        costs = np.zeros(SIZES.shape)
        for unit, choice in self._changes():
            changed = (*UNIFORM[:unit], choice, *UNIFORM[unit + 1 :])
            costs[unit, choice] = self.measure("unit", changed, steps=0)["untuned"]
        costs[:, UNIFORM[0]] = self.measure("unit", UNIFORM, steps=0)["untuned"]
        return costs

    def _changes(self) -> Iterator[tuple[int, int]]:
        yield from ((u, c) for u in range(len(SIZES)) for c in range(len(BITS)) if c != UNIFORM[0])

    def all(self, sample: int) -> None:
        """The sample, then those that are chosen, each with every seed."""
        for seed in SEEDS:
            self.measure("uniform", UNIFORM, seed)
        chosen = best_of(self.untuned_costs())
        for seed in SEEDS:
            self.measure("untuned costs", chosen, seed)
        rows = [self.measure("random", one) for one in random_ones(sample)]
        best = best_of(fitted(rows))
        for seed in SEEDS:
            self.measure("fitted", best, seed)
        for row in sorted(rows, key=lambda r: r["tuned"])[:BEST]:
            for seed in SEEDS:
                self.measure("best of random", tuple(row["configuration"]), seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--sample", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=600)
    given = parser.parse_args()
    torch.set_num_threads(1)
    try:
        Runs(given.data, time.monotonic() + 60 * given.minutes).all(given.sample)
    except TimeoutError:
        say("out of time; run it again to go on")


if __name__ == "__main__":
    main()
