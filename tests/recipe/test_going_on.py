"""What a checkpoint may continue with another value of: declared by the fields of a recipe, looked at in all of them."""

import copy
import warnings
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

import tiny
from trimtab.errors import UserError
from trimtab.recipe import going_on
from trimtab.recipe.changing import Change
from trimtab.recipe.fields import FileMark, TrainBlock
from trimtab.recipe.going_on import changeable, check
from trimtab.recipe.recipe import Recipe, from_dict

MAY = {
    "version", "name", "output", "export", "merge", "model.device", "distill.cache", "data.eval_tokens", "data.num_proc",
    "train.steps", "train.epochs", "train.early_stop",
    "train.lr", "train.lr_scale", "train.schedule", "train.warmup", "train.betas", "train.weight_decay", "train.clip",
    "train.micro_batch", "train.processes", "train.shard", "train.activation_checkpointing", "train.offload_activations",
    "train.compile", "train.log_steps", "train.save_steps", "train.keep_checkpoints", "train.report_to",
    "evaluate.baselines", "evaluate.parity", "evaluate.parity_tokens", "evaluate.tasks", "evaluate.tasks_data",
    "evaluate.tasks_limit", "evaluate.prompt", "evaluate.answer_tokens",
}  # fmt: skip
BY_CONTENT = {
    "model.path", "model.adapter", "start.path", "data.path.0.path", "data.path.1.path", "data.eval_path", "data.template",
    "train.reference",
}  # fmt: skip


def recipe() -> Recipe:
    """With every block, and sources in a list."""
    blocks = {"activations": {"bits": 8}, "kv": {"bits": 8}, "distill": {}, "prune": {"ratio": 0.2}, "search": {}}
    made = tiny.recipe(Path("model"), Path("data.jsonl"), Path("out"), **blocks)
    made["data"]["path"] = [{"path": "a.jsonl", "columns": {"prompt": "question"}}, "b.jsonl"]
    return from_dict(made)


def with_another(value: Any) -> Iterator[tuple[list[str], Any, Any, Any]]:
    """Each key below a value, the value with another one there, and both."""
    inner: dict[Any, Any] = {}
    if isinstance(value, BaseModel):
        inner = {name: getattr(value, name) for name in type(value).model_fields if name != "inputs"}
    elif is_dataclass(value):
        inner = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, list | tuple) and value and (isinstance(value[0], BaseModel) or is_dataclass(value[0])):
        inner = dict(enumerate(value))
    if not inner:
        now = changed(value)
        yield [], now, value, now
        return
    for name, before in inner.items():
        for keys, now, was, is_ in with_another(before):
            made = copy.copy(value)
            if isinstance(value, BaseModel):
                made = value.model_copy(update={name: now})
            elif isinstance(value, list | tuple):
                made = type(value)(now if i == name else entry for i, entry in enumerate(value))
            else:
                object.__setattr__(made, name, now)
            yield [str(name), *keys], made, was, is_


