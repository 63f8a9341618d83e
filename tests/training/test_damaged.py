"""Checkpoints that are not what was written: named and passed over, whatever happened to whichever file."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tiny
from trimtab.errors import UserError
from trimtab.formats.manifest import MANIFEST
from trimtab.pipeline.run import Quiet, run
from trimtab.recipe.recipe import from_dict
from trimtab.training.checkpoints import CHECKPOINT, find, what_is_wrong
from trimtab.training.saving import WRITING, writing
from trimtab.training.trainer import Step


class Stops(Quiet):
    """Stops a run after a step, as a killed process would; remembers what was said."""

    def __init__(self, after: int = 0) -> None:
        self.after, self.said = after, list[str]()

    def step(self, step: Step) -> None:
        if step.step == self.after:
            raise KeyboardInterrupt

    def say(self, text: str) -> None:
        self.said.append(text)


def values(given: Path, output: Path, **changes: Any) -> dict[str, Any]:
    train = {"steps": 8, "save_steps": 2, "keep_checkpoints": 3, **changes.pop("train", {})}
    defaults: dict[str, Any] = {"data": {"eval_path": None}, "evaluate": {"parity": False}, "train": train}
    return tiny.recipe(given / "model", given / "data.jsonl", output, **{**defaults, **changes})


@pytest.fixture(scope="module")
def stopped(given: Path) -> Path:
    """The folder of a run that was stopped after step 7, with checkpoints of steps 2, 4 and 6."""
    with pytest.raises(KeyboardInterrupt):
        run(from_dict(values(given, given / "out")), show=Stops(7))
    return given / "out.unfinished"


@pytest.fixture
def checkpoints(stopped: Path, tmp_path: Path) -> Path:
    """A copy of its checkpoints."""
    return shutil.copytree(stopped / "checkpoints", tmp_path / "checkpoints")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def empty(file: Path) -> None:
    file.write_bytes(b"")


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


DAMAGES: list[Callable[[Path], None]] = [cut, flip, empty, Path.unlink, folder]
FILES = ["manifest.json", "optimizer.pt", "recipe.yaml", "rng_state.pth", "scheduler.pt", CHECKPOINT,
         "trainer_state.json", "versions.json"]  # fmt: skip


def test_the_files_are_these(checkpoints: Path) -> None:
    """So that the next tests damage each of them."""
    assert [f.name for f in sorted(checkpoints.iterdir())] == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    assert sorted(f.name for f in (checkpoints / "checkpoint-6").iterdir()) == FILES
    assert find(checkpoints).last == checkpoints / "checkpoint-6"
    assert not find(checkpoints).lines


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_one_before_taken(
    checkpoints: Path, name: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoints / "checkpoint-6" / name)
    found = find(checkpoints)
    assert found.last == checkpoints / "checkpoint-4"
    (line,) = found.lines
    assert line.startswith(f"{checkpoints / 'checkpoint-6'}: is damaged and passed over: ")
    assert name in line or name == MANIFEST  # whose own hashes are those of other files
    assert line.endswith("; continuing from checkpoint-4")
    damage(checkpoints / "checkpoint-4" / name)
    assert find(checkpoints).last == checkpoints / "checkpoint-2"
    assert len(find(checkpoints).lines) == 2


@pytest.mark.parametrize("name", FILES)
def test_every_byte_of_a_manifest_and_any_of_a_file_counts(checkpoints: Path, name: str) -> None:
    """A bit flipped anywhere: either it is noticed, or what is loaded is what was written."""
    newest = checkpoints / "checkpoint-6"
    before = {f.name: f.read_bytes() for f in newest.iterdir()}
    step = 7 if name == MANIFEST else max(1, len(before[name]) // 40)
    for at in range(0, len(before[name]), step):
        changed = bytearray(before[name])
        changed[at] ^= 1 << at % 8
        (newest / name).write_bytes(changed)
        noticed = bool(what_is_wrong(newest))
        assert noticed or (name == MANIFEST and {f.name: f.read_bytes() for f in newest.iterdir()} | {name: b""} == {
            **before, name: b""}), (name, at)  # fmt: skip
    (newest / name).write_bytes(before[name])
    assert not what_is_wrong(newest)


@pytest.mark.parametrize("name", FILES)
def test_files_of_two_checkpoints_are_not_mixed(checkpoints: Path, name: str) -> None:
    one, other = (checkpoints / f"checkpoint-{step}" / name for step in (4, 6))
    mine, theirs = one.read_bytes(), other.read_bytes()
    one.write_bytes(theirs), other.write_bytes(mine)
    expected = checkpoints / ("checkpoint-6" if mine == theirs else "checkpoint-2")
    assert (mine == theirs) == (name in ("recipe.yaml", "versions.json", "rng_state.pth"))  # nothing is drawn here
    assert find(checkpoints).last == expected


def test_a_checkpoint_under_another_ones_name(checkpoints: Path) -> None:
    shutil.rmtree(checkpoints / "checkpoint-6")
    (checkpoints / "checkpoint-4").rename(checkpoints / "checkpoint-6")
    found = find(checkpoints)
    assert found.last == checkpoints / "checkpoint-2"
    assert "it is that of step 4" in found.lines[0]


def test_what_is_no_checkpoint(checkpoints: Path) -> None:
    for name in ("checkpoint-12.bak", "checkpoint-", "checkpoint-9x", "my-checkpoint-99"):
        shutil.copytree(checkpoints / "checkpoint-6", checkpoints / name)
    (checkpoints / "checkpoint-11").write_text("a file")
    assert find(checkpoints).last == checkpoints / "checkpoint-6"
    assert not find(checkpoints).lines


def test_one_of_an_earlier_version_is_passed_over(checkpoints: Path) -> None:
    """It had no manifest: nothing said that it was whole, or which recipe it was of."""
    for name in ("manifest.json", "recipe.yaml", "versions.json"):
        (checkpoints / "checkpoint-6" / name).unlink()
    found = find(checkpoints)
    assert found.last == checkpoints / "checkpoint-4"
    assert "it has no manifest.json: it was not written to its end, or by an earlier version" in found.lines[0]


def test_a_run_goes_on_from_the_one_before_and_ends_alike(given: Path, stopped: Path, tmp_path: Path) -> None:
    """Bit for bit; the damaged one is named once, and replaced when its step comes again."""
    straight = run(from_dict(values(given, tmp_path / "straight")))
    recipe = from_dict(values(given, tmp_path / "out"))
    shutil.copytree(stopped, tmp_path / "out.unfinished")
    kept = tmp_path / "out.unfinished" / "checkpoints"
    flip(kept / "checkpoint-6" / "optimizer.pt")
    watch = Stops()
    assert run(recipe, resume=True, show=watch)["losses"] == straight["losses"]
    line = f"{kept / 'checkpoint-6'}: is damaged and passed over: optimizer.pt is not what was written"
    assert len([said for said in watch.said if said.startswith(line)]) == 1
    for name in (
        "model.safetensors",
        f"checkpoints/checkpoint-8/{CHECKPOINT}",
        f"checkpoints/checkpoint-6/{CHECKPOINT}",
    ):
        one, other = (load_file(tmp_path / folder / name) for folder in ("straight", "out"))
        assert all((one[key] == other[key]).all() for key in one)
    assert not what_is_wrong(tmp_path / "out" / "checkpoints" / "checkpoint-6")


def test_no_whole_checkpoint_is_said_and_nothing_removed(given: Path, stopped: Path, tmp_path: Path) -> None:
    recipe = from_dict(values(given, tmp_path / "out"))
    shutil.copytree(stopped, tmp_path / "out.unfinished")
    kept = tmp_path / "out.unfinished" / "checkpoints"
    for checkpoint in kept.iterdir():
        empty(checkpoint / CHECKPOINT)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=r"--resume: no checkpoint is whole: .*checkpoint-6: .*checkpoint-2: is damaged"
    ):
        run(recipe, resume=True)
    with pytest.raises(UserError, match=r"output: of an earlier run, .*checkpoint-6: is damaged .*--overwrite"):
        run(recipe)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_damaged_best_model_is_not_the_one_that_is_saved(given: Path, tmp_path: Path) -> None:
    """The comparison begins again, and says so; it was a traceback, or another model."""
    train = {"steps": 4, "save_steps": 2, "evaluate_steps": 2}
    changes: dict[str, Any] = {"data": {"eval_tokens": 64}, "train": train}
    run(from_dict(values(given, tmp_path / "out", **changes)))
    best = tmp_path / "out" / "checkpoints" / "best"
    assert not what_is_wrong(best, (CHECKPOINT,))
    for steps, damage in ((5, cut), (6, flip)):
        damage(best / CHECKPOINT)
        watch, more = Stops(), {**changes, "train": {**train, "steps": steps}}
        found = run(from_dict(values(given, tmp_path / "out", **more)), resume=True, show=watch)["held_out"]
        assert [said for said in watch.said if "best: is damaged and passed over" in said]
        assert found["steps"] == [steps - 1, steps]
        assert not what_is_wrong(best, (CHECKPOINT,))


def test_a_damaged_one_does_not_count_among_those_kept(checkpoints: Path) -> None:
    """Else the last that is whole goes, and the newest may prove bad in the next step."""
    shutil.rmtree(checkpoints / "checkpoint-2")
    shutil.copytree(checkpoints / "checkpoint-6", checkpoints / "checkpoint-7")
    flip(checkpoints / "checkpoint-7" / CHECKPOINT)
    with writing(checkpoints, 8, (checkpoints / "checkpoint-6" / "recipe.yaml").read_text(), keep=2):
        shutil.copytree(checkpoints / "checkpoint-6", checkpoints / WRITING / "checkpoint-8", dirs_exist_ok=True)
        state = checkpoints / WRITING / "checkpoint-8" / "trainer_state.json"
        state.write_text(state.read_text().replace('"global_step": 6', '"global_step": 8'))
    assert sorted(c.name for c in checkpoints.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-7", "checkpoint-8"]
