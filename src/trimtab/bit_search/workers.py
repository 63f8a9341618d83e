"""A search carried out: by this process, or by several that it starts and watches.

Ctrl-C ends it cleanly: the trial in flight becomes a dead one, what was found is written, and the same command goes on.
"""

import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from typing import Any

import torch

from trimtab.bit_search import results
from trimtab.bit_search.searching import Search
from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe, read

_LOOK_SECONDS = 1.0


def run(recipe: Recipe, told: Callable[[Search], None] = lambda _: None) -> Search:
    """Search until there are enough trials, and write what was found.

    Args:
        recipe: with a `search` block.
        told: called whenever something may have happened, for a display.

    Raises:
        KeyboardInterrupt: after everything was written.
        UserError: if workers stopped before there were enough trials, or no trial was finished.
        Exception: of the first trial that ended by anything but a want of memory or a loss that is not finite.
    """
    search = Search(recipe)
    try:
        if search.block.workers == 1:
            search.work(lambda: told(search))
        else:
            search.prepare()  # once, before there are others to do it, too
            search.free()
            _watch(search, recipe, told)
    finally:
        results.write(search)
    trials = search.ledger.trials()
    if not search.front(trials):
        reasons = [t.reason for t in trials if t.reason]
        why = f"none of {len(trials)} was finished; the last: {reasons[-1]}" if reasons else "none was made"
        raise UserError(f"search: there is no trial to choose from: {why}")
    return search


def _watch(search: Search, recipe: Recipe, told: Callable[[Search], None]) -> None:
    file = search.folder / "recipe.yaml"
    file.touch(mode=0o600)  # a storage's url may hold a password
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    context = multiprocessing.get_context("spawn")
    count = search.block.workers
    threads = max(torch.get_num_threads() // count, 1)
    failures = context.SimpleQueue()
    about = str(search.folder / "recipe.yaml"), threads, failures
    processes = [context.Process(target=_work, args=about) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        while any(p.is_alive() for p in processes) and failures.empty():
            told(search)
            time.sleep(_LOOK_SECONDS)
        if not failures.empty():
            for process in processes:
                process.terminate()  # their trials would fail alike
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
            "left; the same command goes on"
        )


def _leave_with_parent() -> None:
    """End this worker if whoever started it was killed: nobody would write results, and the next command starts its own."""
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():
        raise SystemExit("search: the command that started this worker is gone")


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.join(timeout=10)  # a Ctrl-C reached them, too
        if process.is_alive():
            process.terminate()
            process.join()


def _work(file: str, threads: int, failures: Any) -> None:
    torch.set_num_threads(threads)
    try:
        Search(read(file)).work(_leave_with_parent)
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    finally:
        error = sys.exc_info()[1]
        if isinstance(error, Exception):
            # Others than ours may not be pickled.
            failures.put((error if isinstance(error, UserError) else None, traceback.format_exc()))
