"""Stopping and going on: the same numbers as without a stop, and the last good checkpoint when training goes wrong."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tiny
from trimtab import cli
from trimtab.errors import UserError
from trimtab.models.load import load
from trimtab.pipeline.run import Quiet, run
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training.trainer import CHECKPOINT, Step, _Trainer, fit, trainable


def values(given: Path, output: Path, **changes: Any) -> dict[str, Any]:
    defaults = {"data": {"eval_path": None}, "evaluate": {"parity": False}}
    return tiny.recipe(given / "model", given / "data.jsonl", output, **{**defaults, **changes})


class Interrupts(Quiet):
    """Stops the run after a step, as a killed process would."""

    def __init__(self, after: int) -> None:
        self.after = after

    def step(self, step: Step) -> None:
        if step.step == self.after:
            raise KeyboardInterrupt


def unfinished(output: Path) -> Path:
    """What a stopped run leaves beside its output."""
    return output.with_name(f"{output.name}.unfinished")


def checkpoint(output: Path, step: int) -> dict[str, Tensor]:
    return load_file(output / "checkpoints" / f"checkpoint-{step}" / CHECKPOINT)


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def state(output: Path, step: int) -> dict[str, Any]:
    text = (output / "checkpoints" / f"checkpoint-{step}" / "trainer_state.json").read_text()
    loaded: dict[str, Any] = json.loads(text)
    return loaded


METHODS: dict[str, dict[str, Any]] = {
    "lr-qat": {},
    "qat": {"method": "qat", "train": {"lr": 1e-3, "schedule": "cosine", "weight_decay": 0.1}},
}


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
def test_going_on_is_not_stopping(given: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """Bit for bit, from the last checkpoint that is whole."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    metrics = run(from_dict(values(given, straight, **changes)))
    recipe = from_dict(values(given, stopped, **changes))
    with pytest.raises(KeyboardInterrupt):
        run(recipe, show=Interrupts(5))
    assert not stopped.exists()
    assert same(checkpoint(unfinished(stopped), 3), checkpoint(straight, 3))
    torn = unfinished(stopped) / "checkpoints" / ".writing" / "checkpoint-5"  # killed while written
    torn.mkdir(parents=True)
    (torn / CHECKPOINT).write_bytes(b"half")
    with pytest.raises(UserError, match=r"was stopped, and .*checkpoint-3 is what it reached; pass --resume"):
        run(recipe)
    resumed = run(recipe, resume=True)
    assert not unfinished(stopped).exists()
    assert not same(checkpoint(straight, 6), checkpoint(straight, 3))
    assert same(checkpoint(stopped, 6), checkpoint(straight, 6))
    assert same(load_file(stopped / "model.safetensors"), load_file(straight / "model.safetensors"))
    assert resumed["losses"] == metrics["losses"]  # those of the process that was stopped, too
    assert resumed["tokens"] == metrics["tokens"] // 2  # those of this process
    assert run(recipe, resume=True)["losses"] == metrics["losses"]  # a finished run has nothing left to do
    assert not list((stopped / "checkpoints").glob(".*"))
    assert same(load_file(stopped / "model.safetensors"), load_file(straight / "model.safetensors"))
    shorter = {**recipe.model_dump()["train"], "steps": 5}
    with pytest.raises(UserError, match=r"--resume: .*checkpoint-6 is past train\.steps = 5; raise it, or start over"):
        run(from_dict(values(given, stopped, **{**changes, "train": shorter})), resume=True)


