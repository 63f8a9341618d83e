"""Checkpoints of other libraries as bases: the very codes, scales and zeros, by the libraries' own words for them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
import trimtab as tt
from exported import EMBEDDING, everywhere, linears, llama, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.formats.awq.read import AwqPacking
from trimtab.formats.gptq.read import GptqPacking
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight
from trimtab.methods import Lora, LrQat
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import Packing
from trimtab.models.sources import open_source

GRIDS: list[dict[str, Any]] = [
    {"bits": bits, "zero": zero, "group": group}
    for bits, zero, group in [
        (2, "integer", 32), (3, "symmetric", 32), (4, "symmetric", 32), (4, "integer", None), (8, "integer", 32),
    ]
]  # fmt: skip


def exported(tmp_path: Path, format_: str, grid: dict[str, Any]) -> tuple[Path, Any]:
    """A folder in another library's format, and the model that it holds."""
    if format_ == "compressed-tensors" and "codebook" not in grid:
        grid = {**grid, "scale_dtype": "bfloat16"}
    model = prepared(everywhere(**grid))
    write(model, format_, tmp_path / "theirs")
    tiny.tokenizer().save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "manifest.json").unlink()  # others write none
    return tmp_path / "theirs", model


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None], **settings: Any) -> None:
    """Change the tensors and the quantization_config of a folder."""
    found = tensors(folder)
    change(found)
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= settings
    (folder / "config.json").write_text(json.dumps(config))


def same(found: QuantLinear, wanted: QuantLinear) -> None:
    """The same codes on the same grid, whatever its scales are stored in."""
    one, other = found.base, wanted.base
    assert isinstance(one, AffineWeight)
    assert isinstance(other, AffineWeight)
    forms = [(base.grid.bits, base.grid.group, base.grid.zero) for base in (one, other)]
    assert forms[0] == forms[1]
    assert torch.equal(one.integer_codes(), other.integer_codes())
    assert torch.equal(one.dequantize(torch.float64), other.dequantize(torch.float64))


HELD = [(format_, grid) for format_ in ("gptq", "compressed-tensors") for grid in GRIDS]
HELD += [("awq", {"bits": 4, "zero": "integer", "group": group}) for group in (32, None)]


@pytest.mark.parametrize(("format_", "grid"), HELD, ids=str)
def test_what_we_export_is_read_and_exported_again(tmp_path: Path, format_: str, grid: dict[str, Any]) -> None:
    folder, ours = exported(tmp_path, format_, grid)
    model, _ = tt.load(str(folder))
    layers = linears(model)
    assert layers.keys() == linears(ours).keys()
    for name, layer in linears(ours).items():
        same(layers[name], layer)
        assert torch.equal(layers[name].bias, layer.bias) if layer.bias is not None else layers[name].bias is None
    assert write(model, format_, tmp_path / "again").kind == "exact"
    one, again = tensors(folder), tensors(tmp_path / "again")
    assert one.keys() == again.keys()
    assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.parametrize("format_", ["gptq", "awq", "compressed-tensors"])
def test_it_is_trained_on_its_grid_and_goes_back(tmp_path: Path, format_: str) -> None:
    folder, _ = exported(tmp_path, format_, {"bits": 4, "zero": "integer", "group": 32})
    model, _ = tt.load(str(folder), LrQat(rank=4))
    untouched = linears(tt.load(str(folder))[0])
    shake(model, 0.5)
    with torch.no_grad():
        trained = model(torch.arange(8)[None]).logits
    tt.fold(model)
    assert torch.equal(model(torch.arange(8)[None]).logits, trained)
    assert any(not torch.equal(a.base.codes, untouched[n].base.codes) for n, a in linears(model).items())  # type: ignore[arg-type]
    assert write(model, format_, tmp_path / "again").kind == "exact"
    assert {n: t.shape for n, t in tensors(folder).items()} == {
        n: t.shape for n, t in tensors(tmp_path / "again").items()
    }


