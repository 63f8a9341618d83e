"""Products in half precision on a processor without instructions for it: torch's own kernels, and ours through float32.

    linear          x W^T       512 x 576 tokens and a 1536 x 576 weight, as in a forward pass
    of the input    g W         as in a backward pass
    of the weight   g^T x
    attention       its backward pass: 9 heads of 64, 512 tokens

Both run in turn, round after round, on one thread; the ratio is the median over rounds of the quotient in the same round.

    python benchmarks/speed/products.py [--rounds 9]         writes benchmarks/results/products.json
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

from trimtab.kernels import products

OUT = Path(__file__).parents[1] / "results" / "products.json"
TOKENS, IN, WIDE, HEADS, HEAD = 512, 576, 1536, 9, 64


def cases(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    x, w, g = (torch.randn(s).to(dtype) for s in ((TOKENS, IN), (WIDE, IN), (TOKENS, WIDE)))
    q, k, v = (torch.randn(1, HEADS, TOKENS, HEAD, dtype=torch.float32).to(dtype).requires_grad_() for _ in range(3))
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return {
        "linear": lambda: x @ w.t(),
        "of the input": lambda: g @ w,
        "of the weight": lambda: g.t() @ x,
        "attention": lambda: torch.autograd.grad(y, (q, k, v), torch.ones_like(y), retain_graph=True),
    }


def seconds(case: Callable[[], Any]) -> float:
    started = perf_counter()
    case()
    return perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    rounds = parser.parse_args().rounds
    if not products.slow():
        raise SystemExit("this processor has instructions for half precision: trimtab leaves its products alone")
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.bfloat16, torch.float16):
        for name, case in cases(dtype).items():
            took: dict[bool, list[float]] = {False: [], True: []}
            for i in range(rounds + 1):  # the first warms up
                for ours, times in took.items():
                    products.uninstall()
                    if ours:
                        products.install()
                    spent = seconds(case)
                    times += [spent] if i else []
            ratio = statistics.median(a / b for a, b in zip(took[False], took[True], strict=True))
            median = {ours: 1e3 * statistics.median(t) for ours, t in took.items()}
            dtype_name = str(dtype).removeprefix("torch.")
            rows.append(
                {"dtype": dtype_name, "name": name, "torch_ms": median[False], "ours_ms": median[True], "ratio": ratio}
            )
            print(
                f"{dtype_name:<9} {name:<14} {median[False]:8.2f} ms {median[True]:8.2f} ms {ratio:6.1f} x", flush=True
            )
    OUT.write_text(json.dumps({"capability": torch.backends.cpu.get_cpu_capability(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