def changed(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    if isinstance(value, str):
        return f"{value}-other"
    return "other" if value is None else (*value, "other") if isinstance(value, tuple) else ["other"]


@pytest.fixture(autouse=True)
def unchecked() -> Iterator[None]:
    """Values of other types than the fields', as no recipe has them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_every_field_of_a_recipe() -> None:
    before, seen = recipe(), set()
    for keys, now, was, is_ in with_another(before):
        key = ".".join(keys)
        seen.add(key)
        if key in MAY:
            check(before, now, "checkpoint-3")
            continue
        with pytest.raises(UserError) as refused:
            check(before, now, "checkpoint-3")
        said = str(refused.value)
        assert said.startswith(f"--resume: checkpoint-3 was trained by another recipe: {key}"), key
        assert str(is_ if not isinstance(is_, tuple) else is_[0]) in said, said
        assert "and was null" in said or "and was not set" in said if was is None else "and was" in said, said
        assert said.endswith("; set it back, or start over (--overwrite)")
    assert seen >= MAY
    assert {"method.rank", "rules.0.grid.bits", "rules.1.match", "train.seed", "train.batch_tokens", "data.block_tokens",
            "search.trials", "prune.ratio", "kv.bits", "data.path.1.weight", "data.path.0.columns"} <= seen  # fmt: skip
    declared = {key: changeable(key) for key in seen}
    assert {key for key, found in declared.items() if found is not None and not found.content} == MAY
    assert {key for key, found in declared.items() if found is not None and found.content} == BY_CONTENT


@pytest.mark.parametrize("key", sorted(BY_CONTENT))
def test_a_file_may_lie_elsewhere(key: str) -> None:
    """If it holds the same, by its hash."""
    before = recipe()
    now = next(made for keys, made, _, _ in with_another(before) if ".".join(keys) == key)
    marked = key.removesuffix(".path") if key.startswith("data.path.") else key
    same, other = ({marked: {"file": FileMark(bytes=3, sha256=sha)}} for sha in ("aa", "bb"))

    def read(recipe: Recipe, marks: Any) -> Recipe:
        return recipe.model_copy(update={"inputs": marks})

    check(read(before, same), read(now, same), "checkpoint-3")
    with pytest.raises(UserError, match=rf"{key} is .*other'?, and was "):
        check(read(before, same), read(now, other), "checkpoint-3")
    with pytest.raises(UserError, match=rf"--resume: {marked}: file has changed since the run began"):
        check(read(before, same), read(before, other), "checkpoint-3")


def test_a_block_and_a_method_that_come_or_go() -> None:
    before = recipe()
    for update, said in (
        ({"distill": None}, "distill is null, and was {'weight': 0.5"),
        ({"rules": None}, "rules is null, and was"),
        ({"rules": before.rules[:1]}, "rules is .*, and was"),  # type: ignore[index]
        ({"method": from_dict({**minimal(), "method": "peqa"}).method}, "method.name is 'peqa', and was 'lr-qat'"),
    ):
        with pytest.raises(UserError, match=said):
            check(before, before.model_copy(update=update), "checkpoint-3")
    check(before, before.model_copy(), "checkpoint-3")


def minimal() -> dict[str, Any]:
    return tiny.recipe(Path("model"), Path("data.jsonl"), Path("out"))


def test_a_new_field_may_not_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until it says that it may."""

    class Train(TrainBlock):
        warmth: float = 0.5
        colour: str = Field(default="red")

    class Wider(Recipe):
        train: Train = Train()
        flavour: str = "plain"

    monkeypatch.setattr(going_on, "Recipe", Wider)
    assert [
        changeable(key) for key in ("train.warmth", "train.colour", "flavour", "train", "nothing", "train.nothing")
    ] == [None] * 6
    assert isinstance(changeable("train.steps"), Change)


def test_the_guide_lists_what_may_change() -> None:
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    part = guide.partition("## Resuming")[2].partition("\n## ")[0]
    for key in MAY - {key for key in MAY if key.startswith("evaluate.")} | {"evaluate"}:
        assert f"`{key}`" in part, key


def streams(steps: int, limit: int, **train: Any) -> Recipe:
    made = tiny.recipe(Path("model"), Path("data.jsonl"), Path("out"))
    made["data"] |= {"streaming": True, "limit": limit}
    made["train"] |= {"steps": steps, **train}
    return from_dict(made)


def test_other_steps_of_a_stream_are_named_by_what_was_set() -> None:
    """Nobody has set the number of its rows."""
    before = streams(10, 70)
    with pytest.raises(UserError, match=r"train\.steps: checkpoint-5 was trained on 70 rows, .* 20 steps take 140, .*; set "
                       r"data\.limit=70 to see those again, set train\.steps=10, or start over"):  # fmt: skip
        check(before, streams(20, 140), "checkpoint-5")
    with pytest.raises(UserError, match=r"8 steps take 56, in another order; set train\.steps=10, or start over"):
        check(before, streams(8, 56), "checkpoint-5")
    check(before, streams(20, 70), "checkpoint-5")
    with pytest.raises(UserError, match=r"data\.limit is 140, and was 70; train\.seed is 7"):
        check(before, streams(20, 140, seed=7), "checkpoint-5")
