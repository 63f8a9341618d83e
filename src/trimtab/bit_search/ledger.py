"""The study on disk: trials, who is at work on which, and what became of them. The only file that imports optuna.

Optuna keeps the study (one journal file by default, or any storage it knows by url, such as postgresql://), its trials and
their states. Three things are ours, since nothing in it prevents that two workers try the same, or notices that one died:

    a claim      a trial is created whole, in one write: running, with its configuration and worker. The lowest number
                 that holds a configuration (at one length) has it; who finds a lower one gives up its own and asks again.
                 (`Study.ask` writes parameters one by one: between two of them nobody could say who was first.)
    a lease      host, process and a heartbeat. A dead process on this host, or no new beat from another for
                 `LEASE_SECONDS` of our own clock (clocks of hosts differ), makes the trial a failed one, and its
                 configuration may be tried again.
    a clean end  the journal's lock is one that the system lets go of when its holder dies, and a line that was cut off
                 by that death is taken away before the next is written.

A trial that ran and could not be finished (it diverged, it did not fit) is failed, too, but infeasible: it stays tried.
"""

import io
import math
import os
import re
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import IntDistribution
from optuna.storages import BaseStorage, JournalStorage, get_storage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy.exc import SQLAlchemyError

from trimtab.bit_search.additive import Configuration
from trimtab.errors import UserError
from trimtab.formats.holding import waiting
from trimtab.memory import process

LEASE_SECONDS = 120.0
"""Without a heartbeat for so long, a worker on another machine counts as dead."""
DIED = "its worker died"
State = Literal["running", "complete", "infeasible", "dead", "duplicate"]


@dataclass(frozen=True)
class Wish:
    """A trial that somebody wants to make."""

    configuration: Configuration
    steps: int
    """Of the fine-tune; 0 for none."""
    kind: str = "search"
    """search, uniform or promoted."""


@dataclass(frozen=True)
class Trial:
    """A trial of any state."""

    number: int
    wish: Wish
    state: State
    bytes: int | None = None
    quality: float | None = None
    seconds: float | None = None
    reason: str = ""
    """Why it failed."""

    @property
    def counts(self) -> bool:
        """Whether its configuration is taken."""
        return self.state in ("running", "complete", "infeasible")


class _Lock:
    """A lock that goes with its holder; taking it mends a journal whose last line was cut off."""

    def __init__(self, journal: Path) -> None:
        self._journal = journal
        self._lock = waiting(Path(f"{journal}.lock"))

    def acquire(self) -> bool:
        """Wait for the lock."""
        self._lock.acquire()
        if self._journal.exists():
            _mend(self._journal)
        return True

    def release(self) -> None:
        """Let go."""
        self._lock.release()


def _mend(journal: Path) -> None:
    """Take away what follows the last end of a line."""
    with journal.open("r+b") as file:
        size = file.seek(0, os.SEEK_END)
        if size == 0:
            return
        file.seek(size - 1)
        if file.read(1) != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)


def shown(url: str) -> str:
    """A storage's url without its password."""
    return re.sub(r"(://[^/@:]*):[^@/]*@", r"\1:***@", url)


def _storage(url: str) -> BaseStorage:
    if "://" in url:
        try:
            return get_storage(url)
        except (ImportError, ValueError, SQLAlchemyError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"search.storage: {shown(url)}: Optuna cannot open it ({reason}); a database needs its driver installed "
                "(psycopg for postgresql://, with an older SQLAlchemy psycopg2) and must be there"
            ) from error
    path = Path(url)
    _check_journal(path)
    return JournalStorage(JournalFileBackend(str(path), lock_obj=_Lock(path)))  # type: ignore[arg-type]


