"""The ledger: one claim a configuration, leases, resuming after SIGKILL, over real processes on one journal."""

import itertools
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import optuna
import pytest

from trimtab.bit_search import ledger as ledger_module
from trimtab.bit_search import storage
from trimtab.bit_search.ledger import Ledger, Trial, Wish
from trimtab.memory.process import born

UNITS, CHOICES = ("a", "b", "c"), 3
EVERY = list(itertools.product(range(CHOICES), repeat=len(UNITS)))


def next_free(trials: list[Trial]) -> Wish | None:
    """The first configuration that nobody has: workers are bound to collide."""
    taken = {t.wish.configuration for t in trials if t.counts}
    free = [c for c in EVERY if c not in taken]
    return Wish(free[0], 0) if free else None


def work(journal: str, limit: int, seconds: float, done: str) -> None:
    """Try configurations; every one that is begun, and every one that is finished, is written down in a line."""
    found = Ledger(journal, "s", UNITS, CHOICES)
    while (trial := found.claim(next_free, limit)) is not None:
        with open(done, "a") as file:
            file.write(f"{trial.wish.configuration}\n")
        time.sleep(seconds)
        assert found.finish(trial, sum(trial.wish.configuration), 1.0 + trial.number, seconds)


def test_a_study_is_read_back(tmp_path: Path) -> None:
    first = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    first.note("prior", [[1.0, 0.5]])
    a = first.claim(lambda _: Wish((0, 1, 2), 5, "uniform"))
    b = first.claim(lambda _: Wish((1, 1, 2), 5))
    assert a is not None
    assert b is not None
    assert first.finish(a, 123, 0.25, 2.0)
    assert first.fail(b, "infeasible", "it diverged")
    again = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    assert again.noted("prior") == [[1.0, 0.5]]
    done, failed = again.trials()
    assert (done.state, done.bytes, done.quality, done.wish) == ("complete", 123, 0.25, Wish((0, 1, 2), 5, "uniform"))
    assert (failed.state, failed.reason, failed.counts) == ("infeasible", "it diverged", True)
    assert not again.finish(done, 1, 1.0, 1.0)


def test_the_lowest_number_has_a_configuration(tmp_path: Path) -> None:
    """The other asks again; at another length the same configuration is another trial."""
    journal = str(tmp_path / "j.log")
    one, two = Ledger(journal, "s", UNITS, CHOICES), Ledger(journal, "s", UNITS, CHOICES)
    wishes = iter([Wish((0, 0, 0), 0), Wish((1, 0, 0), 0)])
    first = one.claim(lambda _: Wish((0, 0, 0), 0))
    second = two.claim(lambda _: next(wishes))
    third = two.claim(lambda _: Wish((0, 0, 0), 9))
    assert first is not None
    assert second is not None
    assert third is not None
    assert second.wish.configuration == (1, 0, 0)
    assert [t.state for t in one.trials()] == ["running", "duplicate", "running", "running"]


def test_a_limit_holds_and_dead_trials_do_not_count(tmp_path: Path) -> None:
    found = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    dead = found.claim(next_free, 2)
    assert dead is not None
    found.fail(dead, "dead", "interrupted")
    assert found.claim(next_free, 2) is not None
    assert found.claim(next_free, 2) is not None
    assert found.claim(next_free, 2) is None


def test_a_silent_worker_elsewhere_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    monkeypatch.setattr(ledger_module, "_me", lambda: ["another-host", 1, "1"])
    trial = found.claim(next_free)
    assert trial is not None
    found.bury()
    assert found.trials()[0].state == "running"
    now = time.monotonic()
    clock = [now]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    other = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    for seconds in (0, 100, 200, 300):  # it beats, by a clock that is years behind ours
        clock[0] = now + seconds
        monkeypatch.setattr(time, "time", lambda: 1e9 + clock[0] - now)
        other.beat(trial)
        found.bury()
        assert found.trials()[0].state == "running"
    clock[0] += ledger_module.LEASE_SECONDS - 1
    found.bury()
    assert found.trials()[0].state == "running"
    clock[0] += 2
    found.bury()
    assert found.trials()[0].state == "dead"
    assert not found.finish(trial, 1, 1.0, 1.0)


