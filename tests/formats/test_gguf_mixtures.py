"""Mixtures of experts in GGUF: three tensors a block, each of all experts. llama.cpp itself is asked in tests/serving.

Oracle: the reader of the gguf package, and its own table of names.
"""

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import trimtab as tt
from experts import FOUR, mixture
from gguf_models import MIXTURES, byte_level_tokenizer, random_model
from trimtab.errors import UserError
from trimtab.formats.export import write as export
from trimtab.formats.gguf.write import save
from trimtab.methods import LrQat, Rtn

KEYS: dict[str, dict[str, int]] = {
    "mixtral": {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 128},
    "qwen3_moe": {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 96},
    "olmoe": {"expert_count": 4, "expert_used_count": 2, "feed_forward_length": 128},
}


def written(model: Any, folder: Path) -> gguf.GGUFReader:
    save(folder / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    return gguf.GGUFReader(folder / "model.gguf")


def numbers(tensor: Any) -> np.ndarray:
    return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.parametrize("name", MIXTURES)
def test_float_experts(name: str, tmp_path: Path) -> None:
    model = random_model(MIXTURES[name])
    reader = written(model, tmp_path)
    named = str(reader.fields["general.architecture"].contents())
    found = {n.removeprefix(f"{named}."): f.contents() for n, f in reader.fields.items()}
    assert KEYS[name].items() <= found.items()
    there = {t.name: numbers(t) for t in reader.tensors}
    for i, layer in enumerate(model.model.layers):
        gate_up, down = layer.mlp.experts.gate_up_proj.float(), layer.mlp.experts.down_proj.float()
        parts = {"gate": gate_up[:, : gate_up.shape[1] // 2], "up": gate_up[:, gate_up.shape[1] // 2 :], "down": down}
        for part, values in parts.items():
            np.testing.assert_array_equal(there[f"blk.{i}.ffn_{part}_exps.weight"], values.detach().numpy())
        np.testing.assert_array_equal(
            there[f"blk.{i}.ffn_gate_inp.weight"], layer.mlp.gate.weight.float().detach().numpy()
        )


@pytest.mark.parametrize("grid", [{"bits": 4, "group": 32}, {"bits": 4, "group": 32, "zero": "real"}])
def test_tuned_experts(grid: dict[str, Any], tmp_path: Path) -> None:
    """The very numbers that were trained, in the type that holds them."""
    rules = [{"match": "*", "grid": grid | {"scale_dtype": "float16"}}]
    model = tt.prepare(random_model(MIXTURES["qwen3_moe"]), LrQat(rank=2), rules)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.02 * torch.randn_like(p))
    tt.fold(model)
    there = {t.name: t for t in written(model, tmp_path).tensors}
    experts = model.get_submodule("model.layers.1.mlp.experts")
    whole = torch.stack([experts[e].gate_up_proj.base.dequantize(torch.float32) for e in range(4)])
    gate = there["blk.1.ffn_gate_exps.weight"]
    assert gate.tensor_type.name == ("Q4_1" if "zero" in grid else "Q4_0")
    np.testing.assert_array_equal(numbers(gate), whole[:, :96].numpy())
    np.testing.assert_array_equal(numbers(there["blk.1.ffn_up_exps.weight"]), whole[:, 96:].numpy())
    down = torch.stack([experts[e].down_proj.base.dequantize(torch.float32) for e in range(4)])
    np.testing.assert_array_equal(numbers(there["blk.1.ffn_down_exps.weight"]), down.numpy())


def test_experts_of_one_tensor_have_one_type(tmp_path: Path) -> None:
    rules = [
        {"match": "*.experts.2.down_proj", "grid": {"bits": 8, "group": 32}},
        {"match": "*", "grid": {"bits": 4, "group": 32}},
    ]
    model = tt.prepare(random_model(MIXTURES["mixtral"]), Rtn(), rules)
    with pytest.raises(UserError, match=r"experts\.2\.down_proj: is Q8_0 beside experts of Q4_0, which share a tensor"):
        written(model, tmp_path)


def test_what_llama_cpp_computes_otherwise_is_refused(tmp_path: Path) -> None:
    """Weights of the chosen are normed there, whatever the config says; gpt-oss's experts are not written."""
    config = copy.deepcopy(MIXTURES["qwen3_moe"])
    config.norm_topk_prob = False
    with pytest.raises(UserError, match=r"norm_topk_prob False, which llama\.cpp does not compute for qwen3moe"):
        written(random_model(config), tmp_path)
    config = copy.deepcopy(MIXTURES["olmoe"])
    config.num_key_value_heads = 2
    with pytest.raises(UserError, match="num_key_value_heads 2 beside 4 of queries"):
        written(random_model(config), tmp_path)
    with pytest.raises(UserError, match="gpt_oss models are not written"):
        export(tt.prepare(mixture("gpt_oss"), Rtn(), FOUR), None, "gguf", tmp_path / "out", source=tmp_path)
