"""The engine side of a parity check, mlx-lm: see `engine_transformers` for the contract.

MLX takes the GPU of an Apple processor and computes in the dtype of the file's scales. On a CPU its products of packed
weights also *sum* in that dtype, which in bfloat16 is neither close nor fast, so there it is computed in float32.
This is the only file that imports mlx, and it imports nothing of trimtab: mlx-lm lives in a virtual environment of its own.

Legend: W windows, L tokens in each, V vocabulary.
"""

import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import load_file, save_file


def logprobs(folder: Path, windows_WL: np.ndarray) -> np.ndarray:
    """log p of the next token at every position but the last, each window read alone: float32 (W, L - 1, V)."""
    model, _ = load_model(folder)
    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
    windows = []
    for tokens in windows_WL.tolist():
        logits_LV = model(mx.array(tokens)[None])[0, :-1].astype(mx.float32)
        windows.append(np.array(logits_LV - mx.logsumexp(logits_LV, -1, keepdims=True)))
    return np.stack(windows)


def main(directory: str, tokens: str, out: str) -> None:
    """Read the tokens, run the model of the directory, write what it computed."""
    save_file({"logprobs": logprobs(Path(directory), load_file(tokens)["blocks"])}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
