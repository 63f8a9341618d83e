"""What a kill or a loss of power leaves: only what the system was made to write, and files that are whole."""

import os
import socket
from collections.abc import Callable
from contextlib import suppress
from glob import escape
from pathlib import Path

WRITING = ".writing-"
"""Stands in the name of what is not whole yet, behind a dot and the name that it will have."""


def is_unfinished(name: str) -> bool:
    """Whether a file's name says that it is not whole: somebody writes it, or was killed at it."""
    return name.startswith(".") and WRITING in name


def replace_text(file: Path, text: str) -> None:
    """`replace` with a text."""

    def write(new: Path) -> None:
        new.write_text(text, encoding="utf-8")

    replace(file, write)


def replace(file: Path, write: Callable[[Path], None]) -> None:
    """Write a file that is whole or as it was before, for folders that others may look into meanwhile.

    What a process of this machine left of the same file when it was killed goes.

    Args:
        file: its name.
        write: writes it under another one, beside it.
    """
    mine = f".{file.name}{WRITING}{socket.gethostname()}-"
    for left in file.parent.glob(f"{escape(mine)}*"):
        if not _runs(left.name.removeprefix(mine)):
            left.unlink(missing_ok=True)
    new = file.with_name(f"{mine}{os.getpid()}")
    try:
        write(new)
        os.replace(new, file)
    finally:
        with suppress(OSError):  # of one that failed
            new.unlink(missing_ok=True)


def _runs(pid: str) -> bool:
    """Whether a process of this number runs here, or may."""
    if os.name == "nt" or not pid.isdecimal():  # where asking would end it
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # which syncs no folder, and no file that is open to be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
