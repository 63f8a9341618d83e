"""Models that also see or hear: their language model is tuned on text, and the whole comes back as the class it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import families
import seeing
import tiny
import trimtab as tt
from gguf_models import FAMILIES, byte_level_tokenizer
from trimtab.errors import UserError
from trimtab.formats import get
from trimtab.formats.compressed_tensors import unread
from trimtab.formats.export_size import export_sizes
from trimtab.methods import Rtn
from trimtab.models.layout import auto_class
from trimtab.models.load import load_float
from trimtab.models.sources import open_layout
from trimtab.models.targets import targets
from trimtab.pipeline.run import run
from trimtab.recipe import recipe
from trimtab.recipe.rules import parse_rules

TRIED = {
    "gemma3": "GGUF: layer_types",
    "idefics3": 0.0,
    "llava": 0.0,
    "qwen2_5_vl": "GGUF: qwen2_5_vl_text models are not written",
    "voxtral": 0.0,
}
"""Families, and what comes of writing their language model as GGUF."""


@pytest.mark.parametrize("model_type", TRIED)
def test_a_model_that_sees_is_tuned_on_text_and_comes_back_as_it_was(model_type: str, tmp_path: Path) -> None:
    """`tools/families.py` writes down the same of every family."""
    found = seeing.tuned(model_type, tmp_path)
    assert found.towers
    assert found.reloaded
    assert len(found.quantized) == 14
    assert all("language_model" in name or "text_model" in name for name in found.quantized)
    assert found.exported["dense"] == found.exported["compressed-tensors"] == 0.0
    wanted = TRIED[model_type]
    gguf = found.exported["gguf"]
    assert gguf == wanted if isinstance(wanted, float) else str(gguf).startswith(wanted)


@pytest.mark.parametrize("model_type", ["kimi_k25", "minimax_m3_vl", "qwen3_vl_moe"])
def test_a_mixture_that_sees_comes_back_as_it_was(model_type: str, tmp_path: Path) -> None:
    """A tower's qkv is taken apart while transformers reads, an MLP joined, a stack of experts transposed by its shape."""
    found = seeing.tuned(model_type, tmp_path, ("dense", "compressed-tensors"))
    assert found.towers
    assert found.reloaded
    assert sum(".experts." in name for name in found.quantized) in (8, 16)
    assert found.exported["dense"] == 0.0
    packed = found.exported["compressed-tensors"]
    assert packed == 0.0 if model_type != "qwen3_vl_moe" else "keep all of them in one tensor" in str(packed)


@pytest.mark.parametrize(
    ("model_type", "asked"),
    [("blip", "pixel_values"), ("kosmos-2", "pixel_values"), ("t5gemma2", "decoder_input_ids")],
)
def test_what_cannot_be_given_text_alone_is_refused(model_type: str, asked: str, tmp_path: Path) -> None:
    families.tiny_config(model_type).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"asks for {asked}, and is given text alone here"):
        open_layout(str(tmp_path)).layout()


@pytest.mark.parametrize("auto", [AutoModelForCausalLM, AutoModelForMultimodalLM])
def test_a_config_of_two_models_is_of_the_one_that_it_names(auto: Any, tmp_path: Path) -> None:
    """Qwen3.5's is taken by both auto classes: its checkpoints are of the whole, and were loaded without their tower."""
    model = families.random_model("qwen3_5", auto)
    model.save_pretrained(tmp_path)
    assert type(load_float(str(tmp_path), dtype=torch.float32)) is type(model)
    config = families.tiny_config("qwen3_5")
    assert auto_class(config) is AutoModelForCausalLM, "which transformers' own auto class makes of it"


def test_what_transformers_splits_is_not_written_packed() -> None:
    """transformers 5.23 fails to read such a folder: it would take scales and words for weights to divide."""
    packed, config = get("compressed-tensors"), families.tiny_config("qianfan_ocr")
    with pytest.raises(UserError, match=r"makes several tensors of attn\.qkv\.weight in a qianfan_ocr"):
        packed.require_config(config)
    packed.require_config(config, "vllm")
    with pytest.raises(UserError, match=r"takes experts for matrices apart.* in a llama4 model; export to dense"):
        packed.require_config(families.tiny_config("llama4"))
    packed.require_config(families.tiny_config("llava"))


