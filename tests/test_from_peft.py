"""docs/from-peft.md: its snippets run one after another on a tiny model, and what its tables name exists."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset

import tiny
import trimtab as tt
from trimtab.recipe.recipe import from_dict

PAGE = (Path(__file__).parents[1] / "docs" / "from-peft.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning")  # what the trainers' defaults say without a GPU
def test_every_snippet_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {
        "name": str(tmp_path / "model"),
        "rows": Dataset.from_list([{"text": "one and one are two"}] * 8),
    }
    snippets = blocks("python")
    assert len(snippets) == 7
    for snippet in snippets:
        exec(compile(snippet.replace("100", "2"), "docs/from-peft.md", "exec"), given)
    assert sum(layer.differing for layer in given["report"]) == 0
    ids = torch.arange(12).view(1, -1)
    with torch.no_grad():
        assert torch.equal(given["again"](ids).logits, given["model"].to(given["again"].dtype)(ids).logits)
    assert (tmp_path / "tuned-vllm" / "config.json").is_file()


def test_recipes_are_read() -> None:
    for block in blocks("yaml"):
        from_dict({"model": {"path": "a"}, **yaml.safe_load(block)})


def test_right_hand_sides_of_the_tables_are_recipes_or_calls() -> None:
    """Keys that a recipe has, functions that trimtab has."""
    rows = [line.rsplit("|", 2)[1] for line in PAGE.splitlines() if line.startswith("|")]
    pieces = [piece for row in rows for piece in re.findall(r"`([^`]+)`", row)]
    calls = {name for piece in pieces for name in re.findall(r"\btt\.(\w+)", piece)}
    assert calls
    assert calls <= set(tt.__all__)
    base = {"model": {"path": "a"}, "method": "qlora", "data": {"path": "b", "eval_path": "c"}}
    recipes = [yaml.safe_load(piece) for piece in pieces if re.match(r"(model|method|data|train): ", piece)]
    assert len(recipes) > 10
    for recipe in recipes:
        key, block = next(iter(recipe.items()))
        merged = {**base[key], **block} if isinstance(base.get(key), dict) else block  # type: ignore[dict-item]
        if key == "data" and "holdout" in block:
            del merged["eval_path"]
        small = {"train": {"batch_tokens": 8192, "micro_batch": 2}} if key == "data" else {}
        from_dict({**base, **small, key: merged})
