"""What is kept is of what was read, not of where that lay: edited in place it is stale, moved it is the same."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import tiny
from trimtab.bit_search.searching import Search
from trimtab.data.sources import Source
from trimtab.errors import UserError
from trimtab.models import contents
from trimtab.pipeline.pruned import pruned
from trimtab.pruning.checkpoint import made_from
from trimtab.recipe import recipe
from trimtab.recipe.recipe import Recipe

PRUNE = {"ratio": 0.3, "multiple_of": 32, "tokens": 64, "block_tokens": 32}
SEARCH = {"bits": [2, 4], "trials": 1, "tokens": 64, "sensitivity_tokens": 64}


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A model, data, held-out data, calibration data and a template, all in one folder."""
    tiny.model(tmp_path / "at" / "model", template=None)
    for name in ("data", "held", "start"):
        tiny.text(tmp_path / "at" / f"{name}.jsonl", 30)
    (tmp_path / "at" / "chat.jinja").write_text(tiny.TEMPLATE)
    return tmp_path / "at"


def made(at: Path, output: Path, **blocks: Any) -> Recipe:
    return recipe.from_dict(
        tiny.recipe(
            at / "model",
            at / "data.jsonl",
            output,
            data={"eval_path": str(at / "held.jsonl"), "template": str(at / "chat.jinja")},
            start={"name": "gptq", "path": str(at / "start.jsonl"), "tokens": 64},
            **blocks,
        )
    )


def other_weights(file: Path) -> None:
    tensors = load_file(file)
    save_file({name: tensor + 0.01 for name, tensor in tensors.items()}, file, {"format": "pt"})


def other_rows(file: Path) -> None:
    file.write_text(file.read_text().replace("plus", "and"))  # of the same number


def other_text(file: Path) -> None:
    file.write_text(file.read_text() + " ")


PRUNED: dict[str, tuple[Callable[[Path], None], str]] = {
    "model/model.safetensors": (other_weights, r"model: model\.safetensors has changed"),
    "model/config.json": (other_text, r"model: config\.json has changed"),
    "model/tokenizer_config.json": (other_text, r"model: tokenizer_config\.json has changed"),
    "data.jsonl": (other_rows, r"calibration: text: source 0: from: file\.jsonl has changed"),
    "chat.jinja": (other_text, r"calibration: text: template has changed"),
}


@pytest.mark.parametrize("name", PRUNED)
def test_a_pruned_model_is_of_what_its_base_and_text_held(there: Path, tmp_path: Path, name: str) -> None:
    before = pruned(made(there, tmp_path / "out", prune=PRUNE)).model.path
    changed, said = PRUNED[name]
    moved = shutil.move(there, tmp_path / "moved")
    assert pruned(made(moved, tmp_path / "out", prune=PRUNE)).model.path == before
    changed(moved / name)
    with pytest.raises(UserError, match=f"out/pruned was pruned from another model, .*: {said}; remove it"):
        pruned(made(moved, tmp_path / "out", prune=PRUNE))


def test_other_options_of_pruning_are_named(there: Path, tmp_path: Path) -> None:
    pruned(made(there, tmp_path / "out", prune=PRUNE))
    for changes, said in (
        ({"ratio": 0.4}, "options: ratio is 0.4, and was 0.3"),
        ({"tokens": 96}, "calibration: tokens is 96"),
    ):
        with pytest.raises(UserError, match=said):
            pruned(made(there, tmp_path / "out", prune=PRUNE | changes))
    file = tmp_path / "out/pruned/pruning.json"
    file.write_text(file.read_text().replace('"model": {', '"models": {'))
    assert made_from(file.parent) is not None
    with pytest.raises(UserError, match="an earlier version made it"):
        pruned(made(there, tmp_path / "out", prune=PRUNE))


def test_without_text_a_pruned_model_is_of_its_base_alone(there: Path, tmp_path: Path) -> None:
    block = {"ratio": 0.3, "multiple_of": 32, "importance": "magnitude"}
    before = pruned(made(there, tmp_path / "out", prune=block)).model.path
    other_rows(there / "data.jsonl")
    assert pruned(made(there, tmp_path / "out", prune=block)).model.path == before


STUDIED: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "model/model.safetensors": (other_weights, "what model.path holds", "rounded"),
    "data.jsonl": (other_rows, "what its data hold", "rounded"),
    "held.jsonl": (other_rows, "what its data hold", "rounded"),
    "chat.jinja": (other_text, "what its data hold", "rounded"),
    "start.jsonl": (other_rows, "start, distill, activations or kv", "tuned"),
}


@pytest.mark.parametrize("name", STUDIED)
def test_a_study_is_of_what_its_recipe_reads(there: Path, tmp_path: Path, name: str) -> None:
    changed, said, objective = STUDIED[name]
    block = SEARCH | {"objective": objective, "storage": str(tmp_path / "study.log")}
    Search(made(there, tmp_path / "out", search=block))
    moved = shutil.move(there, tmp_path / "moved")
    Search(made(moved, tmp_path / "out", search=block))
    changed(moved / name)
    with pytest.raises(UserError, match=f"was begun with other values of: {said};"):
        Search(made(moved, tmp_path / "out", search=block))


def test_a_file_is_what_it_holds_whatever_it_is_called(there: Path) -> None:
    shutil.copy(there / "data.jsonl", there / "other.jsonl")
    shutil.copy(there / "data.jsonl", there / "data.json")
    data, other, json = (
        contents.of_text(Source(str(there / name))) for name in ("data.jsonl", "other.jsonl", "data.json")
    )
    assert data == other
    assert data != json  # which is read otherwise
    assert contents.of_text(Source(str(there / "data.jsonl"), limit=3)) != data


def test_a_difference_is_named_as_deep_as_both_have_it() -> None:
    hashed = "a" * 64
    for now, said in (
        ({"a": {"b": 1}}, ""),
        ({"a": {"b": 2}}, "a: b is 2, and was 1"),
        ({"a": {}}, "a: b is gone"),
        ({"a": {"b": 1, "c": 1}}, "a: c was added"),
        ({"a": {"b": 1}, "d": {}}, "d was added"),
        ({"a": hashed}, "a has changed"),
        ({"a": None}, "a is None, and was {'b': 1}"),
    ):
        assert contents.change({"a": {"b": 1}}, now) == said
