"""A recipe's data block: what it may say, the rows that it names, and that a saved recipe names them for good."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import huggingface_hub
import pytest
import yaml

import tiny
from trimtab.data.objectives import answers
from trimtab.data.sources import Source
from trimtab.errors import UserError
from trimtab.models import located
from trimtab.recipe import inputs, texts
from trimtab.recipe.fields import DataBlock, StartBlock
from trimtab.recipe.recipe import Recipe, from_dict, read


def recipe_of(folder: Path, data: Any, **changes: Any) -> Recipe:
    values = tiny.recipe(folder / "model", folder / "rows.jsonl", folder / "run", **changes)
    return from_dict({**values, "data": data})


def file_of(folder: Path, name: str = "rows.jsonl", count: int = 3) -> str:
    return str(tiny.jsonl(folder / name, *({"text": f"{name} {i}"} for i in range(count))))


def test_what_data_may_be(tmp_path: Path) -> None:
    assert recipe_of(tmp_path, "a.jsonl", train={"batch_tokens": 8192, "micro_batch": 1}).data.sources == (  # type: ignore[union-attr]
        Source("a.jsonl", columns={}),
    )
    block = {
        "path": ["a.jsonl", {"path": "owner/name", "weight": 2, "revision": "v1", "split": "test", "ignore": ["x"]}],
        "limit": 5, "columns": {"text": "body"}, "subset": "s", "block_tokens": 32,
    }  # fmt: skip
    recipe = recipe_of(tmp_path, block)
    assert recipe.data is not None
    both = {"limit": 5, "columns": {"text": "body"}}
    assert recipe.data.sources == (
        Source("a.jsonl", **both),  # a file has no subsets
        Source("owner/name@v1", split="test", subset="s", ignore=("x",), weight=2, **both),
    )
    assert recipe.data.named == "a.jsonl, owner/name@v1"
    assert from_dict(yaml.safe_load(recipe.to_yaml())).data == recipe.data


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        ({"path": []}, r"data\.path: \[\] is not a path"),
        ({"path": 3}, r"data\.path: 3 is not a path"),
        ({"path": ["a", 3]}, r"data\.path\.1: 3 is not a path"),
        ({"path": ["a", {"weight": 2}]}, r"data\.path\.1\.path: Field required"),
        ({"path": ["a", {"path": "b", "wieght": 2}]}, r"data\.path\.1\.wieght: .*known are path, weight"),
        ({"path": [{"path": "b", "weight": 0}]}, r"data\.path\.0\.weight: Input should be greater than 0"),
        (
            {"path": "a", "columns": {"promt": "x"}},
            r"data\.columns: 'promt' is not a key of a row \(did you mean 'prompt'",
        ),
        ({"path": ["a", {"path": "b", "columns": {"x": "y"}}]}, r"data\.path\.1\.columns: 'x' is not a key of a row"),
        ({"path": "a.jsonl", "revision": "v1"}, r"data\.revision: a\.jsonl is not a data set of the hub"),
        ({"path": "a.jsonl", "subset": "s"}, r"data\.subset: a\.jsonl is not a data set of the hub"),
        ({"path": ["o/n", {"path": __file__, "revision": "v1"}]}, r"data\.path\.1\.revision: .* is not a data set"),
        ({"path": "a", "template": "chatm"}, r"data\.template: 'chatm' is not a template \(did you mean 'chatml'"),
        ({"path": "a", "holdout": 0.1, "eval_path": "b"}, r"data\.holdout: stands beside data\.eval_path"),
        ({"path": "a", "holdout": 1}, r"data\.holdout: Input should be less than 1"),
        ({"path": "a", "loss": "some"}, r"data\.loss"),
        ({"path": "owner/name@v1", "revision": "v2"}, "names two revisions"),
    ],
)
def test_what_it_may_not_be(tmp_path: Path, data: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        recipe_of(tmp_path, {"block_tokens": 32, **data})


def test_steps_or_epochs(tmp_path: Path) -> None:
    data = {"path": "a", "block_tokens": 32}
    both = {"train": {"steps": 3, "epochs": 2}}
    with pytest.raises(UserError, match=r"train\.epochs: stands beside train\.steps = 3; give one of them"):
        recipe_of(tmp_path, data, **both)
    values = tiny.recipe(tmp_path / "m", tmp_path / "a", tmp_path / "r")
    del values["train"]["steps"]
    values["train"]["epochs"] = 1.5
    recipe = from_dict(values)
    assert "steps:" not in recipe.to_yaml().partition("train:")[2].partition("betas")[0]
    assert from_dict(yaml.safe_load(recipe.to_yaml())).train.epochs == 1.5
    baselines = {"evaluate": {"baselines": ["rounded"]}}
    with pytest.raises(UserError, match=r"evaluate\.baselines: .* set data\.eval_path or data\.holdout"):
        recipe_of(tmp_path, data, **baselines)
    assert recipe_of(tmp_path, {**data, "holdout": 0.1}, **baselines)


def test_what_is_held_out(tmp_path: Path) -> None:
    file, other = file_of(tmp_path, count=600), file_of(tmp_path, "other.jsonl")
    for data, count in (
        ({"path": file}, 12), ({"path": file, "holdout": 0.5}, 300), ({"path": file, "holdout": 0}, None),
        ({"path": file, "eval_path": other}, 3), ({"path": other}, None), ({"path": other, "holdout": 0.3}, 1),
    ):  # fmt: skip
        block = recipe_of(tmp_path, {**data, "block_tokens": 32}).data
        assert block is not None
        read = texts.training(block)
        held_out = texts.held_out(block, read)
        assert held_out is None if count is None else abs(len(held_out) - count) <= count / 4 + 1
        again = texts.held_out(block)
        assert held_out is None or again["text"][:] == held_out["text"][:]
        whole = 3 if data["path"] == other else 600
        assert len(read.rows) == whole - (0 if held_out is None or "eval_path" in data else len(held_out))


def test_nothing_is_left_to_hold_out(tmp_path: Path) -> None:
    """Every row a near duplicate of another one: refused where a share was asked for, else no row is held out."""
    rows = [{"text": f"the very same words in every row, but for a number, which is {i}"} for i in range(10)]
    block = recipe_of(
        tmp_path, {"path": str(tiny.jsonl(tmp_path / "r.jsonl", *rows[:2])), "holdout": 0.3, "block_tokens": 32}
    )
    assert block.data is not None
    with pytest.raises(UserError, match=r"data\.holdout: none of 2 rows is left to measure on"):
        texts.held_out(block.data)


# ---- a saved recipe ---------------------------------------------------------------------------------------------


class Hub:
    """Knows one data set, whose branch moves."""

    sha = "a" * 40

    def dataset_info(self, repo: str, revision: str | None = None) -> Any:
        return SimpleNamespace(sha={None: self.sha, "v1": "b" * 40}[revision])


def test_saved_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.chdir(tmp_path)
    file_of(tmp_path, "a.jsonl")
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    paths = ["a.jsonl", {"path": "owner/name", "weight": 2}, {"path": "owner/other", "revision": "v1"}]
    recipe = recipe_of(tmp_path, {"path": paths, "template": "own.jinja", "block_tokens": 32})
    assert sorted(key for key in inputs.paths(recipe) if key.startswith("data")) == ["data.path.0", "data.template"]
    saved = inputs.saved(recipe, {}, "model", located.pinned_data)
    assert saved.data is not None
    assert [source.path for source in saved.data.sources] == [
        str(tmp_path / "a.jsonl"), f"owner/name@{'a' * 40}", f"owner/other@{'b' * 40}",
    ]  # fmt: skip
    assert [source.weight for source in saved.data.sources] == [1, 2, 1]
    assert saved.data.template == str(tmp_path / "own.jinja")
    monkeypatch.setattr(Hub, "sha", "c" * 40)
    now = inputs.saved(recipe, {}, "model", located.pinned_data)
    with pytest.raises(UserError, match=rf"--resume: data\.path\.1: owner/name is at c+, and was at {'a' * 40} when"):
        inputs.check_same_data(saved, now, "--resume")
    inputs.check_same_data(saved, inputs.saved(saved, {}, "model", located.pinned_data), "--resume")
    one = recipe_of(tmp_path, {"path": "owner/name", "revision": "v1", "block_tokens": 32})
    pinned = inputs.saved(one, {}, "model", located.pinned_data).data
    assert pinned is not None
    assert (pinned.path, pinned.revision) == (f"owner/name@{'b' * 40}", None)


def test_the_hub_is_asked_for_what_the_recipe_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision, a configuration, and classes by their names."""
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    made = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **options: asked.append((args, options)) or made)
    columns = {"prompt": "{text}: ", "completion": "label"}
    block = {
        "path": "owner/name",
        "revision": "v1",
        "subset": "s",
        "split": "test",
        "columns": columns,
        "block_tokens": 32,
    }
    data = recipe_of(tmp_path, block).data
    assert data is not None
    rows = texts.training(data).rows
    assert asked == [(("owner/name",), {"split": "test", "revision": "v1", "name": "s"})]
    assert [dict(row) for row in rows] == [
        {"prompt": "a: ", "completion": "good"}, {"prompt": "b: ", "completion": "bad"},
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"rows\.jsonl: has no subsets \('s'\)"):
        texts.training(DataBlock(path=[{"path": file_of(tmp_path), "subset": "s"}]))  # type: ignore[arg-type]


