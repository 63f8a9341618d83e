"""What a reader lacks is refused from a model's config, and what a format stores wider is said: before it is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3_5TextConfig,
    Qwen3Config,
)

import tiny
import trimtab as tt
from exported import EMBEDDING, everywhere, prepared, tensors, write
from gguf_models import GEMMA, QWEN2, SIZES, random_model
from trimtab.errors import UserError
from trimtab.formats import ALL, export, get
from trimtab.formats.export import check_exports
from trimtab.formats.table import HEADER, table
from trimtab.methods import Rtn
from trimtab.models.asked import features
from trimtab.models.targets import targets
from trimtab.recipe.recipe import from_dict

ROPE: dict[str, Any] = {"rope_theta": 1e4, "factor": 4.0}
YARN = {**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 16}
WIDE = Qwen2Config(**QWEN2, head_dim=32)
GEMMA3 = {**SIZES, **GEMMA, "num_hidden_layers": 6}


@pytest.mark.parametrize(
    ("name", "config", "cause"),
    [
        ("gguf", MistralConfig(**SIZES, sliding_window=8), "sliding_window 8"),
        ("mlx", MistralConfig(**SIZES, sliding_window=8), "mistral with a sliding window"),
        ("gguf", WIDE, "head_dim 32 with 4 heads of 64 features"),
        ("mlx", WIDE, "head_dim 32 with 4 heads of 64 features"),
        ("mlx", Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
        ("gguf", Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
        ("mlx", LlamaConfig(**SIZES, rope_parameters={**ROPE, "rope_type": "dynamic"}), "rope_type dynamic"),
        ("gguf", LlamaConfig(**SIZES, rope_parameters={**ROPE, "rope_type": "dynamic"}), "rope_type dynamic"),
        ("mlx", LlamaConfig(**SIZES, rope_parameters={**YARN, "attention_factor": 1.0}), "yarn with an attention_f"),
        ("mlx", LlamaConfig(**SIZES, rope_parameters={**YARN, "truncate": False}), "without truncate"),
        ("mlx", LlamaConfig(**SIZES, rope_parameters={**ROPE, "rope_type": "linear", "partial_rotary_factor": 0.5}),
         r"partial_rotary_factor 0\.5"),
        ("gguf", Qwen3_5TextConfig(**{**SIZES, "head_dim": 16}), r"mrope_section \[11, 11, 10\] in heads of 16"),
        ("mlx", Gemma3TextConfig(**GEMMA3, final_logit_softcapping=30.0), "final_logit_softcapping"),
        ("mlx", Gemma3TextConfig(**GEMMA3, attn_logit_softcapping=50.0), "attn_logit_softcapping"),
    ],
    ids=str,
)  # fmt: skip
def test_a_recipe_is_refused_before_anything_is_loaded(name: str, config: Any, cause: str) -> None:
    """Mistral with a sliding window, exported as exact, and its neighbours."""
    recipe = from_dict({"model": {"path": "m"}, "method": "rtn", "export": [name], "train": {"steps": 0}})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = targets(model, Rtn(), None)
    with pytest.raises(UserError, match=cause):
        check_exports(recipe, found, config)
    with pytest.raises(UserError, match=cause):
        get(name).require_config(config)


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "dense", "peft"])
def test_an_engine_that_takes_other_heads_is_refused(name: str, tmp_path: Path) -> None:
    get(name).require_config(WIDE)
    get(name).require_config(Qwen2Config(**QWEN2), "vllm")
    with pytest.raises(UserError, match=r"head_dim 32 with 4 heads of 64 features, which vllm would compute otherwise"):
        get(name).require_config(WIDE, "vllm")
    if name == "dense":
        model = tt.prepare(random_model(WIDE), Rtn(), [everywhere(bits=4, group=32)])
        with pytest.raises(UserError, match="which vllm would compute otherwise"):
            write(model, name, tmp_path / "out", engine="vllm")
        assert not (tmp_path / "out").exists()


def test_what_a_plain_config_asks_for_is_nothing() -> None:
    assert not list(features(LlamaConfig(**SIZES)))
    assert not list(features(Qwen3Config(**SIZES)))
    assert len(table(ALL)[0]) == len(HEADER)


@pytest.mark.parametrize(
    ("name", "rules", "said"),
    [
        ("gguf", everywhere(bits=3, group=32), "3-bit codes take 4 bits each (Q4_0): 0.01843 MB instead of 0.01382 MB"),
        ("mlx", everywhere(bits=4, group=32, zero="integer"), "4-bit codes take 5 bits each (5 bits): 0.02304 MB"),
        ("dense", everywhere(bits=4, group=32), "4-bit codes take 16 bits each (matrices of floats): 0.07373 MB"),
        ("compressed-tensors", everywhere(bits=3, group=32), None),
        ("gguf", everywhere(bits=4, group=32), None),
        ("native", everywhere(bits=3, group=32), None),
    ],
)
def test_a_width_that_is_stored_wider_is_said_with_both_sizes(
    name: str, rules: Any, said: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    form = get(name)
    config = LlamaConfig(
        **{**SIZES, "num_hidden_layers": 1, "head_dim": 16}, tie_word_embeddings=True
    )  # 36 864 weights
    model = tt.prepare(random_model(config), Rtn(), [rules])
    seen: list[str] = []
    original = type(form).write
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(form), "write", lambda self, folder, writing: seen.extend(caplog.messages))
        write(model, name, tmp_path / "out")
    assert type(form).write is original
    lines = [m for m in seen if "bits each" in m]
    assert len(lines) == (0 if said is None else 1), "and before the first byte is written"
    assert said is None or f"export: {name}: {said}" in lines[0]


@pytest.mark.parametrize("name", ["compressed-tensors", "gptq", "awq", "mlx", "dense"])
def test_ends_template_and_dtype_come_along(name: str, tmp_path: Path) -> None:
    model = prepared(EMBEDDING, everywhere(bits=4, group=32, scale_dtype="portable"))
    model.generation_config.eos_token_id = [2, 7]
    tokenizer = tiny.tokenizer()
    export.write(model, tokenizer, name, tmp_path / "out", source=tmp_path)
    made = json.loads((tmp_path / "out/generation_config.json").read_text())
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert made["eos_token_id"] == [2, 7]
    assert config["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == tokenizer.chat_template


def test_a_saved_model_is_exported_in_the_dtype_that_it_computes_in(tmp_path: Path) -> None:
    """A float32 model came out in bfloat16, and was called exact."""
    model = prepared(everywhere(bits=4, group=32), dtype=torch.float32)
    tt.save(model, str(tmp_path / "saved"))
    assert export.export(str(tmp_path / "saved"), "dense").kind == "exact"
    made = tensors(tmp_path / "saved/dense")
    assert all(torch.equal(made[n], p) for n, p in model.named_parameters() if n in made and "norm" in n)
    assert {t.dtype for t in made.values()} == {torch.float32}
    assert json.loads((tmp_path / "saved/dense/config.json").read_text())["dtype"] == "float32"
