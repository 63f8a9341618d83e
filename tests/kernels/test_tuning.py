"""What is changed in the process: once, told once, and not at all where that is forbidden."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

import trimtab as tt
from trimtab.kernels import heap, products, tuning


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What would have been changed, on any processor and system."""
    found: list[str] = []
    monkeypatch.setenv("TRIMTAB_TUNE", "1")
    monkeypatch.setattr(tuning, "_heap_done", False)
    monkeypatch.setattr(products, "install", lambda: found.append("products") or found.count("products") == 1)
    monkeypatch.setattr(products, "uninstall", lambda: found.append("back"))
    monkeypatch.setattr(heap, "return_freed", lambda: found.append("heap") or True)
    tuning.announcements()
    yield found
    tuning.announcements()


def test_each_change_is_told_once(calls: list[str]) -> None:
    for _ in range(2):
        tuning.for_models()
        tuning.for_training()
    assert calls == ["products", "heap", "products"]
    told = tuning.announcements()
    assert len(told) == 2
    assert all("TRIMTAB_TUNE=0" in text for text in told)
    assert tuning.announcements() == []


def test_nothing_is_changed_where_it_is_forbidden(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    tt.tune(False)
    tuning.for_models()
    tuning.for_training()
    assert calls == ["back"]
    assert tuning.announcements() == []
    tt.tune()
    tuning.for_models()
    assert calls == ["back", "products"]
    monkeypatch.setenv("TRIMTAB_TUNE", "0")
    tuning.for_training()
    assert calls == ["back", "products"]


def test_memory_is_counted_for_what_may_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "workspace_bytes", lambda dtype: 7)
    for switch, wanted in (("1", 7), ("0", 0)):
        monkeypatch.setenv("TRIMTAB_TUNE", switch)
        assert tuning.workspace_bytes(torch.bfloat16) == wanted


def test_processes_started_from_here_follow(calls: list[str]) -> None:
    """Otherwise a run would compare its model with one that a fresh process computes by other products."""
    tt.tune(False)
    asked = "from trimtab.kernels import tuning; print(tuning.allowed())"
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, env=dict(os.environ)
    )
    assert done.stdout.strip() == "False"