def test_only_what_is_trained_is_in_a_checkpoint(given: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    run(from_dict(values(given, output, train={"steps": 5, "save_steps": 1})))
    kept = sorted(folder.name for folder in (output / "checkpoints").iterdir())
    assert kept == ["checkpoint-4", "checkpoint-5"]
    tensors = checkpoint(output, 5)
    assert {name.rpartition(".adapter.")[2] for name in tensors} == {"delta.A", "delta.B", "scale"}
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    files = {file.name for file in (output / "checkpoints" / "checkpoint-5").iterdir()}
    mine = {"recipe.yaml", "versions.json", "manifest.json"}
    assert files == {CHECKPOINT, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", *mine}


def test_another_recipe_cannot_go_on(given: Path, tmp_path: Path) -> None:
    """A 4-bit checkpoint that went on as 3 bits ended as another model, and said nothing."""
    output = tmp_path / "run"
    run(from_dict(values(given, output, train={"steps": 3})))
    wider = [tiny.RULES[0], {"match": "*", "grid": {"bits": 4, "group": 32, "zero": "integer"}}]
    complaints: list[tuple[dict[str, Any], str]] = [
        ({"method": {"name": "lr-qat", "rank": 8, "alpha": 64.0}}, r"method\.rank is 8, and was 4; set it back"),
        ({"method": {"name": "peqa"}}, r"method\.name is 'peqa', and was 'lr-qat'; .* more; set them back"),
        ({"rules": wider}, r"rules\.1\.grid\.bits is 4, and was 3; set it back, or start over \(--overwrite\)"),
        ({"train": {"seed": 1}}, r"train\.seed is 1, and was 0"),
        ({"train": {"batch_tokens": 256}}, r"train\.batch_tokens is 256, and was 128"),
    ]
    before = {f: f.read_bytes() for f in output.rglob("*") if f.is_file()}
    for changes, complaint in complaints:
        with pytest.raises(UserError, match=rf"--resume: checkpoint-3 was trained by another recipe: {complaint}"):
            run(from_dict(values(given, output, **changes)), resume=True)
    assert {f: f.read_bytes() for f in output.rglob("*") if f.is_file()} == before


def went_wrong(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Makes the loss NaN in step `at`."""
    loss_of = _Trainer.compute_loss

    def compute_loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        loss = loss_of(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step + 1 == at else loss

    monkeypatch.setattr(_Trainer, "compute_loss", compute_loss)


def test_a_loss_that_is_no_number(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 4 fails, so what step 3 left is bad; the run continues from step 2, at the rates that the recipe now has."""
    output, straight = tmp_path / "run", tmp_path / "straight"
    mended = values(given, straight, train={"save_steps": 2, "warmup": 0, "schedule": "constant"})
    file = tiny.write(tmp_path / "recipe.yaml", {**mended, "output": str(output)})
    arguments = ["trimtab", "run", str(file), "train.save_steps=1"]
    with pytest.MonkeyPatch.context() as patch:
        went_wrong(patch, at=4)
        patch.setattr(sys, "argv", arguments)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert stopped.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    named = unfinished(output) / "checkpoints" / "checkpoint-2"
    assert line == (
        f"error: train: the loss became nan in step 4; the last good checkpoint is {named}. "
        "Lower train.lr (or train.lr_scale) and continue with --resume"
    )
    assert not output.exists()
    assert not (unfinished(output) / "checkpoints" / "checkpoint-3").exists()
    assert not list(tmp_path.glob(".*"))
    kept = checkpoint(unfinished(output), 2)
    assert all(torch.isfinite(tensor).all() for tensor in kept.values())
    run(from_dict({**mended, "train": {**mended["train"], "steps": 2}}))
    assert same(kept, checkpoint(straight, 2))
    lower = {**mended["train"], "lr": 1e-3, "lr_scale": 1e-5, "steps": 4}
    run(from_dict({**mended, "output": str(output), "train": lower}), resume=True)
    rates = {entry["step"]: entry["learning_rate"] for entry in state(output, 4)["log_history"] if "loss" in entry}
    assert rates == {1: 1e-2, 2: 1e-2, 3: 1e-3, 4: 1e-3}
    optimizer = torch.load(output / "checkpoints" / "checkpoint-4" / "optimizer.pt", weights_only=True)
    assert [group["lr"] for group in optimizer["param_groups"]] == [1e-3, 1e-5]


def test_no_checkpoint_of_numbers_gone_wrong(given: Path, tmp_path: Path) -> None:
    """The loss may still be fine when a parameter is not."""
    recipe: Recipe = from_dict(values(given, tmp_path / "run", train={"save_steps": 2}))
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)
    name, parameter = next((n, p) for n, p in trainable(model).items() if n.endswith("delta.A"))

    def poison(step: Step) -> None:
        if step.step == 4:
            parameter.data[0, 0] = float("inf")

    with pytest.raises(UserError, match=rf"{name} is no longer finite after step 4; .*checkpoint-2\. Lower train\.lr"):
        fit(model, tokenizer, recipe, on_step=poison)
    assert [folder.name for folder in (recipe.out / "checkpoints").iterdir()] == ["checkpoint-2"]
    shutil.rmtree(recipe.out / "checkpoints" / "checkpoint-2")
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)
    with pytest.MonkeyPatch.context() as patch:
        went_wrong(patch, at=1)
        with pytest.raises(UserError, match=r"became nan in step 1; there is no good checkpoint yet\. Lower train\.lr"):
            fit(model, tokenizer, recipe)
