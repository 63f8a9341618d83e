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
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
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


def random_model(config: Any) -> PreTrainedModel:
    """Every tensor random, norms and biases too, so that none can be mistaken for another; with a config of its own, in
    which preparing it leaves a note."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    for p in model.parameters():
        p.data = (torch.randn_like(p) * (0.1 if p.dim() > 1 else 0.5)).bfloat16()
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