@pytest.mark.parametrize("format_", ["gptq", "awq", "compressed-tensors"])
def test_scales_that_are_none(tmp_path: Path, format_: str) -> None:
    """A scale of zero is a group of zeros, which can be trained; one that is not a number is refused by name."""
    name = "model.layers.1.mlp.up_proj"
    part = "weight_scale" if format_ == "compressed-tensors" else "scales"
    folder, ours = exported(tmp_path, format_, {"bits": 4, "zero": "integer", "group": 32})

    def put(value: float) -> None:
        edit(folder, lambda found: found[f"{name}.{part}"].view(-1)[:1].fill_(value))

    put(0.0)
    model, _ = tt.load(str(folder), LrQat(rank=2))
    layer, wanted = linears(model)[name], linears(ours)[name].dequantize(torch.float32)
    wanted[0, :32] = 0
    assert torch.equal(layer.dequantize(torch.float32), wanted)
    assert layer.adapter is not None
    assert torch.equal(layer.adapter.weight(layer.base, torch.float32), wanted)
    for value in (torch.nan, torch.inf):
        put(value)
        with pytest.raises(UserError, match=rf"{name}.*holds NaN or infinite"):
            tt.load(str(folder))


def test_rules_may_ask_for_the_same_or_another_grid(tmp_path: Path) -> None:
    folder, ours = exported(tmp_path, "gptq", {"bits": 4, "group": 32})
    other = {"match": "*.up_proj", "grid": {"bits": 8, "group": 32}}
    model, _ = tt.load(str(folder), rules=[EMBEDDING, other, {"match": "*", "grid": "same"}])
    layers = linears(model)
    assert layers["model.layers.0.mlp.up_proj"].base.grid.bits == 8  # type: ignore[union-attr]
    same(layers["model.layers.0.self_attn.q_proj"], linears(ours)["model.layers.0.self_attn.q_proj"])
    floats, _ = tt.load(str(folder), Lora(rank=2), [{"match": "*", "grid": "float"}])
    wanted = linears(ours)["model.layers.0.mlp.up_proj"].dequantize(torch.bfloat16)
    assert torch.equal(linears(floats)["model.layers.0.mlp.up_proj"].dequantize(torch.bfloat16), wanted)


def test_same_is_what_a_model_has() -> None:
    model = prepared(everywhere(bits=4, group=32))
    before = {name: layer.base.codes.clone() for name, layer in linears(model).items()}
    tt.prepare(model, LrQat(rank=2), [{"match": "*", "grid": "same"}])
    tt.fold(model)
    assert all(torch.equal(layer.base.codes, before[name]) for name, layer in linears(model).items())
    with pytest.raises(UserError, match="no layer of the model is left"):
        tt.prepare(llama(), LrQat(rank=2), [{"match": "*", "grid": "same"}])


