"""A search carried out: by this process, by several that it starts and watches, or by tasks of Ray's (`ray_engine`).

Ctrl-C ends it cleanly: the trial in flight becomes a dead one, what was found is written, and the same command continues.
"""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from trimtab import faults
from trimtab.bit_search import results
from trimtab.bit_search.pinned import pinned
from trimtab.bit_search.searching import Search
from trimtab.ending import Terminated
from trimtab.errors import UserError
from trimtab.pages import report
from trimtab.recipe.recipe import Recipe, read

_END_SECONDS = 10.0
_LOOK_SECONDS = 1.0


def run(
    recipe: Recipe,
    told: Callable[[Search], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> Search:
    """Search until there are enough trials, and write what was found.

    Args:
        recipe: with a `search` block.
        told: called whenever something may have happened, for a display.
        say: told what could not be written, and which cluster makes trials.

    Raises:
        KeyboardInterrupt: after everything was written.
        UserError: if workers stopped before there were enough trials, or no trial was finished.
        Exception: of the first trial that ended by anything but a want of memory or a loss that is not finite.
    """
    places = pinned(recipe)
    search = Search(recipe, places[0])  # what is measured once is measured there, too
    try:
        if search.block.engine == "ray":
            from trimtab.bit_search import ray_engine

            ray_engine.run(search, lambda: told(search), say)
        elif places == [None]:
            search.work(lambda: told(search))
        else:
            search.prepare()  # once, before there are others to do it, too
            search.bench.free()
            _watch(search, recipe, places, told)
    finally:
        results.write(search)
    # Not in the `finally`: behind an error or Ctrl-C it would hide the one, and delay the other.
    report.make(search.folder, say, name=recipe.name)
    trials = search.ledger.trials()
    if not search.front(trials):
        reasons = [t.reason for t in trials if t.reason]
        why = f"none of {len(trials)} was finished; the last: {reasons[-1]}" if reasons else "none was made"
        raise UserError(f"search: there is no trial to choose from: {why}")
    return search


def _watch(search: Search, recipe: Recipe, places: Sequence[str | None], told: Callable[[Search], None]) -> None:
    file = search.folder / "recipe.yaml"
    file.touch(mode=0o600)  # a storage's url may hold a password
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    count = len(places)
    threads = max(torch.get_num_threads() // count, 1)
    failures = context.SimpleQueue()
    about = str(search.folder / "recipe.yaml"), threads, failures
    processes = [context.Process(target=_work, args=(*about, place)) for place in places]
    for process in processes:
        process.start()
    try:
        while any(p.is_alive() for p in processes) and failures.empty():
            told(search)
            time.sleep(_LOOK_SECONDS)
        if not failures.empty():
            for process in processes:
                process.terminate()  # their trials would fail alike
    except Terminated:
        for process in processes:
            process.terminate()  # SIGTERM reached this one alone
        raise
    finally:
        _end(processes)
    told(search)
    search.ledger.bury()
    if not failures.empty():
        error, trace = failures.get()
        raise error if isinstance(error, UserError) else RuntimeError(f"search: a worker failed\n{trace}") from error
    failed = [p.exitcode for p in processes if p.exitcode]
    if failed and search.wish(search.ledger.trials()) is not None:
        killed = "; -9 is the system's kill, mostly for want of memory: use fewer workers" if -9 in failed else ""
        raise UserError(
            f"search: {len(failed)} of {count} workers stopped with an error (exit codes {failed}{killed}) and trials are "
            "left; the same command continues"
        )


def _leave_with_parent() -> None:
    """End this worker if the process that started it was killed: the next command starts workers of its own."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("search: the command that started this worker is gone")


def _end(processes: Sequence[BaseProcess]) -> None:
    until = time.monotonic() + _END_SECONDS  # a Ctrl-C reached them, too
    for process in processes:
        process.join(timeout=max(until - time.monotonic(), 0))
    for process in processes:
        process.terminate()  # which does nothing to those that have ended
    for process in processes:
        process.join()


def _work(file: str, threads: int, failures: Any, place: str | None) -> None:
    torch.set_num_threads(threads)
    try:
        Search(read(file), place).work(_leave_with_parent)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            # Others than ours may not be pickled; what the machine did is one line here, too.
            line = faults.line(error)
            failures.put((None if line is None else UserError(line), traceback.format_exc()))
