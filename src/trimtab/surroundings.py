r"""What a command finds around it, made such that it can work: streams that take every letter, a home folder.

A terminal or a log that is not UTF-8 (`LC_ALL=C`, `PYTHONIOENCODING=ascii`) gets letters that it lacks as `\u2026`, where
Python would end in a `UnicodeEncodeError`. A user without a name or a home folder, as containers have them, gets one in the
folder of temporary files: else libraries would write to a folder called `~` where the command was started.

Only for a process that is ours, the command line's: a library that is imported changes nothing.
"""

import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def settled() -> Iterator[None]:
    """Make them such before libraries are loaded, which look when they are; in the end all that was said is out."""
    _settle()
    try:
        yield
    finally:
        try:
            sys.stdout.flush()
        except OSError as error:  # a full disk behind it, or nobody reads on: Python would say so again at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                raise


def _settle() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if os.name == "nt" or os.path.expanduser("~") != "~":
        return
    home = _home()
    os.environ["HOME"] = str(home)
    os.environ.setdefault("USER", f"uid{os.geteuid()}")
    sys.stderr.write(f"there is no home folder: caches are in {home}; set HOME to a folder of your own to keep them\n")


def _home() -> Path:
    """A folder of this user's alone."""
    folder = Path(tempfile.gettempdir(), f"trimtab-home-{os.geteuid()}")
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if folder.is_symlink() or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        return Path(tempfile.mkdtemp(prefix="trimtab-home-"))  # somebody was there first
    return folder
