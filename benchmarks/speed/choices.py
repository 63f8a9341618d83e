"""The measurements behind small decisions in the code and in `docs/log.md`, each beside the roads not taken.

    unpack      the layout of packed codes, one layer of 1536 x 576
    round       rounding levels to codes with a clamp, same layer
    linear      y = x W^T with W rebuilt in backward: the library's function against torch's checkpoint
    pool        pooling and repeating by two, 1024 x 1536
    finite      whether a loaded weight of 4096 x 4096 is finite
    attention   how much longer than its forward the backward of attention takes
    loss        cross-entropy over 49,152 words, 1024 tokens: ours, TRL's tiles, and the plain one

Within a group the cases are run in turn, round after round, and medians are compared with the group's first case.

    python benchmarks/speed/choices.py [--groups unpack round]     replaces these groups in benchmarks/results/choices.json
"""

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.kernels import recompute
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight
from trimtab.models.head import Head
from trimtab.quant.grid import Grid
from trimtab.quant.packing import LAYOUT, pack, unpack
from trimtab.training.loss import chunked_cross_entropy

N, K, TOKENS, VOCABULARY = 1536, 576, 1024, 49152
Cases = dict[str, Callable[[], Any]]


def unpack_cases() -> Cases:
    """Layouts of packed codes."""
    nibbles = torch.randint(0, 256, (N, K // 2), dtype=torch.uint8)
    planes = torch.randint(0, 256, (4, N, K // 8), dtype=torch.uint8)
    packed = {bits: pack(torch.randint(0, 1 << bits, (N, K), dtype=torch.uint8), bits) for bits in (4, 2, 3, 5, 6)}

    def bit_planes() -> Tensor:
        bits = (planes.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)) & 1
        return (bits[0] | bits[1] << 1 | bits[2] << 2 | bits[3] << 3).view(N, K)

    def blocks() -> Tensor:
        b = nibbles.view(N, K // 32, 16)
        return torch.cat([b & 15, b >> 4], -1).view(N, K)

    cases: Cases = {f"{LAYOUT}, {b} bits": (lambda p=p, b=b: unpack(p, b, K)) for b, p in packed.items()}
    cases["interleaved, 4 bits"] = lambda: torch.stack([nibbles & 15, nibbles >> 4], -1).view(N, K)
    cases["halves of blocks of 32, 4 bits"] = blocks
    cases["bit planes, 4 bits"] = bit_planes
    return cases


def round_cases() -> Cases:
    """Levels to codes."""
    levels = torch.rand(N, K) * 9 - 1
    return {
        "round and clamp": lambda: levels.round().clamp_(0, 7),
        "fake_quantize_per_tensor_affine": lambda: torch.fake_quantize_per_tensor_affine(levels, 1.0, 0, 0, 7),
    }


def linear_cases() -> Cases:
    """Forward and backward of a frozen 4-bit layer."""
    weight = AffineWeight.quantize(torch.randn(N, K), Grid(4, 64))
    layer = QuantLinear(weight)
    x = torch.randn(TOKENS, K, dtype=torch.bfloat16, requires_grad=True)

    def build() -> Tensor:
        return weight.dequantize(torch.bfloat16)

    def ours() -> None:
        recompute.linear(x, layer).sum().backward()

    def checkpointed() -> None:
        y: Tensor = checkpoint(lambda t: F.linear(t, build()), x, use_reentrant=False)
        y.sum().backward()

    def kept() -> None:
        F.linear(x, build()).sum().backward()

    return {"rebuilt by our function": ours, "rebuilt by torch's checkpoint": checkpointed, "weight kept": kept}


def pool_cases() -> Cases:
    """Sums of pairs of neighbours, and each number twice: Q-BaRA's pool and repeat."""
    x = torch.randn(4, TOKENS // 4, N, dtype=torch.bfloat16)
    return {
        "pairs, strided adds": lambda: torch.add(*x.unflatten(-1, (-1, 2)).unbind(-1)),
        "pairs, sum over the last axis": lambda: x.unflatten(-1, (-1, 2)).sum(-1),
        "twice, stack": lambda: torch.stack([x, x], -1).flatten(-2),
        "twice, repeat_interleave": lambda: x.repeat_interleave(2, -1),
    }


def finite_cases() -> Cases:
    """Whether a weight that is loaded holds a number everywhere."""
    weight = torch.randn(4096, 4096, dtype=torch.bfloat16)
    return {
        "extremes": lambda: all(x.isfinite() for x in torch.aminmax(weight)),
        "isfinite": lambda: torch.isfinite(weight).all(),
    }


def attention_cases() -> Cases:
    """torch's causal attention, 4 x 256 tokens, 9 heads of 64."""
    q, k, v = (torch.randn(4, 9, 256, 64, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))

    def forward() -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return {"forward": forward, "forward and backward": lambda: forward().sum().backward()}


def loss_cases() -> Cases:
    """Forward and backward of the loss."""
    from trl.kernels import ChunkedLogProbFunction

    hidden = torch.randn(TOKENS, K, dtype=torch.bfloat16, requires_grad=True)
    head = (torch.randn(VOCABULARY, K) * 0.05).bfloat16()
    labels = torch.randint(0, VOCABULARY, (TOKENS,))

    def trl() -> None:
        outputs = ChunkedLogProbFunction.apply(
            hidden, head, None, labels, 1.0, 32768, None, 1.0, ("entropy", "is_top1")
        )
        (-outputs[0].sum()).backward()

    return {
        "ours, in chunks": lambda: chunked_cross_entropy(hidden, Head(head), labels).backward(),
        "TRL's tiles": trl,
        "plain, all logits at once": lambda: F.cross_entropy((hidden @ head.t()).float(), labels).backward(),
    }


GROUPS = {
    "unpack": (unpack_cases, 50),
    "round": (round_cases, 30),
    "linear": (linear_cases, 30),
    "pool": (pool_cases, 30),
    "finite": (finite_cases, 15),
    "attention": (attention_cases, 15),
    "loss": (loss_cases, 7),
}


def measure(cases: Cases, rounds: int) -> list[dict[str, Any]]:
    """Median milliseconds of every case and its ratio to the first, two warm-up rounds left out."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for round_ in range(rounds + 2):
        for name, run in cases.items():
            began = perf_counter()
            run()
            if round_ >= 2:
                seconds[name].append(perf_counter() - began)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    first = next(iter(medians.values()))
    return [{"name": name, "median_ms": m * 1e3, "ratio": m / first} for name, m in medians.items()]


def main() -> None:
    """Run the groups and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results" / "choices.json")
    args = parser.parse_args()
    torch.manual_seed(0)
    kept = json.loads(args.out.read_text())["groups"] if args.out.exists() else {}
    found: dict[str, Any] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "groups": kept}
    for group in args.groups:
        cases, rounds = GROUPS[group]
        found["groups"][group] = measure(cases(), rounds)
        print(group)
        for row in found["groups"][group]:
            print(f"  {row['name']:34} {row['median_ms']:9.3f} ms   x {row['ratio']:.2f}")
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
