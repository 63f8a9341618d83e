"""Tiny models of three families on the meta device: what bytes and memory are predicted from."""

import copy
from typing import Any

from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

SIZES: dict[str, Any] = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS: list[PreTrainedConfig] = [
    LlamaConfig(**SIZES, tie_word_embeddings=False),
    LlamaConfig(**SIZES, tie_word_embeddings=True),
    Qwen2Config(**SIZES, tie_word_embeddings=True),
    Gemma3TextConfig(**SIZES, head_dim=16, layer_types=["sliding_attention", "full_attention"], bos_token_id=1),
]


def skeleton(config: PreTrainedConfig) -> PreTrainedModel:
    """Laid out by accelerate, another hand than the library's."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))