def test_held_out_rows_of_a_saved_model(tmp_path: Path) -> None:
    file = file_of(tmp_path, count=100)
    recipe = recipe_of(tmp_path, {"path": [file], "holdout": 0.2, "block_tokens": 32})
    marks = {"data.path.0": inputs.mark([Path(file)], file)}
    tiny.write(
        tmp_path / "recipe.yaml", yaml.safe_load(inputs.saved(recipe, marks, "m", located.pinned_data).to_yaml())
    )
    block = inputs.held_out(tmp_path)
    assert block is not None
    assert recipe.data is not None
    assert texts.held_out(block)["text"][:] == texts.held_out(recipe.data)["text"][:]
    with Path(file).open("a") as more:
        more.write('{"text": "x"}\n')
    with pytest.raises(
        UserError, match=r"data\.path\.0: .*rows\.jsonl has changed since the model was made; pass --data"
    ):
        inputs.held_out(tmp_path)
    none = recipe_of(tmp_path, {"path": [file], "holdout": 0.0, "block_tokens": 32})
    tiny.write(tmp_path / "recipe.yaml", yaml.safe_load(none.to_yaml()))
    assert inputs.held_out(tmp_path) is None
    assert read(tmp_path / "recipe.yaml").data == none.data


def test_epochs_have_no_rates_until_they_are_steps(tmp_path: Path) -> None:
    """A rate goes with a number of steps, which only the rows tell."""
    tiny.text(tmp_path / "rows.jsonl")
    given = {"path": str(tmp_path / "rows.jsonl"), "block_tokens": 32}
    train = {"epochs": 1.0, "batch_tokens": 64, "micro_batch": 2}
    recipe = from_dict({"model": {"path": "m"}, "method": "lr-qat", "data": given, "train": train})
    again = from_dict(yaml.safe_load(recipe.to_yaml()))
    assert (again.train.lr, again.train.lr_scale, again.parametrization) == (None, None, "relative")
    own = from_dict({"model": {"path": "m"}, "method": "lr-qat", "data": given, "train": {**train, "lr": 0.5}})
    assert from_dict(yaml.safe_load(own.to_yaml())).rates == own.rates


