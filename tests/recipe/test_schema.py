"""The JSON schema of recipes, held to every recipe of the documentation by a validator that is not ours; and versions."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
from trimtab import methods
from trimtab.errors import UserError
from trimtab.recipe import recipe as recipes
from trimtab.recipe import versions
from trimtab.recipe.recipe import Recipe, as_recipe, from_dict
from trimtab.recipe.schema import schema

ROOT = Path(__file__).parents[2]
BASE: dict[str, Any] = {"model": {"path": "a"}, "method": "lr-qat", "data": "b"}


@pytest.fixture(scope="module")
def refused() -> Any:
    """Whether a validator refuses values."""
    jsonschema = pytest.importorskip("jsonschema", reason="a part of trimtab[dev]")
    validator = jsonschema.Draft202012Validator(schema())
    validator.check_schema(schema())
    return lambda values: not validator.is_valid(json.loads(json.dumps(values)))


def written() -> list[dict[str, Any]]:
    """Every recipe of the documentation and the examples."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    blocks = [b for page in pages for b in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)]
    blocks += [file.read_text() for file in (ROOT / "examples" / "recipes").glob("*.yaml")]
    return [{**BASE, **yaml.safe_load(block)} for block in [*blocks, recipes.EXAMPLE]]


def test_every_written_recipe_is_taken(refused: Any) -> None:
    found = written()
    assert len(found) > 20
    assert [values for values in found if refused(values)] == []


@pytest.mark.parametrize("name", [method.name for method in methods.ALL])
def test_a_resolved_recipe_is_taken(name: str, refused: Any) -> None:
    more = {"train": {"steps": 0}} if name == "rtn" else {}
    assert not refused(yaml.safe_load(from_dict({**BASE, "method": name, **more}).to_yaml()))


@pytest.mark.parametrize(
    "change",
    [
        {"trian": {}},
        {"train": {"stepz": 3}},
        {"train": {"steps": -1}},
        {"train": {"objective": "ppo"}},
        {"method": "lr-qta"},
        {"method": {"name": "qlora", "svd": True}},
        {"method": {"rank": 3}},
        {"rules": [{"match": "*"}]},
        {"rules": [{"match": "*", "grid": {"bitz": 3}}]},
        {"rules": [{"match": "*", "grid": {"kquant": "q7_k"}}]},
        {"data": []},
        {"export": ["onnx"]},
    ],
)
def test_what_a_recipe_refuses_the_schema_refuses(change: dict[str, Any], refused: Any) -> None:
    assert refused({**BASE, **change})
    with pytest.raises(UserError):
        from_dict({**BASE, **change})


@pytest.mark.parametrize("grid", [None, "same", "float", {"kquant": "q4_k"}, {"bits": 4, "group": "channel"}])
def test_every_form_of_a_grid_is_taken(grid: Any, refused: Any) -> None:
    values = {**BASE, "rules": [{"match": "*", "grid": grid}]}
    from_dict(values)
    assert not refused(values)


def test_every_field_is_explained() -> None:
    made = schema()
    assert set(made["properties"]) == set(Recipe.model_fields)
    for kind in made["$defs"].values():
        assert [
            key for key, value in kind["properties"].items() if not value.get("description") and "$ref" not in value
        ] == []


def test_the_command_prints_it() -> None:
    done = subprocess.run([sys.executable, "-m", "trimtab", "recipe", "--schema"], capture_output=True, check=True)
    assert json.loads(done.stdout) == schema()


# ---- versions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [0, -1, "1", True, None])
def test_what_is_no_version(version: Any) -> None:
    with pytest.raises(UserError, match=r"version: .* leave it out, or write 1"):
        from_dict({**BASE, "version": version})


def test_a_newer_recipe_is_refused(tmp_path: Path) -> None:
    path = tiny.write(tmp_path / "a.yaml", {**BASE, "version": versions.VERSION + 1})
    with pytest.raises(UserError, match=r"a\.yaml: version: .* install a newer trimtab"):
        as_recipe(path)


def test_an_older_recipe_is_migrated_before_its_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if version 2 had renamed `updates` to `train.steps`, and version 3 had doubled what it counts."""

    def renamed(values: dict[str, Any]) -> dict[str, Any]:
        return {"train": {"steps": values.pop("updates")}, **values}

    def doubled(values: dict[str, Any]) -> dict[str, Any]:
        return {**values, "train": {"steps": 2 * values["train"]["steps"]}}

    monkeypatch.setattr(versions, "VERSION", 3)
    monkeypatch.setattr(versions, "MIGRATIONS", (renamed, doubled))
    old = {**BASE, "updates": 7}
    path = tiny.write(tmp_path / "old.yaml", old)
    assert from_dict(old).train.steps == 14
    assert as_recipe(path).train.steps == as_recipe(old).train.steps == 14
    assert as_recipe(path, ["train.steps=5"]).train.steps == as_recipe(old, ["train.steps=5"]).train.steps == 5
    assert from_dict({**BASE, "version": 2, "train": {"steps": 4}}).train.steps == 8
    assert "updates" in old
    resolved = as_recipe(path)
    assert resolved.version == 3
    assert from_dict(yaml.safe_load(resolved.to_yaml())).train.steps == 14