@pytest.mark.slow
@pytest.mark.parametrize("format_", ["gptq", "awq"])
def test_a_run_gives_it_back_in_its_format(tmp_path: Path, format_: str) -> None:
    rules = [everywhere(bits=4, zero="integer", group=32)]
    model, tokenizer = tt.load(str(tiny.model(tmp_path / "float")), rules=rules)
    write(model, format_, tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    data, changes = tiny.text(tmp_path / "data.jsonl"), {"rules": None, "export": ["same"], "train": {"steps": 3}}
    tt.run(tiny.recipe(tmp_path / "theirs", data, tmp_path / "out", **changes))
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["export"] == [format_]
    again, whole = (linears(tt.load(str(folder))[0]) for folder in (tmp_path / "out" / format_, tmp_path / "out"))
    for name, layer in whole.items():
        same(again[name], layer)


def test_a_format_that_is_not_written_is_not_given_back(tmp_path: Path) -> None:
    four_bits(tmp_path / "theirs", "nf4", False)
    data = tiny.text(tmp_path / "data.jsonl")
    with pytest.raises(
        UserError,
        match=r"is in a format that is read and not written \(bitsandbytes\): native holds its codes, and dense",
    ):
        tt.run(tiny.recipe(tmp_path / "theirs", data, tmp_path / "out", rules=None, export=["same"]))


# ---- GPTQ -----------------------------------------------------------------------------------------------------------


def read(packing: Packing, stored: dict[str, Tensor]) -> Any:
    kinds = {torch.int32: "I32", torch.float16: "F16", torch.float32: "F32", torch.uint32: "U32"}
    headers = {part: Stored(Path(), kinds[t.dtype], tuple(t.shape)) for part, t in stored.items()}
    return packing.weight(stored, packing.form("layer", headers, stored))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_words_of_gptqmodel(bits: int) -> None:
    stored = load_file(Path(__file__).parents[1] / "stored/gptq_v2.safetensors")
    theirs = {name.partition(".")[2]: tensor for name, tensor in stored.items() if name.startswith(f"{bits}.")}
    parts = {part: theirs[part] for part in ("qweight", "qzeros", "scales", "g_idx")}
    found = read(GptqPacking({"bits": bits, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}), parts)
    assert torch.equal(found.integer_codes(), theirs["codes"])
    assert torch.equal(found.range().zero_NG, theirs["zero"].float())
    assert torch.equal(found.range().scale_NG, theirs["scale"].float())


def test_the_first_version_has_zeros_less_one(tmp_path: Path) -> None:
    folder, ours = exported(tmp_path, "gptq", {"bits": 4, "group": 32})

    def older(found: dict[str, Tensor]) -> None:
        for name in [name for name in found if name.endswith("qzeros")]:
            assert set(found[name].flatten().tolist()) == {-0x77777778}  # eights
            found[name] = torch.full_like(found[name], 0x77777777)

    edit(folder, older, checkpoint_format="gptq")
    model, _ = tt.load(str(folder))
    for name, layer in linears(ours).items():
        same(linears(model)[name], layer)


def test_what_gptq_cannot_mean_here_is_refused_by_name(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, "gptq", {"bits": 4, "group": 32})
    name = "model.layers.1.mlp.up_proj"

    def act_order(found: dict[str, Tensor]) -> None:
        found[f"{name}.g_idx"] = found[f"{name}.g_idx"].flip(0)

    edit(folder, act_order)
    with pytest.raises(UserError, match=rf"{name}: its groups follow the order of activations"):
        tt.load(str(folder))
    edit(folder, lambda found: found.__setitem__(f"{name}.g_idx", found[f"{name}.g_idx"].flip(0)))
    edit(folder, lambda found: found.__setitem__(f"{name}.qzeros", torch.full_like(found[f"{name}.qzeros"], -1)))
    with pytest.raises(UserError, match=rf"{name}: quantization_config says sym"):
        tt.load(str(folder))
    edit(folder, lambda _: None, sym=False, checkpoint_format="gptq")
    with pytest.raises(UserError, match="a stored zero of 15 is 0 to some readers"):
        tt.load(str(folder))
    edit(folder, lambda found: found.pop(f"{name}.scales"))  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match=rf"{name}: has qweight but no scales"):
        tt.load(str(folder))
    edit(folder, lambda _: None, bits=5)
    with pytest.raises(UserError, match=r"quantization_config.bits: 5 is none of"):
        tt.load(str(folder))


# ---- AWQ ------------------------------------------------------------------------------------------------------------


def test_words_of_autoawq() -> None:
    theirs = load_file(Path(__file__).parents[1] / "stored/awq.safetensors")
    parts = {part: theirs[part] for part in ("qweight", "qzeros", "scales")}
    found = read(AwqPacking({"bits": 4, "version": "gemm", "group_size": 32}), parts)
    assert torch.equal(found.integer_codes(), theirs["codes"])
    assert torch.equal(found.range().zero_NG, theirs["zero"].float())
    assert torch.equal(found.range().scale_NG, theirs["scale"].float())
    assert (found.grid.bits, found.grid.group, found.grid.zero, found.grid.scale_dtype) == (4, 32, "integer", "float16")


def test_a_folder_of_awq(tmp_path: Path) -> None:
    """In float16, as they lie on hubs; it goes back as it came, and into GPTQ's layout."""
    folder, ours = exported(tmp_path, "awq", {"bits": 4, "zero": "integer", "group": 32, "scale_dtype": "float16"})
    edit(folder, lambda _: None, version="GEMM", zero_point=True, backend="autoawq")
    model, _ = tt.load(str(folder), dtype=torch.float16)
    for name, layer in linears(ours).items():
        same(linears(model)[name], layer)
    before = {name: t for name, t in tensors(folder).items() if t.dtype != torch.bfloat16}
    assert open_source(str(folder)).came_in == "awq"
    for engine in (None, "vllm", "vllm-cpu", "gptqmodel"):
        assert write(model, "awq", tmp_path / f"{engine}", engine=engine).kind == "exact"
        after = tensors(tmp_path / f"{engine}")
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert write(model, "gptq", tmp_path / "gptq").kind == "exact"
    tiny.tokenizer().save_pretrained(tmp_path / "gptq")
    for name, layer in linears(tt.load(str(tmp_path / "gptq"), dtype=torch.float16)[0]).items():
        same(layer, linears(ours)[name])
    with pytest.raises(UserError, match="zero that is integer, which vllm does not run in gptq"):
        write(model, "gptq", tmp_path / "no", engine="vllm")
    edit(folder, lambda _: None, version="gemv")
    with pytest.raises(UserError, match="packed for 'gemv'"):
        tt.load(str(folder))


