"""llama.cpp's log-probabilities for given tokens: the engine's side of parity, run by the engine's own Python.

    python engine_llama_cpp.py DIR TOKENS.safetensors LOGPROBS.safetensors

It imports llama_cpp, numpy and safetensors and nothing of trimtab, so that the engine can live in an environment of its
own. Tokens come as ids: what is compared is the model, never two tokenizers. Everything else is as the engine does by
default, a float16 KV cache among it. llama.cpp multiplies block weights with activations that it rounds to 8 bits, 32 at a
time: that is its noise, which a report has to be read against.

Legend: W windows, L tokens in each, V vocabulary.
"""

import sys
from pathlib import Path

import llama_cpp
import numpy as np
from safetensors.numpy import load_file, save_file


def logprobs(model: Path, windows_WL: np.ndarray) -> np.ndarray:
    """log p of the next token at every position but the last, each window read alone: float32 (W, L - 1, V)."""
    length = windows_WL.shape[1]
    engine = llama_cpp.Llama(str(model), n_ctx=length, n_batch=length, n_ubatch=length, logits_all=True, verbose=False)
    windows = []
    for tokens in windows_WL.tolist():
        engine.reset()
        engine.eval(tokens)
        logits_LV = engine.scores[: length - 1].astype(np.float64)
        logits_LV -= logits_LV.max(-1, keepdims=True)
        logits_LV -= np.log(np.exp(logits_LV).sum(-1, keepdims=True))
        windows.append(logits_LV.astype(np.float32))
    return np.stack(windows)


def main(directory: str, tokens: str, out: str) -> None:
    """Read the tokens, run the one GGUF file of the directory, write what it computed."""
    model = next(Path(directory).glob("*.gguf"))
    save_file({"logprobs": logprobs(model, load_file(tokens)["blocks"])}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
