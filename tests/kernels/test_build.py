"""How the C kernels are compiled, found again and done without: what a build's name depends on, and what is said."""

import ctypes
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

from trimtab.kernels import cpu

COMPILER = cpu._compiler()
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own, and sources that take no time."""
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.h").write_text("#define ONE 1\n")
    (tmp_path / "c" / "b.c").write_text('#include "a.h"\nint one(void) { return ONE; }\n')
    monkeypatch.setattr(cpu, "_SOURCES", tuple(sorted((tmp_path / "c").iterdir())))
    monkeypatch.setattr(cpu, "_processor", lambda: "a processor")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "new" / "cache"))
    return tmp_path / "new" / "cache"


def built(compiler: str | None = COMPILER) -> Path:
    assert compiler is not None
    return cpu._build(compiler)


def test_a_build_is_made_once_and_leaves_nothing_else(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []
    run = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **options: (ran.append(command), run(command, **options))[1])
    made = built()
    assert [*cache.iterdir()] == [made]
    assert made.suffix == ".so"
    assert ctypes.CDLL(str(made)).one() == 1
    assert len(ran) == 2
    assert [Path(word).name for word in ran[1] if word.endswith((".c", ".h"))] == ["b.c"]
    assert set(cpu._FLAGS) < set(ran[1])
    assert built() == made
    assert len(ran) == 3
    assert ran[2] == [COMPILER, "--version"]


def test_a_build_is_another_for_each_thing_that_it_depends_on(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [built()]
    assert built() == names[0]
    header, source = cpu._SOURCES
    for path in (header, source):
        path.write_text(path.read_text() + "\n/* another */\n")
        names.append(built())
    monkeypatch.setattr(cpu, "_FLAGS", (*cpu._FLAGS, "-DX"))
    names.append(built())
    monkeypatch.setattr(cpu, "_processor", lambda: "another processor")
    names.append(built())
    assert COMPILER is not None
    other = cache.parent / "cc"
    other.write_text(f'#!/bin/sh\n[ $1 = --version ] && echo 99 && exit 0\nexec {COMPILER} "$@"\n')
    other.chmod(0o755)
    names.append(built(str(other)))
    assert len(set(names)) == 6
    assert sorted(cache.iterdir()) == sorted(names)


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b[:-1] + b"x"])
def test_a_damaged_build_is_made_again(cache: Path, damage: Any) -> None:
    """Loading one that is cut short may end the process."""
    made = built()
    held = made.read_bytes()
    made.write_bytes(damage(held))
    assert built() == made
    assert [*cache.iterdir()] == [made]
    assert made.read_bytes() == held


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows")
def test_what_others_can_write_is_not_run(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = built()
    assert (cache.stat().st_mode & 0o777, made.stat().st_mode & 0o777) == (0o700, 0o700)
    for path, mode in ((made, 0o720), (made, 0o702), (cache, 0o770), (cache, 0o777)):
        path.chmod(mode)
        found, said = library()
        assert found is None
        assert said == [
            f"trimtab's C kernels could not be built, its slower torch kernels run: {path} can be written by other users, "
            f"and what lies there is run or trusted: chmod go-w {path}"
        ]
        path.chmod(0o700)
    assert built() == made
    monkeypatch.setattr(os, "geteuid", lambda: made.stat().st_uid + 1)
    if made.stat().st_uid:
        with pytest.raises(PermissionError, match="belongs to another user; set TRIMTAB_CACHE"):
            built()
    os.chown(made, 1234, -1) if made.stat().st_uid == 0 else None
    if made.stat().st_uid:
        with pytest.raises(PermissionError, match="belongs to another user; set TRIMTAB_CACHE"):
            built()


def test_a_source_that_does_not_compile_leaves_nothing(cache: Path) -> None:
    cpu._SOURCES[1].write_text("int one(void) { return }\n")
    with pytest.raises(subprocess.CalledProcessError) as error:
        built()
    assert "error" in error.value.stderr
    assert [*cache.iterdir()] == []


def test_a_compiler_that_cannot_name_itself_is_none(cache: Path, tmp_path: Path) -> None:
    broken = tmp_path / "cc"
    broken.write_text(f'#!/bin/sh\n[ $1 = --version ] && exit 1\nexec {COMPILER} "$@"\n')
    broken.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError):
        built(str(broken))


def test_without_a_folder_of_ones_own_builds_are_kept_in_the_users(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert built().is_relative_to(tmp_path)


def test_which_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that CC names if it is there, else the first of three."""
    there: set[str] = set()
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}" if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    assert cpu._compiler() is None
    for name in ("clang", "gcc", "cc"):
        there.add(name)
        assert cpu._compiler() == f"/bin/{name}"
    monkeypatch.setenv("CC", "icx")
    assert cpu._compiler() == "/bin/cc"
    there.add("icx")
    assert cpu._compiler() == "/bin/icx"


def test_what_a_processor_is_known_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of Linux's list the lines that tell models apart, once each, whatever the order of the cores."""
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(cpu, "Path", lambda name: info if name == "/proc/cpuinfo" else Path(name))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(platform, "processor", lambda: "m9")
    assert cpu._processor() == "arm64m9"
    info.write_text(
        "processor: 0\nmodel name: B\nflags: x\nprocessor: 1\nFeatures: f\nmodel name: A\nCPU part: p\nflags: x\n"
    )
    assert cpu._processor() == "CPU part: pFeatures: fflags: xmodel name: Amodel name: B"


def library(**changed: Any) -> tuple[Any, list[str]]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        return cpu.library.__wrapped__(), [str(w.message) for w in seen]


def test_functions_have_the_types_of_their_arguments() -> None:
    """Without them a pointer is cut to an int."""
    found, said = library()
    assert said == []
    assert found.dequantize.argtypes[1:] == [ctypes.c_void_p, ctypes.c_long, ctypes.c_void_p, ctypes.c_int]
    assert found.dequantize.restype is None


def test_what_is_said_where_there_are_no_kernels(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("TRIMTAB_KERNELS", "torch")
        assert library() == (None, [])
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "win32")
        assert library() == (None, [])
    with monkeypatch.context() as patch:
        patch.setattr(cpu, "_compiler", lambda: None)
        found, said = library()
        assert found is None
        assert said == ["no C compiler found (cc, gcc, clang or $CC): trimtab uses its slower torch kernels"]
    for broken, reason in (("int one(void) { return }", "error"), ("#error not here", "not here")):
        cpu._SOURCES[1].write_text(broken)
        found, said = library()
        assert found is None
        assert len(said) == 1
        assert said[0].startswith("trimtab's C kernels could not be built, its slower torch kernels run: ")
        assert reason in said[0]
    monkeypatch.setattr(cpu, "_build", lambda compiler: Path(os.devnull))
    found, said = library()
    assert found is None
    assert len(said) == 1
    assert os.devnull in said[0]
