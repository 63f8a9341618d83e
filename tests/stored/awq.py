"""Makes `awq.safetensors`: random codes, and the words that AutoAWQ's own packing makes of them.

    python tests/stored/awq.py AWQ/modules/linear/gemm.py      stored with that of autoawq 0.2.9

AutoAWQ asks for kernels and a transformers of its time, so its one function `from_linear`, which needs only torch, is taken
out of its source and run.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

N, K, GROUP = 32, 64, 32


def from_linear(source: Path) -> Any:
    """The class method of the `gemm` packing as a function, whose first argument makes what it fills."""
    (owner,) = (x for x in ast.walk(ast.parse(source.read_text())) if getattr(x, "name", "") == "WQLinear_GEMM")
    (found,) = (x for x in ast.walk(owner) if getattr(x, "name", "") == "from_linear")
    assert isinstance(found, ast.FunctionDef)
    found.decorator_list = []
    known: dict[str, Any] = {"torch": torch, "get_best_device": lambda: "cpu"}
    exec(compile(ast.Module(body=[found], type_ignores=[]), str(source), "exec"), known)
    return known["from_linear"]


def main(source: str) -> None:
    """Write the file."""
    torch.manual_seed(0)
    codes_NK, zero_NG = torch.randint(0, 16, (N, K)), torch.randint(0, 16, (N, K // GROUP))
    scale_NG = 2.0 ** torch.randint(-4, 3, (N, K // GROUP))
    groups_K = torch.arange(K) // GROUP
    linear = torch.nn.Linear(K, N, bias=False)
    linear.weight.data = scale_NG[:, groups_K] * (codes_NK - zero_NG[:, groups_K])

    def made(w_bit: int, group_size: int, in_features: int, *_: Any) -> Any:
        return SimpleNamespace(w_bit=w_bit, group_size=group_size, in_features=in_features)

    theirs = from_linear(Path(source))(made, linear, 4, GROUP, scales=scale_NG.T, zeros=zero_NG.T)
    stored = {"qweight": theirs.qweight, "qzeros": theirs.qzeros, "scales": theirs.scales}
    stored |= {"codes": codes_NK.to(torch.uint8), "zero": zero_NG.to(torch.uint8), "scale": scale_NG}
    save_file({name: t.contiguous() for name, t in stored.items()}, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
