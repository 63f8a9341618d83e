"""A search whose trials are tasks of a Ray cluster, each with the resources that `search.resources` names.

    this command    claims trials and keeps their leases, proposes, and writes down what comes back
    a task          one trial: rules and steps go there, quality and seconds come back

Tasks open no storage, so that machines of the cluster need trimtab, the model and the data, and no way to a database. The
study is an ordinary one: other commands, with Ray or without, may work on it at the same time. Ray is told to try nothing
twice (`max_retries=0`): a task whose process or machine is lost leaves a dead trial, and dead trials are made again by the
rules of every search, twice at most for one that kills its worker.

The only file that imports ray.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from trimtab import faults
from trimtab.bit_search.bench import Bench, Objective
from trimtab.bit_search.ledger import Trial
from trimtab.bit_search.searching import Search, WorkerDied, beating
from trimtab.bit_search.storage import Away
from trimtab.errors import Diverged, UserError
from trimtab.memory.process import memory_errors
from trimtab.recipe.recipe import Recipe, from_text

_LOOK_SECONDS = 1.0
_NAMES = {"cpu": "CPU", "gpu": "GPU"}
"""Of resources, as Ray writes them; others are the cluster's own."""


class _Job(NamedTuple):
    """What a task has to know, besides its trial."""

    recipe: str
    folder: str
    """Where this command was given: paths of the recipe may be relative to it."""
    threads: int


class _Answer(NamedTuple):
    """What comes back: a value, or in words why there is none."""

    value: Any
    where: str
    infeasible: str = ""
    mistake: str = ""
    """Of the user's."""


def run(search: Search, told: Callable[[], None], say: Callable[[str], None]) -> None:
    """Make trials until there are enough.

    Args:
        search: whose study it is.
        told: called whenever something may have happened.
        say: told which cluster it is.

    Raises:
        UserError: if there is no cluster, or none of its machines has what a trial needs.
        Exception: of the first trial that ended by anything but a want of memory or a loss that is not finite.
    """
    asked = {"cpu": 1.0} | (search.block.resources or {})
    need = {_NAMES.get(name, name): amount for name, amount in asked.items()}
    with _cluster() as ray:
        search.workers = _workers(search, ray.nodes(), need, say)
        task = _task(ray, dict(need))
        # A url may hold a password, and a task has no use for one.
        recipe = search.recipe.model_copy(update={"search": search.block.model_copy(update={"storage": None})})
        job = _Job(recipe.to_yaml(), os.getcwd(), max(int(need["CPU"]), 1))
        try:
            if search.ledger.noted("prior") is None:
                for key, value in _value(ray, task.remote(job, _prior, search.space)).value.items():
                    search.ledger.note(key, value)
            if search.block.objective == "tuned" and search.recipe.teacher_cache is not None:
                _value(ray, task.remote(job, _taught))
        except WorkerDied as error:
            raise UserError(f"search: the task that measures what all trials begin with was lost: {error}") from error
        _work(search, ray, lambda rules, steps: task.remote(job, _measured, rules, steps), told)


def _task(ray: Any, need: dict[str, float]) -> Any:
    """`_carried_out` as a task with these resources, in Ray's names."""
    options: dict[str, Any] = {"num_cpus": need.pop("CPU"), "num_gpus": need.pop("GPU", 0.0), "max_retries": 0}
    if "memory" in need:
        options["memory"] = need.pop("memory")
    try:
        # A task with a GPU ends its process, and so gives the GPU back: Ray's own default.
        return ray.remote(resources=need, **options)(_carried_out)
    except ValueError as error:
        raise UserError(f"search.resources: {' '.join(str(error).split())}") from error


def _work(search: Search, ray: Any, begin: Callable[[Any, int], Any], told: Callable[[], None]) -> None:
    flying: dict[Any, Trial] = {}
    with ExitStack() as leases:
        ends: dict[Any, ExitStack] = {}
        try:
            while flying or search.more(told):
                while len(flying) < search.workers and (trial := search.claim()) is not None:
                    reference = begin(search.space.rules(trial.wish.configuration), trial.wish.steps)
                    flying[reference] = trial
                    ends[reference] = leases.enter_context(ExitStack())
                    ends[reference].enter_context(beating(search.ledger, trial))
                told()
                done, _ = ray.wait(list(flying), timeout=_LOOK_SECONDS) if flying else ([], [])
                for reference in done:
                    trial = flying.pop(reference)
                    search.settle(trial, _measure(search, ray, trial, reference))
                    ends.pop(reference).close()
        finally:
            for reference in flying:
                ray.cancel(reference, force=True)
            with suppress(Away):  # then their leases end
                for trial in flying.values():
                    search.ledger.fail(trial, "dead", "interrupted")


