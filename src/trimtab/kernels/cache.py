"""Where what is made once on a machine is kept: compiled kernels, scripts that take seconds to put together, rows, hashes.

What lies there is run, or trusted to be what was put there, so it has to be the user's own: a folder or a file that
somebody else owns or may write is refused.
"""

import os
import stat
from pathlib import Path

import platformdirs


def cache_folder() -> Path:
    """`TRIMTAB_CACHE`, or the user's cache; it may not be there yet."""
    return Path(os.environ.get("TRIMTAB_CACHE") or platformdirs.user_cache_path("trimtab", appauthor=False))


def own_folder(*inside: str) -> Path:
    """The cache folder or one inside it, made if it is not there.

    Raises:
        PermissionError: if others can write there (see `trusted`).
        OSError: if it cannot be made.
    """
    for folder in (cache_folder(), *([cache_folder().joinpath(*inside)] if inside else [])):
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(mode=0o700, exist_ok=True)
        trusted(folder)
    return folder


def trusted(path: Path) -> Path:
    """The path, if it belongs to this user (or to root) and nobody else may write it.

    Raises:
        PermissionError: if not, naming what to do.
    """
    if not hasattr(os, "geteuid"):
        return path  # Windows keeps the user's folders to the user
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{path} belongs to another user; set TRIMTAB_CACHE to a folder of your own")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"{path} can be written by other users, and what lies there is run or trusted: chmod go-w {path}"
        )
    return path
