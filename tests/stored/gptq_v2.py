"""Makes `gptq_v2.safetensors`: random codes, and the words that gptqmodel's own packing makes of them.

    python tests/stored/gptq_v2.py GPTQMODEL/nn_modules/qlinear/__init__.py      stored with that of gptqmodel 7.7.0

gptqmodel does not install beside the torch that trimtab is tested with, so its one function `pack_original`, which needs
only numpy and torch, is taken out of its source and run.
"""

import ast
import contextlib
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

N, K, GROUP = 32, 64, 32


def pack_original(source: Path) -> Any:
    """The method as a function."""
    found = [x for x in ast.walk(ast.parse(source.read_text())) if getattr(x, "name", "") == "pack_original"]
    threads = SimpleNamespace(threadpool_limits=lambda _: contextlib.nullcontext())
    conv = SimpleNamespace(pytorch_utils=SimpleNamespace(Conv1D=torch.nn.Bilinear))
    known: dict[str, Any] = {
        "t": torch, "nn": torch.nn, "np": np, "math": math, "THREADPOOLCTL": threads, "transformers": conv,
        "_ConvNd": torch.nn.modules.conv._ConvNd,
    }  # fmt: skip
    exec(compile(ast.Module(body=[found[0]], type_ignores=[]), str(source), "exec"), known)
    return known["pack_original"]


def main(source: str) -> None:
    """Write the file."""
    pack, stored = pack_original(Path(source)), {}
    torch.manual_seed(0)
    for bits in (2, 3, 4, 8):
        codes_NK, zero_NG = torch.randint(0, 2**bits, (N, K)), torch.randint(0, 2**bits, (N, K // GROUP))
        scale_NG = 2.0 ** torch.randint(-4, 3, (N, K // GROUP))
        groups_K = torch.arange(K, dtype=torch.int32) // GROUP
        linear = torch.nn.Linear(K, N, bias=False)
        linear.weight.data = scale_NG[:, groups_K] * (codes_NK - zero_NG[:, groups_K])
        made: dict[str, torch.Tensor] = {}
        about: dict[str, Any] = {"bits": bits, "planar": False, "maxq": 2**bits - 1, "pack_factor": 32 // bits}
        about |= {"pack_dtype_bits": 32, "pack_np_math_dtype": np.uint32, "pack_np_dtype": np.int32}
        self = SimpleNamespace(**about, g_idx=groups_K, register_buffer=made.__setitem__)
        pack(self, linear, scale_NG, zero_NG, groups_K)
        mine = {"codes": codes_NK.to(torch.uint8), "zero": zero_NG.to(torch.uint8), "scale": scale_NG}
        stored |= {f"{bits}.{name}": tensor.contiguous() for name, tensor in (mine | made).items()}
    save_file(stored, Path(__file__).with_suffix(".safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
