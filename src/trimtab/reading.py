"""Files that somebody else wrote, and that may hold anything: only regular ones are opened, and only so much is believed.

A config, an index, a manifest, an adapter's settings come with a model from anywhere. Of such a file

    what lies there    is a regular file (a fifo would wait for ever, a device would never end)
    its size           is at most `MOST_BYTES`; a hole of terabytes takes no room on a disk
    its text           is UTF-8, with or without a byte order mark
    its JSON           is no deeper than `DEEPEST` (what copies it calls itself for each level), and has no integer of more
                       digits than Python converts

and whatever is not so is a `UserError` that names the file and what to do. What other libraries read by themselves is
looked at first (`require_regular`), and what they then raise is told in one line (`told`).
"""

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trimtab.errors import UserError

MOST_BYTES = 64 * 2**20
"""Of a file that is read as a whole; the largest index on the hub has 6 MB."""
DEEPEST = 64
"""Levels of lists and mappings in one another."""
MOST_OF_A_TEMPLATE = 2**20
"""Of a chat template."""
AGAIN = "fetch or save it again"


def require_regular(file: Path, most: int | None = None, remedy: str = AGAIN) -> None:
    """Raise a `UserError` if what lies there is no file that can be read to its end.

    Args:
        file: of any name; one that does not exist is let pass.
        most: bytes that it may have.
        remedy: what to do.
    """
    try:
        found = file.stat()
    except FileNotFoundError:
        if file.is_symlink():
            raise UserError(f"{file}: is a link to nothing; {remedy}") from None
        return
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    if not stat.S_ISREG(found.st_mode):
        what = "a folder" if stat.S_ISDIR(found.st_mode) else "a pipe, socket or device"
        raise UserError(f"{file}: is {what}, not a file; {remedy}")
    if most is not None and found.st_size > most:
        raise UserError(f"{file}: has {found.st_size:,} bytes, where at most {most:,} are read; {remedy}")


def read_text(file: Path, remedy: str = AGAIN, most: int = MOST_BYTES) -> str:
    """The text of a file.

    Raises:
        UserError: if it is missing, no regular file, too large or not UTF-8.
    """
    require_regular(file, most, remedy)
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); {remedy}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: is not UTF-8 (byte {error.start}); {remedy}") from error


def read_json(file: Path, remedy: str = AGAIN, most: int = MOST_BYTES) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: as `read_text`, and for what is no JSON, or JSON that nobody means.
    """
    return parsed(read_text(file, remedy, most), str(file), remedy)


def read_mapping(file: Path, remedy: str = AGAIN, most: int = MOST_BYTES) -> dict[str, Any]:
    """As `read_json`, of a file that holds a mapping of keys."""
    values = read_json(file, remedy, most)
    if not isinstance(values, dict):
        raise UserError(f"{file}: holds no mapping of keys; {remedy}")
    return values


def parsed(text: str, where: str, remedy: str = AGAIN) -> Any:
    """What a JSON text says; as `read_json`."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:  # an integer of 5,000 digits is a ValueError
        raise UserError(f"{where}: not valid JSON ({first_line(error)}); {remedy}") from error
    if deeper_than(values, DEEPEST):
        raise UserError(f"{where}: holds more than {DEEPEST} lists and mappings in one another; {remedy}")
    return values


def deeper_than(values: Any, most: int) -> bool:
    """Whether lists and mappings of JSON stand in one another more often than this."""
    level = [values]
    for _ in range(most):
        level = [
            item
            for outer in level
            if isinstance(outer, dict | list)
            for item in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return any(isinstance(item, dict | list) for item in level)


def first_line(error: BaseException) -> str:
    """An error of another library in a few words."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


FAILS = (
    *(ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError, OSError),
    *(ImportError, SyntaxError),
)
"""How libraries fail on a file that is not what they took it for; RecursionError is a RuntimeError."""


class told:
    """Let another library read a file from an untrusted source, and say in one line that it could not.

    Libraries check little of what they read: they fail somewhere in it, with whatever comes of that. Two have exceptions
    of their own that stand below no other: tokenizers raises `Exception` itself, and what its Rust panics with; the configs
    of transformers are checked by huggingface_hub. A lack of memory, an interrupt and our own errors pass.

    Args:
        say: from the library's words to the message.

    Raises:
        UserError: with that message.
    """

    def __init__(self, say: Callable[[str], str]) -> None:
        self._say = say

    def __enter__(self) -> None:
        """Nothing; the end counts."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or error is None or isinstance(error, UserError):
            return
        named = {base.__name__ for base in kind.__mro__}
        if issubclass(kind, FAILS) or kind is Exception or named & {"PanicException", "StrictDataclassError"}:
            raise UserError(self._say(words_of(error))) from error


def words_of(error: BaseException) -> str:
    """What an exception says, its type before it where it would be no sentence."""
    text = " ".join(str(error).split())[:300]
    plain = isinstance(error, ValueError | OSError | ImportError) or type(error) is Exception
    return text if plain and text else f"{type(error).__name__}: {text}" if text else type(error).__name__
