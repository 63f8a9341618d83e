"""Recipes: YAML there and back, overrides, types, defaults of the methods, and an explanation of every field."""

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from trimtab import methods
from trimtab.errors import UserError
from trimtab.layers import rates
from trimtab.methods import LrQat, Method, QaHira, Rtn
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe import explain, recipe
from trimtab.recipe.recipe import Recipe, from_dict, read
from trimtab.recipe.rules import Rule

SHORT: dict[str, Any] = {"model": {"path": "m"}, "method": "lr-qat", "data": {"path": "d.jsonl"}}
FULL: dict[str, Any] = {
    "name": "full",
    "model": {"path": "m", "dtype": "float32"},
    "method": {"name": "q-blora", "rank": 4, "alpha": 2.5, "k": 4, "mean": False, "adapter_dtype": "float32"},
    "rules": [
        {"match": "model.embed_tokens", "grid": {"bits": 8, "group": "channel", "scale_dtype": "float16"}},
        {"match": "*.down_proj", "grid": None},
        {"match": "*.up_proj", "grid": "float"},
        {"match": "*.q_proj", "grid": {"codebook": "nf3", "double_quant": True}},
        {"match": "*", "grid": {"bits": 3, "group": 32, "zero": "integer", "range": "lp2.4"}},
    ],
    "data": {"path": "d.jsonl", "block_tokens": 64, "packing": "bfd", "eval_path": "e.jsonl", "eval_tokens": 640},
    "train": {"steps": 5, "batch_tokens": 256, "micro_batch": 2, "lr": 0.003, "lr_scale": 0, "betas": [0.8, 0.9]},
    "evaluate": {"baselines": ["float", "rounded"], "prompt": 'Hi: "you"', "answer_tokens": 3},
    "merge": True,
    "output": "somewhere/else",
}


def resolved(parsed: Recipe) -> Recipe:
    """As it reads when its defaults are written out."""
    return parsed.model_copy(update={"output": str(parsed.out)})


@pytest.mark.parametrize("values", [SHORT, FULL], ids=["short", "full"])
def test_yaml_there_and_back(tmp_path: Path, values: dict[str, Any]) -> None:
    first = from_dict(values)
    file = tmp_path / "other.yaml"
    file.write_text(first.to_yaml())
    second = read(file)
    assert second.model_dump() == resolved(first).model_dump()
    assert second.to_yaml() == first.to_yaml()
    # What a run read is written by the run, where there is something to write.
    assert list(yaml.safe_load(first.to_yaml())) == [name for name in Recipe.model_fields if name != "inputs"]


@pytest.mark.parametrize("bits", [None, 2, 3])
def test_the_rule_for_all_layers_decides_whether_rates_fall(bits: int | None) -> None:
    grid = None if bits is None else {"bits": bits, "group": 32}
    rules = [{"match": "*.down_proj", "grid": {"bits": 2, "group": 32}}, {"match": "*", "grid": grid}]
    assert from_dict({**SHORT, "train": {"steps": 400}, "rules": rules}).rates == rates.default("levels", 400, bits)


def test_rates_are_written_down_where_they_were_used() -> None:
    """Until then another number of steps has others."""
    short = from_dict({**SHORT, "train": {"steps": 400}})
    assert recipe.as_recipe(short, ["train.steps=100"]).rates == rates.default("levels", 100)
    kept = from_dict(yaml.safe_load(short.with_its_rates().to_yaml()))
    assert (kept.train.lr, kept.train.lr_scale, kept.train.parametrization) == (*short.rates, "relative")
    assert recipe.as_recipe(kept, ["train.steps=100"]).rates == short.rates


def test_what_a_full_recipe_holds() -> None:
    full = from_dict(FULL)
    assert full.method == methods.QBara(rank=4, alpha=2.5, k=4, mean=False, adapter_dtype="float32")
    assert full.rules == [
        Rule("model.embed_tokens", Grid(8, None, "symmetric", "float16")),
        Rule("*.down_proj", None),
        Rule("*.up_proj", "float"),
        Rule("*.q_proj", CodebookGrid("nf3", 64, True)),
        Rule("*", Grid(3, 32, "integer", range="lp2.4")),
    ]
    assert (full.dtype, full.out, *full.rates) == (torch.float32, Path("somewhere/else"), 0.003, 0)
    assert full.train.betas == (0.8, 0.9)


