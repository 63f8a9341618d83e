"""Every configuration of a small real model, measured: the truth that `benchmarks/search.py` compares searches with.

stories260K, five decoder layers in 8 units, 3 widths each: 3^8 = 6561 configurations, each rounded to nearest, per channel,
integer zeros, and held against the float model by KL on the same tokens. The table, the bytes and the sensitivities, each
with what it cost, go to benchmarks/results/search_truth.npz.

    python benchmarks/search_truth.py [--model ../shared/data/stories260k] [--data ../shared/data/tinystories/valid.jsonl]
"""

import argparse
import itertools
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from trimtab import data, loading, weights
from trimtab.grid import Grid
from trimtab.methods import Rtn
from trimtab.search import sensitivity
from trimtab.search.space import Space, Unit, space

OUT = Path(__file__).parent / "results" / "search_truth.npz"
SHARED = Path(__file__).parents[2] / "shared" / "data"
BITS = (2, 3, 4)
GRID = Grid(4, None, "integer")
MERGED = ((0, 1), (2, 3), (4, 5), (6, 7), (8, 9, 10, 11), (12, 13), (14, 15), (16, 17, 18, 19))
"""Fusion groups (four in a layer: qkv, o, gate and up, down) that make a unit: 8 of 20."""
WINDOWS, LENGTH = 4, 64


def merged(whole: Space) -> Space:
    """The space with its fusion groups merged to 8 units."""
    units = [
        Unit("+".join(whole.units[i].name for i in group), tuple(n for i in group for n in whole.units[i].layers))
        for group in MERGED
    ]
    return replace(whole, units=tuple(units), bytes_UC=np.stack([whole.bytes_UC[list(g)].sum(0) for g in MERGED]))


class Rounded:
    """The model with any configuration's weights, each rounded once."""

    def __init__(self, model: torch.nn.Module, laid_out: Space, blocks: torch.Tensor) -> None:
        self.model, self.blocks = model, blocks
        with torch.no_grad():
            self.float_log_p = F.log_softmax(model(input_ids=blocks, use_cache=False).logits.float(), -1)
        self.linears = [[model.get_submodule(n) for n in unit.layers] for unit in laid_out.units]
        self.weights = [
            [[weights.quantize(m.weight.data, g).dequantize(torch.float32) for m in unit] for g in laid_out.placements]
            for unit in self.linears
        ]

    @torch.no_grad()
    def kl(self, configuration: tuple[int, ...]) -> float:
        for unit, choices, chosen in zip(self.linears, self.weights, configuration, strict=True):
            for linear, weight in zip(unit, choices[chosen], strict=True):
                linear.weight.data = weight
        log_q = F.log_softmax(self.model(input_ids=self.blocks, use_cache=False).logits.float(), -1)
        return F.kl_div(log_q, self.float_log_p, reduction="sum", log_target=True).item() / self.blocks.numel()


def measured(model: torch.nn.Module, laid_out: Space, blocks: torch.Tensor) -> dict[str, np.ndarray]:
    """Sensitivities of the merged units (a unit in two decoder layers is the sum of its parts), and what they cost."""
    found: dict[str, np.ndarray] = {}
    for name, some in (("exact", blocks), ("exact_quarter", blocks[:1])):
        whole = sensitivity.exact(model, laid_out.units, laid_out.placements, some, micro_batch=len(some))
        found[f"{name}_cost"] = whole.cost_UC
        found[f"{name}_passes"] = np.array(whole.passes * len(some) / len(blocks))
    fisher = sensitivity.fisher(model, laid_out.units, laid_out.placements, blocks)
    found["fisher_cost"], found["fisher_passes"] = fisher.cost_UC, np.array(fisher.passes)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHARED / "stories260k"))
    parser.add_argument("--data", default=str(SHARED / "tinystories" / "valid.jsonl"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source, skeleton = loading.skeleton(arguments.model)
    laid_out = merged(space(skeleton, Rtn(), bits=BITS, grid=GRID, dtype=torch.float32))
    model = loading.load_float(arguments.model, dtype=torch.float32, source=source)
    rows = data.load_rows(arguments.data, limit=200)
    blocks = data.token_blocks(rows, source.tokenizer(), block_tokens=LENGTH, limit_tokens=WINDOWS * LENGTH)
    found = measured(model, laid_out, blocks)
    table, started = Rounded(model, laid_out, blocks), time.perf_counter()
    configurations = list(itertools.product(range(len(BITS)), repeat=len(laid_out.units)))
    kl = np.zeros(len(configurations))
    for i, c in enumerate(configurations):
        kl[i] = table.kl(c)
        if i % 500 == 0:
            print(i, time.perf_counter() - started, flush=True)
    seconds = time.perf_counter() - started
    sizes = np.array([laid_out.bytes(c) for c in configurations])
    np.savez_compressed(
        OUT, kl=kl.astype(np.float32), bytes=sizes, bytes_UC=laid_out.bytes_UC, fixed_bytes=laid_out.fixed_bytes,
        bits=np.array(BITS), tokens=blocks.numel(), seconds_each=seconds / len(kl), **found,
    )  # fmt: skip
    print(f"{len(kl)} configurations, {seconds / len(kl) * 1e3:.1f} ms each; KL {kl.min():.4f} to {kl.max():.4f}")
    print({k: v for k, v in found.items() if k.endswith("passes")})


if __name__ == "__main__":
    main()
