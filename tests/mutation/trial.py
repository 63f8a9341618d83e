"""Trying one break: a fork of a process that has imported and collected everything, which breaks itself and runs tests.

A break inside a function is put in place of the code of every live function that has it, so that classes, operators that
are registered with torch and modules imported elsewhere stay the objects they are. A break that acts at import (a constant,
a default, the body of a class) gets a fork of a process that has not imported the package yet. A break in C is compiled.
"""

import gc
import importlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import SourceFileLoader
from pathlib import Path
from typing import Any

import pytest

from mutation import c_breaks, python_breaks

Verdict = dict[str, Any]
"""`verdict`: killed, survived, unreached, unchanged (the compiler makes the same code of it, or leaves it out here) or
invalid (it does not compile); `by`: the test that failed; `tests`: how many were run."""


@dataclass(frozen=True)
class Break:
    """One change of one file."""

    path: Path
    line: int
    scope: str
    span: tuple[int, int]
    """Lines that run when what is broken does; of C, none."""
    at_import: bool
    source: str
    change: str
    number: tuple[int, int]
    """Site and variant of `python_breaks`, or the position in `c_breaks`."""
    copy: int
    """How many like it stand above it in the same scope."""

    def key(self, root: Path) -> str:
        """What it is called in results: no line number, so that changes elsewhere in the file leave it alone."""
        parts = (self.path.relative_to(root).as_posix(), self.scope, self.source, self.change, str(self.copy))
        return " | ".join(parts)


def breaks_of(path: Path) -> Iterator[Break]:
    """All breaks of a file."""
    source = path.read_text(encoding="utf-8")
    lines, seen = source.splitlines(), dict[tuple[str, ...], int]()

    def made(line: int, scope: str, span: tuple[int, int], at_import: bool, change: str, number: Any) -> Break:
        alike = scope, lines[line - 1].strip(), change
        seen[alike] = seen.get(alike, -1) + 1
        return Break(path, line, scope, span, at_import, alike[1], change, number, seen[alike])

    if path.suffix in (".c", ".h"):
        for i, (line, change, _) in enumerate(c_breaks.breaks(source)):
            yield made(line, c_breaks.function_at(source, line), (0, 0), False, change, (i, 0))
        return
    for i, site in enumerate(python_breaks.sites(python_breaks.ast.parse(source))):
        for j, new in enumerate(python_breaks.variants(site)):
            line = getattr(site.node, "lineno", site.span[0])
            yield made(line, site.scope, site.span, site.at_import, python_breaks.words(site, new), (i, j))


def fork(work: Callable[[], Verdict], answer: Path, seconds: float) -> int:
    """Start `work` in a child of limited time, silently; what it returns stands in `answer` unless it dies first."""
    pid = os.fork()
    if pid:
        return pid
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        limit = int(seconds) + 1
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        signal.alarm(8 * limit)  # another process may have the processor; a child that sleeps ends, too
        folder = answer.with_suffix("")
        folder.mkdir()
        os.environ["PYTEST_DEBUG_TEMPROOT"] = str(folder)
        answer.write_text(json.dumps(work()))
    except (OSError, subprocess.CalledProcessError) as error:  # of this tool, which says nothing about the break
        answer.write_text(json.dumps({"verdict": "", "by": f"{error}"}))
    except BaseException as error:  # noqa: BLE001  (a child must never return into its parent's loop)
        answer.write_text(json.dumps({"verdict": "killed", "by": f"{type(error).__name__}: {error}"[:200]}))
    finally:
        os._exit(0)


def verdict_of(status: int, answer: Path) -> Verdict:
    """What a child that has ended found."""
    shutil.rmtree(answer.with_suffix(""), ignore_errors=True)
    if not answer.exists() or not answer.stat().st_size:
        return {"verdict": "killed", "by": f"signal {status & 0x7F}: a crash, or a loop without end"}
    found: Verdict = json.loads(answer.read_text())
    answer.unlink()
    return found


class FirstFailure:
    """Remembers which test failed first."""

    def __init__(self) -> None:
        self.nodeid: str | None = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and self.nodeid is None:
            self.nodeid = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and self.nodeid is None:
            self.nodeid = f"{report.nodeid} cannot be imported"


class Patient:
    """Examples of hypothesis may take as long as a busy machine needs."""

    def pytest_configure(self) -> None:
        settings = importlib.import_module("hypothesis").settings  # not earlier: pytest rewrites its plugins
        settings.register_profile("mutation", deadline=None, database=None)
        settings.load_profile("mutation")


def run_items(items: list[pytest.Item], first: FirstFailure) -> Verdict:
    """Run tests until one fails."""
    for item, after in zip(items, [*items[1:], None], strict=True):
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        if first.nodeid is not None:
            return {"verdict": "killed", "by": first.nodeid}
    return {"verdict": "survived", "tests": len(items)}