@pytest.mark.parametrize("method", methods.ALL, ids=lambda m: m.name)
def test_every_method_there_and_back(tmp_path: Path, method: type[Method]) -> None:
    """By its name alone it has the dataclass's defaults, and its own learning rates."""
    parsed = from_dict({**SHORT, "method": method.name, "train": {"steps": 0 if method is Rtn else 8}})
    assert parsed.method == method()
    assert parsed.rates == rates.default(method.kind, parsed.train.steps)
    paper = from_dict({**SHORT, "method": method.name, "train": {"steps": 0, "parametrization": "paper"}})
    assert tuple(paper.rates) == (method.lr, method.lr_scale)
    file = tmp_path / "r.yaml"
    file.write_text(parsed.to_yaml())
    assert read(file).method == method()
    written = yaml.safe_load(parsed.to_yaml())["method"]
    assert written == {"name": method.name, **{f.name: f.default for f in fields(method)}}


def test_defaults() -> None:
    short = from_dict(SHORT)
    assert (short.method, short.rules, short.out) == (LrQat(rank=32, alpha=1.0), None, Path("runs/run"))
    assert (short.parametrization, short.train.clip, short.train.warmup) == ("relative", 1.0, 0.1)
    assert from_dict({**SHORT, "method": QaHira(repeat=2)}).method == QaHira(repeat=2)
    own = from_dict({**SHORT, "train": {"lr": 0.5, "lr_scale": 0.25}})
    assert (*own.rates, own.parametrization) == (0.5, 0.25, "paper")
    half = from_dict({**SHORT, "train": {"lr_scale": 0.25}})
    assert (*half.rates, half.parametrization) == (LrQat.lr, 0.25, "paper")
    share = from_dict({**SHORT, "train": {"lr": 0.5, "parametrization": "relative"}})
    assert share.rates == (0.5, rates.default("levels", share.train.steps).scale)


def test_name_is_the_file(tmp_path: Path) -> None:
    file = tmp_path / "my-run.yaml"
    file.write_text(yaml.safe_dump(SHORT))
    assert read(file).out == Path("runs/my-run")
    assert read(file, ["name=other"]).out == Path("runs/other")
    assert read(file, ["output=there"]).out == Path("there")


OVERRIDES: dict[str, tuple[str, Any]] = {
    "train.steps=10": ("train.steps", 10),
    "train.lr=1e-3": ("train.lr", 1e-3),  # a string to YAML 1.1, which wants 1.0e-3
    "train.lr=null": ("train.lr", None),
    "merge=true": ("merge", True),
    "name=a=b": ("name", "a=b"),
    "data.eval_path=x.jsonl": ("data.eval_path", "x.jsonl"),
    "evaluate.prompt=": ("evaluate.prompt", None),
    "evaluate={parity: false}": ("evaluate.parity", False),
    "method.rank=7": ("method.rank", 7),
    "method={name: qa-hira, repeat: 2}": ("method.repeat", 2),
    "method.adapter_dtype=float32": ("method.adapter_dtype", "float32"),
}


@pytest.mark.parametrize(("override", "expected"), OVERRIDES.items(), ids=OVERRIDES)
def test_overrides(tmp_path: Path, override: str, expected: tuple[str, Any]) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(SHORT))
    found: Any = read(file, [override])
    for part in expected[0].split("."):
        found = getattr(found, part)
    assert found == expected[1]


def test_overrides_of_lists_and_their_order(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump({**SHORT, "rules": FULL["rules"]}))
    changed = read(file, ["rules.4.grid.bits=2", "rules.1={match: lm_head, grid: float}", "rules.4.grid.group=null"])
    assert changed.rules is not None
    assert changed.rules[4] == Rule("*", Grid(2, None, "integer", range="lp2.4"))
    assert changed.rules[1] == Rule("lm_head", "float")
    assert read(file, ["train.steps=1", "train.steps=2"]).train.steps == 2
    assert read(file, ["rules=null"]).rules is None


