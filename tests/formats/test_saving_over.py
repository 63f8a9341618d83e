"""Saving and exporting into folders that hold something: never over the base, and never over what is not ours."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import exported
import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.methods import Rtn

RULES = [exported.EMBEDDING, exported.everywhere(bits=4, group=32)]


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float model, `float`, and the same quantized and saved, `saved`."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "float")
    tt.save(*_swapped(tt.load(str(folder / "float"), Rtn(), RULES), folder / "saved"))
    return folder


def _swapped(loaded: tuple[Any, Any], path: Path) -> tuple[Any, Path, Any]:
    return loaded[0], path, loaded[1]


@pytest.mark.parametrize("how", ["load", "from_pretrained"])
@pytest.mark.parametrize("base", ["float", "saved"])
def test_the_base_is_not_saved_over(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: str, how: str
) -> None:
    """`save` into the directory that the model was read from: by whatever name, from whatever directory."""
    shutil.copytree(given / base, tmp_path / "base")
    (tmp_path / "link").symlink_to(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    if how == "load":
        model, _ = tt.load("base", Rtn(), None if base == "saved" else RULES)
    else:
        model = AutoModelForCausalLM.from_pretrained("base")
        model = model if base == "saved" else tt.prepare(model, Rtn(), RULES)
    before = listing(tmp_path / "base")
    if base == "saved" or how == "load":
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    for name in (tmp_path / "base", tmp_path / "link", tmp_path / "elsewhere/../base", tmp_path):
        with pytest.raises(UserError, match="the model was read from there"):
            tt.save(model, name)
    assert listing(tmp_path / "base") == before


def test_a_save_replaces_our_own_and_nothing_else(given: Path, tmp_path: Path) -> None:
    model, tokenizer = tt.load(str(given / "float"), Rtn(), RULES)
    out = tmp_path / "out"
    tt.save(model, out, tokenizer, max_shard_size=20_000)
    assert len(list(out.glob("*.safetensors"))) > 1
    tt.save(model, out, tokenizer)
    assert [f.name for f in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert manifest.verify(out)
    (out / "thesis.txt").write_text("mine")
    (out / "adapter_model.safetensors").write_text("mine")
    before = listing(out)
    with pytest.raises(UserError, match=r"holds adapter_model\.safetensors, thesis\.txt, which trimtab did not write"):
        tt.save(model, out, tokenizer)
    assert listing(out) == before
    other = shutil.copytree(given / "float", tmp_path / "other")
    with pytest.raises(UserError, match=r"holds chat_template\.jinja, .* and 3 more, which trimtab"):
        tt.save(model, other, tokenizer)
    assert listing(other) == listing(given / "float")


def test_an_export_replaces_exports_only(given: Path, tmp_path: Path) -> None:
    """Not the saved model that it was made from, not another one, not an export that the model was made of."""
    saved = shutil.copytree(given / "saved", tmp_path / "saved")
    other = shutil.copytree(given / "saved", tmp_path / "other")
    tt.export(str(saved), "dense", tmp_path / "dense")
    for out, complaint in (
        (saved, "is in the output directory|was read from there|holds a saved model"),
        (other, "holds a saved model, which is not replaced by an export"),
        (tmp_path, "holds .*, which trimtab did not write"),
    ):
        before = listing(tmp_path)
        with pytest.raises(UserError, match=complaint):
            tt.export(str(saved), "dense", out, overwrite=True)
        assert listing(tmp_path) == before
    with pytest.raises(UserError, match="holds an export, which is not replaced by a saved model"):
        tt.save(tt.load(str(saved))[0], tmp_path / "dense")
    tt.export(str(saved), "native", tmp_path / "native")
    with pytest.raises(UserError, match="the model was read from there"):
        tt.export(str(tmp_path / "native"), "native", tmp_path / "native", overwrite=True)
    tuned = tt.load(str(tmp_path / "dense"), Rtn(), RULES)[0]
    recipe = tiny.recipe(tmp_path / "dense", tmp_path / "none", tmp_path / "tuned")
    tt.save(tuned, tmp_path / "tuned", recipe=tiny.write(tmp_path / "r.yaml", recipe).read_text())
    with pytest.raises(UserError, match=r"model\.path: .*dense is in the output directory"):
        tt.export(str(tmp_path / "tuned"), "dense", tmp_path / "dense", overwrite=True)
    tt.export(str(saved), "dense", tmp_path / "dense", overwrite=True)


def test_an_export_into_a_saved_folder_is_listed(given: Path, tmp_path: Path) -> None:
    """So that what replaces the model takes it along, and finds nothing strange in it."""
    saved = shutil.copytree(given / "saved", tmp_path / "saved")
    tt.export(str(saved), "dense")
    assert not manifest.keeps(saved, "model")
    assert tt.verify(saved)
    assert tt.verify(saved / "dense")
    (saved / "dense" / "card.md").write_text("mine")
    assert "dense/card.md" in manifest.keeps(saved, "model")
