"""GGUF files that we write, read by transformers' and gguf's own readers: the same model, to the bit."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
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
from trimtab.errors import UserError
from trimtab.formats.gguf.write import save
from trimtab.layers.linear import QuantLinear
from trimtab.methods import Qlora, Rtn
from trimtab.models.prepare import prepare
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
RULES: list[dict[str, Any]] = [
    {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
    {"match": "lm_head", "grid": None},
    {"match": "*.q_proj", "grid": {"bits": 4, "group": 32, "zero": "real"}},
    {"match": "*.k_proj", "grid": {"bits": 3, "group": 64, "zero": "integer"}},
    {"match": "*.v_proj", "grid": {"bits": 4, "group": None, "zero": "integer"}},
    {"match": "*.gate_proj", "grid": {"bits": 2, "group": 32}},
    {"match": "*.up_proj", "grid": {"bits": 5, "group": 32, "zero": "real"}},
    {"match": "model.layers.1.*.down_proj", "grid": None},
    {"match": "*", "grid": {"bits": 4, "group": 32}},
]


def random_model(config: Any) -> PreTrainedModel:
    """Every tensor random, norms and biases too, so that none can be mistaken for another."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
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


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_reads_the_same_model(name: str, tmp_path: Path) -> None:
    model = prepare(random_model(FAMILIES[name]), Rtn(), RULES)
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected, read = weights(model), theirs.state_dict()
    missing = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    assert read.keys() - missing == expected.keys() - missing
    for key, value in expected.items():
        shift = "norm.weight" in key and name.startswith("gemma")
        tolerance = {"rtol": 0, "atol": 2**-23 if shift else 0}  # the file holds 1 + w
        torch.testing.assert_close(read[key], value, **tolerance, msg=key)
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    block = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    assert [types[f"blk.0.{t}.weight"] for t in block] == ["Q4_1", "Q4_0", "Q5_0", "Q4_0", "Q4_0", "Q5_1", "Q4_0"]
    assert types["token_embd.weight"] == "Q8_0"
    assert types["blk.1.ffn_down.weight"] == "BF16"
    assert types["blk.1.attn_norm.weight"] == "F32"
    with torch.no_grad():
        ids = torch.arange(24).view(1, 24) * 7 % 250
        config = {k: v for k, v in theirs.config.to_dict().items() if k in SIZES and k != "pad_token_id"}
        assert config == {k: v for k, v in model.config.to_dict().items() if k in config}
        if name.startswith("gemma"):
            return  # their reader leaves out what Gemma's attention is scaled by
        dense = AutoModelForCausalLM.from_config(FAMILIES[name], dtype=torch.float32).eval()
        dense.load_state_dict(expected, strict=not missing)
        torch.testing.assert_close(theirs(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_tokenizer_and_its_template_come_along(tmp_path: Path) -> None:
    ours = byte_level_tokenizer()
    assert ours.eos_token_id == EOS
    model = prepare(random_model(FAMILIES["llama"]), Rtn(), RULES)
    save(tmp_path / "model.gguf", model, ours, name="tiny")
    theirs = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    text = "the 12 moths' été <eos>"
    assert theirs(text, add_special_tokens=False).input_ids == ours(text, add_special_tokens=False).input_ids
    assert theirs.chat_template == ours.chat_template
    assert theirs.eos_token_id == ours.eos_token_id


def test_a_file_says_what_most_of_it_is(tmp_path: Path) -> None:
    save(
        tmp_path / "model.gguf",
        prepare(random_model(FAMILIES["llama"]), Rtn(), RULES),
        byte_level_tokenizer(),
        name="t",
    )
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert gguf.LlamaFileType(fields["general.file_type"].contents()) == gguf.LlamaFileType.MOSTLY_Q4_0
    assert fields["general.name"].contents() == "t"
    assert fields["general.architecture"].contents() == "llama"


@pytest.mark.parametrize(
    ("grid", "cause"),
    [
        ({"bits": 8, "group": 32, "zero": "integer"}, "at most 7 bits"),
        ({"codebook": "nf4", "group": 32}, "no table of nf4 values"),
        ({"bits": 4, "group": 16}, "group 16 is no multiple"),
    ],
    ids=str,
)
def test_the_layer_that_cannot_be_held_is_named(grid: dict[str, Any], cause: str, tmp_path: Path) -> None:
    model = prepare(random_model(FAMILIES["llama"]), Rtn(), [{"match": "*.1.*.up_proj", "grid": grid}, *RULES])
    with pytest.raises(UserError, match=rf"model\.layers\.1\.mlp\.up_proj: .*{cause}"):
        save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    assert not list(tmp_path.iterdir())


def test_an_adapter_is_refused(tmp_path: Path) -> None:
    model = prepare(random_model(FAMILIES["llama"]), Qlora(rank=2))
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: has an adapter"):
        save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (LlamaConfig(**SIZES, hidden_act="gelu"), "activation gelu"),
        (LlamaConfig(**SIZES, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "rope_type"),
        (Gemma3TextConfig(**SIZES, query_pre_attn_scalar=64), "query_pre_attn_scalar 64"),
        (Gemma3TextConfig(**SIZES, query_pre_attn_scalar=32, layer_types=["full_attention"] * 3), "layer_types"),
        (Gemma2Config(**SIZES, query_pre_attn_scalar=32, tie_word_embeddings=False), "a head apart"),
        (Qwen2Config(**QWEN2, use_sliding_window=True, sliding_window=8, max_window_layers=1), "layer_types"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.model_type,
)
def test_what_llama_cpp_does_not_compute_is_refused(config: Any, cause: str, tmp_path: Path) -> None:
    model = prepare(random_model(config), Rtn())
    with pytest.raises(UserError, match=cause):
        save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")


def test_llama3_rope_factors_are_those_that_transformers_uses(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    }
    config = LlamaConfig(**SIZES, rope_parameters=rope, max_position_embeddings=2048)
    model = prepare(random_model(config), Rtn(), RULES)
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    tensors = {t.name: t.data for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    plain = 1e4 ** -(np.arange(0, 32, 2) / 32)
    ratio = plain / model.model.rotary_emb.inv_freq.numpy()
    assert len(set(ratio.round(3))) > 3
    np.testing.assert_allclose(tensors["rope_freqs.weight"], ratio, rtol=1e-5)
