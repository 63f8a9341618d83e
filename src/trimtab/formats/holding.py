"""An output that only one process writes at a time.

The lock is the system's own on an open file, `.<name>.lock` beside the output, so it goes with its holder: a killed
process leaves a file that nobody has locked. The file says who has it, and goes when that process releases it. A file
system that has no locks gets a warning: an output that cannot be written at all would be worse than one that two may write.
"""

import errno
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import BaseFileLock, FileLock, lock_descriptor

from trimtab import outputs
from trimtab.errors import UserError

NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""What a file system says that has no locks: Lustre without `-o flock`, some network mounts."""
_LOOK_SECONDS = 0.2


@contextmanager
def holding(target: Path, waits: Callable[[str], None] | None = None) -> Iterator[bool]:
    """Have an output to oneself while the block runs; whether that is sure, which it is not where there are no locks.

    Args:
        target: the output; the folder that it is in is made if need be.
        waits: told, once, whom this waits for; None does not wait.

    Raises:
        UserError: naming the process that has it, where that is not waited for.
    """
    target = outputs.resolved(target)
    file = target.parent / f".{target.name}.lock"
    made = [folder for folder in target.parents if not folder.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor, unknown = None, None
        try:
            descriptor = _locked(file)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            unknown = error.strerror
        if unknown is not None:
            file.unlink(missing_ok=True)
            warnings.warn(
                f"{target}: the file system has no flock ({unknown}), so nobody is kept from writing it at the same time",
                stacklevel=3,
            )
            yield False
            return
        if descriptor is None and waits is not None:
            waits(f"{target}: {_holder(file)} is writing it; waiting for that")
            while (descriptor := _locked(file)) is None:
                time.sleep(_LOOK_SECONDS)
        if descriptor is None:
            raise UserError(f"{target}: {_holder(file)} is writing it; wait for that, or choose another output")
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            yield True
        finally:
            with suppress(OSError):  # Windows removes no open file
                file.unlink()
            os.close(descriptor)
    finally:
        with suppress(OSError):  # what is not empty stays
            for folder in made:
                folder.rmdir()


def waiting(file: Path) -> BaseFileLock:
    """A lock on a file, to be waited for, that the system lets go of with its holder."""
    # Without `flock` a lock file would have to do, which outlives its holder: then it raises instead.
    return FileLock(file, poll_interval=0.01, fallback_to_soft=False)


def _locked(file: Path) -> int | None:
    """A descriptor of the file, locked; None if somebody else has it."""
    while True:
        descriptor, mine = os.open(file, os.O_RDWR | os.O_CREAT, 0o666), False
        try:
            # Its last holder may have removed the file since it was opened: then this lock is one on nothing.
            mine = lock_descriptor(descriptor, blocking=False) and _is(descriptor, file)
            if mine:
                return descriptor
            if _is(descriptor, file):
                return None
        finally:
            if not mine:
                os.close(descriptor)


def _is(descriptor: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), file.stat())
    except FileNotFoundError:
        return False


def _holder(file: Path) -> str:
    with suppress(OSError):
        return file.read_text(encoding="utf-8").strip() or "another process"
    return "another process"
