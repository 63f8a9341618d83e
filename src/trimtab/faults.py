"""What the machine does to a command, and no bug does: a full disk, a missing right, too little memory.

    line(error)     such an error in one line: what is wrong, where, what to do; None of any other, a bug
    told()          ends a command in it
    writing(place)  lets an error that leaves the block know what was being written; the system names no file of a write

Libraries pass on what the system says in their own ways: Python as an `OSError`, Rust's (safetensors, tokenizers) as text
that ends in "(os error 28)", torch's writer of archives and numpy's as text without a number.
"""

import errno
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from trimtab.errors import UserError

_ANOTHER = "choose a place on another disk"
_SAYS = {
    errno.ENOSPC: ("the disk is full", f"make room there, or {_ANOTHER}"),
    errno.EDQUOT: ("your quota of this disk is used up", f"make room there, or {_ANOTHER}"),
    errno.EFBIG: ("a file would be larger than the disk or a limit allows", f"look at `ulimit -f`, or {_ANOTHER}"),
    errno.EROFS: ("the disk can only be read", _ANOTHER),
    errno.EACCES: ("the system does not allow it", "change its owner or mode (`ls -ld`), or choose another place"),
    errno.EPERM: ("the system does not allow it", "change its owner or mode (`ls -ld`), or choose another place"),
    errno.EIO: ("the disk fails", f"look after it (`dmesg`), or {_ANOTHER}"),
    errno.ESTALE: ("the network's disk has forgotten the file", f"mount it again, or {_ANOTHER}"),
    errno.ENAMETOOLONG: ("the name is too long for the disk", "choose a shorter one"),
    errno.ELOOP: ("symbolic links lead in a circle", "fix them, or choose another place"),
    errno.EBUSY: ("something else uses it", "a mount point cannot be replaced: choose a folder in it"),
    errno.EXDEV: ("is on another disk than the folder above it", "a mount point cannot be replaced: choose a folder in it"),
    errno.EMFILE: ("too many files are open", "raise the limit: `ulimit -n 4096`"),
    errno.ENFILE: ("too many files are open on this machine", "end what opens them"),
}  # fmt: skip
"""What is wrong, and what to do about it, by the system's number."""
_NUMBER = re.compile(r"\(os error (\d+)\)")
_UNWRITTEN = ("PytorchStreamWriter failed", "unexpected pos ", "file write failed", "iostream error", " requested and ")
"""What torch, and numpy, say where they could not write a file."""
_MEMORY = ("DefaultCPUAllocator: ", "out of memory", "Cannot allocate memory", "std::bad_alloc", "failed to map segment",
           "can't start new thread")  # fmt: skip
_ASKED = re.compile(r"tried to allocate (\d+) bytes")
_WHILE = "trimtab was writing "


class writing:
    """Notes on an error of the machine's that leaves the block what was being written.

    Args:
        place: a file or folder.
    """

    def __init__(self, place: Path) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            error.add_note(f"{_WHILE}{self._place}")


class told:
    """Ends a command in the one line of an error that leaves the block, and status 2; a bug leaves it as it is.

    Args:
        before: called first, to leave the terminal as it was.
    """

    def __init__(self, before: Callable[[], None] = lambda: None) -> None:
        self._before = before

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        said = line(error) if isinstance(error, Exception) else None
        if said is not None:
            self._before()
            sys.stderr.write(f"error: {said}\n")
            raise SystemExit(2) from None


def line(error: BaseException) -> str | None:
    """The one line of an error that is not a bug: a `UserError`'s own, or what the machine did.

    Args:
        error: as it was raised.

    Returns:
        None of anything else.
    """
    if isinstance(error, UserError):
        return str(error)
    found: BaseException | None = error
    while found is not None:
        said = _of_memory(found) or _of_letters(found) or _of_files(found, error)
        if said is not None:
            return said
        found = found.__cause__
    return None


def _of_files(error: BaseException, outer: BaseException) -> str | None:
    number = _number(error)
    if number not in _SAYS:
        return None
    what, remedy = _SAYS[number]
    file, place = _file(error), _place(outer)
    where = place or file
    inside = f" (at {file})" if place and file and file != place else ""
    return f"{where}: {what}{inside}; {remedy}" if where else f"{what}; {remedy}"


def _of_letters(error: BaseException) -> str | None:
    """A name that the locale's encoding has no letters for."""
    if not isinstance(error, UnicodeEncodeError):
        return None
    lost = ascii(error.object[error.start : error.end])
    return f"the encoding of this locale, {error.encoding}, has no {lost}; set LC_ALL=C.UTF-8, or another name"


def _number(error: BaseException) -> int | None:
    """The system's number of an error, however it was passed on."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found[1])
    unwritten = isinstance(error, RuntimeError | OSError) and any(words in text for words in _UNWRITTEN)
    return errno.ENOSPC if unwritten else None  # which it is mostly


def _file(error: BaseException) -> str:
    named = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return os.fsdecode(named) if isinstance(named, str | bytes) else ""


def _place(error: BaseException) -> str:
    """What was being written, where `writing` noted that."""
    notes = getattr(error, "__notes__", ())
    return next((note.removeprefix(_WHILE) for note in notes if note.startswith(_WHILE)), "")


def _of_memory(error: BaseException) -> str | None:
    wanting = isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
    if not wanting and isinstance(error, RuntimeError | OSError | ImportError):
        wanting = any(words in str(error) for words in _MEMORY)
    if not wanting:
        return None
    asked = _ASKED.search(str(error))
    much = f"; {int(asked[1]) / 1e9:.2f} GB more were asked for" if asked else ""
    limit = _limit()
    of = "" if limit is None else f" (this process may have {limit / 1e9:.1f} GB: `ulimit -v`)"
    return (
        f"there is not enough memory{of}{much}; end what else needs it, or need less: train.micro_batch, "
        "data.block_tokens, fewer workers (`trimtab plan RECIPE` says what a training needs)"
    )


def _limit() -> int | None:
    """Bytes that the process may have, where it is limited."""
    if os.name == "nt":
        return None
    import resource

    most = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if most == resource.RLIM_INFINITY else most