def test_vllm_rounds_scales_to_the_dtype_it_computes_in(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = exported(tmp_path, "awq", {"bits": 4, "zero": "integer", "group": 32, "scale_dtype": "float16"})
    model, _ = tt.load(str(folder), dtype=torch.bfloat16)
    words = r"float16 scales in a model that computes in bfloat16, which vllm does not run in awq; compute in float16"
    with pytest.raises(UserError, match=words):
        write(model, "awq", tmp_path / "no", engine="vllm")
    caplog.clear()
    assert write(model, "awq", tmp_path / "out").kind == "exact"
    assert "its float16 scales are exact in the file, and rounded by vllm or vllm-cpu to bfloat16" in caplog.text


# ---- compressed-tensors ---------------------------------------------------------------------------------------------


def test_other_compressed_forms_are_refused_by_name(tmp_path: Path) -> None:
    folder, _ = exported(tmp_path, "compressed-tensors", {"bits": 4, "group": 32})
    edit(folder, lambda _: None, format="nvfp4-pack-quantized")
    with pytest.raises(UserError, match="'nvfp4-pack-quantized' is read by nothing here"):
        tt.load(str(folder))
    edit(folder, lambda found: found.pop("model.layers.0.mlp.up_proj.weight_packed"), format="pack-quantized")  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match=r"layers.0.mlp.up_proj: has a scale beside a weight of nothing"):
        tt.load(str(folder))


# ---- bitsandbytes ---------------------------------------------------------------------------------------------------


def four_bits(folder: Path, kind: str, double: bool, block: int = 64) -> dict[str, Tensor]:
    """A folder as transformers saves a model that bitsandbytes has quantized; and each layer as it dequantizes it."""
    model = llama()
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    found, wanted = dict(load_file(folder / "model.safetensors")), {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.detach().float()
            codes, state = bnb.quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=double)
            found[f"{name}.weight"] = codes
            found |= {f"{name}.weight.{part}": t for part, t in state.as_dict(packed=True).items()}
            wanted[name] = bnb.dequantize_4bit(codes, state)
    save_file({name: t.contiguous() for name, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return wanted


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_four_bits_of_bitsandbytes(tmp_path: Path, kind: str, double: bool) -> None:
    wanted = four_bits(tmp_path / "theirs", kind, double)
    model, _ = tt.load(str(tmp_path / "theirs"))
    layers = linears(model)
    assert layers.keys() == wanted.keys()
    for name, theirs in wanted.items():
        grid = layers[name].base.grid
        assert (grid.codebook, grid.group, grid.double_quant) == (kind, 64, double)  # type: ignore[union-attr]
        assert torch.equal(layers[name].dequantize(torch.float32), theirs)


def test_blocks_over_the_ends_of_rows_are_refused(tmp_path: Path) -> None:
    four_bits(tmp_path / "theirs", "nf4", False, block=128)
    with pytest.raises(UserError, match="blocks of 128 run over the ends of rows of 64"):
        open_source(str(tmp_path / "theirs"))


def test_four_bit_floats_of_compressed_tensors(tmp_path: Path) -> None:
    """MXFP4, as that package reads it, and back: the very tensors, -0 among them."""
    folder, ours = exported(tmp_path, "compressed-tensors", {"codebook": "mxfp4", "group": 32})
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mxfp4-pack-quantized"
    ids = torch.arange(24).view(2, 12)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)

    def with_minus_zeros(found: dict[str, Tensor]) -> None:
        for name in [n for n in found if n.endswith("k_proj.weight_packed")]:
            found[name] = torch.where(found[name] & 7 == 0, found[name] | 8, found[name])

    edit(folder, with_minus_zeros)
    model, _ = tt.load(str(folder))
    assert write(model, "compressed-tensors", tmp_path / "again").kind == "exact"
    before, after = tensors(folder), tensors(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(UserError, match="is on mxfp4 g32, which vllm was not tried with; name another --engine"):
        write(model, "compressed-tensors", tmp_path / "v", engine="vllm")
    edit(folder, lambda found: found.update({n: torch.full_like(t, 255) for n, t in found.items() if "scale" in n}))
    with pytest.raises(UserError, match="exponent is 255, which stands for no number"):
        tt.load(str(folder))