def _check_journal(path: Path) -> None:
    """Refuse a journal that cannot be written, and a file that is none: `_mend` would cut it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for file in (path, path.with_name(f"{path.name}.lock")):
            there = file.exists()
            with file.open("ab"):  # to learn whether it can be written
                pass
            if not there:
                file.unlink(missing_ok=True)
        with path.open("rb") if path.exists() else io.BytesIO() as journal:
            first = journal.readline()
    except OSError as error:
        raise UserError(
            f"search.storage: the journal {path} cannot be written ({error.strerror or error}); set search.storage (or "
            "`output`) to a place where it can"
        ) from error
    if first and not first.startswith(b'{"op_code":'):
        raise UserError(f"search.storage: {path} is no journal of Optuna's; name another file")


def busy(url: str, name: str) -> bool:
    """Whether somebody alive is at work on a study."""
    if not begun(url, name):
        return False
    storage = _storage(url)
    running = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False, states=(TrialState.RUNNING,))
    return any(_at_work(trial.user_attrs) for trial in running)


def _at_work(about: dict[str, Any]) -> bool:
    worker = about.get("worker")
    if worker and worker[0] == _here():
        return _alive(worker)
    return time.time() - float(about.get("beat", 0.0)) < LEASE_SECONDS


def begun(url: str, name: str) -> bool:
    """Whether a storage holds a study of this name."""
    return name in {study.study_name for study in _storage(url).get_all_studies()}


class Ledger:
    """One study.

    Args:
        url: path of a journal file, or the url of a storage that Optuna knows.
        name: of the study.
        units: names of the units, in order.
        choices: how many choices each has.
    """

    def __init__(self, url: str, name: str, units: Sequence[str], choices: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._storage = _storage(url)
        sampler = optuna.samplers.RandomSampler()  # never asked
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, directions=["minimize"] * 2, load_if_exists=True, sampler=sampler
        )
        self._id = self._storage.get_study_id_from_name(name)
        self._units, self._distribution = tuple(units), IntDistribution(0, max(choices - 1, 0))
        self._seen: dict[int, tuple[float, float]] = {}  # by trial: its last beat, and when we first saw that

    def note(self, key: str, value: Any) -> None:
        """Keep a value (of JSON) with the study."""
        self._study.set_user_attr(key, value)

    def noted(self, key: str) -> Any:
        """A value kept with the study, or None."""
        return self._study.user_attrs.get(key)

    def keys(self, begin: str) -> list[str]:
        """Keys of kept values that begin so."""
        return sorted(key for key in self._study.user_attrs if key.startswith(begin))

    def trials(self) -> list[Trial]:
        """Every trial so far, by number."""
        return [self._read(t) for t in self._study.get_trials(deepcopy=False)]

    def _read(self, trial: FrozenTrial) -> Trial:
        about = trial.user_attrs
        wish = Wish(tuple(trial.params[u] for u in self._units), about["steps"], about["kind"])
        if trial.state == TrialState.COMPLETE:
            return Trial(trial.number, wish, "complete", int(trial.values[0]), trial.values[1], about.get("seconds"))
        if trial.state == TrialState.RUNNING:
            return Trial(trial.number, wish, "running")
        return Trial(trial.number, wish, about.get("end", "dead"), reason=about.get("reason", ""))

    def claim(self, choose: Callable[[list[Trial]], Wish | None], limit: int | None = None) -> Trial | None:
        """Take a trial that nobody else has.

        Args:
            choose: what to try, knowing all trials; asked again whenever another worker was first.
            limit: trials of kind `search` and `promoted` that there may be.

        Returns:
            None when `choose` wants no more, or the limit is reached.
        """
        while True:
            self.bury()
            wish = choose(self.trials())
            if wish is None:
                return None
            identity = self._create(wish)
            number = self._storage.get_trial_number_from_id(identity)
            before = [t for t in self.trials() if t.number < number and t.counts]
            taken = any(t.wish.configuration == wish.configuration and t.wish.steps == wish.steps for t in before)
            full = wish.kind != "uniform" and limit is not None
            if full and sum(t.wish.kind != "uniform" for t in before) >= (limit or 0):
                self._end(identity, "duplicate", "one trial too many")
                return None
            if not taken:
                return Trial(number, wish, "running")
            self._end(identity, "duplicate", "another worker was first")

    def _create(self, wish: Wish) -> int:
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(zip(self._units, wish.configuration, strict=True)),
            distributions=dict.fromkeys(self._units, self._distribution),
            user_attrs={"steps": wish.steps, "kind": wish.kind, "worker": _me(), "beat": time.time()},
        )
        return self._storage.create_new_trial(self._id, template)

    def _end(self, identity: int, how: State, reason: str) -> bool:
        """Fail a running trial; False if somebody else ended it."""
        try:
            self._storage.set_trial_user_attr(identity, "end", how)
            self._storage.set_trial_user_attr(identity, "reason", reason)
            self._storage.set_trial_state_values(identity, TrialState.FAIL)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def _identity(self, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._id, number)

    def beat(self, trial: Trial) -> None:
        """Say that the worker of this trial is alive."""
        try:
            self._storage.set_trial_user_attr(self._identity(trial.number), "beat", time.time())
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # it was given up for dead; `finish` will say so
        except (OSError, optuna.exceptions.StorageInternalError):
            return  # the storage is away for a moment; the next beat may reach it

    def finish(self, trial: Trial, size: int, quality: float, seconds: float) -> bool:
        """A trial came to its end; False if it had been given up for dead."""
        identity = self._identity(trial.number)
        if not math.isfinite(quality):
            return self.fail(trial, "infeasible", f"quality became {quality}")
        try:
            self._storage.set_trial_user_attr(identity, "seconds", seconds)
            self._storage.set_trial_state_values(identity, TrialState.COMPLETE, [float(size), quality])
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return True

    def fail(self, trial: Trial, how: State, reason: str) -> bool:
        """A trial is infeasible (it stays tried), or dead (it may be tried again)."""
        return self._end(self._identity(trial.number), how, reason)

    def bury(self) -> None:
        """Fail the trials whose workers are dead."""
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker, beat = trial.user_attrs.get("worker"), trial.user_attrs.get("beat", 0.0)
            if not (_alive(worker) if worker and worker[0] == _here() else self._beats(trial.number, beat)):
                self._end(self._identity(trial.number), "dead", DIED)

    def _beats(self, number: int, beat: float) -> bool:
        """Whether a trial's last beat is new, or was so not long ago."""
        now = time.monotonic()
        last, since = self._seen.get(number, (None, now))
        self._seen[number] = beat, (since if last == beat else now)
        return now - self._seen[number][1] < LEASE_SECONDS


def _me() -> list[Any]:
    return [_here(), os.getpid(), process.born(os.getpid())]


@cache
def _here() -> str:
    """Where process numbers mean the same: this host since it was started, and this container on it.

    A container has a first process of its own, which began later than its host's.
    """
    return f"{socket.gethostname()} {process.boot_seconds()} {process.born(1) or uuid.uuid4()}"


def _alive(worker: Any) -> bool:
    return process.born(int(worker[1])) == worker[2]
