"""What the machine does is one line, by the words of the libraries that pass it on; what is a bug keeps its traceback."""

import errno
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import tiny
from trimtab import cli, faults
from trimtab.errors import UserError


def _python(file: Path) -> None:
    with file.open("w") as stream:
        stream.write("x" * 99)


def _numpy(file: Path) -> None:
    with file.open("wb", buffering=0) as stream:
        np.zeros(99_999).tofile(stream)


def _arrow(file: Path) -> None:
    import pyarrow

    with pyarrow.OSFile(str(file), "wb") as stream:
        stream.write(b"x" * 99)


WRITERS: dict[str, Callable[[Path], Any]] = {
    "python": _python,
    "safetensors": lambda file: save_file({"a": torch.zeros(99)}, file),
    "tokenizers": lambda file: tiny.tokenizer().backend_tokenizer.save(str(file)),
    "torch": lambda file: torch.save({"a": torch.zeros(99)}, file),
    "numpy": _numpy,
    "arrow": _arrow,
}


@contextmanager
def limited(size: int) -> Iterator[None]:
    """No file may be larger than so many bytes: a fault that needs no full disk."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
@pytest.mark.parametrize("writer", WRITERS)
def test_a_disk_without_room_in_the_words_of_each_library(tmp_path: Path, writer: str) -> None:
    with pytest.raises(Exception, match=r".") as raised, limited(9), faults.writing(tmp_path):
        WRITERS[writer](tmp_path / "x")
    line = faults.line(raised.value)
    assert line is not None
    # Where no number is said, the disk is full mostly.
    said = (
        "the disk is full" if writer in ("torch", "numpy") else "a file would be larger than the disk or a limit allows"
    )
    assert line.startswith(f"{tmp_path}: {said}")


@pytest.mark.parametrize("number", faults._SAYS)
def test_each_number_of_the_system_is_said(number: int) -> None:
    line = faults.line(OSError(number, os.strerror(number), "/a/b"))
    assert line is not None
    assert line.startswith("/a/b: ")
    assert faults.line(OSError(number, os.strerror(number))) == line.removeprefix("/a/b: ")


def _no_torch_memory() -> None:
    torch.empty(1 << 60, dtype=torch.uint8)


def _no_python_memory() -> None:
    bytearray(1 << 62)


def _no_map() -> None:
    mmap.mmap(-1, 1 << 62)


@pytest.mark.parametrize("want", [_no_torch_memory, _no_python_memory, _no_map])
def test_a_want_of_memory(want: Callable[[], None]) -> None:
    with pytest.raises((RuntimeError, MemoryError, OSError)) as raised:
        want()
    line = faults.line(raised.value)
    assert line is not None
    assert line.startswith("there is not enough memory")
    assert ("1152921504.61 GB more were asked for" in line) == (want is _no_torch_memory)


def test_what_memory_a_process_may_have_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 << 30, 3 << 30))
    assert "(this process may have 3.2 GB: `ulimit -v`)" in str(faults.line(MemoryError()))


def test_what_was_raised_from_it_is_it_too() -> None:
    error = RuntimeError("could not save")
    error.__cause__ = OSError(errno.EROFS, "read-only", "/a")
    assert faults.line(error) == "/a: the disk can only be read; choose a place on another disk"


@pytest.mark.parametrize(
    "bug",
    [ValueError("x"), RuntimeError("shapes differ"), FileNotFoundError(errno.ENOENT, "none", "/a"), KeyError("os error"),
     ImportError("no module"), OSError("no number")],
)  # fmt: skip
def test_a_bug_is_none(bug: Exception) -> None:
    assert faults.line(bug) is None


def test_a_mistake_keeps_its_words_and_is_given_no_place() -> None:
    with pytest.raises(UserError) as raised, faults.writing(Path("/x")):
        raise UserError("first\n  second")
    assert faults.line(raised.value) == "first second"
    assert not hasattr(raised.value, "__notes__")


def test_the_innermost_place_is_said() -> None:
    with pytest.raises(OSError, match="x") as raised, faults.writing(Path("/out")), faults.writing(Path("/out/in")):
        raise OSError(errno.EDQUOT, "x", "/out/in/.new")
    assert str(faults.line(raised.value)).startswith("/out/in: your quota of this disk is used up (at /out/in/.new); ")


def _command(patch: pytest.MonkeyPatch, error: Exception) -> int:
    def fails(*_: Any, **__: Any) -> None:
        raise error

    patch.setattr(cli.trimtab, "verify", fails, raising=False)
    patch.setattr(sys, "argv", ["trimtab", "verify", "x"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    return int(left.value.code or 0)


def test_a_command_ends_in_that_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert _command(monkeypatch, OSError(errno.ENOSPC, "full", "/a")) == 2
    assert (
        capsys.readouterr().err == "error: /a: the disk is full; make room there, or choose a place on another disk\n"
    )
    with pytest.raises(KeyError):
        _command(monkeypatch, KeyError("a bug"))
