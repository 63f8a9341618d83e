"""No hostile input does anything but what it may: two minutes of `make fuzz`; and the harness finds what it seeks."""

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fuzz import artefacts, trial
from fuzz.artefacts import TARGETS, Read, Target
from fuzz.changes import bytes_changed
from fuzz.run import cases
from trimtab.errors import UserError

CASES, SEED, LIMIT = 560, 20, 100.0


@pytest.mark.slow
def test_hostile_input_is_refused_in_one_line_or_read_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    results = list(trial.try_all(tmp_path / "fuzz", cases(CASES, SEED), time.monotonic() + LIMIT))
    bad = [f"make fuzz ARGS='--case {r.case} --seed {SEED}'   {r}" for r in results if r.outcome in trial.BAD]
    assert not bad, "\n".join(bad)
    assert len(results) > len(TARGETS)


# ---- the harness itself ---------------------------------------------------------------------------------------------


def _tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any, count: int = 1, peer: Any = None
) -> list[trial.Result]:
    monkeypatch.setitem(artefacts.ARTEFACTS, "numbers", lambda folder: (folder / "x").write_bytes(bytes(range(64))))
    monkeypatch.setitem(TARGETS, "numbers", Target("numbers", "numbers", {"x": bytes_changed}, read, peer))
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(trial, "IDLE", 2)
    monkeypatch.setattr(artefacts, "MISPLACED", 0)
    return list(trial.try_all(tmp_path, [trial.Case("numbers", i) for i in range(count)]))


def _original(folder: Path) -> bool:
    return (folder / "x").read_bytes() == bytes(range(64))


def _raises(error: BaseException) -> Any:
    def read(folder: Path, _: str) -> Read:
        if not _original(folder):
            raise error
        return Read("1")

    return read


def _if_changed(then: Callable[[], Any]) -> Any:
    return lambda folder, _: Read("1") if _original(folder) else then()


class Unprintable(UserError):
    """As none is any more."""

    def __str__(self) -> str:
        return "x\ud800"


class Lines(UserError):
    """As none is any more."""

    def __str__(self) -> str:
        return "x\nis wrong"


OUTCOMES: dict[str, tuple[Any, str]] = {
    "one line": (_raises(UserError("x is wrong; fix it")), "refused"),
    "two lines": (_raises(Lines("")), "exception"),
    "not printable": (_raises(Unprintable("")), "exception"),
    "an exception": (_raises(ValueError("x")), "exception"),
    "an exit": (_raises(SystemExit(0)), "exception"),
    "the same": (lambda folder, _: Read("1"), "same"),
    "another": (_if_changed(lambda: Read("2")), "legal"),
    "a loop": (_if_changed(lambda: [None for _ in iter(int, 1)]), "hang"),
    "a loop in a library": (_if_changed(lambda: sum(itertools.repeat(0))), "hang"),
    "a sleep": (_if_changed(lambda: time.sleep(60)), "hang"),
    "an end": (_if_changed(lambda: os._exit(3)), "died"),
    "a crash": (_if_changed(lambda: os.kill(os.getpid(), signal.SIGKILL)), "died"),
    "much memory": (_if_changed(lambda: bytes(2**34)), "exception"),
}


@pytest.mark.parametrize("name", OUTCOMES)
def test_what_may_not_happen_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    read, outcome = OUTCOMES[name]
    (result,) = _tried(tmp_path, monkeypatch, read)
    assert result.outcome == outcome, result


HUGE = (1e38, -1e38) * 32
"""Of so many, torch's spread in float32 is not a number."""


@pytest.mark.parametrize(
    ("theirs", "outcome"),
    [((1.0, 2.0), "legal"), ((1.0, 2.5), "other"), ((1.0, 2.0, 3.0), "other"), (None, "other"), (HUGE, "legal")],
)
def test_other_numbers_are_held_against_another_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, theirs: tuple[float, ...] | None, outcome: str
) -> None:
    def peer(_: Path) -> torch.Tensor:
        if theirs is None:
            raise ValueError("no such thing")
        return torch.tensor(theirs)

    def read(folder: Path, _: str) -> Read:
        return Read(str(_original(folder)), torch.tensor(HUGE if theirs == HUGE else (1.0, 2.0)))

    (result,) = _tried(tmp_path, monkeypatch, read, peer=peer)
    assert result.outcome == outcome


def test_a_child_that_dies_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = _tried(tmp_path, monkeypatch, _if_changed(lambda: os._exit(3)), 3)
    assert [r.outcome for r in results] == ["died"] * 3
    assert len({r.case for r in results}) == 3


def test_a_case_is_made_again_by_its_name(tmp_path: Path) -> None:
    made = []
    for turn in range(2):
        folder = tmp_path / str(turn)
        folder.mkdir()
        artefacts.ARTEFACTS["data"](folder)
        what = [artefacts.spoil(TARGETS["eval"], folder, random.Random(f"{SEED} eval:5"))]
        made.append((what, (folder / "data.jsonl").is_file() and (folder / "data.jsonl").read_bytes()))
    assert made[0] == made[1]