@pytest.mark.parametrize("model_type", ["falcon", "nanochat"])
def test_what_transformers_initialises_is_not_written_packed(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it reads, `_init_weights` of these families asks for a `weight` that layers of packed codes have not."""
    monkeypatch.setattr(unread, "_ASKED", {})
    packed, config = get("compressed-tensors"), families.tiny_config(model_type)
    with pytest.raises(
        UserError, match=rf"stops at matrices that are codes, .* in a {model_type} model; export to dense"
    ):
        packed.require_config(config)
    packed.require_config(families.tiny_config("qwen3_moe"))
    # A model is laid out to know: once for a family, and not for vLLM.
    monkeypatch.setattr(unread, "_initialises", lambda _: pytest.fail("asked again"))
    packed.require_config(families.tiny_config("qwen3_moe"))
    packed.require_config(families.tiny_config("xlstm"), "vllm")


# ---- a whole run ----------------------------------------------------------------------------------------------------


def llava(path: Path) -> PreTrainedModel:
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(text_config=FAMILIES["llama"].to_dict(), vision_config=vision, image_token_index=258)
    model = LlavaForConditionalGeneration(config).bfloat16()
    model.save_pretrained(path)
    byte_level_tokenizer().save_pretrained(path)
    for name in ("processor_config.json", "preprocessor_config.json"):
        (path / name).write_text(json.dumps({"patch_size": 14}), encoding="utf-8")
    return model


def test_a_recipe_tunes_a_model_that_sees(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Trained on a text, measured, and exported: the whole in three formats, the language model as GGUF."""
    before = llava(tmp_path / "base").state_dict()
    rules = [{"match": "*", "grid": {"bits": 4, "group": 32, "zero": "symmetric"}}]
    names = ["dense", "compressed-tensors", "gguf"]
    data, about = (
        tiny.text(tmp_path / "t.jsonl"),
        {"rules": rules, "export": names, "evaluate": {"baselines": ["rounded"]}},
    )
    values = tiny.recipe(tmp_path / "base", data, tmp_path / "run", **about)
    run(recipe.from_dict(values))
    found = json.loads((tmp_path / "run" / "metrics.json").read_text(encoding="utf-8"))["perplexity"]
    assert found["tuned"] < found["rounded"]
    assert "of a LlavaForConditionalGeneration the language model alone" in caplog.text
    model, _ = tt.load(str(tmp_path / "run"), dtype=torch.float32, quiet=True)
    assert isinstance(model, LlavaForConditionalGeneration)
    assert all(torch.equal(p, before[n].float()) for n, p in model.state_dict().items() if "vision" in n)
    expected, laid_out = families.logits(model), open_layout(str(tmp_path / "base")).layout(dtype=torch.bfloat16)
    for folder in (tmp_path / "run", *(tmp_path / "run" / name for name in names[:2])):
        assert json.loads((folder / "processor_config.json").read_text(encoding="utf-8")) == {"patch_size": 14}
        assert "LlavaForConditionalGeneration" in (folder / "config.json").read_text(encoding="utf-8")
    sizes = export_sizes(
        laid_out, targets(laid_out, Rtn(), parse_rules(rules)), Rtn(), dtype=torch.bfloat16, only=names
    )
    for name, file in zip(names, ("model.safetensors", "model.safetensors", "model.gguf"), strict=True):
        written = (tmp_path / "run" / name / file).stat().st_size
        assert written - 24000 < sizes[name] < written  # a table of tensors, and GGUF's tokens  # type: ignore[operator]
    read = load_float(str(tmp_path / "run" / "gguf" / "model.gguf"), dtype=torch.float32)
    assert (families.logits(read) - expected).abs().max() < 1e-3
