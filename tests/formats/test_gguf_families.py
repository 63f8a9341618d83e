"""Families as llama.cpp's own converter lays them out: names of tensors are the gguf package's, rows of queries and keys
are where its permutation puts them, and the keys of the architecture are these and no others.

Whether llama.cpp computes from them what transformers computes is asked of llama.cpp (`tests/serving`).
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_models import WRITTEN, byte_level_tokenizer, random_model
from trimtab.formats.gguf.write import save

SIZES = {"vocab_size": 260, "embedding_length": 64, "feed_forward_length": 128, "block_count": 3}
HEADS = {
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 16,
    "attention.value_length": 16,
}
RMS, BASE = {"attention.layer_norm_rms_epsilon": 1e-6}, {"rope.freq_base": 1e4, "context_length": 2048}
FACTORS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
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


def converted(name: str, key: str, weight: torch.Tensor) -> np.ndarray:
    """A parameter as the converter's `LlamaModel.permute` leaves it."""
    heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
    values = weight.float().numpy()
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
    factors = {n: there.pop(n) for n in ("rope_factors_long.weight", "rope_factors_short.weight") if n in there}
    assert bool(factors) == (name == "phi4")
    for n, factor in factors.items():
        asked = model.config.rope_parameters[f"{n.split('.')[0].removeprefix('rope_factors_')}_factor"]
        np.testing.assert_allclose(factor.data, np.float32(asked))
    parameters = dict(model.named_parameters())  # a tied head once
    by_name = {names.get_name(key, try_suffixes=(".weight", ".bias")): key for key in parameters}
    assert there.keys() == by_name.keys()
    for n, key in by_name.items():
        data = gguf.dequantize(there[n].data, there[n].tensor_type)
        np.testing.assert_array_equal(data, converted(name, key, parameters[key].detach()), err_msg=key)