def _measure(search: Search, ray: Any, trial: Trial, reference: Any) -> Callable[[], tuple[float, float]]:
    """Quality and seconds of a task that has ended, as `Search.settle` asks for them."""

    def measure() -> tuple[float, float]:
        answer = _value(ray, reference)
        search.ledger.place(trial, answer.where)
        quality, seconds = answer.value
        return quality, seconds

    return measure


def _value(ray: Any, reference: Any) -> _Answer:
    """What a task gave back; what went wrong there goes wrong here."""
    lost = ray.exceptions
    try:
        answer: _Answer = ray.get(reference)
    except (lost.WorkerCrashedError, lost.NodeDiedError, lost.ObjectLostError, lost.OutOfMemoryError) as error:
        raise WorkerDied(" ".join(str(error).split())) from error
    except lost.RayTaskError as error:  # says the trace
        raise RuntimeError(f"search: a task of Ray's failed\n{error}") from error
    except lost.RayError as error:
        raise UserError(f"search.engine: Ray could not run a task: {' '.join(str(error).split())[:500]}") from error
    if answer.infeasible:
        raise Diverged(answer.infeasible)
    if answer.mistake:
        raise UserError(f"{answer.mistake} (on {answer.where})")
    return answer


# ---- the cluster --------------------------------------------------------------------------------------------------------


@contextmanager
def _cluster() -> Iterator[Any]:
    """Ray, connected: to the cluster of `RAY_ADDRESS`, else to that of this machine, else to one that is started here."""
    import ray

    began = not ray.is_initialized()
    if began:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # what is started here sends nobody figures
        try:
            ray.init(log_to_driver=False, logging_level="ERROR", include_dashboard=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"search.engine: no Ray cluster ({' '.join(str(error).split())[:300]}); start one with `ray start --head`, "
                "or set RAY_ADDRESS"
            ) from error
    try:
        yield ray
    finally:
        if began:
            ray.shutdown()


def _workers(search: Search, nodes: list[dict[str, Any]], need: dict[str, float], say: Callable[[str], None]) -> int:
    """How many trials are made at a time: as many as there is room for, or fewer if so asked."""
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    room = sum(min(int(has.get(name, 0.0) / amount) for name, amount in need.items()) for has in alive)
    wanted = search.block.workers
    if not room and wanted is None:
        asked = ", ".join(f"{name} {amount:g}" for name, amount in need.items())
        there = "; ".join(", ".join(f"{name} {has.get(name, 0.0):g}" for name in need) for has in alive)
        raise UserError(
            f"search.resources: no machine of the Ray cluster has what a trial needs ({asked}); they have: {there}. Lower "
            "it, or set search.workers to wait for machines that are still to come"
        )
    say(f"Ray: {len(alive)} machines, room for {room} trials at a time" + (f", {wanted} asked for" if wanted else ""))
    return wanted or room


# ---- in a task ----------------------------------------------------------------------------------------------------------


def _carried_out(job: _Job, what: Callable[..., Any], *about: Any) -> _Answer:
    """Do something with the bench of a job, in a process of Ray's."""
    where = socket.gethostname()
    try:
        torch.set_num_threads(job.threads)
        if Path(job.folder).is_dir():
            os.chdir(job.folder)
        recipe = from_text(job.recipe)
        where = f"{where} {recipe.device}"
        with memory_errors():
            return _Answer(what(recipe, *about), where)
    except Diverged as error:
        return _Answer(None, where, infeasible=str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return _Answer(None, where, infeasible=f"{type(error).__name__}: {' '.join(str(error).split())}")
    except UserError as error:
        return _Answer(None, where, mistake=str(error))
    except (OSError, RuntimeError) as error:
        if (line := faults.line(error)) is None:
            raise
        return _Answer(None, where, mistake=f"{where}: {line}")


_KEPT: dict[str, Objective] = {}
"""By recipe: a process that makes another trial of the same search does not load everything again."""


def _measured(recipe: Recipe, rules: Any, steps: int) -> tuple[float, float]:
    key = recipe.to_yaml()
    if key not in _KEPT:
        _KEPT.clear()
        _KEPT[key] = Bench(recipe).objective()
    began = time.perf_counter()
    return _KEPT[key](rules, steps), time.perf_counter() - began


def _prior(recipe: Recipe, space: Any) -> dict[str, Any]:
    bench = Bench(recipe)
    found = bench.prior(space)
    bench.free()
    return found


def _taught(recipe: Recipe) -> None:
    Bench(recipe).teach()
