"""Where a study lies: a database that is away for a moment or refuses, a file system without locks."""

import errno
import fcntl
import multiprocessing
import sqlite3
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from sqlalchemy.exc import OperationalError

from trimtab.bit_search import storage
from trimtab.bit_search.ledger import Ledger, Wish
from trimtab.errors import UserError
from trimtab.formats.holding import holding

UNITS, CHOICES = ("a", "b"), 3


def away(text: str = "server closed the connection unexpectedly", *, cut: bool = True) -> StorageInternalError:
    """As Optuna raises it: its own error, of SQLAlchemy's."""
    error = StorageInternalError("An exception is raised during the commit.")
    error.__cause__ = OperationalError("SELECT 1", {}, Exception(text), connection_invalidated=cut)
    return error


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What a storage slept, in seconds, by a clock that only sleeping moves on."""
    found: list[float] = []

    class Clock:
        monotonic = staticmethod(lambda: sum(found))
        sleep = staticmethod(found.append)

    monkeypatch.setattr(storage, "time", Clock)
    return found


def in_database(folder: Path) -> Ledger:
    return Ledger(f"sqlite:///{folder / 's.db'}", "s", UNITS, CHOICES)


def fails(monkeypatch: pytest.MonkeyPatch, ledger: Ledger, name: str, *errors: Exception, late: bool = False) -> None:
    """The next calls of a storage's function raise, before or after they have done what they should."""
    inside: Any = ledger._storage.impatient  # type: ignore[attr-defined]
    works, left = getattr(inside, name), list(errors)

    def call(*args: Any, **kwargs: Any) -> Any:
        if not left:
            return works(*args, **kwargs)
        if late:
            works(*args, **kwargs)
        raise left.pop(0)

    monkeypatch.setattr(inside, name, call)


def test_a_restart_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    """In every call of a trial's life; said once if it takes more than a second."""
    found = in_database(tmp_path)
    fails(monkeypatch, found, "create_new_trial", away(), away())
    trial = found.claim(lambda _: Wish((0, 1), 0))
    assert trial is not None
    fails(monkeypatch, found, "set_trial_state_values", *[away("connection refused", cut=False)] * 8)
    with pytest.warns(
        UserWarning, match=r"^search\.storage: sqlite:.*: connection refused; waiting for it, 300"
    ) as said:
        assert found.finish(trial, 12, 0.5, 1.0)
    assert len(said) == 1
    assert 1 < sum(slept) < 60
    fails(monkeypatch, found, "get_all_trials", away())
    assert [t.state for t in found.trials()] == ["complete"]
    fails(monkeypatch, found, "set_study_user_attr", away())
    found.note("prior", [1.0])
    assert found.noted("prior") == [1.0]


def test_an_answer_that_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    """What was done, though nobody could say so, is neither done twice nor taken for a stranger's."""
    found = in_database(tmp_path)
    fails(monkeypatch, found, "create_new_trial", away(), late=True)
    trial = found.claim(lambda _: Wish((0, 1), 0))
    assert trial is not None
    assert [t.state for t in found.trials()] == ["running", "duplicate"]
    assert trial.number == 0
    fails(monkeypatch, found, "set_trial_state_values", away(), late=True)
    assert found.finish(trial, 12, 0.5, 1.0)
    assert found.trials()[0].quality == 0.5
    assert not found.finish(trial, 12, 0.75, 1.0)  # another's, now


def test_a_database_that_stays_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    """One line, and what is asked while the search ends does not wait for minutes again."""
    found = in_database(tmp_path)
    fails(monkeypatch, found, "get_all_trials", *[away()] * 1000)
    with pytest.warns(UserWarning, match="waiting for it"), pytest.raises(storage.Away) as caught:
        found.trials()
    assert "\n" not in str(caught.value)
    assert caught.match(r"unexpectedly; away for 3\d\d s, and the same command continues when it is back")
    waited = sum(slept)
    with pytest.raises(storage.Away, match="away for 0 s"):
        found.trials()
    assert sum(slept) == waited


def test_beats_fail_at_once_and_leases_begin_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    """While nobody could see a beat, nobody's lease runs out."""
    found = in_database(tmp_path)
    monkeypatch.setattr("trimtab.bit_search.ledger._me", lambda: ["elsewhere", 1, "1"])
    trial = found.claim(lambda _: Wish((0, 1), 0))
    assert trial is not None
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    assert found.bury() == 0
    fails(monkeypatch, found, "set_trial_user_attr", away())
    found.beat(trial)
    assert not slept
    fails(monkeypatch, found, "get_all_trials", away())
    clock[0] += 1000
    assert found.bury() == 0
    clock[0] += 1000
    assert found.bury() == 1


