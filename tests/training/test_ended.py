"""SIGTERM and Ctrl-C at any moment of a command: children ended, the last checkpoint named, 143 or 130, no traceback."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab import cli, ending
from trimtab.evaluation import parity
from trimtab.pipeline import run as running
from trimtab.training import trainer
from trimtab.training.checkpoints import step_of

SIGNALS = [signal.SIGTERM, signal.SIGINT]


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Signals as a terminal sends them: what a shell starts in the background is told to ignore Ctrl-C."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def recipe(given: Path, folder: Path, **changes: Any) -> Path:
    train = {"steps": 4, "save_steps": 2}
    made = {"data": {"eval_path": None}, "evaluate": {"parity": False}, "train": train, **changes}
    return tiny.write(
        folder / "recipe.yaml", tiny.recipe(given / "model", given / "data.jsonl", folder / "out", **made)
    )


def command(patch: pytest.MonkeyPatch, *arguments: object) -> int:
    patch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


MOMENTS: dict[str, tuple[Any, str, str]] = {
    "before anything": (cli, "_terminal", "stopped before anything was begun: run the same command again"),
    "while reading": (
        running.checks,
        "gather",
        "nothing was trained yet that could be kept: the same command begins again",
    ),
    "while loading": (running, "build", "nothing was trained yet that could be kept: the same command begins again"),
    "before the first step": (
        trainer,
        "groups_of",
        "nothing was trained yet that could be kept: the same command begins",
    ),
    "in a step": (
        trainer._Trainer,
        "compute_loss",
        "stopped after step 1 of 4: {out}checkpoint-1 is kept. Continue with: ",
    ),
    "while folding": (
        running,
        "fold",
        "stopped after step 4 of 4: {out}checkpoint-4 is kept. Continue with: trimtab run ",
    ),
    "while saving": (
        running,
        "write_into",
        "stopped after step 4 of 4: {out}checkpoint-4 is kept. Continue with: trimtab ",
    ),
    "in the end": (
        running.report,
        "make",
        "stopped after step 4 of 4: {out}checkpoint-4 is kept. Continue with: trimtab run",
    ),
}


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
@pytest.mark.parametrize("moment", MOMENTS)
def test_at_every_stage(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str,
    number: signal.Signals,
) -> None:  # fmt: skip
    where, name, line = MOMENTS[moment]
    file = recipe(given, tmp_path)
    with monkeypatch.context() as patch:
        real, sent = getattr(where, name), list[int]()

        def ended(*arguments: Any, **options: Any) -> Any:
            if not sent:
                sent.append(1)
                signal.raise_signal(number)
            return real(*arguments, **options)

        patch.setattr(where, name, ended)
        assert command(patch, "run", file) == 128 + number
    found = capsys.readouterr()
    expected = line.format(out=f"{tmp_path}/out.unfinished/checkpoints/")
    assert expected in found.out.splitlines()[-1]
    assert "Traceback" not in found.out + found.err
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.unfinished").exists() == ("is kept" in line)
    assert not list(tmp_path.glob(".*"))
    if moment in ("in a step", "in the end"):
        assert command(monkeypatch, "run", file, "--resume") == 0
        assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_child_ends_with_its_command(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """The fresh process that parity is measured in; one that would not end by itself."""
    children: list[subprocess.Popen[Any]] = []
    real = subprocess.Popen

    class Popen(real):  # type: ignore[type-arg, misc, valid-type]
        def __init__(self, command: Any, **options: Any) -> None:
            super().__init__([sys.executable, "-c", "import time; time.sleep(600)"], **options)
            children.append(self)
            threading.Timer(0.3, os.kill, (os.getpid(), number)).start()

    monkeypatch.setattr(parity.subprocess, "Popen", Popen)
    file = recipe(given, tmp_path, evaluate={"parity": True, "parity_tokens": 64})
    began = time.monotonic()
    assert command(monkeypatch, "run", file) == 128 + number
    assert len(children) == 1
    assert children[0].poll() is not None
    assert time.monotonic() - began < 120


def test_sigterm_finishes_the_step_and_a_second_one_does_not(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe(given, tmp_path)

    for times, kept in ((2, 2), (1, 4)):
        sent: list[int] = []

        def step(_: Any, step: trainer.Step, times: int = times, sent: list[int] = sent) -> None:
            if step.step == 3 and not sent:
                sent.append(1)
                for _ in range(times):
                    signal.raise_signal(signal.SIGTERM)

        with monkeypatch.context() as patch:
            patch.setattr("trimtab.report.terminal.Terminal.step", step)
            assert command(patch, "run", file, "--overwrite") == 128 + signal.SIGTERM
        said = capsys.readouterr().out
        assert f"stopped after step {kept} of 4: " in said
        assert ("SIGTERM: finishing step 4, then saving; once more to stop at once" in said) == (times == 1)


def test_who_listens_to_sigterm_keeps_it() -> None:
    mine = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    with ending.listening():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    signal.signal(signal.SIGTERM, mine)
    with pytest.raises(KeyboardInterrupt), ending.listening():
        signal.raise_signal(signal.SIGTERM)
    assert ending.status() == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_what_comes_while_libraries_load_waits_for_them(number: signal.Signals) -> None:
    """numpy, that torch loads from its compiled part, swallowed it, and was then loaded twice: a traceback."""
    loaded: list[int] = []

    def loads(times: int) -> None:
        with ending.listening(), ending.held():
            for _ in range(times):
                signal.raise_signal(number)
            loaded.append(times)

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            loads(times)
    assert loaded == [1], "a second one does not wait"
    assert signal.getsignal(number) is (signal.SIG_DFL if number == signal.SIGTERM else signal.default_int_handler)


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_a_command_of_its_own(given: Path, tmp_path: Path, number: signal.Signals) -> None:
    """As a shell sees it, at moments that nobody chose."""
    for i in range(4):
        (tmp_path / str(i)).mkdir()
        file = recipe(given, tmp_path / str(i), train={"steps": 500, "save_steps": 2})
        begin = [sys.executable, "-m", "trimtab", "run", str(file)]
        with subprocess.Popen(begin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
            deadline = time.monotonic() + (3, 6, 60, 60)[i]
            wanted = tmp_path / str(i) / "out.unfinished" / "checkpoints" / "checkpoint-2"
            while time.monotonic() < deadline and not wanted.exists():
                time.sleep(0.1)
            run.send_signal(number)
            said, _ = run.communicate(timeout=120)
        assert run.returncode == 128 + number, said
        assert said.splitlines()[-1].startswith("stopped"), said
        assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_two_processes_end_with_whoever_started_them(given: Path, tmp_path: Path, number: signal.Signals) -> None:
    train = {"steps": 5000, "save_steps": 1000, "batch_tokens": 128, "micro_batch": 2, "processes": 2}
    file = recipe(given, tmp_path, train=train, model={"path": str(given / "model"), "device": "cpu"})
    kept = tmp_path / "out.unfinished" / "checkpoints"
    begin = [sys.executable, "-m", "trimtab", "run", str(file), "train.save_steps=2"]
    with subprocess.Popen(begin, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and not list(kept.glob("checkpoint-*")):
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        assert len(children) >= 2
        run.send_signal(number)
        said, _ = run.communicate(timeout=200)
    assert run.returncode == 128 + number, said
    last = max(kept.glob("checkpoint-*"), key=step_of)
    assert said.splitlines()[-1].startswith(
        f"stopped after step {step_of(last)} of 5000: {last} is kept. Continue with: "
    ), said
    assert "Traceback" not in said
    assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
