"""YAML from an untrusted source: the values that stand there, and no bomb."""

from typing import Any

import pytest
import yaml

from trimtab.errors import UserError
from trimtab.recipe import yaml_text

KEYS = "abcdefghi"


def doubled(times: int, each: int) -> str:
    """Aliases of aliases: `each` to the power of `times` values."""
    names = [f"k{i}" for i in range(times)]
    lines = [
        f"{name}: &{name} [{', '.join([f'*{before}'] * each)}]"
        for before, name in zip(["k", *names], names, strict=False)
    ]
    return "\n".join(["k: &k x", *lines])


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [x, 2.5, null, true, 2026-01-31]\nc: {d: 'e'}",
        "base: &base {x: 1, y: [2, 3]}\none: *base\ntwo: {<<: *base, x: 2}\nthree: [*base, *base]",
        "",
        "[" * 60 + "]" * 60,
        doubled(5, 10),
    ],
)
def test_it_is_what_yaml_says(text: str) -> None:
    assert yaml_text.load(text, "here") == yaml.safe_load(text)
    assert yaml_text.load(text.encode(), "here") == yaml.safe_load(text)


BAD: dict[str, tuple[str, str]] = {
    "aliases for ten to the ninth": (doubled(9, 10), "aliases that stand for too many"),
    "aliases in one another": (doubled(200, 1), "aliases that stand for too many"),
    "holds itself": ("a: &a [1, *a]", "inside of what it stands for"),
    "a mapping that holds itself": ("&a {b: *a}", "inside of what it stands for"),
    "deep": ("[" * 70 + "]" * 70, "more than 64 levels"),
    "very deep": ("{a: " * 50_000, "more than 64 levels"),
    "a long integer": ("a: " + "1" * 5000, "4300 digits"),
    "a date that is none": ("a: 2026-13-45", "month must be"),
    "a timestamp that is none": ("a: !!timestamp x", "does not fit its tag"),
    "an integer that is none": ("a: !!int x", "invalid literal"),
    "code": ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    "a key that is a list": ("{[1]: 2}", "unhashable"),
    "two documents": ("a: 1\n---\nb: 2", "line 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_it_is_refused_by_name(name: str) -> None:
    text, said = BAD[name]
    with pytest.raises(UserError, match=rf"here: not valid YAML: .*{said}"):
        yaml_text.load(text, "here")


def test_a_book_is_no_recipe() -> None:
    with pytest.raises(UserError, match="here: has 5,000,000 bytes"):
        yaml_text.load("x" * 5_000_000, "here")


def test_an_override_is_read_by_the_same() -> None:
    from trimtab.recipe.recipe import from_dict

    values: dict[str, Any] = {"model": {"path": "x"}, "method": "rtn", "train": {"steps": 0}}
    assert from_dict(values).train.steps == 0
    from trimtab.recipe.recipe import as_recipe

    with pytest.raises(UserError, match=r"train\.steps: '1111.* is not a YAML value"):
        as_recipe(values, ["train.steps=" + "1" * 5000])
