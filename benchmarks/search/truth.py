"""Every configuration of a small real model, measured: the truth that `benchmarks/search/search.py` compares searches with.

A model's decoder in 8 units, 3 widths each: 3^8 = 6561 configurations, each rounded to nearest with integer zeros, and held
against the float model by KL on the same tokens. The table, the bytes and the sensitivities, each with what it cost, go to
benchmarks/results/search_truth*.npz. Two tables:

    stories260k    units are parts of its five layers, per channel
    smollm2-135m   units are runs of three or four of its thirty layers, groups of 64

    python benchmarks/search/truth.py [--table smollm2-135m] [--data DIR]

DIR holds stories260k/, tinystories/ and wikitext2/.
"""

import argparse
import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from trimtab.bit_search import sensitivity
from trimtab.bit_search.space import By, Space, Unit, space
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.layers import weights
from trimtab.methods import Rtn
from trimtab.models.load import load_float
from trimtab.models.sources import open_source
from trimtab.quant.grid import Grid

RESULTS = Path(__file__).parents[1] / "results"
SHARED = Path(__file__).parents[3] / "shared" / "data"
BITS = (2, 3, 4)
SEEDS = 10
"""Of the labels that Fisher's sensitivities are drawn with: a search's seed decides them, too."""


@dataclass(frozen=True)
class Table:
    """A model, cut into 8 units, and the text that it is measured on."""

    file: str
    model: str
    text: str
    by: By
    sizes: tuple[int, ...]
    """Units of the space (fusion groups, four in a layer, or layers) that make one of the 8, in their order."""
    group: int | None
    windows: int
    length: int


TABLES = {
    "stories260k": Table(
        "search_truth.npz", "stories260k", "tinystories/valid.jsonl", "fusion", (2, 2, 2, 2, 4, 2, 2, 4), None, 4, 64
    ),
    "smollm2-135m": Table(
        "search_truth_smollm2.npz", "", "wikitext2/train.part.txt", "layer", (4, 4, 4, 4, 4, 4, 3, 3), 64, 4, 32
    ),
}


def merged(whole: Space, sizes: tuple[int, ...]) -> Space:
    """The space with its units merged to fewer."""
    ends = list(itertools.accumulate(sizes))
    groups = [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]
    units = [
        Unit("+".join(whole.units[i].name for i in group), tuple(n for i in group for n in whole.units[i].layers))
        for group in groups
    ]
    return replace(whole, units=tuple(units), bytes_UC=np.stack([whole.bytes_UC[list(g)].sum(0) for g in groups]))


class Rounded:
    """The model under any configuration, each weight rounded once for each choice."""

    def __init__(self, model: Any, laid_out: Space, blocks: torch.Tensor) -> None:
        layers = list(model.base_model.layers)
        names = {id(m): i for i, layer in enumerate(layers) for m in layer.modules()}
        linears = [[model.get_submodule(n) for n in unit.layers] for unit in laid_out.units]
        self.model, self.layers, self.linears = model, layers, linears
        # Before a unit is chosen, all layers in front of its first one can be gone through.
        self.first = [min(names[id(m)] for m in unit) for unit in linears] + [len(layers)]
        self.weights = [
            [[weights.quantize(m.weight.data, g).dequantize(torch.float32) for m in unit] for g in laid_out.placements]
            for unit in linears
        ]
        with torch.no_grad():
            self.stream = sensitivity.float_pass(model, blocks)
            self.float_log_p = self._log_p(self.stream.last)

    def _log_p(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.log_softmax(self.model.get_output_embeddings()(self.model.base_model.norm(hidden)), -1)

    @torch.no_grad()
    def all(self, hidden: torch.Tensor | None = None, unit: int = 0, done: int = 0) -> Iterator[float]:
        """KL of every configuration, the last unit's choice changing fastest; what precedes a unit is computed once."""
        hidden = self.stream.hidden if hidden is None else hidden
        if unit == len(self.linears):
            log_q = self._log_p(hidden)
            tokens = hidden.shape[0] * hidden.shape[1]
            yield F.kl_div(log_q, self.float_log_p, reduction="sum", log_target=True).item() / tokens
            return
        for chosen in self.weights[unit]:
            for linear, weight in zip(self.linears[unit], chosen, strict=True):
                linear.weight.data = weight
            reached = self.first[unit + 1]
            after = self.stream.through(self.layers[done:reached], done, hidden)
            yield from self.all(after, unit + 1, reached)


def measured(model: torch.nn.Module, laid_out: Space, blocks: torch.Tensor) -> dict[str, np.ndarray]:
    """Sensitivities of the merged units, and what they cost."""
    found: dict[str, np.ndarray] = {}
    for name, some in (("exact", blocks), ("exact_quarter", blocks[:1])):
        whole = sensitivity.exact(model, laid_out.units, laid_out.placements, some, micro_batch=len(some))
        found[f"{name}_cost"] = whole.cost_UC
        found[f"{name}_passes"] = np.array(whole.passes * len(some) / len(blocks))
    drawn = [sensitivity.fisher(model, laid_out.units, laid_out.placements, blocks, seed=s) for s in range(SEEDS)]
    found["fisher_cost"] = np.stack([fisher.cost_UC for fisher in drawn])
    found["fisher_passes"] = np.array(drawn[0].passes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="stories260k")
    parser.add_argument("--data", type=Path, default=SHARED)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = TABLES[arguments.table]
    path = str(arguments.data / table.model) if table.model else arguments.table
    source = open_source(path)
    skeleton = source.layout()
    grid = Grid(4, table.group, "integer")
    laid_out = merged(space(skeleton, Rtn(), bits=BITS, grid=grid, by=table.by, dtype=torch.float32), table.sizes)
    model = load_float(path, dtype=torch.float32, source=source)
    rows = load_rows(str(arguments.data / table.text), limit=200)
    tokens = table.windows * table.length
    blocks = token_windows(rows, source.tokenizer(), block_tokens=table.length, limit_tokens=tokens)
    found = measured(model, laid_out, blocks)
    started, kl = time.perf_counter(), list[float]()
    for value in Rounded(model, laid_out, blocks).all():
        kl.append(value)
        if len(kl) % 500 == 0:
            print(len(kl), f"{time.perf_counter() - started:.0f} s", flush=True)
    seconds = time.perf_counter() - started
    sizes = np.array([laid_out.bytes(c) for c in itertools.product(range(len(BITS)), repeat=len(laid_out.units))])
    np.savez_compressed(
        RESULTS / table.file, kl=np.array(kl, np.float32), bytes=sizes, bytes_UC=laid_out.bytes_UC,
        fixed_bytes=laid_out.fixed_bytes, bits=np.array(BITS), tokens=blocks.numel(),
        seconds_each=seconds / len(kl), **found,
    )  # fmt: skip
    print(f"{len(kl)} configurations, {seconds / len(kl) * 1e3:.1f} ms each; KL {min(kl):.4f} to {max(kl):.4f}")
    print({k: v for k, v in found.items() if k.endswith("passes")})


if __name__ == "__main__":
    main()
