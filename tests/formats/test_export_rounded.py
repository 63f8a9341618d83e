"""Rounded inputs in compressed-tensors (`int-quantized`): what is refused, and what plain transformers makes of the rest.

Oracles: compressed_tensors' own decompressor, config class and rounding of inputs, which transformers runs.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import AutoModelForCausalLM, PreTrainedModel

import tiny
import trimtab as tt
from exported import EMBEDDING, IDS, everywhere, linears, logits, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.formats import get, table
from trimtab.formats.declaration import Layer
from trimtab.formats.refusals import refusals
from trimtab.methods import LrQat
from trimtab.pipeline.run import run
from trimtab.quant.grid import Grid
from trimtab.recipe import recipe

DYNAMIC, SYMMETRIC = tt.Activations(8), tt.Activations(8, symmetric=True)
STATIC = tt.Activations(8, symmetric=True, mode="static")


def rounded(grid: dict[str, Any], kind: tt.Activations, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Trained, folded and with rounded inputs."""
    model = prepared(EMBEDDING, everywhere(**grid), method=LrQat(rank=4), dtype=dtype)
    shake(model)
    tt.simulate(model, activations=kind, calibration=IDS)
    tt.fold(model)
    return model


@pytest.mark.parametrize(
    ("bits", "zero", "group", "kind"),
    [
        (8, "symmetric", None, DYNAMIC),
        (4, "integer", 32, DYNAMIC),
        (3, "integer", None, tt.Activations(4)),
        (8, "symmetric", None, STATIC),
        (4, "symmetric", 32, tt.Activations(8, mode="static")),
    ],
)
def test_transformers_rounds_the_same(tmp_path: Path, bits: int, zero: str, group: int | None, kind: Any) -> None:
    """To the bit in float32, the dtype that compressed-tensors rounds a float32 model's inputs in."""
    model = rounded({"bits": bits, "zero": zero, "group": group}, kind)
    report = write(model, "compressed-tensors", tmp_path / "out", engine="transformers")
    assert (report.kind, report.relative_error) == ("exact", 0.0)
    values = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    assert config.format == "int-quantized"
    scheme = config.config_groups["group_0"]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    stored = tensors(tmp_path / "out")
    for name, layer in linears(model).items():
        parts = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        assert (parts["weight"].dtype, parts["weight"].shape) == (torch.int8, layer.base.shape)
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], layer.dequantize(torch.float32))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    for layer in linears(model).values():
        layer.inputs = None
    assert not torch.equal(logits(loaded), logits(model))


def layer(grid: Grid, kind: tt.Activations) -> Layer:
    return Layer(name="model.layers.0.mlp.down_proj", kind="linear", shape=(64, 128), grid=grid, inputs=kind)


@pytest.mark.parametrize(
    ("grid", "kind", "engine", "words"),
    [
        (Grid(8), DYNAMIC, "vllm-cpu", None),
        (Grid(8), SYMMETRIC, "vllm", None),
        (Grid(8), STATIC, "vllm-cpu", "8-bit static symmetric inputs, .* use 8-bit dynamic asymmetric;"),
        (Grid(8), STATIC, "vllm", None),
        (Grid(4, 32), DYNAMIC, "vllm-cpu", None),
        (Grid(4, 32), DYNAMIC, None, None),
        (Grid(4, 32), SYMMETRIC, "vllm-cpu", "has 8-bit dynamic symmetric inputs, .* use 8-bit dynamic asymmetric;"),
        (Grid(4, 32), DYNAMIC, "vllm", "4 bits with 8-bit dynamic asymmetric inputs, .* use 8;"),
        (Grid(4, 32, "integer"), DYNAMIC, "vllm-cpu", "zero that is integer with 8-bit .* use symmetric"),
        (Grid(8, 32), DYNAMIC, "vllm-cpu", "is int8 g32 symmetric with 8-bit .* use a group of per channel"),
        (Grid(3), DYNAMIC, "vllm-cpu", "has 3 bits with .* use 4 or 8;"),
        (Grid(4), tt.Activations(4), "vllm-cpu", "has 4-bit dynamic asymmetric inputs, .* use 8-bit dynamic asymm"),
        (Grid(4, 32), SYMMETRIC, None, "has 8-bit dynamic symmetric inputs, which transformers does not run"),
        (Grid(4, 32, "real"), DYNAMIC, None, "zero that is real, which compressed-tensors does not hold"),
    ],
)
def test_refused(grid: Grid, kind: Any, engine: str | None, words: str | None) -> None:
    found = refusals(get("compressed-tensors"), [layer(grid, kind)], torch.bfloat16, engine)
    assert len(found) == (words is not None)
    if words is not None:
        assert re.search(words, str(found[0])), found[0]


def test_both_kinds_of_rounding_name_what_is_lost() -> None:
    asked = replace(layer(Grid(4, 32), DYNAMIC), kv=tt.KvCache(8))
    found = get("compressed-tensors").form(asked, torch.bfloat16)
    assert "is trained with a KV cache of 8 bits, which" in str(found)
    found = get("gguf").form(asked, torch.bfloat16)
    assert "8-bit dynamic asymmetric inputs and a KV cache of 8 bits" in str(found)


def test_the_table_has_a_row_for_each() -> None:
    rows = table.table([get("compressed-tensors")])
    kinds = {(row[1], row[2]): row[7] for row in rows[1:] if row[7] != "float"}
    assert kinds["vllm-cpu", "4"] == "8-bit dynamic asymmetric"
    assert "8-bit static symmetric" in kinds["vllm", "8"]
    assert "8-bit dynamic symmetric" not in kinds["transformers", "2 3 4 8"].split(", ")


def test_a_recipe_trains_rounds_and_exports(tmp_path: Path) -> None:
    values = tiny.recipe(tiny.model(tmp_path / "m"), tiny.text(tmp_path / "t.jsonl"), tmp_path / "out")
    values |= {"export": ["compressed-tensors"], "rules": [everywhere(bits=8)], "activations": {"bits": 8}}
    values["train"] |= {"steps": 2}
    run(recipe.from_dict(values))
    config = json.loads((tmp_path / "out/compressed-tensors/config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["input_activations"]["dynamic"] is True
    with pytest.raises(UserError, match="8-bit dynamic symmetric inputs and a KV cache of 8 bits, which gguf would"):
        run(
            recipe.from_dict(
                values
                | {"activations": {"symmetric": True}, "kv": {}, "export": ["gguf"], "output": str(tmp_path / "o")}
            )
        )
