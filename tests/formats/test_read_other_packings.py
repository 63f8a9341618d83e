"""AutoRound, MLX and FP8 checkpoints as bases: the very codes, scales and zeros, by the libraries' own words for them."""

import json
from pathlib import Path
from typing import Any

import pytest
import test_read_packed as packed
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config

import tiny
import trimtab as tt
from exported import everywhere, linears, llama, prepared, tensors, write
from trimtab.errors import UserError
from trimtab.formats.auto_round.read import AutoRoundGptq
from trimtab.formats.export import same
from trimtab.formats.mlx.read import MlxPacking
from trimtab.layers.weights import AffineWeight
from trimtab.methods import LrQat
from trimtab.models.load import load_float
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


@pytest.mark.parametrize("packing", ["awq", "gptq"])
def test_auto_round_goes_back_as_what_its_packing_is_of(
    packing: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The very tensors, as the other library's own."""
    folder, _ = packed.exported(tmp_path, packing, {"bits": 4, "zero": "integer", "group": 32})
    theirs = "auto_round:auto_awq" if packing == "awq" else "auto_round:gptqmodel"
    packed.edit(folder, lambda _: None, quant_method="auto-round", packing_format=theirs, sym=False)
    source = open_source(str(folder))
    assert same(source) == packing
    assert f"export: same: auto-round is written as {packing}, whose codes, scales and zeros it has" in caplog.text
    model, tokenizer = tt.load(str(folder))
    tt.save(model, tmp_path / "saved", tokenizer)
    recipe = tiny.recipe(folder, tiny.text(tmp_path / "data.jsonl"), tmp_path / "out", rules=None)
    (tmp_path / "saved/recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert tt.export(str(tmp_path / "saved")).format == packing
    before, after = tensors(folder), tensors(tmp_path / "saved" / packing)
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_what_is_not_written_names_what_holds_it(tmp_path: Path) -> None:
    fp8_folder(tmp_path / "fp8", "fp8", "rows")
    with pytest.raises(
        UserError, match=r"not written \(fp8\): its floats of 8 bits are dequantized once, .* dense holds them"
    ):
        same(open_source(str(tmp_path / "fp8")))


def test_a_folder_of_auto_round_with_widths_of_their_own(tmp_path: Path) -> None:
    """By name and by a pattern."""
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
    assert same(open_source(str(folder))) == "gptq"
    with pytest.raises(
        UserError, match=r"int8 g32 .* beside int4 g32 .*; give all layers one, or export to compressed-tensors"
    ):
        write(model, "gptq", tmp_path / "gptq")
    with pytest.raises(
        UserError, match=r"has float16 scales, .*, or compute in float16 .`model.dtype`., which holds them"
    ):
        write(model, "compressed-tensors", tmp_path / "bfloat16")
    model, _ = tt.load(str(folder), dtype=torch.float16)
    assert write(model, "compressed-tensors", tmp_path / "float16", engine="transformers").kind == "exact"
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


# ---- FP8 ------------------------------------------------------------------------------------------------------------


def fp8_folder(folder: Path, method: str, shape: str, blocks: tuple[int, int] = (48, 40)) -> dict[str, Tensor]:
    """A folder of 8-bit floats, and each layer's values in float64."""
    model, found, wanted = llama(), {}, {}
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    kept = load_file(folder / "model.safetensors")
    part = "weight_scale_inv" if method == "fp8" else "weight_scale"
    for name, t in kept.items():
        if not name.endswith("proj.weight"):
            found[name] = t
            continue
        n, k = t.shape
        block = {"blocks": blocks, "rows": (1, k), "one": (n, k)}[shape]
        rows, columns = (-(-size // b) for size, b in zip((n, k), block, strict=True))
        scale = 0.01 + torch.rand(rows, columns, generator=torch.Generator().manual_seed(n + k))
        wide = scale.repeat_interleave(block[0], 0)[:n].repeat_interleave(block[1], 1)[:, :k]
        found[name] = (t.float() / wide).to(torch.float8_e4m3fn)
        found[f"{name.removesuffix('weight')}{part}"] = scale.view(-1) if shape == "one" else scale
        wanted[name.removesuffix(".weight")] = found[name].double() * wide.double()
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    settings: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": blocks}
    if method != "fp8":
        weights = {"num_bits": 8, "type": "float", "block_structure": blocks if shape == "blocks" else None}
        groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
        settings = {"quant_method": method, "format": "float-quantized", "config_groups": groups}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return wanted


@pytest.mark.parametrize("shape", ["blocks", "rows", "one"])
@pytest.mark.parametrize("method", ["fp8", "compressed-tensors"])
def test_floats_of_eight_bits(method: str, shape: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Dequantized once, which is said; then a float model like any other."""
    wanted = fp8_folder(tmp_path / "theirs", method, shape)
    floats = load_float(str(tmp_path / "theirs"), dtype=torch.float32)
    for name, values in wanted.items():
        assert torch.equal(floats.get_submodule(name).weight, values.float()), name
    assert "and 11 more: no grid here holds their values, so they are dequantized once" in caplog.text
    model, _ = tt.load(str(tmp_path / "theirs"), LrQat(rank=2), [everywhere(bits=4, group=32)])
    grid = Grid(4, 32)
    for name, values in wanted.items():
        rounded = AffineWeight.quantize(values.float(), grid)
        assert torch.equal(linears(model)[name].base.integer_codes(), rounded.integer_codes()), name
    assert linears(tt.load(str(tmp_path / "theirs"), LrQat(rank=2))[0]).keys() == wanted.keys(), "the method's own grid"


def test_as_transformers_dequantizes_it(tmp_path: Path) -> None:
    wanted = fp8_folder(tmp_path / "theirs", "fp8", "blocks", (32, 16))  # it takes no blocks that are cut off
    how = FineGrainedFP8Config(weight_block_size=(32, 16), dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "theirs", dtype=torch.float32, quantization_config=how)
    ours = load_float(str(tmp_path / "theirs"), dtype=torch.float32)
    for name in wanted:
        assert torch.equal(ours.get_submodule(name).weight, theirs.get_submodule(name).weight), name


def test_scales_that_do_not_go_with_floats_of_eight_bits(tmp_path: Path) -> None:
    fp8_folder(tmp_path / "theirs", "fp8", "blocks")
    file = tmp_path / "theirs/model.safetensors"
    found = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight_scale_inv"
    save_file({**found, name: found[name][:, :1].repeat(1, 3)}, file, {"format": "pt"})
    with pytest.raises(
        UserError, match=r"up_proj: scales of 3 x 3 do not go with 128 x 64 weights in blocks of 48 x 40"
    ):
        open_source(str(tmp_path / "theirs"))
    save_file({**found, "model.layers.0.mlp.up_proj.weight": torch.ones(128, 64)}, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj: has a scale of F32 beside a weight of F32; F8_E4M3 with float"):
        open_source(str(tmp_path / "theirs"))
