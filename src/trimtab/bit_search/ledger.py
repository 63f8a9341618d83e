"""The study: trials, who is at work on which, and what became of them. Where it lies, and what is away for a moment, is
the affair of `storage`.

Optuna keeps the study (one journal file by default, or any storage it knows by url, such as postgresql://), its trials and
their states. Three things are ours, since nothing in it prevents that two workers try the same, or notices that one died:

    a claim      a trial is created whole, in one write: running, with its configuration and worker. The lowest number
                 that holds a configuration (at one length) has it; who finds a lower one gives up its own and asks again.
                 (`Study.ask` writes parameters one by one: between two of them nobody could say who was first.)
    a lease      host, process and a heartbeat. A dead process on this host, or no new beat from another for
                 `LEASE_SECONDS` of our own clock (clocks of hosts differ), makes the trial a failed one, and its
                 configuration may be tried again. Nobody leaves while a life is in doubt (`searching`).
    a name       each claim and each end can be known again: where a database was cut off before it could answer, the
                 call is made again (`storage`), and must neither take two trials nor find its own result a stranger's.

A trial that ran and could not be finished (it diverged, it did not fit) is failed, too, but infeasible: it stays tried.
"""

import math
import os
import socket
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import optuna
from optuna.distributions import IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from trimtab.bit_search.additive import Configuration
from trimtab.bit_search.storage import ERRORS, opened
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
    where: str = ""
    """Host and device that made it."""

    @property
    def counts(self) -> bool:
        """Whether its configuration is taken."""
        return self.state in ("running", "complete", "infeasible")


def busy(url: str, name: str) -> bool:
    """Whether somebody alive is at work on a study."""
    if not begun(url, name):
        return False
    storage = opened(url)
    running = storage.get_all_trials(storage.get_study_id_from_name(name), deepcopy=False, states=(TrialState.RUNNING,))
    return any(_at_work(trial.user_attrs) for trial in running)


def _at_work(about: dict[str, Any]) -> bool:
    worker = about.get("worker")
    if _is_here(worker):
        return _alive(worker)
    return time.time() - float(about.get("beat", 0.0)) < LEASE_SECONDS


def begun(url: str, name: str) -> bool:
    """Whether a storage holds a study of this name."""
    return name in {study.study_name for study in opened(url).get_all_studies()}


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
        self._storage = opened(url)
        sampler = optuna.samplers.RandomSampler()  # never asked
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, directions=["minimize"] * 2, load_if_exists=True, sampler=sampler
        )
        self._id = self._storage.get_study_id_from_name(name)
        self._units, self._distribution = tuple(units), IntDistribution(0, max(choices - 1, 0))
        self._seen: dict[int, tuple[float, float]] = {}  # by trial: its last beat, and when we first saw that
        self._outages = 0  # of the storage, when `_seen` was begun
        self.where = socket.gethostname()
        """What the trials claimed here say of their place."""

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
        where = about.get("where", "")
        if trial.state == TrialState.COMPLETE:
            size, quality = trial.values
            return Trial(trial.number, wish, "complete", int(size), quality, about.get("seconds"), where=where)
        if trial.state == TrialState.RUNNING:
            return Trial(trial.number, wish, "running", where=where)
        return Trial(trial.number, wish, about.get("end", "dead"), reason=about.get("reason", ""), where=where)

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
                return Trial(number, wish, "running", where=self.where)
            self._end(identity, "duplicate", "another worker was first")

    def _create(self, wish: Wish) -> int:
        claim = str(uuid.uuid4())
        about = {"worker": _me(), "where": self.where, "beat": time.time(), "claim": claim}
        template = create_trial(
            state=TrialState.RUNNING,
            params=dict(zip(self._units, wish.configuration, strict=True)),
            distributions=dict.fromkeys(self._units, self._distribution),
            user_attrs={"steps": wish.steps, "kind": wish.kind, **about},
        )
        made = self._storage.create_new_trial(self._id, template)
        # A database that was cut off before it could answer was asked again, and may have made two.
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        mine = [self._identity(t.number) for t in running if t.user_attrs.get("claim") == claim]
        for twin in mine[1:]:
            self._end(twin, "duplicate", "made twice by a database that was away")
        return mine[0] if mine else made

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
        storage = getattr(self._storage, "impatient", self._storage)
        try:
            identity = storage.get_trial_id_from_study_id_trial_number(self._id, trial.number)
            storage.set_trial_user_attr(identity, "beat", time.time())
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # it was given up for dead; `finish` will say so
        except ERRORS:
            self._seen.clear()  # the storage is away for a moment, for all: the next beat may reach it

    def place(self, trial: Trial, where: str) -> None:
        """Note where a trial was made, if not here."""
        try:
            self._storage.set_trial_user_attr(self._identity(trial.number), "where", where)
        except optuna.exceptions.UpdateFinishedTrialError:
            return  # it was given up for dead; `finish` will say so

    def finish(self, trial: Trial, size: int, quality: float, seconds: float) -> bool:
        """A trial ended; False if it had been given up for dead."""
        identity = self._identity(trial.number)
        if not math.isfinite(quality):
            return self.fail(trial, "infeasible", f"quality became {quality}")
        values = [float(size), quality]
        try:
            self._storage.set_trial_user_attr(identity, "seconds", seconds)
            self._storage.set_trial_state_values(identity, TrialState.COMPLETE, values)
        except optuna.exceptions.UpdateFinishedTrialError:
            found = self._storage.get_trial(identity)  # by us, if the answer was lost
            return found.state == TrialState.COMPLETE and found.values == values
        return True

    def fail(self, trial: Trial, how: State, reason: str) -> bool:
        """A trial is infeasible (it stays tried), or dead (it may be tried again)."""
        return self._end(self._identity(trial.number), how, reason)

    def bury(self) -> int:
        """Fail the trials whose workers are dead; how many these were."""
        buried = 0
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            worker, beat = trial.user_attrs.get("worker"), trial.user_attrs.get("beat", 0.0)
            if not (_alive(worker) if _is_here(worker) else self._beats(trial.number, beat)):
                buried += self._end(self._identity(trial.number), "dead", DIED)
        return buried

    def _beats(self, number: int, beat: float) -> bool:
        """Whether a trial's last beat is new, or was so not long ago."""
        outages = getattr(self._storage, "outages", 0)
        if outages != self._outages:  # no beat could be seen meanwhile
            self._seen.clear()
            self._outages = outages
        now = time.monotonic()
        last, since = self._seen.get(number, (None, now))
        self._seen[number] = beat, (since if last == beat else now)
        return now - self._seen[number][1] < LEASE_SECONDS

    def beats(self) -> dict[int, float]:
        """The last beat of each trial that runs on another host, by number: who does not change it is in doubt."""
        running = self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        others = [t for t in running if not _is_here(t.user_attrs.get("worker"))]
        return {t.number: float(t.user_attrs.get("beat", 0.0)) for t in others}


def _me() -> list[Any]:
    return [_here(), os.getpid(), process.born(os.getpid())]


@cache
def _here() -> str:
    """Where process numbers mean the same: this host since it was started, and this container on it.

    A container has a first process of its own, which began later than its host's.
    """
    return f"{socket.gethostname()} {process.boot_seconds()} {process.born(1) or uuid.uuid4()}"


def _is_here(worker: Any) -> bool:
    return bool(worker) and worker[0] == _here()


def _alive(worker: Any) -> bool:
    return process.born(int(worker[1])) == worker[2]
