"""AutoRound's and MLX's checkpoints as bases: the very codes, scales and zeros, by the libraries' own words for them."""

import json
from pathlib import Path

import pytest
import test_read_packed as packed
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
import trimtab as tt
from exported import everywhere, linears, prepared, tensors, write
from trimtab.errors import UserError
from trimtab.formats.auto_round.read import AutoRoundGptq
from trimtab.formats.mlx.read import MlxPacking
from trimtab.layers.weights import AffineWeight
from trimtab.models.sources import open_source
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.grid import Grid
from trimtab.quant.int32_packing import pack_int32


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("packing", ["auto_round:auto_gptq", "auto_round"])
def test_words_of_auto_round(packing: str, bits: int) -> None:
    stored = load_file(Path(__file__).parents[1] / "stored/auto_round.safetensors")
    theirs = {name.rpartition(".")[2]: t for name, t in stored.items() if name.startswith(f"{packing}.{bits}.")}
    parts = {part: theirs[part] for part in ("qweight", "qzeros", "scales")}
    found = packed.read(AutoRoundGptq({"bits": bits, "group_size": 32, "sym": False, "packing_format": packing}), parts)
    assert torch.equal(found.integer_codes(), theirs["codes"])
    assert torch.equal(found.range().zero_NG, theirs["zero"].float())
    assert torch.equal(found.range().scale_NG, theirs["scale"].float())


def test_a_folder_of_auto_round_with_widths_of_their_own(tmp_path: Path) -> None:
    """By name and by a pattern; it goes back as GPTQ's second version."""
    folder, ours = packed.exported(tmp_path, "gptq", {"bits": 4, "group": 32})
    wide = {n: layer for n, layer in linears(ours).items() if n.endswith(("0.mlp.up_proj", "down_proj"))}
    forms = {n: Grid(8, 32) if n.endswith("up_proj") else Grid(2, 64) for n in wide}
    bases = {n: AffineWeight.quantize(layer.dequantize(torch.float32), forms[n]) for n, layer in wide.items()}

    def as_auto_round(found: dict[str, Tensor]) -> None:
        for name, layer in linears(ours).items():
            base = bases.get(name, layer.base)
            codes, scales = base.integer_codes(), base.range().scale_NG.T
            zeros = torch.full(scales.shape, base.grid.center - 1)
            del found[f"{name}.g_idx"]
            found[f"{name}.qweight"] = pack_int32(codes, base.grid.bits).T
            found[f"{name}.qzeros"], found[f"{name}.scales"] = pack_int32(zeros, base.grid.bits), scales.half()

    own = {"model.layers.0.mlp.up_proj": {"bits": 8}, ".*down_proj": {"bits": 2, "group_size": 64}}
    settings = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "extra_config": own}
    packed.edit(folder, as_auto_round, **settings)
    model, _ = tt.load(str(folder))
    assert linears(model).keys() == linears(ours).keys()
    for name, layer in linears(ours).items():
        wanted = bases.get(name, layer.base)
        found = linears(model)[name].base
        assert torch.equal(found.integer_codes(), wanted.integer_codes()), name
        assert torch.equal(found.dequantize(torch.float32), wanted.dequantize(torch.float32)), name
    assert open_source(str(folder)).came_in == "gptq"
    for key, value in {"packing_format": "auto_round:llm_compressor", "act_bits": 8, "data_type": "mx_fp"}.items():
        packed.edit(folder, lambda _: None, **{**settings, "data_type": "int", "act_bits": 16, key: value})
        with pytest.raises(UserError, match=rf"model.path: .*quantization_config: packing_format .*{value}.* are read"):
            open_source(str(folder))


# ---- MLX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_words_of_mlx(bits: int) -> None:
    stored = load_file(Path(__file__).parents[1] / "stored/mlx_words.safetensors")
    codes, words = stored[f"{bits}.codes"], stored[f"{bits}.words"]
    draw = torch.Generator().manual_seed(bits)
    scales, biases = (torch.randn(len(codes), 2, generator=draw).half() for _ in range(2))
    found = packed.read(
        MlxPacking({"bits": bits, "group_size": 32}), {"weight": words, "scales": scales, "biases": biases}
    )
    assert torch.equal(found.integer_codes(), codes)
    wide = [x.double().repeat_interleave(32, 1) for x in (scales, biases)]
    assert torch.equal(found.dequantize(torch.float32), (wide[0] * codes.double() + wide[1]).float())


@pytest.mark.parametrize("tied", [False, True])
def test_a_folder_of_mlx(tmp_path: Path, tied: bool) -> None:
    """Widths of their own, the embedding and a head tied to it among them, and back bit for bit."""
    rules = [
        {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32, "zero": "real"}},
        {"match": "*.down_proj", "grid": {"bits": 3, "group": 64, "zero": "real"}},
        *([] if tied else [{"match": "lm_head", "grid": {"bits": 6, "group": 64, "zero": "real"}}]),
        {"match": "*", "grid": {"bits": 4, "group": 32, "zero": "real"}},
    ]
    ours = prepared(*rules, tied=tied)
    folder = tmp_path / "theirs"
    write(ours, "mlx", folder)
    tiny.tokenizer().save_pretrained(folder)
    (folder / "manifest.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # older files have one key only
    (folder / "config.json").write_text(json.dumps(config))
    model, _ = tt.load(str(folder))
    assert quant_layers(model).keys() == quant_layers(ours).keys()
    for name, layer in quant_layers(ours).items():
        assert torch.equal(quant_layers(model)[name].base.integer_codes(), layer.base.integer_codes()), name
        assert torch.equal(
            quant_layers(model)[name].base.dequantize(torch.float32), layer.base.dequantize(torch.float32)
        )
    ids = torch.arange(8)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, ours(ids).logits)
    assert write(model, "mlx", tmp_path / "again").kind == "exact"
    one, again = tensors(folder), tensors(tmp_path / "again")
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)


def test_other_modes_of_mlx_are_refused(tmp_path: Path) -> None:
    write(prepared(everywhere(bits=4, group=32, zero="real")), "mlx", tmp_path / "theirs")
    (tmp_path / "theirs/manifest.json").unlink()
    file = tmp_path / "theirs/config.json"
    config = json.loads(file.read_text())
    for layer in config["quantization_config"].values():
        if isinstance(layer, dict):
            layer["mode"] = "mxfp4"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"4 bits in MLX's mode mxfp4; affine codes of 2, 3, 4, 5, 6, 8 bits are read"):
        open_source(str(tmp_path / "theirs"))
