"""Options of training that save memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab import pipeline, recipe
from trimtab.errors import UserError


def run(folder: Path, output: str, **train: Any) -> dict[str, Any]:
    if not (folder / "model").exists():
        tiny.model(folder / "model")
        tiny.text(folder / "data.jsonl")
    changes = {"data": {"eval_path": None}, "evaluate": {"parity": False}, "train": train}
    changes["method"] = {"name": "qlora", "rank": 128}
    values = tiny.recipe(folder / "model", folder / "data.jsonl", folder / output, **changes)
    return pipeline.run(recipe.from_dict(values))


def tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, dict):
        for inner in value.values():
            yield from tensors(inner)
    elif torch.is_tensor(value):
        yield value


def moments(folder: Path) -> set[torch.dtype]:
    """Of those with 4096 numbers and more: bitsandbytes keeps smaller ones in 32 bits."""
    saved = sorted(folder.glob("checkpoints/*/optimizer.pt"))[-1]
    return {t.dtype for t in tensors(torch.load(saved, weights_only=True)["state"]) if t.numel() >= 4096}


def test_moments_in_eight_bits(tmp_path: Path) -> None:
    run(tmp_path, "wide", optimizer="adamw")
    run(tmp_path, "narrow", optimizer="adamw-8bit")
    assert moments(tmp_path / "wide") == {torch.float32}
    assert moments(tmp_path / "narrow") == {torch.uint8}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to page from")
@pytest.mark.parametrize("train", [{"optimizer": "adamw-paged"}, {"offload_activations": True}])
def test_what_needs_a_gpu_says_so(tmp_path: Path, train: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"train.{next(iter(train))}: .* no GPU here"):
        run(tmp_path, "out", **train)
    assert not (tmp_path / "out").exists()
