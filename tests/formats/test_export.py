"""Formats: what is written is what was trained, what cannot be held is refused, what looks whole is whole.

Oracles: compressed_tensors' own decompressor and config class, and plain transformers, which loads the folders.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from transformers import ArceeConfig, AutoModelForCausalLM

import tiny
import trimtab as tt
from exported import EMBEDDING, everywhere, linears, logits, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.formats import ALL, declaration, directory, get, manifest, table
from trimtab.formats import export as exporting
from trimtab.formats.declaration import Form, Layer
from trimtab.formats.refusals import refusals
from trimtab.formats.written import layers_of
from trimtab.methods import LrQat, QaHira, Qlora, Rtn
from trimtab.models.sources import SafetensorsSource
from trimtab.pipeline.run import run
from trimtab.quant.grid import CodebookGrid, Grid, Range
from trimtab.recipe import recipe
from trimtab.recipe.fields import FormatName

LAYER = Layer(name="model.layers.0.mlp.down_proj", kind="linear", shape=(64, 128), grid=Grid(4, 32))


@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_compressed_tensors(tmp_path: Path, bits: int, zero: str, group: int | None) -> None:
    model = prepared(EMBEDDING, everywhere(bits=bits, zero=zero, group=group), method=LrQat(rank=4))
    shake(model)
    tt.fold(model)
    report = write(model, "compressed-tensors", tmp_path / "out")
    assert (report.kind, report.relative_error) == ("exact", 0.0)
    values = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(values)
    stored = tensors(tmp_path / "out")
    scheme = config.config_groups["group_0"]
    assert sorted(scheme.targets) == sorted(linears(model))
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    for name, layer in linears(model).items():
        parts = {k.removeprefix(f"{name}."): v for k, v in stored.items() if k.startswith(f"{name}.")}
        assert parts["weight_packed"].shape[1] == layer.in_features * bits // 32
        assert torch.equal(compressor.decompress(parts, scheme)["weight"], layer.dequantize(torch.bfloat16))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))


def test_three_bits_are_dense_words() -> None:
    codes = torch.arange(64, dtype=torch.uint8).view(1, 64) % 8
    range_ = Range(torch.ones(1, 1), None, None)
    from trimtab.formats.compressed_tensors.write import packed

    assert packed(codes, range_, Grid(3), torch.bfloat16)["weight_packed"].shape == (1, 6)


def test_mixed_widths(tmp_path: Path) -> None:
    rules: list[dict[str, Any]] = [
        {"match": "*.0.self_attn.*", "grid": {"bits": 8}},
        {"match": "*.0.mlp.down_proj", "grid": None},
        {"match": "*.0.mlp.*", "grid": {"bits": 3, "group": 32}},
        {"match": "*.1.self_attn.*", "grid": {"bits": 2, "group": 16}},
        everywhere(bits=4, group=64),
    ]
    model = prepared(*rules, tied=False)
    write(model, "compressed-tensors", tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert len(config["config_groups"]) == 4
    assert "model.layers.0.mlp.down_proj" in config["ignore"]
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


@pytest.mark.parametrize(
    ("grid", "cause", "remedy"),
    [
        (Grid(5, 32), "5 bits", "2, 3, 4 or 8 bits"),
        (Grid(4, 32, "real"), "zero that is real", "`zero: symmetric or integer`"),
        (Grid(4, 32, scale_dtype="float32"), "float32 scales", "portable or bfloat16"),
        (Grid(4, 32, scale_dtype="float16"), "float16 scales", "portable or bfloat16"),
        (CodebookGrid("nf4", 64), "nf4 g64", "affine grid"),
    ],
)
def test_refused_grids(grid: Any, cause: str, remedy: str) -> None:
    found = refusals(get("compressed-tensors"), [replace(LAYER, grid=grid)], torch.bfloat16)
    assert len(found) == 1
    assert found[0].layer == LAYER.name
    assert cause in found[0].cause
    assert remedy in found[0].remedy


def test_joined_layers_must_be_alike(tmp_path: Path) -> None:
    model = prepared({"match": "*.1.self_attn.v_proj", "grid": {"bits": 8}}, everywhere(bits=4, group=32))
    with pytest.raises(UserError, match=r"layers.1.self_attn.q_proj: vllm joins q_proj/k_proj/v_proj"):
        write(model, "compressed-tensors", tmp_path / "out")
    write(model, "compressed-tensors", tmp_path / "out", engine="transformers")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))
    with pytest.raises(UserError, match="llama"):
        write(model, "compressed-tensors", tmp_path / "other", engine="llama.cpp")
    report = write(model, "compressed-tensors", tmp_path / "lossy", allow_lossy=True)
    assert [name.rpartition(".")[2] for name in report.changed] == ["q_proj", "k_proj"]
    assert 0 < report.relative_error < 0.01


def test_layers_are_joined_only_where_all_parts_are_there(tmp_path: Path) -> None:
    """An MLP without a gate has an `up_proj`, too, and a gate of attention may be called `gate_proj`."""
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    config = ArceeConfig(**sizes, num_attention_heads=2, num_key_value_heads=2)
    model = tt.prepare(
        AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), Rtn(), [everywhere(bits=4, group=32)]
    )
    assert {layer.joined for layer in layers_of(model)} == {("q_proj", "k_proj", "v_proj"), ()}
    assert write(model, "compressed-tensors", tmp_path / "out").kind == "exact"


def test_one_engine_that_cannot(tmp_path: Path) -> None:
    model = prepared(everywhere(bits=3, group=32, zero="integer"))
    with pytest.raises(UserError, match=r"q_proj: has 3 bits, which vllm-cpu does not run .* use 4;.*and 13 more"):
        write(model, "compressed-tensors", tmp_path / "out", engine="vllm-cpu")
    report = write(model, "compressed-tensors", tmp_path / "out", engine="vllm-cpu", allow_lossy=True)
    assert {x.base.grid for x in linears(model).values()} == {Grid(4, 32, "integer")}
    assert len(report.changed) == 14


def test_integer_zeros_of_several_grids_have_no_engine_in_three_bits(tmp_path: Path) -> None:
    rules = [{"match": "*mlp*", "grid": {"bits": 3, "group": 32, "zero": "integer"}}, everywhere(bits=4, group=32)]
    with pytest.raises(UserError, match="in a model of several grids"):
        write(prepared(*rules), "compressed-tensors", tmp_path / "out")


def test_kept_adapters_are_refused_or_merged(tmp_path: Path) -> None:
    model = prepared(everywhere(bits=4, group=32), method=Qlora(rank=4))
    shake(model)
    with pytest.raises(UserError, match=r"q_proj: keeps an adapter .*; export to peft, or merge it"):
        write(model, "compressed-tensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    exact = {n: x.base.dequantize(torch.float32) + x.adapter.delta.dense() for n, x in linears(model).items()}
    report = write(model, "dense", tmp_path / "dense")
    stored = tensors(tmp_path / "dense")
    assert report.kind == "algebraic"
    assert 0 < report.relative_error < 4e-3
    assert all(torch.equal(stored[f"{n}.weight"], w.bfloat16()) for n, w in exact.items())
    report = write(model, "compressed-tensors", tmp_path / "out", allow_lossy=True)
    moved = sum((x.dequantize(torch.float32) - exact[n]).square().sum() for n, x in linears(model).items())
    assert report.relative_error == pytest.approx((moved / sum(w.square().sum() for w in exact.values())).sqrt().item())


ROUNDED = {"activations": tt.Activations(8)}, "8-bit dynamic asymmetric inputs"
KV = {"kv": tt.KvCache(4)}, "a KV cache of 4 bits"


@pytest.mark.parametrize(
    ("name", "asked", "words"),
    [
        *((name, *ROUNDED) for name in ("gptq", "awq", "gguf", "dense", "peft")),
        *((name, *KV) for name in ("compressed-tensors", "gptq", "awq", "gguf", "dense", "peft")),
    ],
)
def test_what_engines_would_leave_unrounded_is_refused(tmp_path: Path, name: str, asked: Any, words: str) -> None:
    model = prepared(everywhere(bits=4, group=32))
    tt.simulate(model, **asked)
    for lossy in (False, True):
        with pytest.raises(UserError, match=f"is trained with {words}, which {name} would leave unrounded"):
            write(model, name, tmp_path / "out", allow_lossy=lossy)
    assert not (tmp_path / "out").exists()


def test_unfolded_levels_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not folded yet"):
        write(prepared(everywhere(bits=4, group=32), method=LrQat(rank=4)), "dense", tmp_path / "out")


def test_dense_is_what_the_model_computes_with(tmp_path: Path) -> None:
    model = prepared(EMBEDDING, everywhere(codebook="nf4", group=32), method=QaHira())
    shake(model)
    tt.fold(model)
    report = write(model, "dense", tmp_path / "out", max_shard_size="20KB")
    assert report.kind == "exact"
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 3
    assert all(file.stat().st_size < 22_000 for file in (tmp_path / "out").glob("*.safetensors"))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_native_shards(tmp_path: Path) -> None:
    model = prepared(EMBEDDING, everywhere(bits=4, group=32))
    tt.save(model, tmp_path / "out", max_shard_size="20KB")
    assert manifest.verify(tmp_path / "out") > 3
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(model))


def test_verify_names_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(prepared(everywhere(bits=4, group=32)), "dense", folder, max_shard_size="20KB")
    assert manifest.verify(folder) == len(list(folder.iterdir())) - 1
    shard = next(iter(sorted(folder.glob("*.safetensors"))))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match=rf"{shard.name}: is not what was written"):
        manifest.verify(folder)
    shard.write_bytes(content)
    (folder / "stale.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"stale.safetensors: does not belong"):
        manifest.verify(folder)
    (folder / "stale.safetensors").unlink()
    shard.unlink()
    with pytest.raises(UserError, match=rf"{shard.name}: is missing"):
        manifest.verify(folder)
    (folder / "manifest.json").write_text("[]")
    with pytest.raises(UserError, match=r"manifest.json: holds no mapping"):
        manifest.verify(folder)


def test_a_killed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    model = prepared(everywhere(bits=4, group=32))
    write(model, "dense", tmp_path / "out")
    with pytest.raises(UserError, match="not empty; pass --overwrite"):
        write(model, "compressed-tensors", tmp_path / "out")
    monkeypatch.setattr(directory.Shards, "close", killed)
    with pytest.raises(KeyboardInterrupt):
        write(model, "compressed-tensors", tmp_path / "out", overwrite=True)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert manifest.verify(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        write(model, "compressed-tensors", tmp_path / "new")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    monkeypatch.undo()
    write(model, "compressed-tensors", tmp_path / "out", overwrite=True)
    assert "quantization_config" in (tmp_path / "out/config.json").read_text()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("keep")
    with pytest.raises(UserError, match="did not write"):
        write(model, "dense", tmp_path / "mine", overwrite=True)


def test_a_shard_size_is_checked_first(tmp_path: Path) -> None:
    model = prepared(everywhere(bits=4, group=32))
    for save in (
        lambda out: write(model, "dense", out, max_shard_size="big"),
        lambda out: tt.save(model, out, max_shard_size=0),
    ):
        with pytest.raises(UserError, match=r"max_shard_size: .* size"):
            save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_recipes_know_every_format() -> None:
    assert set(get_args(FormatName)) == {"same", *(format_.name for format_ in ALL)}
    with pytest.raises(UserError, match=r"did you mean 'dense'"):
        get("dence")


@pytest.mark.parametrize("format_", [f for f in ALL if f.forms], ids=lambda f: f.name)
def test_table_and_refusal_are_one(format_: declaration.Format) -> None:
    """A grid is taken exactly where some form names its bits and zero, and the table lists those bits."""
    for bits in range(1, 9):
        for zero in ("symmetric", "integer", "real"):
            layer = replace(LAYER, grid=Grid(bits, 64, zero))  # type: ignore[arg-type]
            named = any(bits in f.bits and zero in f.zeros for f in format_.forms)
            assert isinstance(format_.form(layer, torch.bfloat16), Form) is named
    row = table.table([format_])[0]
    tables = sorted({f.table for f in format_.forms if f.table is not None})
    bits = [str(b) for b in sorted({b for f in format_.forms for b in f.bits})]
    assert row[2].split() == [*bits, *tables]


def test_recipe_is_checked_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("read a tensor")

    monkeypatch.setattr(SafetensorsSource, "read", never)
    values = tiny.recipe(tiny.model(tmp_path / "m"), tiny.text(tmp_path / "t.jsonl"), tmp_path / "out")
    values |= {"rules": [everywhere(bits=3, group=32, zero="real")], "export": ["native", "compressed-tensors"]}
    with pytest.raises(
        UserError, match=r"export: compressed-tensors: .*q_proj: has 3-bit codes with a zero that is real"
    ):
        run(recipe.from_dict(values))
    values |= {"method": "qlora", "rules": None}
    with pytest.raises(UserError, match="keeps an adapter"):
        run(recipe.from_dict(values))
    with pytest.raises(AssertionError, match="read a tensor"):
        run(recipe.from_dict(values | {"export": ["dense"], "merge": True}))


def test_run_and_export(tmp_path: Path) -> None:
    """A recipe writes its formats; a saved model is exported again, lossy, with the perplexity that it costs."""
    values = tiny.recipe(tiny.model(tmp_path / "m"), tiny.text(tmp_path / "t.jsonl"), tmp_path / "out")
    values |= {"export": ["dense"], "rules": [everywhere(bits=3, group=32, zero="real")]}
    values["train"] |= {"steps": 2}
    run(recipe.from_dict(values))
    assert manifest.verify(tmp_path / "out")
    assert manifest.verify(tmp_path / "out/dense")
    with pytest.raises(UserError, match="zero that is real"):
        exporting.export(str(tmp_path / "out"), "compressed-tensors")
    options = exporting.Options(allow_lossy=True)
    report = exporting.export(str(tmp_path / "out"), "compressed-tensors", None, options)
    assert report.kind == "lossy"
    assert 0.01 < report.relative_error < 0.5
    assert set(report.perplexity) == {"before", "after"}
    assert report.perplexity["before"] != report.perplexity["after"]
    kept = json.loads((tmp_path / "out/compressed-tensors/export.json").read_text())
    assert kept["perplexity"] == report.perplexity
    with pytest.raises(UserError, match="was not saved by trimtab"):
        exporting.export(str(tmp_path / "m"), "dense")
