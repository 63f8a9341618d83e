"""Where something is written: what a person gave becomes a path here, and what can be no output is refused here.

`~` is the home folder, and a symbolic link is what it leads to, so that a folder is replaced and never the link to it. What
is written beside an output while it is made (`formats.directory`) takes its name and some letters more, and then that name.
"""

import os
from pathlib import Path

from trimtab.errors import UserError

_BESIDE_BYTES = 24
"""Most that the name of a folder beside an output is longer than its own: `.NAME.unfinished.new`."""
_INSIDE_BYTES = 160
"""Most that the path of a file in it is longer."""


def expanded(path: str | os.PathLike[str], key: str = "output") -> Path:
    """The path with its `~` expanded.

    Raises:
        UserError: if there is no such home, or nothing was named.
    """
    text = os.fspath(path)
    if not text.strip() or "\0" in text:
        raise UserError(f"{key}: {text!r} names no folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{key}: {text}: there is no such home folder; write the whole path") from error


def resolved(path: str | os.PathLike[str], key: str = "output") -> Path:
    """The absolute path that is meant, without links; it need not be there.

    Raises:
        UserError: as `expanded` does, if links lead in a circle, or for a whole disk.
    """
    try:
        target = expanded(path, key).resolve()
    except (RuntimeError, OSError) as error:  # a circle of links is a RuntimeError before Python 3.13
        raise UserError(f"{key}: {path}: leads nowhere ({getattr(error, 'strerror', None) or error})") from error
    if target == target.parent:
        raise UserError(f"{key}: {target} is a whole disk, which cannot be replaced; name a folder in it")
    return target


def output(path: str | os.PathLike[str], key: str = "output") -> Path:
    """The same, looked at: whether a folder can be written there, and put in place of what is there.

    Args:
        path: as a person gave it.
        key: where, for messages: a key of a recipe, or an option.

    Raises:
        UserError: naming what is in the way: a file, a mount point, a disk that is read-only, a name that is too long.
    """
    target = resolved(path, key)
    above = next(folder for folder in target.parents if _exists(folder, key))
    if not above.is_dir():
        raise UserError(f"{key}: {above} is a file, so {target} cannot be made in it; name another folder")
    _check_lengths(target, above, key)
    if target.exists() and not target.is_dir():
        raise UserError(f"{key}: {target} is a file, not a directory; name another folder")
    if os.path.ismount(target):
        raise UserError(
            f"{key}: {target} is a mount point, which cannot be replaced as a whole; name a folder in it: {target / 'out'}"
        )
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{key}: nothing can be written in {above} by this user; name another folder")
    return target


def _exists(folder: Path, key: str) -> bool:
    try:
        return folder.exists()
    except OSError as error:
        raise UserError(f"{key}: {folder}: {error.strerror}; name another folder") from error


def _check_lengths(target: Path, above: Path, key: str) -> None:
    if not hasattr(os, "pathconf"):
        return
    most, whole = os.pathconf(above, "PC_NAME_MAX"), os.pathconf(above, "PC_PATH_MAX")
    for part in target.parts:
        length = len(os.fsencode(part)) + (_BESIDE_BYTES if part == target.name else 0)
        if 0 < most < length:
            long = len(os.fsencode(part))
            raise UserError(
                f"{key}: the name {part[:40]}.. has {long} bytes, and {most - _BESIDE_BYTES} fit; shorten it"
            )
    if 0 < whole < len(os.fsencode(target)) + _INSIDE_BYTES:
        raise UserError(f"{key}: the path {str(target)[:40]}.. is longer than the system takes; name a shorter one")
