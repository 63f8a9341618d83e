"""llama.cpp's log-probabilities for given tokens: the engine's side of parity, run by the engine's own Python.

    python engine_llama_cpp.py MODEL.gguf TOKENS.npy OUT.npy [THREADS]

It imports llama_cpp and numpy and nothing of trimtab, so that the engine can live in an environment of its own. Tokens
come as ids: what is compared is the model, never two tokenizers. Everything else is as the engine does by default, a
float16 KV cache among it. llama.cpp multiplies block weights with activations that it rounds to 8 bits, 32 at a time:
that is its noise, and `Noise` in a report is measured with it.

Legend: W windows, L tokens in each, V vocabulary.
"""

import sys

import llama_cpp
import numpy as np


def log_probabilities(model: str, tokens_WL: np.ndarray, threads: int) -> np.ndarray:
    """log p(next token) at every position, each window read alone: float32 (W, L, V)."""
    length = tokens_WL.shape[1]
    engine = llama_cpp.Llama(
        model, n_ctx=length, n_batch=length, n_ubatch=length, n_threads=threads, logits_all=True, verbose=False
    )
    windows = []
    for tokens in tokens_WL.tolist():
        engine.reset()
        engine.eval(tokens)
        logits_LV = engine.scores[:length].astype(np.float64)
        logits_LV -= logits_LV.max(-1, keepdims=True)
        logits_LV -= np.log(np.exp(logits_LV).sum(-1, keepdims=True))
        windows.append(logits_LV.astype(np.float32))
    return np.stack(windows)


def _main(model: str, tokens: str, out: str, threads: str = "1") -> None:
    np.save(out, log_probabilities(model, np.load(tokens), int(threads)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
