"""Options of training that save memory."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab.errors import UserError
from trimtab.models.load import load
from trimtab.pipeline import run as pipeline
from trimtab.recipe import recipe
from trimtab.training import trainer as train


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


def test_scales_of_mixed_widths_move_in_proportion_to_their_steps(tmp_path: Path) -> None:
    """Adam's first step is its rate: as given at the width it is meant for, and in proportion at others."""
    tiny.model(tmp_path / "model")
    tiny.text(tmp_path / "data.jsonl")
    bits = {"q_proj": 2, "k_proj": 4, "v_proj": 8}
    rules = [{"match": f"*.{n}", "grid": {"bits": b, "group": 32, "zero": "real"}} for n, b in bits.items()]
    moved: dict[int | None, dict[str, float]] = {}
    for meant in (None, 4):
        changes = {"rules": rules, "train": {"steps": 1, "warmup": 0, "schedule": "constant", "lr_scale_bits": meant}}
        values = tiny.recipe(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", **changes)
        parsed = recipe.from_dict(values)
        model, tokenizer = load(str(tmp_path / "model"), parsed.method, parsed.rules)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        train.fit(model, tokenizer, parsed)
        moved[meant] = {
            f"{n} {kind}": (p.detach() - before[name]).abs().max().item()
            for n in bits
            for kind in ("scale", "offset")
            for name, p in model.named_parameters()
            if name == f"model.layers.0.self_attn.{n}.adapter.{kind}"
        }
    rate = 1e-4
    every = {f"{n} {kind}": rate for n in bits for kind in ("scale", "offset")}
    assert moved[None] == pytest.approx(every, rel=1e-3)
    assert moved[4] == pytest.approx(every | {"q_proj scale": rate * 5, "v_proj scale": rate / 17}, rel=1e-3)