def live_functions(paths: set[str]) -> dict[tuple[str, str, int], list[types.FunctionType]]:
    """Functions of these files that exist now, by file, qualified name and first line."""
    found: dict[tuple[str, str, int], list[types.FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is types.FunctionType and thing.__code__.co_filename in paths:
            code = thing.__code__
            found.setdefault((code.co_filename, code.co_qualname, code.co_firstlineno), []).append(thing)
    return found


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield constant
            yield from _codes(constant)


def put_in_place(a_break: Break, live: dict[tuple[str, str, int], list[types.FunctionType]]) -> bool:
    """Give live functions their broken code; whether any had another before."""
    file, changed = str(a_break.path), False
    tree = python_breaks.broken(a_break.path.read_text(encoding="utf-8"), *a_break.number)
    for code in _codes(compile(tree, file, "exec", dont_inherit=True)):
        for function in live.get((file, code.co_qualname, code.co_firstlineno), ()):
            if function.__code__ != code:
                function.__code__ = code  # a ValueError where it closes over less than before: no such break
                changed = True
    return changed


def put_before_import(a_break: Break) -> None:
    """Have the file import in its broken form."""
    tree = python_breaks.broken(a_break.path.read_text(encoding="utf-8"), *a_break.number)
    code = compile(tree, str(a_break.path), "exec", dont_inherit=True)
    original = SourceFileLoader.get_code

    def get_code(self: SourceFileLoader, fullname: str) -> types.CodeType | None:
        return code if self.get_filename(fullname) == str(a_break.path) else original(self, fullname)

    SourceFileLoader.get_code = get_code  # type: ignore[method-assign]


class Compiler:
    """Builds of the C kernels: the unbroken one, kept as objects, and broken ones, of which one file is compiled."""

    def __init__(self, folder: Path) -> None:
        self._cpu = importlib.import_module("trimtab.kernels.cpu")
        self._compiler = self._cpu._compiler()
        self._sources: tuple[Path, ...] = self._cpu._SOURCES
        self._folder = folder
        self._built: dict[str, dict[str, bytes]] = {}

    def _objects(self, folder: Path, names: list[str], level: str) -> dict[str, bytes]:
        flags = [level, *(f for f in self._cpu._FLAGS if f not in ("-O3", "-shared"))]
        for name in names:  # by their bare names, which stand in objects
            subprocess.run([self._compiler, *flags, "-c", name], cwd=folder, check=True, capture_output=True)
        return {name: (folder / name).with_suffix(".o").read_bytes() for name in names}

    def _whole(self, level: str) -> dict[str, bytes]:
        if level not in self._built:
            folder = self._folder / level
            folder.mkdir(parents=True, exist_ok=True)
            for path in self._sources:
                shutil.copy(path, folder)
            self._built[level] = self._objects(folder, [p.name for p in self._sources if p.suffix == ".c"], level)
        return self._built[level]

    def start(self) -> None:
        """Build what all breaks share, before the first fork."""
        for level in ("-O1", "-O3"):
            self._whole(level)

    def broken(self, a_break: Break, folder: Path, level: str) -> dict[str, bytes]:
        """The objects that a break changes; empty if it changes none, an error of subprocess where it does not compile."""
        whole = self._whole(level)
        folder.mkdir(exist_ok=True)
        for path in self._sources:
            shutil.copy(path, folder)
        made = list(c_breaks.breaks(a_break.path.read_text(encoding="utf-8")))
        (folder / a_break.path.name).write_text(made[a_break.number[0]][2])
        names = [a_break.path.name] if a_break.path.suffix == ".c" else list(whole)
        objects = self._objects(folder, names, level)
        return {name: o for name, o in objects.items() if o != whole[name]}

    def put_in(self, a_break: Break, folder: Path) -> str:
        """Have this process call broken kernels; what stands against it: invalid, unchanged or nothing.

        With -O1, which takes a quarter of the time, and changes no value but by the order of sums.
        """
        try:
            objects = self.broken(a_break, folder / "c", "-O1")
        except subprocess.CalledProcessError:
            return "invalid"
        if not objects:
            return "unchanged"
        paths = [folder / "c" / n if n in objects else self._folder / "-O1" / n for n in self._whole("-O1")]
        built = folder / "kernels.so"
        command = [self._compiler, *self._cpu._FLAGS, "-o", str(built), *(str(p.with_suffix(".o")) for p in paths)]
        subprocess.run(command, check=True, capture_output=True)
        self._cpu._build = lambda compiler: built
        self._cpu.library.cache_clear()
        return "" if self._cpu.library() is not None else "invalid"

    def same(self, a_break: Break, folder: Path) -> bool:
        """Whether what is shipped, built with -O3, is the same with the break in it."""
        return not self.broken(a_break, folder / "c", "-O3")


def overruns(sources: Path) -> bool:
    """Whether the sanitizers, of addresses and undefined behaviour, stop a sweep over kernels of these sources."""
    script = Path(__file__).parents[1] / "kernels" / "test_sanitizers.py"
    found = importlib.util.spec_from_file_location("sanitizers", script)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    around = module.environment(sources.parent / "built")
    if sys.platform != "linux" or around is None:
        return False
    return bool(subprocess.run([sys.executable, script, sources], env=around, capture_output=True).returncode)


def fresh(a_break: Break, nodeids: list[str], options: list[str]) -> Verdict:
    """Import everything with the break in it, and run tests."""
    put_before_import(a_break)
    sys.dont_write_bytecode = True
    first, file, ran = FirstFailure(), str(a_break.path), False

    def watch(frame: types.FrameType, event: str, _: Any) -> Any:
        nonlocal ran
        if frame.f_code.co_filename != file:
            return None
        ran = ran or a_break.span[0] <= frame.f_lineno <= a_break.span[1]
        return None if ran else watch

    if not a_break.at_import:
        sys.settrace(watch)
    code = pytest.main([*options, "-x", *nodeids], plugins=[first, Patient()])
    sys.settrace(None)
    if first.nodeid is not None or code not in (0, 1):
        return {"verdict": "killed", "by": first.nodeid or "cannot be imported"}
    return {"verdict": "survived" if a_break.at_import or ran else "unreached", "tests": len(nodeids)}