def test_process_numbers_of_another_container_say_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same host name, another namespace: that no such process is here does not make its worker dead."""
    found = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    here = ledger_module._here()
    monkeypatch.setattr(ledger_module, "_me", lambda: [f"{here}0", 999_999_999, "1"])
    assert found.claim(next_free) is not None
    found.bury()
    assert found.trials()[0].state == "running"
    monkeypatch.setattr(ledger_module, "_me", lambda: [here, 999_999_999, "1"])
    assert found.claim(next_free) is not None
    found.bury()
    assert [t.state for t in found.trials()] == ["running", "dead"]


def test_a_heartbeat_outlives_a_storage_that_is_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = Ledger(str(tmp_path / "j.log"), "s", UNITS, CHOICES)
    trial = found.claim(next_free)
    assert trial is not None

    def away(*_: object) -> None:
        raise optuna.exceptions.StorageInternalError("the server closed the connection")

    monkeypatch.setattr(found._storage, "set_trial_user_attr", away)
    found.beat(trial)


def test_a_study_in_a_database(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'study.db'}"
    first, second = Ledger(url, "s", UNITS, CHOICES), Ledger(url, "s", UNITS, CHOICES)
    wishes = iter([Wish((0, 0, 0), 0), Wish((1, 0, 0), 0)])
    trial = first.claim(lambda _: Wish((0, 0, 0), 0))
    other = second.claim(lambda _: next(wishes))
    assert trial is not None
    assert other is not None
    assert other.wish.configuration == (1, 0, 0)
    assert first.finish(trial, 12, 0.5, 1.0)
    assert [t.state for t in second.trials()] == ["complete", "duplicate", "running"]


def test_a_cut_line_is_mended(tmp_path: Path) -> None:
    journal = tmp_path / "j.log"
    found = Ledger(str(journal), "s", UNITS, CHOICES)
    trial = found.claim(next_free)
    assert trial is not None
    assert found.finish(trial, 1, 1.0, 1.0)
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"study_')
    again = Ledger(str(journal), "s", UNITS, CHOICES)
    assert again.claim(next_free) is not None
    assert [t.state for t in Ledger(str(journal), "s", UNITS, CHOICES).trials()] == ["complete", "running"]


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def test_two_processes_never_run_the_same(tmp_path: Path) -> None:
    journal, done = str(tmp_path / "j.log"), tmp_path / "done"
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=work, args=(journal, 12, 0.005, str(done))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert len(lines(done)) == len(set(lines(done))) == 12
    trials = Ledger(journal, "s", UNITS, CHOICES).trials()
    assert sum(t.state == "complete" for t in trials) == 12


def test_a_killed_search_loses_only_what_was_in_flight(tmp_path: Path) -> None:
    """SIGKILL at random moments: what was finished stays as it was, one trial is dead, and the end is reached."""
    journal, done = str(tmp_path / "j.log"), tmp_path / "done"
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    finished: dict[int, Trial] = {}
    for _ in range(5):
        process = context.Process(target=work, args=(journal, 20, 0.02, str(done)))
        process.start()
        time.sleep(draw.uniform(0.05, 0.4))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        found = Ledger(journal, "s", UNITS, CHOICES)
        found.bury()
        trials = found.trials()
        assert all(trials[number] == trial for number, trial in finished.items())
        finished = {t.number: t for t in trials if t.state == "complete"}
        assert not any(t.state == "running" for t in trials)
    begun = len(lines(done))
    assert begun - len(finished) <= 5
    work(journal, 20, 0.0, str(done))
    trials = Ledger(journal, "s", UNITS, CHOICES).trials()
    assert all(trials[number] == trial for number, trial in finished.items())
    assert sum(t.state == "complete" for t in trials) == 20


def test_a_lock_goes_with_its_holder(tmp_path: Path) -> None:
    """Killed while it holds the lock: nobody waits for it, and a living holder is waited for."""
    journal, context = tmp_path / "j.log", multiprocessing.get_context("fork")
    taken = context.Event()

    def hold(seconds: float) -> None:
        lock = storage._Lock(journal)
        lock.acquire()
        taken.set()
        time.sleep(seconds)

    for seconds, kill in ((600.0, True), (0.5, False)):
        taken.clear()
        holder = context.Process(target=hold, args=(seconds,))
        holder.start()
        assert taken.wait(60)
        began = time.monotonic()
        if kill:
            os.kill(holder.pid or 0, signal.SIGKILL)
        lock = storage._Lock(journal)
        lock.acquire()
        lock.release()
        assert kill or time.monotonic() - began > 0.3
        holder.join(60)


def test_a_process_is_known_by_when_it_began() -> None:
    """Another process of the same number is another; a zombie is dead; the dead were never born."""
    context = multiprocessing.get_context("fork")
    mine = ledger_module._me()
    assert ledger_module._alive(mine)
    assert not ledger_module._alive([mine[0], mine[1], "0.00"])
    child = context.Process(target=time.sleep, args=(600,))
    child.start()
    assert child.pid is not None
    worker = [mine[0], child.pid, born(child.pid)]
    assert ledger_module._alive(worker)
    os.kill(child.pid, signal.SIGKILL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # ended, and still a zombie
    assert not ledger_module._alive(worker)
    child.join()
    assert not ledger_module._alive(worker)
    assert born(child.pid) == ""
