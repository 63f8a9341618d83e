"""SHA-256 of files; of those that are large and do not change, a base's tensors above all, read once on a machine.

    <cache>/hashes/<hash of the path>.json      {"file": [size, times of change, inode], "sha256": ...}

A hash is kept for a file as it was: by its size, the times at which its content and the file itself last changed, and its
inode. Whatever writes into a file changes those. Of one that has only just changed it is not kept: a second change within
the clock's grain would look like none.
"""

import hashlib
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trimtab.kernels.cache import cache_folder, own_folder, trusted

LEAST_BYTES = 16 << 20
"""Smaller files are read in no time."""
_SETTLED_SECONDS = 2.0
_TICK_SECONDS = 0.05
"""Clocks of file systems go in steps of up to ten milliseconds; a file that is read for longer than that is settled."""


def sha256(file: Path) -> str:
    """SHA-256 of a file, read now."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def digest(file: Path, *, keep: bool = False) -> str:
    """SHA-256 of a file, read once by a process as long as it does not change, whatever it is called meanwhile.

    Args:
        file: to be read.
        keep: whether it may have been read by another process, as a large one that a recipe reads may.
    """
    mark = (keep, file.stat().st_dev, *_mark(file))
    known = _known.get((False, *mark[1:])) or _known.get(mark)  # what this process has read will do for either
    if known is not None:
        return known
    found = kept(file) if keep else sha256(file)
    if _settled(mark[2:], _TICK_SECONDS):
        _known[mark] = found
    return found


_known: dict[tuple[int, ...], str] = {}
"""By what `digest` goes by."""


def kept(file: Path) -> str:
    """SHA-256 of a file, read now unless it was before on this machine, and has not changed since."""
    mark = _mark(file)
    if mark[0] < LEAST_BYTES:
        return sha256(file)
    beside = cache_folder() / "hashes" / f"{hashlib.sha256(os.fsencode(file.resolve())).hexdigest()[:32]}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # none there, not the user's own, or cut off
        for path in (cache_folder(), beside.parent, beside):
            trusted(path)
        known = json.loads(beside.read_text(encoding="utf-8"))
        if known["file"] == mark:
            return str(known["sha256"])
    found = sha256(file)
    if _settled(mark, _SETTLED_SECONDS) and _mark(file) == mark:
        with suppress(OSError):  # a cache that cannot be written is none
            own_folder("hashes")
            new = beside.with_suffix(f".{os.getpid()}")
            new.touch(0o600)  # whatever the umask allows: what others may write is not read
            new.write_text(json.dumps({"file": mark, "sha256": found}), encoding="utf-8")
            os.replace(new, beside)
    return found


def _mark(file: Path) -> list[int]:
    about = file.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns, about.st_ino]


def _settled(mark: Sequence[int], seconds: float) -> bool:
    """Whether a file last changed so long ago that another change would show."""
    return time.time() - max(mark[1:3]) / 1e9 > seconds