WRONG_TYPES: dict[str, tuple[dict[str, Any], str]] = {
    "steps": ({"train": {"steps": "many"}}, "train.steps: .*'many'"),
    "fraction of a step": ({"train": {"steps": 1.5}}, "train.steps: .*1.5"),
    "negative": ({"train": {"steps": -1}}, "train.steps: .*-1"),
    "rate": ({"train": {"lr": "fast"}}, "train.lr: .*'fast'"),
    "rate of nothing": ({"train": {"lr": 0}}, "train.lr: .*greater than 0"),
    "warm-up": ({"train": {"warmup": 1}}, "train.warmup: .*less than 1"),
    "schedule": ({"train": {"schedule": "lineer"}}, "train.schedule: .*'linear', 'cosine' or 'constant'"),
    "dtype": ({"model": {"path": "m", "dtype": "int8"}}, "model.dtype: .*'bfloat16'"),
    "path": ({"model": {"path": 3}}, "model.path: .*string"),
    "block": ({"train": 3}, "train: .*3"),
    "merge": ({"merge": "maybe"}, "merge: .*'maybe'"),
    "rank": ({"method": {"name": "lr-qat", "rank": "big"}}, "method.rank: .*'big'"),
    "no rank": ({"method": {"name": "lr-qat", "rank": None}}, "method.rank: .*None"),
    "storage": ({"method": {"name": "lr-qat", "storage": "int4"}}, "method.storage: .*'fixed8'"),
    "method": ({"method": ["lr-qat"]}, "method: .*is not a method"),
    "bits": ({"rules": [{"match": "*", "grid": {"bits": "4"}}]}, r"rules\[0\].grid.bits: '4' is not a whole number"),
    "bits in range": ({"rules": [{"match": "*", "grid": {"bits": 9}}]}, r"rules\[0\].grid: .*between 1 and 8"),
    "yes": ({"rules": [{"match": "*", "grid": {"bits": True}}]}, r"rules\[0\].grid.bits: True"),
    "zero": ({"rules": [{"match": "*", "grid": {"zero": "rael"}}]}, r"rules\[0\].grid: .*symmetric, integer, real"),
    "codebook": ({"rules": [{"match": "*", "grid": {"codebook": "nf9"}}]}, r"rules\[0\].grid: .*nf4, nf3, nf2, fp4"),
    "double": (
        {"rules": [{"match": "*", "grid": {"codebook": "nf4", "double_quant": "maybe"}}]},
        r"rules\[0\].grid.double_quant: 'maybe'",
    ),
    "grid": ({"rules": [{"match": "*", "grid": 4}]}, r"rules\[0\].grid: 4 is not a grid; write"),
    "pattern": ({"rules": [{"match": 4, "grid": None}]}, r"rules\[0\].match: 4 is not a pattern"),
    "rule": ({"rules": [{"match": "*"}]}, r"rules\[0\]: .*exactly the keys match and grid, not match"),
    "rules": ({"rules": "all"}, "rules: 'all' is not a list"),
}


@pytest.mark.parametrize(("changes", "complaint"), WRONG_TYPES.values(), ids=WRONG_TYPES)
def test_wrong_types_name_the_key(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"^recipe: {complaint}") as caught:
        from_dict({**SHORT, **changes})
    assert "\n" not in str(caught.value)


def test_batches_are_checked_only_for_training() -> None:
    odd = {"batch_tokens": 1000}
    with pytest.raises(UserError, match="batch_tokens"):
        from_dict({**SHORT, "train": odd})
    assert from_dict({**SHORT, "train": {**odd, "steps": 0}})


def test_the_example(tmp_path: Path) -> None:
    file = tmp_path / "example.yaml"
    file.write_text(recipe.EXAMPLE)
    example = read(file)
    assert example.method == LrQat(rank=32, alpha=1.0)
    assert example.rules is not None
    assert example.rules[1] == Rule("*", Grid(4, 64))


def test_the_explanation_mentions_every_field() -> None:
    """With its help below it, and under its own heading."""
    lines = explain.explanation().splitlines()
    keys = {}
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip().startswith("#") or not line.strip():
            continue
        keys[line.partition(":")[0]] = below.strip()
    for name, field in Recipe.model_fields.items():
        assert name in keys
        block = field.annotation if isinstance(field.annotation, type) else None
        block = recipe.DataBlock if name == "data" else block
        for key in getattr(block, "model_fields", {}):
            assert len(keys[f"  {key}"].removeprefix("# ")) > 10
    for cls in (Grid, CodebookGrid, *methods.ALL):
        for option in fields(cls):
            assert keys[f"  {option.name}"].startswith("# "), (cls, option.name)
    for method in methods.ALL:
        assert any(method.name in line and method.summary in line for line in lines)
    assert "  steps: 1000" in lines
