"""How long it takes to make a 4096 x 4096 bfloat16 weight from what is stored, beside copying it and beside the peers.

    copy          a bfloat16 matrix of that size into a buffer that is used again and again: the floor
    ours          each stored form by the fused kernels, into such a buffer, and once into fresh memory
    reference     the same by the plain torch composition, eager and through torch.compile
    bitsandbytes  NF4 with double quantization, into fresh memory (it takes no buffer)

The cases run in turn, round after round; `ratio_to_copy` is the median over rounds of the quotient in the same round.

    python benchmarks/speed/dequantize.py [--rounds 15]         writes benchmarks/results/dequantize.json
"""

import argparse
import json
import logging
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from trimtab.kernels import dequantize
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.quant.grid import CodebookGrid, Grid

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.step import environment

N = K = 4096
RANK = 32
OUT = Path(__file__).parents[1] / "results" / "dequantize.json"
Case = Callable[[], Any]


def ours(weight: torch.Tensor) -> dict[str, Case]:
    """Every stored form into the shared buffer."""
    cases: dict[str, Case] = {}
    for bits in (4, 2, 3, 8):
        w = AffineWeight.quantize(weight, Grid(bits, 64, "integer"))
        cases[f"ours, int{bits} g64 integer zero"] = lambda w=w: w.dequantize(torch.bfloat16, reuse=True)
    four = AffineWeight.quantize(weight, Grid(4, 64, "integer"))
    cases["ours, int4 g64 integer zero, fresh memory"] = lambda: four.dequantize(torch.bfloat16)
    table = CodebookWeight.quantize(weight, CodebookGrid("nf4", 64, double_quant=True))
    cases["ours, NF4 g64 double"] = lambda: table.dequantize(torch.bfloat16, reuse=True)
    phi = AffineWeight.quantize(weight, Grid(4, None), "fixed8")
    factors = torch.randn(RANK, K).bfloat16().float() * 0.1, torch.randn(N, RANK).bfloat16().float() * 0.1
    about = phi.described(phi.range(), factors, 1.0 / RANK)
    out = torch.empty(N, K, dtype=torch.bfloat16)
    cases[f"ours, fixed8 with a rank {RANK} shift, rounded"] = lambda: dequantize.levels(out, *about)
    return cases


def peers(weight: torch.Tensor) -> dict[str, Case]:
    """The plain compositions, and bitsandbytes."""
    import bitsandbytes.functional as bnb

    four = AffineWeight.quantize(weight, Grid(4, 64, "integer"))
    out = torch.empty(N, K, dtype=torch.bfloat16)
    arguments = (out, four.codes, None, *four.range(), 4, 8.0)
    compiled = torch.compile(dequantize._affine)
    packed, state = bnb.quantize_4bit(weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=True)
    return {
        "reference, int4 g64, eager torch": lambda: dequantize._affine(*arguments),
        "reference, int4 g64, torch.compile": lambda: compiled(*arguments),
        "bitsandbytes, NF4 g64 double": lambda: bnb.dequantize_4bit(packed, state),
    }


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    weight = torch.randn(N, K) * 0.02
    source, target = weight.bfloat16(), torch.empty(N, K, dtype=torch.bfloat16)
    cases: dict[str, Case] = {"copy": lambda: target.copy_(source), **ours(weight), **peers(weight)}
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(args.rounds + 2):
        for name, case in cases.items():
            start = perf_counter()
            case()
            if i >= 2:
                seconds[name].append(perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds["copy"], strict=True))
        rows.append({"name": name, "median_ms": statistics.median(times) * 1e3, "ratio_to_copy": ratio})
        print(f"{name:48}{rows[-1]['median_ms']:9.2f} ms   x {ratio:.2f}")
    result = {"environment": environment(args.rounds, 2, args.threads), "shape": [N, K], "rows": rows}
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
