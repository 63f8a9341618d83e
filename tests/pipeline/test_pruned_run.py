"""A pruned model of mixed widths in every format: what transformers and gguf read is what was trained."""

import copy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

import exported
import tiny
import trimtab as tt
from gguf_models import byte_level_tokenizer, weights
from trimtab import pruning as prune
from trimtab.evaluation.parity import logits_of
from trimtab.formats.gguf.write import save
from trimtab.methods import LrQat, Rtn
from trimtab.pipeline.stages import run
from trimtab.pruning import Options
from trimtab.recipe import recipe

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "initializer_range": 0.3,
    "bos_token_id": 259,
    "eos_token_id": 259,
    "tie_word_embeddings": True,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, head_dim=32),
    "qwen3": Qwen3Config(**SIZES, head_dim=128),  # transformers' reader takes every Qwen3 file for this head dimension
}
IDS = torch.arange(64).view(2, 32) * 7 % 260
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}


def mixed(zero: str) -> list[dict[str, Any]]:
    """A width for each fusion group, as a search gives them; one stays in float."""
    widths = {
        "*.0.self_attn.[qkv]_proj": 2,
        "*.0.self_attn.o_proj": 3,
        "*.0.mlp.[gu]*": 4,
        "*.0.mlp.down_proj": 8,
        "*.1.self_attn.[qkv]_proj": 4,
        "*.1.mlp.[gu]*": 3,
        "*.1.mlp.down_proj": 2,
    }
    grids: dict[str, Any] = {
        m: {"bits": b, "group": 32, "zero": zero if b < 8 else "symmetric"} for m, b in widths.items()
    }
    return [EMBEDDING, *({"match": m, "grid": g} for m, g in grids.items()), {"match": "*", "grid": None}]


def tuned(name: str, rules: list[dict[str, Any]], folder: Path) -> PreTrainedModel:
    """Pruned, saved, loaded on its grids, moved as training would, folded."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.bfloat16).eval()
    done = prune.prune(model, Options(ratio=0.45, importance="random", multiple_of=32))
    assert done.widths.groups < 4
    assert done.widths.channels < 128
    prune.save(model, folder / "pruned", byte_level_tokenizer(), {})
    model = tt.load(str(folder / "pruned"), LrQat(rank=4, alpha=64.0), rules)[0]
    exported.shake(model)
    assert all(layer.differing == 0 for layer in tt.fold(model))
    untuned = exported.linears(tt.load(str(folder / "pruned"), Rtn(), rules)[0])
    moved = [n for n, x in exported.linears(model).items() if not torch.equal(x.base.codes, untuned[n].base.codes)]
    assert len(moved) > 10
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("format_", "zero"),
    [("compressed-tensors", "symmetric"), ("dense", "integer")],  # no engine runs integer zeros of several grids
)
def test_transformers_loads_what_was_trained(name: str, zero: str, format_: str, tmp_path: Path) -> None:
    model = tuned(name, mixed(zero), tmp_path)
    exported.write(model, format_, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert again.config.head_dim == CONFIGS[name].head_dim
    assert again.config.num_key_value_heads < 4
    assert torch.equal(logits_of(again, IDS), logits_of(model, IDS))


BLOCKS = {2: "Q4_0", 3: "Q4_0", 4: "Q4_0", 8: "Q8_0"}


@pytest.mark.parametrize("name", CONFIGS)
def test_gguf_holds_every_width(name: str, tmp_path: Path) -> None:
    """Types as gguf's reader sees them, values by its own dequantization; and all of it by transformers."""
    model = tuned(name, mixed("symmetric"), tmp_path)
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    read = {t.name: t for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    expected = weights(model)
    for theirs, ours, bits in (
        ("blk.0.attn_v", "model.layers.0.self_attn.v_proj", 2),
        ("blk.0.attn_output", "model.layers.0.self_attn.o_proj", 3),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj", 4),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", 8),
        ("blk.1.ffn_down", "model.layers.1.mlp.down_proj", 2),
    ):
        tensor = read[f"{theirs}.weight"]
        assert tensor.tensor_type.name == BLOCKS[bits]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert np.array_equal(values, expected[f"{ours}.weight"].numpy()), ours
    again = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    state = again.state_dict()
    assert all(torch.equal(state[n], w) for n, w in expected.items() if n in state)
    assert {f"model.layers.{i}.{p}_proj.weight" for i in (0, 1) for p in ("self_attn.q", "mlp.down")} <= state.keys()


def test_one_recipe_ends_in_every_format(tmp_path: Path) -> None:
    """prune -> search -> tune -> fold -> export, and each folder computes what the native one does."""
    tiny.model(tmp_path / "m", template=None)
    byte_level_tokenizer().save_pretrained(tmp_path / "m")
    rules = [EMBEDDING, {"match": "*", "grid": {"bits": 4, "group": 32, "zero": "symmetric"}}]
    values = tiny.recipe(
        tmp_path / "m",
        tiny.text(tmp_path / "t.jsonl", 200),
        tmp_path / "out",
        rules=rules,
        prune={"ratio": 0.3, "multiple_of": 32, "tokens": 64, "block_tokens": 32},
        search={"bits": [2, 3, 4, 8], "trials": 2, "tokens": 64, "sensitivity_tokens": 64, "uniform": False},
        train={"steps": 1},
        data={"eval_tokens": 64},
        evaluate={"parity": False},
        export=["native", "compressed-tensors", "dense", "gguf"],
    )
    out = Path(run(recipe.from_dict(values))["output"])
    native = AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16)
    assert native.config.intermediate_size < 128
    found = {layer.base.grid.bits for layer in exported.linears(native).values() if hasattr(layer.base.grid, "bits")}
    assert len(found) > 1, "a search of two trials found no mixed widths"
    expected = logits_of(native, IDS)
    for folder in ("compressed-tensors", "dense"):
        again = AutoModelForCausalLM.from_pretrained(out / folder, dtype=torch.bfloat16)
        assert torch.equal(logits_of(again, IDS), expected), folder
    file = next((out / "gguf").glob("*.gguf")).name
    again = AutoModelForCausalLM.from_pretrained(out / "gguf", gguf_file=file, dtype=torch.float32).state_dict()
    assert all(torch.equal(again[n], w) for n, w in weights(native).items() if n in again)
