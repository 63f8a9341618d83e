"""Pruned models of mixed widths in the engines, as far as these run them. `make test-serving` runs this."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import trimtab as tt
from trimtab import pruning as prune
from trimtab.evaluation import serving
from trimtab.formats.gguf.write import save
from trimtab.methods import LrQat
from trimtab.pruning import Options

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_vllm import SIZES, needs_four_bits

import exported
from gguf_models import byte_level_tokenizer

BLOCKS = torch.arange(128).view(2, 64) * 7 % 250
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}


def tuned(dtype: torch.dtype, rules: list[dict[str, Any]], folder: Path) -> PreTrainedModel:
    """Half of the heads and some channels pruned, saved, loaded on its grids, moved as training would, folded."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES | {"num_key_value_heads": 4, "bos_token_id": 259, "eos_token_id": 259})
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    done = prune.prune(model, Options(ratio=0.4, importance="random", multiple_of=64))
    assert done.widths.groups * 32 < 128
    assert done.widths.channels < 256
    prune.save(model, folder / "pruned", byte_level_tokenizer(), {})
    model = tt.load(str(folder / "pruned"), LrQat(rank=4), [EMBEDDING, *rules], dtype=dtype)[0]
    exported.shake(model)
    tt.fold(model)
    return model


def check(model: PreTrainedModel, folder: Path, engine: str) -> None:
    served = serving.engine_logprobs(folder, engine, BLOCKS)
    found = serving.compare(engine, serving.model_logprobs(model, BLOCKS), served, BLOCKS)
    assert found.rms_logprob < 0.05
    assert found.top1_agreement > 0.9


@needs_four_bits
def test_vllm_takes_float_layers_and_two_groups(tmp_path: Path) -> None:
    """4 bits are all that its kernels run on a CPU: the widths of a search over [4, 16], and another group."""
    rules: list[dict[str, Any]] = [
        {"match": "*.0.self_attn.[qkv]_proj", "grid": None},
        {"match": "*.1.mlp.*", "grid": {"bits": 4, "group": 32}},
        {"match": "*", "grid": {"bits": 4, "group": 64}},
    ]
    model = tuned(torch.bfloat16, rules, tmp_path)
    exported.write(model, "compressed-tensors", tmp_path / "out", engine="vllm-cpu")
    check(model, tmp_path / "out", "vllm")


@pytest.mark.parametrize("zero", ["symmetric", "integer"])
def test_llama_cpp_takes_every_width(tmp_path: Path, zero: str) -> None:
    rules: list[dict[str, Any]] = [
        {"match": "*.0.self_attn.[qkv]_proj", "grid": {"bits": 2, "group": 32, "zero": zero}},
        {"match": "*.0.mlp.[gu]*", "grid": {"bits": 3, "group": 32, "zero": zero}},
        {"match": "*.down_proj", "grid": {"bits": 8, "group": 32}},
        {"match": "*.1.self_attn.o_proj", "grid": None},
        {"match": "*", "grid": {"bits": 4, "group": 32, "zero": zero}},
    ]
    model = tuned(torch.float32, rules, tmp_path)
    (tmp_path / "out").mkdir()
    save(tmp_path / "out" / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    check(model, tmp_path / "out", "llama.cpp")