def test_of_preferences_the_good_answers_are_measured(tmp_path: Path) -> None:
    """As they are what is learned: perplexity does not count the bad ones."""
    pairs = [{"prompt": "a ", "chosen": "good", "rejected": "bad"}]
    judged = [{"prompt": "a ", "completion": c, "label": c == "good"} for c in ("good", "bad")]
    for rows in (pairs, judged):
        block = DataBlock(path="x", eval_path=str(tiny.jsonl(tmp_path / "held.jsonl", *rows)))
        assert texts.held_out(block)["completion"][:] == ["good"]


def test_a_reward_may_read_any_column(tmp_path: Path) -> None:
    """Also those that other objectives read."""
    rows = [{"prompt": "2+2?", "label": "4", "chosen": "x"}]
    train = {"objective": "grpo", "reward": "math:sin", "generations": 2, "batch_tokens": 64, "micro_batch": 2}
    recipe = recipe_of(
        tmp_path, {"path": str(tiny.jsonl(tmp_path / "a.jsonl", *rows)), "block_tokens": 32}, train=train
    )
    found = texts.training_of(recipe).rows
    assert found[0] == rows[0]
    assert answers(found, "grpo")["text"][:] == ["2+2?"]


def test_the_same_set_of_the_hub_is_read_in_the_same_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """Held-out and calibration data at the revision, and in the subset, that is trained on; another set in its own."""
    block = DataBlock(
        path="o/n", subset="s", revision="v1", eval_path="o/n", eval_split="test", columns={"text": "body"}
    )
    assert block.measured == Source("o/n@v1", "test", "s", columns={"text": "body"})
    assert block.model_copy(update={"eval_path": "o/n@v2"}).measured[:3] == ("o/n@v2", "test", "s")
    other = block.model_copy(update={"eval_path": "o/other", "eval_subset": "t"})
    assert other.measured[:3] == ("o/other", "test", "t")
    read = []
    monkeypatch.setattr(
        "trimtab.data.sources.load_rows", lambda path, **options: read.append((path, options["subset"]))
    )
    texts.calibration(StartBlock(name="gptq", path="o/n"), block)
    texts.calibration(StartBlock(name="gptq", path="o/other", subset="u"), block)
    assert read == [("o/n@v1", "s"), ("o/other", "u")]
    pin = {"o/n@v1": "o/n@abc", "o/n": "o/n@newest"}
    values = {
        "model": {"path": "m"},
        "method": "rtn",
        "train": {"steps": 0},
        "data": block.model_dump(),
        "start": {"path": "o/n"},
    }
    saved = inputs.saved(from_dict(values), {}, "m", lambda path: pin[path])
    assert saved.data is not None
    assert saved.data.measured[:3] == ("o/n@abc", "test", "s")
    assert saved.start.path == "o/n@abc"


def test_rows_of_another_objective_are_not_split_even_untrained(tmp_path: Path) -> None:
    """With static activations they would be read, and nothing found to be held out."""
    with pytest.raises(UserError, match=r"data\.holdout: splits texts, not rows of dpo"):
        recipe_of(tmp_path, {"path": "a.jsonl", "holdout": 0.1}, train={"objective": "dpo", "steps": 0})


def test_a_column_names_whether_an_answer_is_good(tmp_path: Path) -> None:
    for good in (True, 1):
        file = tiny.jsonl(
            tmp_path / "a.jsonl", {"q": "a", "a": "b", "thumbs": good}, {"q": "a", "a": "c", "thumbs": 0 * good}
        )
        block = DataBlock(path=str(file), columns={"prompt": "q", "completion": "a", "label": "thumbs"})
        assert texts.training(block).rows["label"][:] == [True, False]
