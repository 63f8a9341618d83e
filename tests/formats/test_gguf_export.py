"""GGUF files that we write, read by transformers' and gguf's own readers: the same model, to the bit."""

import copy
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    Qwen2Config,
)

from gguf_models import EOS, FAMILIES, QWEN2, SIZES, byte_level_tokenizer, random_model, weights
from trimtab.errors import UserError
from trimtab.formats.gguf.write import save
from trimtab.methods import Qlora, Rtn
from trimtab.models.prepare import prepare

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
        dense = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name]), dtype=torch.float32).eval()
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
        ({"bits": 4, "group": 16}, "group 16 is not a multiple"),
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


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("short", [1, 40, 4000])
def test_a_disk_that_has_no_room_for_the_end_is_noticed(tmp_path: Path, short: int) -> None:
    """numpy's `tofile` loses what stands in a buffer of its own, and says nothing."""
    import resource

    model = prepare(random_model(FAMILIES["llama"]), Rtn(), RULES)
    save(tmp_path / "whole.gguf", model, byte_level_tokenizer(), name="tiny")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / "whole.gguf").stat().st_size - short, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            save(tmp_path / "cut.gguf", model, byte_level_tokenizer(), name="tiny")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
