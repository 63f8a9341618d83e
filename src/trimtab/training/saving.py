"""Writing a checkpoint: in a folder apart, which takes its name when it is whole.

    checkpoints/.writing/checkpoint-6    the trainer writes here: every process its random state, the first the rest
    checkpoints/checkpoint-6             the same folder, renamed when its manifest is written and every file is on the disk

Whatever ends a run in between (a signal, a full disk) leaves nothing under a checkpoint's name, and the earlier ones as
they were: they are removed only after that.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from trimtab import processes
from trimtab.formats.directory import mend, put_in_place
from trimtab.formats.manifest import write_json
from trimtab.training.checkpoints import RECIPE, VERSIONS, checkpoints_in, step_of, what_is_wrong
from trimtab.training.versions import versions

WRITING = ".writing"


def tidy(checkpoints: Path) -> None:
    """Mend what a process left in a folder of checkpoints that was killed while it wrote one; nobody else writes there."""
    shutil.rmtree(checkpoints / WRITING, ignore_errors=True)
    for left in checkpoints.glob(".*"):
        name = left.name[1:].removesuffix(".old")
        if left.name.endswith(".old"):
            mend(checkpoints / name)
        elif left.is_dir():  # a staging folder of the best model
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


@contextmanager
def writing(checkpoints: Path, step: int, recipe: str, keep: int) -> Iterator[None]:
    """Around the writing of a checkpoint into `checkpoints / WRITING`, by every process; the first puts it in place.

    Args:
        checkpoints: where it is to be.
        step: its own.
        recipe: text of the resolved recipe that it belongs to.
        keep: how many are kept, this one among them.
    """
    name = f"checkpoint-{step}"
    written = checkpoints / WRITING / name
    processes.first(lambda: _begin(written))
    with ExitStack() as failing:
        if processes.is_first():
            failing.callback(shutil.rmtree, checkpoints / WRITING, ignore_errors=True)
        yield
        processes.barrier()
        processes.first(lambda: _put(written, checkpoints / name, recipe, keep))
        failing.pop_all()


def _begin(written: Path) -> None:
    shutil.rmtree(written.parent, ignore_errors=True)
    written.mkdir(parents=True)


def _put(written: Path, target: Path, recipe: str, keep: int) -> None:
    (written / RECIPE).write_text(recipe, encoding="utf-8")
    write_json(written / VERSIONS, versions())
    if target.exists():  # a damaged one of this step, or one whose numbers went wrong
        shutil.rmtree(target)
    put_in_place(written, target, "checkpoint")
    with suppress(OSError):
        os.rmdir(written.parent)
    left = keep - 1
    for checkpoint in checkpoints_in(target.parent):
        if step_of(checkpoint) >= step_of(target):
            continue  # a newer one was damaged when this run continued
        if left <= 0:
            shutil.rmtree(checkpoint)
        elif not what_is_wrong(checkpoint):  # a damaged one is none to keep one less for
            left -= 1