def test_a_refusal_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slept: list[float]) -> None:
    found = in_database(tmp_path)
    for said in (
        'FATAL:  password authentication failed for user "me"',
        "could not translate host name",
        "disk is full",
    ):
        error = away(said, cut=False)
        if said == "disk is full":
            error.__cause__.orig = sqlite3.OperationalError(said)  # type: ignore[union-attr]
        fails(monkeypatch, found, "get_all_trials", error)
        with pytest.raises(storage.Away, match=rf"^search\.storage: sqlite:.*s\.db: {' '.join(said.split())[:20]}"):
            found.trials()
    assert not slept
    for said in ("is starting up", "is not yet accepting connections"):
        fails(monkeypatch, found, "get_all_trials", away(f"FATAL:  the database system {said}", cut=False))
        assert found.trials() == []
        assert slept.pop()


def test_what_cannot_be_opened(tmp_path: Path, slept: list[float]) -> None:
    def refused(url: str) -> str:
        with pytest.raises(UserError) as caught:
            storage.opened(url)
        assert "secret" not in str(caught.value)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert refused(f"sqlite:///{tmp_path}/no/x.db").endswith("no/x.db: unable to open database file")
    said = refused("postgres://me:secret@host/db")
    assert said.startswith("search.storage: postgres://me:***@host/db: is not the URL of a database (")
    assert "is not the URL of a database (Optuna has no storage in Redis)" in refused("redis://host:1234")
    assert "is not the URL of a database" in refused("postgresql://me:secret{0@host/db")
    if find_spec("cx_Oracle") is None:
        said = refused("oracle+cx_oracle://host/db?password=secret")
        assert "needs its driver installed (No module named 'cx_Oracle'): pip install" in said
    assert not slept
    with sqlite3.connect(tmp_path / "old.db") as made:
        made.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        made.execute("INSERT INTO alembic_version VALUES ('v1.3.0.a')")
    made.close()
    assert "no longer compatible with the table schema" in refused(f"sqlite:///{tmp_path}/old.db")


# ---- no locks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


def claim_all(journal: str, done: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = Ledger(journal, "s", UNITS, CHOICES)
    every = [(a, b) for a in range(CHOICES) for b in range(CHOICES)]

    def first(trials: Any) -> Wish | None:
        taken = {t.wish.configuration for t in trials if t.counts}
        return next((Wish(c, 0) for c in every if c not in taken), None)

    while (trial := found.claim(first)) is not None:
        with open(done, "a") as file:
            file.write(f"{trial.wish.configuration}\n")
        assert found.finish(trial, 1, 1.0, 1.0)


@pytest.mark.usefixtures("no_flock")
def test_a_journal_without_flock(tmp_path: Path) -> None:
    """Two processes, and a line that was cut off: as with it, and said once by each that opens it."""
    journal, done = tmp_path / "j.log", tmp_path / "done"
    with pytest.warns(UserWarning, match=r"has no flock \(Function not implemented\); .*j\.log\.open\.lock") as said:
        found = Ledger(str(journal), "s", UNITS, CHOICES)
    assert len(said) == 1
    assert found.noted("x") is None
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"study_')
    context = multiprocessing.get_context("fork")
    both = [context.Process(target=claim_all, args=(str(journal), str(done))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
        assert process.exitcode == 0
    lines = done.read_text().splitlines()
    assert len(lines) == len(set(lines)) == CHOICES**2
    assert not (tmp_path / "j.log.open.lock").exists()


@pytest.mark.usefixtures("no_flock")
def test_an_output_without_flock(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"out: the file system has no flock"), holding(tmp_path / "out"):
        (tmp_path / "out").mkdir()
    assert [file.name for file in tmp_path.iterdir()] == ["out"]
    with pytest.raises(KeyError), pytest.warns(UserWarning, match="no flock"), holding(tmp_path / "out"):
        raise KeyError("of the block")


def test_another_error_of_a_lock_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(OSError, match="Input/output"), holding(tmp_path / "out"):
        pass
    with pytest.raises(UserError, match=r"j\.log cannot be locked \(Input/output error\)"):
        storage.opened(str(tmp_path / "j.log"))


def test_a_url_is_shown_without_its_password() -> None:
    assert storage.shown("postgresql://me:secret@host/db") == "postgresql://me:***@host/db"
    assert (
        storage.shown("postgresql://host/db?user=me&password=secret&x=1")
        == "postgresql://host/db?user=me&password=***&x=1"
    )
