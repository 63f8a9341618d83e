"""Configs that no model has are refused before anything is made of them."""

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.models import believable


@pytest.fixture
def model(given: Path, tmp_path: Path) -> Path:
    return shutil.copytree(given / "model", tmp_path / "model")


def change(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("name", sorted(believable.MOST))
def test_a_size_has_a_largest_value(name: str) -> None:
    most = believable.MOST[name]
    believable.check("here", {name: most, "x": 10**30})
    believable.check("here", {"part": {name: most}})
    for value in (most + 1, -most - 1, float("nan"), float("inf")):
        with pytest.raises(UserError, match=rf"^here: {name} is .* at most {most:,}"):
            believable.check("here", {"part": {name: value}})


def test_more_layers_than_tensors_are_refused_at_once(model: Path) -> None:
    begun = time.monotonic()
    for layers, said in (
        (10**9, r"num_hidden_layers is 1e\+09"),
        (1000, "1,000 layers .* tensors"),
    ):
        change(model, num_hidden_layers=layers)
        with pytest.raises(UserError, match=said):
            tt.load(str(model), dtype=torch.float32)
    assert time.monotonic() - begun < 2


def test_one_layer_more_is_missing_by_name(model: Path) -> None:
    change(model, num_hidden_layers=3)
    with pytest.raises(UserError, match=r"no tensor model\.layers\.2\."):
        tt.load(str(model))


def test_tensors_of_a_layer_that_the_config_has_not_are_named(model: Path) -> None:
    change(model, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"tensor model\.layers\.1\..* is not a part of"):
        tt.load(str(model))


def test_a_plan_of_a_config_alone_has_the_same_bounds(model: Path) -> None:
    change(model, num_hidden_layers=10**6)
    with pytest.raises(UserError, match="num_hidden_layers"):
        tt.plan(str(model / "config.json"))


@pytest.mark.parametrize(
    "values",
    [
        {"num_attention_heads": "4"}, {"hidden_size": 64.5}, {"rope_parameters": {"rope_type": "x"}},
        {"layer_types": ["x", "y"]},
        {"vocab_size": None}, {"num_key_value_heads": -2}, {"model_type": ["llama"]}, {"text_config": "x"}, {"dtype": "x"},
        {"hidden_act": "x"}, {"rms_norm_eps": []}, {"head_dim": {}}, {"architectures": 3, "model_type": "x"},
        {"per_layer_config": {"0": {"num_hidden_layers": 3}}}, {"per_layer_config": {"0": {"tie_word_embeddings": False}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_value_of_a_wrong_type_is_told_in_one_line(model: Path, values: dict[str, Any]) -> None:
    change(model, **values)
    with pytest.raises(UserError, match=r"config\.json"):
        tt.load(str(model))


@pytest.mark.parametrize("key", ["_attn_implementation", "attn_implementation", "_experts_implementation"])
def test_kernels_of_the_hub_are_not_fetched(model: Path, key: str) -> None:
    """transformers would, where the package `kernels` is installed, and run them."""
    change(model, **{key: "owner/kernel"})
    with pytest.raises(UserError, match=rf"{key} names code to be fetched \(owner/kernel\)"):
        tt.load(str(model))


@pytest.mark.parametrize(("tied", "said"), [(False, r"no tensor lm_head\.weight"), (True, None)])
def test_a_head_that_is_tied_or_not(tmp_path: Path, tied: bool, said: str | None) -> None:
    """Of a model that has no head of its own, it is missing; of one that has, its own numbers count, as in transformers."""
    folder = tiny.model(tmp_path / "model", tied=not tied)
    right, _ = tt.load(str(folder), dtype=torch.float32)
    change(folder, tie_word_embeddings=tied)
    if said is not None:
        with pytest.raises(UserError, match=said):
            tt.load(str(folder))
        return
    model, _ = tt.load(str(folder), dtype=torch.float32)
    ids = torch.arange(8).view(1, 8)
    assert torch.equal(model(ids).logits, right(ids).logits)


@pytest.fixture(scope="module")
def saved(given: Path) -> Path:
    """A model in our format, without its manifest: with it, a changed file is one that was not written."""
    model, tokenizer = tt.load(str(given / "model"), dtype=torch.float32)
    tt.save(model, given / "saved", tokenizer)
    (given / "saved" / "manifest.json").unlink()
    return given / "saved"


def test_specs_have_the_shapes_that_the_config_says(saved: Path, tmp_path: Path) -> None:
    """Without a word a model of the one half and the other half was made."""
    folder = shutil.copytree(saved, tmp_path / "saved")
    change(folder, num_key_value_heads=4)
    said = r"saved/config\.json: its quantization_config gives model\.layers\.0\.self_attn\.k_proj the shape \(32, 64\)"
    with pytest.raises(UserError, match=said):
        tt.load(str(folder))


SPECS: dict[str, tuple[str, Any]] = {
    "format_version": ("format_version", "3"),
    "no layout": ("layout", None),
    "specs of another type": ("specs", {"0": 1}),
    "a spec that is a word": ("specs", ["x"]),
    "layers of another type": ("layers", []),
    "a layer without a spec": ("layers", {"model.layers.0.mlp.up_proj": 99}),
    "a layer with true for a spec": ("layers", {"model.layers.0.mlp.up_proj": True}),
    "no such dtype": ("compute_dtype", "nn"),
    "a KV cache of another type": ("kv", [8]),
    "buffers of another type": ("buffers", "x"),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_quantization_config_that_trimtab_did_not_write(saved: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(saved, tmp_path / "saved")
    key, value = SPECS[name]
    config = json.loads((folder / "config.json").read_text())
    change(folder, quantization_config=config["quantization_config"] | {key: value})
    with pytest.raises(UserError, match=r"quantization_config"):
        tt.load(str(folder))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"eos_token_id": "x"}', "eos_token_id is 'x', where a token's number stands"),
        ('{"bos_token_id": [1, -1]}', "bos_token_id is"),
        ('{"pad_token_id": true}', "pad_token_id is True"),
        ('{"output_hidden_states": "5.23.0"}', "output_hidden_states is '5.23.0', where true or false stands"),
        ("null", "holds no mapping"),
        ("[" * 10**5, "not valid JSON"),
    ],
)
def test_a_generation_config_that_generates_nothing(
    model: Path, saved: Path, tmp_path: Path, text: str, said: str
) -> None:
    for folder in (model, shutil.copytree(saved, tmp_path / "saved")):
        (folder / "generation_config.json").write_text(text)
        with pytest.raises(UserError, match=rf"generation_config\.json: {said}"):
            tt.load(str(folder))


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja"]
)
def test_a_fifo_in_a_folder_is_not_waited_for(model: Path, name: str) -> None:
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(UserError, match=rf"{name}: is a pipe"):
        tt.load(str(model))


@pytest.mark.parametrize("weight_map", [[], {}, None, "x", {"lm_head.weight": 3}])
def test_an_index_that_is_none(model: Path, weight_map: Any) -> None:
    (model / "model.safetensors").rename(model / "model-00001-of-00001.safetensors")
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(UserError, match=r"index\.json: not an index of safetensors"):
        tt.load(str(model))


@pytest.mark.parametrize(("kind", "width"), [("sliding", "sliding_window"), ("chunked", "attention_chunk_size")])
def test_layers_with_windows_of_no_width(model: Path, kind: str, width: str) -> None:
    """transformers looks for it only when a text comes."""
    change(model, layer_types=["full_attention", f"{kind}_attention"])
    with pytest.raises(UserError, match=f"has layers of {kind}_attention in layer_types, but no {width}; fetch"):
        tt.load(str(model))
    change(model, **{width: 8})
    tt.load(str(model))


@pytest.mark.parametrize("key", ["return_dict", "output_hidden_states"])
@pytest.mark.parametrize("value", [False, True, "0", 99])
def test_outputs_are_logits_whatever_a_config_says(model: Path, key: str, value: Any) -> None:
    change(model, **{key: value})
    found = tt.load(str(model))[0](torch.arange(4)[None])
    assert found.logits.shape[:2] == (1, 4)
    assert found.hidden_states is None


def test_a_family_without_an_encoder_generates_whatever_its_config_says(model: Path) -> None:
    change(model, is_encoder_decoder=True)
    found = tt.load(str(model))[0].generate(torch.arange(4)[None], max_new_tokens=2, do_sample=False)
    assert found.shape == (1, 6)
