"""MXFP4 in a GGUF file: written from codes, read code for code, written again byte for byte; rows of q and k move."""

from pathlib import Path

import gguf
import numpy as np
import torch

import gguf_models
from trimtab.formats.export_size import export_sizes
from trimtab.formats.gguf.write import save
from trimtab.layers.weights import CodebookWeight
from trimtab.methods import Lora, Rtn
from trimtab.models.load import load
from trimtab.models.prepare import prepare
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import quant_layers
from trimtab.recipe.rules import parse_rules

RULES = [{"match": "*", "grid": {"codebook": "mxfp4", "group": 32}}]
KIND = gguf.GGMLQuantizationType.MXFP4


def test_a_file_of_mxfp4(tmp_path: Path) -> None:
    model = gguf_models.random_model(gguf_models.FAMILIES["llama"]).bfloat16()
    size = export_sizes(model, targets(model, Rtn(), parse_rules(RULES)), Rtn(), dtype=torch.bfloat16, only=["gguf"])[
        "gguf"
    ]
    prepare(model, Rtn(), RULES)
    for layer in quant_layers(model).values():  # -0 is in files of others, and is kept
        codes = layer.base.integer_codes()
        layer.base = CodebookWeight.of_powers(torch.where(codes == 7, 15, codes), layer.base.absmax.data)
    tokenizer = gguf_models.byte_level_tokenizer()
    save(tmp_path / "one.gguf", model, tokenizer, name="one")
    held = {t.name: t for t in gguf.GGUFReader(tmp_path / "one.gguf").tensors}
    packed = [t for t in held.values() if t.tensor_type == KIND]
    assert len(packed) == 21
    inside = sum(t.n_bytes for t in held.values())
    assert isinstance(size, int)
    assert size * 0.8 < inside < size * 1.2
    plain = held["blk.0.ffn_up.weight"]
    wanted = quant_layers(model)["model.layers.0.mlp.up_proj"].base.dequantize(torch.float32)
    assert np.array_equal(gguf.quants.dequantize(plain.data, KIND), wanted.numpy())
    again, _ = load(str(tmp_path / "one.gguf"), Lora(rank=1), [{"match": "*", "grid": "same"}], dtype=torch.bfloat16)
    for name, layer in quant_layers(model).items():
        other = quant_layers(again)[name].base
        assert other.grid == layer.base.grid
        assert torch.equal(other.integer_codes(), layer.base.integer_codes()), name
        assert torch.equal(other.absmax, layer.base.absmax), name
    prepared, _ = load(str(tmp_path / "one.gguf"), Rtn(), [{"match": "*", "grid": "same"}], dtype=torch.bfloat16)
    save(tmp_path / "two.gguf", prepared, tokenizer, name="one")
    two = {t.name: t for t in gguf.GGUFReader(tmp_path / "two.gguf").tensors}
    assert all(np.array_equal(two[t.name].data, t.data) for t in packed)
