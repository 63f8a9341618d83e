"""A run, with a block-wise start and an export, that is killed at its n-th change of a file, goes on and ends as one that
was not, bit for bit.

Python tells an audit hook of every file that is opened to be written, renamed, made or removed; the child of a fork counts
them, and ends at the n-th as SIGKILL would: no handler, no `finally`.
"""

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tiny
from trimtab.formats.manifest import kind_of, verify
from trimtab.pipeline.run import run
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training.checkpoints import whole_checkpoint

pytestmark = pytest.mark.slow
POINTS = int(os.environ.get("TRIMTAB_KILLS", "12"))
"""Kills of each kind, spread over all that a run writes."""
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
KILLED = 9


def recipe(given: Path, output: Path, **changes: Any) -> Recipe:
    train = {"steps": 4, "save_steps": 2, "evaluate_steps": 2}
    made = {"train": train, "evaluate": {"parity": False}, "export": ["native", "dense"], **changes}
    made["start"] = {"name": "block", "tokens": 64, "steps": 1}
    made["data"] = {"eval_path": str(given / "data.jsonl"), "eval_tokens": 64}
    return from_dict(tiny.recipe(given / "model", given / "data.jsonl", output, **made))


def apart(call: Callable[[], Any], under: Path, end_at: int | None) -> tuple[int, int]:
    """Exit status of a child that makes a call, and how many files below a folder it changed."""
    told = under.with_name(f"{under.name}.count")
    child = os.fork()
    if child == 0:
        count = 0

        def hears(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR)
            if (writes or event in CHANGES) and str(arguments[0]).startswith(str(under)):
                count += 1
                if count == end_at:
                    os._exit(KILLED)

        sys.addaudithook(hears)
        status = 1
        try:
            call()
            told.write_text(str(count))
            status = 0
        finally:  # nothing of the test's own process may go on in this one
            traceback.print_exc()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(told.read_text()) if told.exists() else 0


def alike(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "dense/model.safetensors", "checkpoints/checkpoint-4/trainable.safetensors"):
        mine, theirs = load_file(one / name), load_file(other / name)
        assert mine.keys() == theirs.keys()
        assert all((mine[key] == theirs[key]).all() for key in mine), name
    state = "checkpoints/checkpoint-4/trainer_state.json"
    mine, theirs = (json.loads((folder / state).read_text())["log_history"] for folder in (one, other))
    assert mine == theirs, "losses, rates, and tokens counted from the run's beginning"


@pytest.fixture(scope="module")
def straight(given: Path) -> tuple[Path, int]:
    """The output of a run that was not killed, and how many changes it made."""
    folder = given / "straight"
    folder.mkdir()
    status, count = apart(lambda: run(recipe(given, folder / "out")), folder, None)
    assert status == 0
    return folder / "out", count


@pytest.mark.parametrize("point", range(POINTS))
def test_a_killed_run_goes_on(given: Path, tmp_path: Path, straight: tuple[Path, int], point: int) -> None:
    whole, count = straight
    end_at = 1 + point * (count - 1) // max(1, POINTS - 1)
    made = recipe(given, tmp_path / "out")
    status, _ = apart(lambda: run(made), tmp_path, end_at)
    assert status == KILLED
    if (tmp_path / "out").exists():
        verify(tmp_path / "out")
    begun = (tmp_path / "out.unfinished").exists()
    kept = whole_checkpoint(tmp_path / "out.unfinished" / "checkpoints")
    if kept is None and not (tmp_path / "out").exists():
        run(made)
    elif begun:
        run(made, resume=True)
    alike(tmp_path / "out", whole)
    assert kind_of(tmp_path / "out") == "run"
    assert not (tmp_path / "out.unfinished").exists()
    left = {f.name for f in tmp_path.iterdir()} - {"out"}
    assert left <= {".out.lock"}, "but for a lock that nobody holds, where there was nothing left to do"


@pytest.mark.parametrize("point", range(POINTS))
def test_a_finished_run_that_goes_on_and_is_killed(
    given: Path, tmp_path: Path, straight: tuple[Path, int], point: int
) -> None:
    """The finished one stays until the longer one is whole."""
    whole, count = straight
    shutil.copytree(whole, tmp_path / "out")
    longer = recipe(given, tmp_path / "out", train={"steps": 5, "save_steps": 2, "evaluate_steps": 2})
    status, _ = apart(lambda: run(longer, resume=True), tmp_path, 1 + point * (count - 1) // max(1, POINTS - 1))
    assert status in (0, KILLED)
    if status == KILLED:
        there = tmp_path / "out" if (tmp_path / "out").exists() else tmp_path / ".out.old"
        verify(there)
        run(longer, resume=True)
    assert whole_checkpoint(tmp_path / "out" / "checkpoints") == tmp_path / "out" / "checkpoints" / "checkpoint-5"
    assert {f.name for f in tmp_path.iterdir()} <= {"out", ".out.lock"}
