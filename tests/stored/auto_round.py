"""Makes `auto_round.safetensors`: random codes, and the words that AutoRound's own packings make of them.

    python tests/stored/auto_round.py AUTO_ROUND_EXTENSION/torch      stored with that of auto-round 0.16.1

Its two methods need only torch, so they are taken out of their sources and run, without all that auto-round installs.
"""

import ast
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import save_file

N, K, GROUP = 32, 64, 32
SOURCES = {"auto_round:auto_gptq": "qlinear_torch_zp.py", "auto_round": "qlinear_torch.py"}


def packing(source: Path) -> Any:
    """`pack_248_bits` as a function."""
    found = [x for x in ast.walk(ast.parse(source.read_text())) if getattr(x, "name", "") == "pack_248_bits"]
    conv = SimpleNamespace(pytorch_utils=SimpleNamespace(Conv1D=torch.nn.Bilinear))
    known: dict[str, Any] = {
        "torch": torch, "nn": torch.nn, "transformers": conv, "get_packing_device": lambda _: torch.device("cpu"),
    }  # fmt: skip
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), str(source), "exec"), known)
    return known["pack_248_bits"]


def main(folder: str) -> None:
    """Write the file."""
    stored: dict[str, torch.Tensor] = {}
    torch.manual_seed(0)
    for name, source in SOURCES.items():
        pack = packing(Path(folder) / source)
        for bits in (2, 4, 8):
            # A zero of 0 is one that the first packing does not hold.
            codes_NK, zero_NG = torch.randint(0, 2**bits, (N, K)), torch.randint(1, 2**bits, (N, K // GROUP))
            scale_NG = 2.0 ** torch.randint(-4, 3, (N, K // GROUP))
            groups_K = torch.arange(K) // GROUP
            linear = torch.nn.Linear(K, N, bias=False)
            linear.weight.data = scale_NG[:, groups_K] * (codes_NK - zero_NG[:, groups_K])
            made = SimpleNamespace(bits=bits, group_size=GROUP, maxq=2**bits - 1, device="cpu")
            pack(made, linear, scale_NG, zero_NG)
            parts = {"qweight": made.qweight, "qzeros": made.qzeros, "scales": made.scales}
            parts |= {"codes": codes_NK.to(torch.uint8), "zero": zero_NG.to(torch.uint8), "scale": scale_NG}
            stored |= {f"{name}.{bits}.{part}": tensor.contiguous() for part, tensor in parts.items()}
    save_file(stored, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
