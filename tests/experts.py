"""Tiny mixtures of experts that several tests share: each way in which a family keeps them."""

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
}
CONFIGS: dict[str, Any] = {
    "mixtral": lambda **more: MixtralConfig(**SIZES | {"num_local_experts": 4} | more),
    "qwen3_moe": lambda **more: Qwen3MoeConfig(
        **SIZES | {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 8} | more
    ),
    "granitemoe": lambda **more: GraniteMoeConfig(**SIZES | {"num_local_experts": 4} | more),
    "gpt_oss": lambda **more: GptOssConfig(**SIZES | {"num_local_experts": 4, "head_dim": 8} | more),
}
"""Renamed, each expert by itself; each by itself; stacked and renamed; stacked, transposed, interleaved and with biases."""

FOUR: list[dict[str, Any]] = [{"match": "*", "grid": {"bits": 4, "group": 32, "scale_dtype": "portable"}}]


def mixture(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A random model, its biases not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**more), dtype=dtype)
    with torch.no_grad():
        for own, p in model.named_parameters():
            if own.endswith("bias"):
                p.normal_(0, 0.1)
    return model.eval()


IDS = torch.arange(24).view(2, 12) * 3 % 96


def logits(model: Any) -> torch.Tensor:
    """Of some tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(IDS).logits
    return found
