"""Options of training that save memory."""

import json
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
from trimtab.training import options
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
    with pytest.raises(UserError, match=rf"train.{next(iter(train))}: .* model.device is cpu"):
        run(tmp_path, "out", **train)
    assert not (tmp_path / "out").exists()


def test_what_a_recipe_says_of_the_optimizer_reaches_it(tmp_path: Path) -> None:
    """Betas, decay (none on scales), clip and warm-up, as Adam's own state and the rates of each step show them."""
    tiny.model(tmp_path / "model")
    tiny.text(tmp_path / "data.jsonl")
    about = {"lr": 0.004, "lr_scale": 0.002, "betas": [0.8, 0.7], "weight_decay": 0.3, "clip": 1e-4, "warmup": 0.5}
    changes = {
        "train": {**about, "steps": 4, "save_steps": 1, "keep_checkpoints": 4, "schedule": "constant", "log_steps": 1}
    }
    parsed = recipe.from_dict(tiny.recipe(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", **changes))
    model, tokenizer = load(str(tmp_path / "model"), parsed.method, parsed.rules)
    train.fit(model, tokenizer, parsed)
    saved = {int(f.parent.name.rpartition("-")[2]): f for f in tmp_path.glob("out/checkpoints/*/optimizer.pt")}
    first, last = (torch.load(saved[step], weights_only=True) for step in (1, 4))
    deltas, scales = last["param_groups"]
    assert [group["initial_lr"] for group in (deltas, scales)] == [0.004, 0.002]
    assert [tuple(group["betas"]) for group in (deltas, scales)] == [(0.8, 0.7)] * 2
    assert [group["weight_decay"] for group in (deltas, scales)] == [0.3, 0]
    # After one step the moments are (1 - beta1) g and (1 - beta2) g^2 of the gradient that was cut to the norm `clip`.
    one, two = (
        torch.cat([state[name].flatten().double() for state in first["state"].values()])
        for name in ("exp_avg", "exp_avg_sq")
    )
    assert one.norm().item() / 0.2 == pytest.approx(1e-4, rel=0.02)
    assert two.sum().sqrt().item() / 0.3**0.5 == pytest.approx(1e-4, rel=0.02)
    logged = json.loads((saved[4].parent / "trainer_state.json").read_text())["log_history"]
    assert [row["learning_rate"] for row in logged] == pytest.approx([0, 0.002, 0.004, 0.004])


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


@pytest.mark.parametrize(("name", "package"), [("trackio", "trackio"), ("wandb", "wandb"), ("comet_ml", "comet-ml")])
def test_a_logger_that_is_not_installed(
    name: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers' own words are that it is no known integration."""
    monkeypatch.setattr(options, "get_available_reporting_integrations", lambda: ["mlflow"])
    said = rf"train\.report_to: {name} needs a package .*: pip install {package} \(or none"
    with pytest.raises(UserError, match=said):
        run(tmp_path, "out", report_to=name)
    with pytest.raises(UserError, match=r"train\.report_to: no logger 'wandbb'.*wandb"):
        run(tmp_path, "out", report_to="wandbb")
    assert not (tmp_path / "out").exists()
