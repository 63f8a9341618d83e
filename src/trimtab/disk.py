"""What a kill or a loss of power leaves: only what the system was made to write, and files that are whole."""

import os
from contextlib import suppress
from pathlib import Path

WRITING = ".writing-"
"""Stands in the name of what is not whole yet, behind a dot and the name that it will have."""


def is_unfinished(name: str) -> bool:
    """Whether a file's name says that it is not whole: somebody writes it, or was killed at it."""
    return name.startswith(".") and WRITING in name


def replace_text(file: Path, text: str) -> None:
    """Write a text file that is whole or as it was before, for folders that others may look into meanwhile."""
    new = file.with_name(f".{file.name}{WRITING}{os.getpid()}")
    try:
        new.write_text(text, encoding="utf-8")
        os.replace(new, file)
    finally:
        with suppress(OSError):  # of one that failed
            new.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    if os.name == "nt":  # which syncs no folder, and no file that is open to be read
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
