"""Tiny random models of every family that GGUF is written for, and a tokenizer with merges."""

import copy
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    OlmoeConfig,
    Phi3Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

import tiny
from trimtab.layers.linear import QuantLinear
from trimtab.models.transformers_bridge import quant_layers

EOS = 259
SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "bos_token_id": EOS,
    "eos_token_id": EOS,
    "pad_token_id": EOS,
}
QWEN2 = {key: value for key, value in SIZES.items() if key != "head_dim"}
GEMMA = {"query_pre_attn_scalar": 32, "sliding_window": 16}
FAMILIES = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**QWEN2, tie_word_embeddings=True),
    # transformers' reader takes every Qwen3 file for one of head dimension 128
    "qwen3": Qwen3Config(**{**SIZES, "head_dim": 128}, tie_word_embeddings=False),
    "gemma2": Gemma2Config(**SIZES, **GEMMA),
    "gemma3": Gemma3TextConfig(**SIZES, **GEMMA),
}


def _phi4(trained_on: int) -> Phi3Config:
    """llama.cpp chooses between the two lists of factors by the context that it is opened with, transformers by the text:
    `trained_on` is above the one and the other, or below both."""
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": trained_on,
        "short_factor": [1.0, 1.1, 1.3, 1.6, 2.0, 2.5],
        "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0],
        "partial_rotary_factor": 0.75,
    }
    return Phi3Config(
        **QWEN2,
        sliding_window=262144,
        max_position_embeddings=2048,
        original_max_position_embeddings=trained_on,
        tie_word_embeddings=True,
        rope_parameters=rope,
    )


DELTA = ["linear_attention", "linear_attention", "full_attention"]
LINEAR_HEADS = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_num_key_heads": 2}
GEMMA4: dict[str, Any] = {
    **SIZES,
    "num_hidden_layers": 5,
    "global_head_dim": 64,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["full_attention"],
}
GPT2: dict[str, Any] = {
    "gpt2": GPT2Config(n_embd=64, n_layer=3, n_head=4, n_positions=128, vocab_size=260, bos_token_id=EOS, eos_token_id=EOS),
    "gpt2 with a head and a width of its own": GPT2Config(
        n_embd=64, n_layer=3, n_head=4, n_positions=128, n_inner=96, vocab_size=260, bos_token_id=EOS, eos_token_id=EOS,
        tie_word_embeddings=False, layer_norm_epsilon=1e-4,
    ),
}  # fmt: skip
"""No rotation, no groups of heads, and matrices that transformers keeps transposed."""
WRITTEN: dict[str, Any] = {
    "smollm3": SmolLM3Config(**{**QWEN2, "num_hidden_layers": 5}),
    "phi3": Phi3Config(**QWEN2, sliding_window=None),
    "phi4": _phi4(1024),
    "phi4 beyond its first context": _phi4(16),
    "granite": GraniteConfig(
        **QWEN2,
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=2.0,
        tie_word_embeddings=True,
    ),
    "granite with biases": GraniteConfig(**QWEN2, attention_bias=True, mlp_bias=True),
    "glm4": Glm4Config(**SIZES),
    "qwen3_5": Qwen3_5TextConfig(
        **SIZES, layer_types=DELTA, **LINEAR_HEADS, linear_num_value_heads=2, tie_word_embeddings=True
    ),
    "qwen3_5 with more heads of values": Qwen3_5TextConfig(
        **SIZES, layer_types=DELTA, **LINEAR_HEADS, linear_num_value_heads=6
    ),
    "gemma4": Gemma4TextConfig(**GEMMA4, hidden_size_per_layer_input=0, final_logit_softcapping=3.0),
    "gemma4 of the small kind": Gemma4TextConfig(
        **{**GEMMA4, "num_hidden_layers": 6, "layer_types": ["sliding_attention", "full_attention"] * 3},
        hidden_size_per_layer_input=32,
        vocab_size_per_layer_input=260,
        num_kv_shared_layers=2,
        use_double_wide_mlp=True,
    ),
    "gemma4 whose keys are values": Gemma4TextConfig(
        **GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True, num_global_key_value_heads=1
    ),
    "olmo": OlmoConfig(**QWEN2, clip_qkv=0.6),
    "olmo2": Olmo2Config(**QWEN2),
    "olmo3": Olmo3Config(**{**QWEN2, "num_hidden_layers": 5}, sliding_window=16),
}
"""Families and settings that transformers does not read from GGUF, or reads as another model."""


EXPERTS: dict[str, Any] = {**QWEN2, "num_experts_per_tok": 2}
MIXTURES: dict[str, Any] = {
    "mixtral": MixtralConfig(**EXPERTS, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(
        **{**EXPERTS, "head_dim": 32}, num_experts=4, moe_intermediate_size=96, norm_topk_prob=True
    ),
    "olmoe": OlmoeConfig(**{**EXPERTS, "num_key_value_heads": 4}, num_experts=4),
}
"""Mixtures of experts."""


def random_model(config: Any) -> PreTrainedModel:
    """Every tensor random, norms and biases too, so that none can be mistaken for another; with a config of its own, in
    which preparing it leaves a note."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for p in model.parameters():
        p.data = (torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.5)).bfloat16()
    for name, buffer in model.named_buffers():
        if name.endswith("layer_scalar"):
            buffer.fill_(0.75)
    return model.eval()


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """GPT-2's kind of tokenizer, with merges."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=259, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["the 12 moths there"] * 9, trainer)
    trained.add_special_tokens(["<eos>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = tiny.TEMPLATE
    return fast


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The float32 values of a prepared model under the names that transformers' own has."""
    ours, found = quant_layers(model), {}
    for name, layer in ours.items():
        if not (isinstance(layer, QuantLinear) and layer.tied):
            found[f"{name}.weight"] = layer.base.dequantize(torch.float32)
        if getattr(layer, "bias", None) is not None:
            found[f"{name}.bias"] = layer.bias.float()
    inside = tuple(f"{name}." for name in ours)
    return found | {n: p.float() for n, p in model.state_dict().items() if not n.startswith(inside)}
