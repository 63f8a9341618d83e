"""A training step of a model with the layers of a 7B one, beside peft's LoRA in bfloat16 and peft with bitsandbytes.

Random weights made on the device, as many layers as its memory holds (32 are all), a head that every row keeps in bfloat16,
no activation checkpointing at 512 tokens and checkpointing at 4096, one sequence, fused AdamW on what is trained. Rows
take turns with nothing; compare them on a device that nobody else uses.

`allocated_bytes` is torch's `max_memory_allocated` over whole steps, `planned_bytes` what `trimtab plan` would say. The
plan counts 128 tokens of logits; on a GPU a step makes more at once where memory is free. `waits` are the host's waits
for the device in a step, less the one that reads the loss.

python benchmarks/gpu/run.py steps
"""

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.gpu.device import Rows, allocated, arguments, forget, seconds, syncs

SEVEN: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 8192,
}  # fmt: skip
TINY: dict[str, Any] = {
    "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 32, "max_position_embeddings": 256,
}  # fmt: skip
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS: dict[str, tuple[dict[str, Any], dict[str, Any] | None]] = {
    "qlora": ({"name": "qlora", "rank": 16}, None),
    "q-bara": ({"name": "q-bara", "rank": 16}, None),
    "qa-hira": ({"name": "qa-hira"}, None),
    "lr-qat channel": ({"name": "lr-qat", "rank": 32}, {"bits": 4, "group": None, "zero": "symmetric"}),
    "lr-qat g128": ({"name": "lr-qat", "rank": 32}, {"bits": 4, "group": 128, "zero": "symmetric"}),
}
THEIRS = ("peft lora", "peft + bitsandbytes qlora")


def shape(device: str, tiny: bool) -> dict[str, Any]:
    """A whole 7B where 40 GB are there, else eight of its layers."""
    if tiny:
        return TINY
    large = torch.device(device).type == "cuda" and torch.cuda.get_device_properties(device).total_memory > 40e9
    return {**SEVEN, "num_hidden_layers": 32 if large else 8}


def float_model(device: str, sizes: dict[str, Any]) -> Any:
    """In bfloat16, on the device from the start."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**sizes, attn_implementation="sdpa", use_cache=False)
    config.dtype = torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return LlamaForCausalLM(config).train()
    finally:
        torch.set_default_dtype(before)


def ours(name: str, device: str, sizes: dict[str, Any]) -> Any:
    """A model prepared by one of our methods, on the device."""
    import trimtab

    options, grid = OURS[name]
    rules = None if grid is None else [{"match": "*", "grid": grid}]
    method = trimtab.methods.make(options["name"], **{k: v for k, v in options.items() if k != "name"})
    return trimtab.prepare(float_model(device, sizes), method, rules).to(device)


def theirs(name: str, device: str, sizes: dict[str, Any]) -> Any:
    """peft, on the dense model or on bitsandbytes' layers."""
    import peft

    model = float_model(device, sizes)
    if "bitsandbytes" in name:
        import bitsandbytes as bnb

        for path, layer in list(model.named_modules()):
            if path.rpartition(".")[2] in LINEAR_LAYERS:
                new = bnb.nn.Linear4bit(
                    layer.in_features, layer.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                new.weight = bnb.nn.Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", module=new)
                model.set_submodule(path, new.to(device))
        model.is_loaded_in_4bit = True  # what peft asks before it takes its bitsandbytes path
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config, autocast_adapter_dtype=False)


def step_of(model: Any, tokens: int, device: str, chunked: bool) -> Callable[[], torch.Tensor]:
    """Forward, backward and the optimizer; gives the loss, unread."""
    from trimtab.training.divergence import counted_tokens
    from trimtab.training.loss import summed_loss

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=torch.device(device).type == "cuda")
    ids = torch.randint(model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1)).to(device)
    counted = counted_tokens(ids[:, 1:].flatten())

    def step() -> torch.Tensor:
        if chunked:
            loss = summed_loss(model, ids, counted=counted, input_ids=ids) / len(counted)
        else:
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def planned(name: str, tokens: int, sizes: dict[str, Any], checkpointing: bool) -> int:
    """What the plan says of the same step, without the process and its libraries."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import trimtab
    from trimtab.memory.peak import peak_of_training
    from trimtab.models.layout import laid_out
    from trimtab.recipe.rules import Rule

    options, grid = OURS[name]
    config = LlamaConfig(**sizes, attn_implementation="sdpa", use_cache=False)
    model = laid_out(lambda: LlamaForCausalLM(config))
    method = trimtab.methods.make(options["name"], **{k: v for k, v in options.items() if k != "name"})
    rules = None if grid is None else [Rule("*", trimtab.Grid(**grid))]
    plan = peak_of_training(
        model, method, rules, micro_batch=1, block_tokens=tokens, dtype=torch.bfloat16, checkpointing=checkpointing,
        micro_batches=1,
    )  # fmt: skip
    return plan.total


def row(name: str, tokens: int, device: str, sizes: dict[str, Any], tiny: bool) -> dict[str, Any]:
    """One model at one length."""
    gc.collect()
    forget(device)
    own, checkpointing = name in OURS, tokens > 1000
    model = (ours if own else theirs)(name, device, sizes)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if not own:
            model.enable_input_require_grads()
    forget(device)
    step = step_of(model, tokens, device, own)
    first = float(step())
    took = seconds(step, device, rounds=2 if tiny else 8)
    with syncs(device) as waits:
        step()
    last = float(step())
    found = {
        "layers": sizes["num_hidden_layers"],
        "seconds": took,
        "tokens_per_second": tokens / took,
        "allocated_bytes": allocated(device),
        "waits": len(waits),
        "waited_at": sorted(set(waits)),
        "losses": [first, last],
    }
    if own:
        found["planned_bytes"] = planned(name, tokens, sizes, checkpointing)
    return found


def main() -> int:
    """Write the section."""
    args = arguments(__doc__)
    rows, sizes = Rows(args), shape(args.device, args.tiny)
    for tokens in (32,) if args.tiny else (512, 4096):
        for name in ("lr-qat channel", "qlora", THEIRS[0]) if args.tiny else (*OURS, *THEIRS):
            rows.add(f"{name}, {tokens} tokens", lambda n=name, t=tokens: row(n, t, args.device, sizes, args.tiny))
    return rows.failed


if __name__ == "__main__":
    sys.exit(main())
