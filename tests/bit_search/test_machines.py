"""A search on several machines: hosts that die while they have a trial, GPUs for workers."""

import time
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab.bit_search import ledger as ledger_module
from trimtab.bit_search import searching, workers
from trimtab.bit_search.ledger import DIED
from trimtab.bit_search.pinned import pinned
from trimtab.bit_search.searching import Search
from trimtab.errors import UserError
from trimtab.pipeline import stages
from trimtab.recipe import recipe
from trimtab.recipe.recipe import Recipe

SEARCH: dict[str, Any] = {"units": "layer", "bits": [4, 8], "trials": 1, "tokens": 64, "sensitivity_tokens": 64}


def made(folder: Path, *, device: str = "auto", **search: Any) -> Recipe:
    if not (folder / "m").exists():
        tiny.model(folder / "m")
        tiny.text(folder / "t.jsonl")
    values = tiny.recipe(folder / "m", folder / "t.jsonl", folder / "out", search={**SEARCH, **search})
    values["model"]["device"] = device
    return recipe.from_dict(values)


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A search of three trials, of which another host has taken the last; and that trial."""
    monkeypatch.setattr(searching, "_LOOK_SECONDS", 0.05)
    used = made(tmp_path)
    other = Search(used)
    with monkeypatch.context() as there:
        there.setattr(ledger_module, "_me", lambda: ["another-host 1 1", 1, "1"])
        for _ in range(2):
            trial = other.claim()
            assert trial is not None
            other.ledger.finish(trial, other.space.bytes(trial.wish.configuration), 1.0, 1.0)
        trial = other.claim()
    assert trial is not None
    assert other.claim() is None
    return used, other, trial


def test_a_dead_hosts_trial_is_made_again_by_a_rerun(elsewhere: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """There was nothing else to do, so every rerun had ended before that host's lease had."""
    used, other, trial = elsewhere
    monkeypatch.setattr(ledger_module, "LEASE_SECONDS", 0.5)
    seen: list[int] = []
    found = workers.run(used, told=lambda search: seen.append(search.doubtful))
    trials = found.ledger.trials()
    assert [t.state for t in trials] == ["complete", "complete", "dead", "complete"]
    assert trials[2].reason == DIED
    assert trials[3].wish == trial.wish
    assert seen[0] == 1  # and the observer is told what is being waited for
    assert seen[-1] == 0
    assert not other.ledger.finish(trial, 1, 0.1, 1.0)


def test_a_living_hosts_trial_is_left_to_it(elsewhere: Any) -> None:
    """One new beat is enough, and its trial is not made twice."""
    used, other, trial = elsewhere
    began = time.monotonic()
    found = workers.run(used, told=lambda search: other.ledger.beat(trial) if search.doubtful else None)
    assert time.monotonic() - began < ledger_module.LEASE_SECONDS
    assert [t.state for t in found.ledger.trials()] == ["complete", "complete", "running"]
    assert "1 trials still run elsewhere" in found.unmade(found.ledger.trials())


def test_a_trial_that_ends_meanwhile_is_waited_for_no_longer(elsewhere: Any) -> None:
    used, other, trial = elsewhere
    ended: list[bool] = []

    def told(search: Search) -> None:
        if search.doubtful and not ended:
            ended.append(other.ledger.finish(trial, 1, 0.5, 1.0))

    found = workers.run(used, told)
    assert ended == [True]
    assert [t.state for t in found.ledger.trials()] == ["complete"] * 3


def test_a_trial_says_where_it_was_made(tmp_path: Path) -> None:
    found = workers.run(made(tmp_path, trials=1, uniform=False))
    (trial,) = found.ledger.trials()
    assert trial.where.endswith(" cpu")
    header, row = (tmp_path / "out/search/trials.csv").read_text().splitlines()
    assert dict(zip(header.split(","), row.split(","), strict=True))["where"] == trial.where


# ---- GPUs of workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "search", "words"),
    [
        (
            "auto",
            {"devices": [0, 1], "workers": 3},
            r"search\.devices: \[0, 1\] are devices of 2 workers, and search\.wo",
        ),
        ("cpu", {"devices": [0, 1]}, r"\[0, 1\] are numbers of GPUs, and model\.device is cpu; set it to auto, cuda"),
        ("cuda:1", {"devices": [0]}, r"\[0\] are numbers of GPUs, and model\.device is cuda:1"),
        ("auto", {"devices": [-1]}, r"search\.devices\.0"),
        ("auto", {"devices": []}, r"search\.devices: "),
        (
            "auto",
            {"devices": [0], "engine": "ray"},
            r"search\.devices: Ray gives its tasks GPUs itself; set search\.res",
        ),
        ("auto", {"resources": {"gpu": 1}}, r"search\.resources: are what Ray gives a trial; set search\.engine=ray"),
        ("auto", {"engine": "ray", "resources": {"gpu": 0}}, r"search\.resources\.gpu: "),
        ("cuda:1", {"engine": "ray"}, r"model\.device: cuda:1 is a GPU of one machine, and Ray gives each trial one"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, device: str, search: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        made(tmp_path, device=device, **search)


def test_a_list_of_devices_is_a_number_of_workers(tmp_path: Path) -> None:
    assert Search(made(tmp_path, devices=[3, 3])).workers == 2
    assert Search(made(tmp_path, workers=4)).workers == 4
    assert Search(made(tmp_path)).workers == 1
    assert pinned(made(tmp_path, workers=2)) == [None, None]


def test_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Before anything is read, pruned or written."""
    with pytest.raises(
        UserError, match=r"search\.devices: \[0, 1\] are numbers of GPUs, and there is none here for model"
    ):
        stages.search(made(tmp_path, devices=[0, 1]))
    assert not (tmp_path / "out").exists()
