"""Families as llama.cpp's own converter lays them out: names of tensors are the gguf package's, rows of queries and keys
are where its permutation puts them, and the keys of the architecture are these and no others.

Whether llama.cpp computes from them what transformers computes is asked of llama.cpp (`tests/serving`).
"""

import functools
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import trimtab as tt
from gguf_models import WRITTEN, byte_level_tokenizer, random_model
from trimtab.errors import UserError
from trimtab.formats.gguf.write import save
from trimtab.methods import Rtn

SIZES = {"vocab_size": 260, "embedding_length": 64, "feed_forward_length": 128, "block_count": 3}
HEADS = {
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
}
RMS, BASE = {"attention.layer_norm_rms_epsilon": 1e-6}, {"rope.freq_base": 1e4, "context_length": 2048}
FACTORS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
DELTA = {
    **RMS,
    "context_length": 32768,
    "attention.key_length": 32,
    "attention.value_length": 32,
    "rope.dimension_count": 8,
    "rope.dimension_sections": [11, 11, 10, 0],
    "full_attention_interval": 3,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 32,
}
GEMMA4 = {
    **RMS,
    "block_count": 5,
    "context_length": 131072,
    "rope.freq_base": 1e6,
    "rope.freq_base_swa": 1e4,
    "rope.dimension_count": 64,
    "rope.dimension_count_swa": 32,
    "attention.key_length": 64,
    "attention.value_length": 64,
    "attention.key_length_swa": 32,
    "attention.value_length_swa": 32,
    "attention.shared_kv_layers": 0,
    "attention.sliding_window": 16,
    "attention.sliding_window_pattern": [True, False, True, False, False],
    "embedding_length_per_layer_input": 0,
}
KEYS: dict[str, dict[str, Any]] = {
    "smollm3": {**RMS, "block_count": 5, "rope.dimension_count": 16, "rope.freq_base": 2e6, "context_length": 32768},
    "phi3": {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "context_length": 4096,
        "attention.sliding_window": 0,
    },
    "phi4": {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "attention.sliding_window": 262144,
        "rope.dimension_count": 12,
        "rope.scaling.original_context_length": 1024,
        "rope.scaling.attn_factor": (1 + np.log(2) / np.log(1024)) ** 0.5,
    },
    "granite": {**RMS, "rope.dimension_count": 16, **dict(zip(FACTORS, (0.2, 3.0, 0.4, 2.0), strict=True))},
    "glm4": {
        "attention.layer_norm_rms_epsilon": 1.5625e-7,
        "context_length": 131072,
        "attention.key_length": 32,
        "attention.value_length": 32,
        "rope.dimension_count": 16,
    },
    "qwen3_5": DELTA | {"ssm.group_count": 2, "ssm.time_step_rank": 2, "ssm.inner_size": 64},
    "qwen3_5 with more heads of values": DELTA | {"ssm.group_count": 2, "ssm.time_step_rank": 6, "ssm.inner_size": 192},
    "gemma4": GEMMA4 | {"final_logit_softcapping": 3.0},
    "gemma4 of the small kind": GEMMA4
    | {
        "block_count": 6,
        "attention.shared_kv_layers": 2,
        "attention.sliding_window_pattern": [True, False] * 3,
        "embedding_length_per_layer_input": 32,
        "feed_forward_length": [128, 128, 128, 128, 256, 256],
    },
    "gemma4 whose keys are values": GEMMA4 | {"attention.head_count_kv": [2, 1, 2, 1, 1]},
    "olmo": {"attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 16, "attention.clamp_kqv": 0.6},
    "olmo2": {"attention.layer_norm_rms_epsilon": 1e-5},
    "olmo3": {
        "attention.layer_norm_rms_epsilon": 1e-5,
        "block_count": 5,
        "rope.freq_base": 5e5,
        "attention.sliding_window": 16,
    },
}
"""What a file says beside `SIZES`, `HEADS` and `BASE`."""
ROTATES_NEIGHBOURS = ("smollm3", "granite", "olmo")
"""Whose queries and keys llama.cpp rotates by neighbours, and transformers by halves."""


def reordered(values: np.ndarray, axis: int, head: int, keys: int = 2) -> np.ndarray:
    """The converter's `_reorder_v_heads`."""
    shape = values.shape
    split = (*shape[:axis], keys, shape[axis] // keys // head, head, *shape[axis + 1 :])
    return values.reshape(split).swapaxes(axis, axis + 1).reshape(shape)


def delta_net(key: str, values: np.ndarray) -> np.ndarray:
    """A parameter of a gated delta net as the converter's `Qwen3NextModel` and `_LinearAttentionVReorderBase` leave it."""
    part = key.rpartition("linear_attn.")[2].removesuffix(".weight")
    if part in ("in_proj_a", "in_proj_b", "dt_bias", "A_log"):
        return reordered(-np.exp(values) if part == "A_log" else values, 0, 1)
    if part == "in_proj_z":
        return reordered(values, 0, 32)
    if part in ("in_proj_qkv", "conv1d"):
        return np.concatenate([values[:128], reordered(values[128:], 0, 32)]).squeeze()
    return reordered(values, 1, 32) if part == "out_proj" else values


def converted(name: str, key: str, weight: torch.Tensor) -> np.ndarray:
    """A parameter as the converter leaves it; its `LlamaModel.permute` among others."""
    values = weight.float().numpy()
    if "linear_attn" in key:
        return delta_net(key, values)
    if name.startswith("qwen3_5") and key.endswith("norm.weight"):
        return values + 1
    heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
    if heads is None or name not in ROTATES_NEIGHBOURS:
        return values
    return values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)


@pytest.mark.parametrize("name", KEYS)
def test_a_family_is_laid_out_as_llama_cpp_reads_it(name: str, tmp_path: Path) -> None:
    model: Any = random_model(WRITTEN[name])
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    named = str(reader.fields["general.architecture"].contents())
    architecture = next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == named)
    found = {n.removeprefix(f"{named}."): f.contents() for n, f in reader.fields.items() if n.startswith(f"{named}.")}
    wanted = SIZES | HEADS | BASE | KEYS[name]
    assert found == {key: pytest.approx(value, rel=1e-6) for key, value in wanted.items()}

    names = gguf.get_tensor_name_map(architecture, model.config.num_hidden_layers)
    there = {t.name: t for t in reader.tensors}
    factors = {n: there.pop(n) for n in list(there) if n.startswith("rope_f")}
    asked = model.config.rope_parameters
    wanted = {f"rope_factors_{which}.weight": asked.get(f"{which}_factor") for which in ("long", "short")}
    wanted["rope_freqs.weight"] = [1.0] * 8 + [1e30] * 24 if name.startswith("gemma4") else None
    assert factors.keys() == {n for n, values in wanted.items() if values is not None}
    for n, factor in factors.items():
        np.testing.assert_allclose(factor.data, np.float32(wanted[n]))
    parameters = dict(model.named_parameters())  # a tied head once
    parameters |= {n: b for n, b in model.named_buffers() if n.endswith("layer_scalar")}
    ends = (("dt_bias", "dt_proj.bias"), ("layer_scalar", "layer_scalar.weight"))
    theirs = {key: functools.reduce(lambda n, end: n.replace(*end), ends, key) for key in parameters}
    by_name = {names.get_name(n, (".weight", ".bias")): key for key, n in theirs.items()}
    assert there.keys() == by_name.keys()
    for n, key in by_name.items():
        data = gguf.dequantize(there[n].data, there[n].tensor_type)
        np.testing.assert_allclose(data, converted(name, key, parameters[key].detach()), rtol=1e-6, err_msg=key)


def test_groups_move_with_the_columns_of_a_gated_delta_net(tmp_path: Path) -> None:
    name, out = "qwen3_5 with more heads of values", "model.layers.0.linear_attn.out_proj"
    for group in (32, None):
        grid = {"bits": 4, "group": group, "zero": "integer"}
        model = tt.prepare(random_model(WRITTEN[name]), Rtn(), [{"match": "*.linear_attn.*", "grid": grid}])
        save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
        tensors = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
        stored = gguf.dequantize(tensors["blk.0.ssm_out.weight"].data, tensors["blk.0.ssm_out.weight"].tensor_type)
        expected = model.get_submodule(out).dequantize(torch.float32).numpy()
        np.testing.assert_array_equal(stored, reordered(expected, 1, 32))
    for torn in ({"bits": 4, "group": 64}, {"bits": 4, "group": 96}):
        model = tt.prepare(random_model(WRITTEN[name]), Rtn(), [{"match": f"*{out}", "grid": torn}])
        with pytest.raises(UserError, match=rf"{out}: its columns change places .* tear its groups of {torn['group']}"):
            save(tmp_path / "torn.gguf", model, byte_level_tokenizer(), name="tiny")
