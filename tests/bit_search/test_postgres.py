"""A study in a real PostgreSQL: many at once, restarts and crashes in between, what it refuses."""

import itertools
import multiprocessing
import os
import signal
import tempfile
import time
import warnings
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import postgres
import pytest

from trimtab.bit_search import storage
from trimtab.bit_search.ledger import DIED, Ledger, Trial, Wish
from trimtab.errors import UserError

pytestmark = pytest.mark.skipif(
    bool(postgres.lacking()) or find_spec("psycopg") is None,
    reason=postgres.lacking() or "psycopg is not installed: pip install 'psycopg[binary]'",
)
UNITS, CHOICES = ("a", "b", "c"), 3
EVERY = list(itertools.product(range(CHOICES), repeat=len(UNITS)))


@pytest.fixture(scope="module")
def server() -> Iterator[postgres.Server]:
    # Not in pytest's folder, which is closed to the user that a server of root's runs as.
    with tempfile.TemporaryDirectory(prefix="trimtab-postgres-") as folder:
        made = postgres.Server(Path(folder))
        try:
            yield made
        finally:
            made.stop("immediate")


def next_free(trials: list[Trial]) -> Wish | None:
    taken = {t.wish.configuration for t in trials if t.counts}
    return next((Wish(c, 0) for c in EVERY if c not in taken), None)


def work(url: str, name: str, seconds: float, done: str) -> None:
    """Try every configuration; what is finished is written down in a line."""
    warnings.simplefilter("ignore")
    found = Ledger(url, name, UNITS, CHOICES)
    while (trial := found.claim(next_free)) is not None:
        time.sleep(seconds)
        assert found.finish(trial, sum(trial.wish.configuration), 1.0 + trial.number, seconds)
        with open(done, "a") as file:
            file.write(f"{trial.wish.configuration}\n")


def begin(count: int, *about: object) -> list[multiprocessing.context.ForkProcess]:
    made = [multiprocessing.get_context("fork").Process(target=work, args=about, daemon=True) for _ in range(count)]
    for process in made:
        process.start()
    return made


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def wait_for(file: Path, count: int) -> None:
    until = time.monotonic() + 120
    while len(lines(file)) < count:
        assert time.monotonic() < until
        time.sleep(0.02)


def test_tables_that_several_create_at_once(server: postgres.Server, tmp_path: Path) -> None:
    """An empty database, which all of them find empty: all but one fail, and try again."""
    done = tmp_path / "done"
    for process in begin(4, server.url, "first", 0.0, str(done)):
        process.join(120)
        assert process.exitcode == 0
    assert sorted(lines(done)) == sorted(map(str, EVERY))
    trials = Ledger(server.url, "first", UNITS, CHOICES).trials()
    assert sum(t.state == "complete" for t in trials) == len(EVERY)


@pytest.mark.parametrize("how", ["fast", "immediate"])
def test_a_restart_loses_nothing(server: postgres.Server, tmp_path: Path, how: str) -> None:
    """Two at work while it stops, is away for seconds, and comes back; twice."""
    done = tmp_path / "done"
    both = begin(2, server.url, how, 0.1, str(done))
    for count in (3, 12):
        wait_for(done, count)
        server.stop(how)
        time.sleep(1.5)
        server.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    assert sorted(lines(done)) == sorted(map(str, EVERY))
    trials = [t for t in Ledger(server.url, how, UNITS, CHOICES).trials() if t.state != "duplicate"]
    assert [t.state for t in trials] == ["complete"] * len(EVERY)


def test_killed_workers(server: postgres.Server, tmp_path: Path) -> None:
    """What they were making is dead, and is made again."""
    found, done = Ledger(server.url, "killed", UNITS, CHOICES), str(tmp_path / "done")
    for _ in range(2):
        (process,) = begin(1, server.url, "killed", 600.0, done)
        until = time.monotonic() + 120
        while not any(t.state == "running" for t in found.trials()):
            assert time.monotonic() < until
            time.sleep(0.02)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert found.bury() == 1
    work(server.url, "killed", 0.0, done)
    trials = found.trials()
    assert [t.reason for t in trials if t.state == "dead"] == [DIED] * 2
    assert sum(t.state == "complete" for t in trials) == len(EVERY)


def test_it_is_opened_while_it_starts(server: postgres.Server, tmp_path: Path) -> None:
    server.stop()
    (process,) = begin(1, server.url, "opened", 0.0, str(tmp_path / "done"))
    time.sleep(1.5)
    assert process.is_alive()
    server.start()
    process.join(120)
    assert process.exitcode == 0


def test_what_it_refuses_is_told_at_once(server: postgres.Server) -> None:
    began = time.monotonic()
    for wrong, words in (
        (server.url.replace(postgres.PASSWORD, "guess"), 'password authentication failed for user "me"'),
        (server.url.removesuffix("/postgres") + "/nowhere", 'database "nowhere" does not exist'),
        (server.url.replace("127.0.0.1", "no-such-host.invalid"), "resolve host"),
    ):
        with pytest.raises(UserError, match=r"^search\.storage: postgresql\+psycopg://me:\*\*\*@") as caught:
            storage.opened(wrong)
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
    assert time.monotonic() - began < storage.OPENING_SECONDS / 2
