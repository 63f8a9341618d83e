"""Which test runs which lines, learned once for each test, and which tests to run on a break, likeliest first."""

import gc
import hashlib
import json
import random
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import _lru_cache_wrapper
from itertools import zip_longest
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from mutation import c_breaks
from mutation.trial import Break, FirstFailure

_KILLERS = 6
"""Tests that noticed earlier breaks of the same function, tried first."""
_C = (".c", ".h")

Lines = dict[str, list[int]]
"""Lines that ran, by file."""


class Recorder:
    """A tracing function for some files, and what it saw; what a shared fixture runs counts for all that ask for it."""

    def __init__(self, files: set[str]) -> None:
        self.files = files
        self.seen: set[tuple[str, int]] = set()
        self._of_fixture: dict[Any, set[tuple[str, int]]] = {}

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        """For `sys.settrace`."""
        file = frame.f_code.co_filename
        if file not in self.files:
            return None
        self.seen.add((file, frame.f_lineno))
        return self.trace

    @pytest.hookimpl(hookwrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        before, self.seen = self.seen, set()
        yield
        self._of_fixture[fixturedef] = self.seen
        self.seen = before | self.seen

    def run(self, item: pytest.Item, after: pytest.Item | None) -> tuple[float, set[tuple[str, int]]]:
        """Seconds and lines of a test."""
        self.seen, started = set(), time.process_time()
        sys.settrace(self.trace)
        try:
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        finally:
            sys.settrace(None)
        seconds = time.process_time() - started
        for fixtures in item._fixtureinfo.name2fixturedefs.values():  # type: ignore[attr-defined]
            for fixture in fixtures:
                self.seen |= self._of_fixture.get(fixture, set())
        return seconds, self.seen


def _stamp(item: pytest.Item, files: set[str], known: dict[str, str] = {}) -> str:  # noqa: B006 (a cache)
    """Changes whenever the test's file or a file that is broken does."""
    for path in (*sorted(files), str(item.path)):
        if path not in known:
            known[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return hashlib.sha256("".join(known[p] for p in (*sorted(files), str(item.path))).encode()).hexdigest()[:16]


def learn(items: list[pytest.Item], files: set[str], store: Path) -> None:
    """Run what is not known yet, in this process, and add it to `store`: nodeid -> stamp, seconds, lines."""
    known = read(store)
    stamps = {item.nodeid: _stamp(item, files) for item in items}
    new = [item for item in items if known.get(item.nodeid, {}).get("stamp") != stamps[item.nodeid]]
    recorder, first, saved = Recorder(files), FirstFailure(), time.monotonic()
    caches = [
        c for c in gc.get_objects() if type(c) is _lru_cache_wrapper and c.__module__.startswith(("trimtab", "test"))
    ]
    for item, after in zip(new, [*new[1:], None], strict=False):
        for cache in caches:  # what another test had made does not hide what this one needs
            cache.cache_clear()
        item.config.pluginmanager.register(recorder, "recorder")
        item.config.pluginmanager.register(first, "first")
        seconds, seen = recorder.run(item, after)
        lines: dict[str, list[int]] = defaultdict(list)
        for file, line in seen:
            lines[file].append(line)
        known[item.nodeid] = {
            "stamp": stamps[item.nodeid], "seconds": seconds, "lines": lines, "passed": first.nodeid is None
        }  # fmt: skip
        first.nodeid = None
        item.config.pluginmanager.unregister(name="recorder")
        item.config.pluginmanager.unregister(name="first")
        if time.monotonic() - saved > 60:  # what is learned is kept where a run is stopped
            store.write_text(json.dumps(known))
            saved = time.monotonic()
    store.write_text(json.dumps({nodeid: known[nodeid] for nodeid in stamps}))


def read(store: Path) -> dict[str, Any]:
    """What has been learned."""
    return json.loads(store.read_text()) if store.exists() else {}


class Reach:
    """Chooses tests for a break."""

    def __init__(self, root: Path, store: Path, each: float, seed: int) -> None:
        self._root, self._each, self._seed = root, each, seed
        self._known = {nodeid: k for nodeid, k in read(store).items() if k["passed"]}
        self._at: dict[tuple[str, int], set[str]] = defaultdict(set)
        for nodeid, known in self._known.items():
            for file, lines in known["lines"].items():
                for line in lines:
                    self._at[file, line].add(nodeid)
        self._killers: dict[tuple[Path, str], list[str]] = defaultdict(list)

    def killed(self, a_break: Break, by: str) -> None:
        """A test that noticed one break of a function is the first to be tried on the next."""
        self.remember(a_break.path, a_break.scope, by)

    def remember(self, path: Path, scope: str, by: str) -> None:
        """The same of an earlier run."""
        killers = self._killers[path, scope]
        if by in self._known and by not in killers[:_KILLERS]:
            killers.insert(0, by)

    def runs(self, a_break: Break) -> bool:
        """Whether a test runs it: no constant, and no function that makes one at import."""
        lines = range(a_break.span[0], a_break.span[1] + 1)
        in_python = not a_break.at_import and any(self._at.get((str(a_break.path), line)) for line in lines)
        return in_python or a_break.path.suffix in _C

    def _touching(self, a_break: Break) -> set[str]:
        file = str(a_break.path)
        if a_break.path.suffix in _C:
            return self._touching_c(a_break)
        if self.runs(a_break):
            return set().union(*(self._at[file, line] for line in range(a_break.span[0], a_break.span[1] + 1)))
        # What runs at import has run before any test: tests that run some of the file, or name something of it.
        names = re.findall(r"^(?:def|class) (\w+)|^(\w+)(?=\s*[:=])", a_break.path.read_text(), re.M)
        named = re.compile(r"\b(" + "|".join({a or b for a, b in names} | {a_break.path.stem}) + r")\b")
        files = {nodeid.partition("::")[0] for nodeid in self._known}
        naming = {name for name in files if named.search((self._root / name).read_text())}
        return {n for n, k in self._known.items() if file in k["lines"] or n.partition("::")[0] in naming}

    def _touching_c(self, a_break: Break) -> set[str]:
        """Tests that call an entry point which reaches the function (a header: any), by lines of cpu.py that name it."""
        files = [a_break.path] if a_break.path.suffix == ".c" else sorted(a_break.path.parent.glob("*.c"))
        reached = [c_breaks.entries_of(file.read_text()) for file in files]
        here = set().union(*(r.get(a_break.scope, ()) for r in reached))
        entries = here or set().union(*(entries for r in reached for entries in r.values()))
        caller = a_break.path.parents[1] / "cpu.py"
        calls = re.compile(r"lib\.(" + "|".join(entries) + r")\b")
        at = [i for i, line in enumerate(caller.read_text().splitlines(), 1) if calls.search(line)]
        return set().union(*(self._at[str(caller), line] for line in at))

    def tests(self, a_break: Break) -> list[str]:
        """Tests in the order to run them: last killers, then one case of each test function by turns, quickest first.

        Those of the same room (tests/quant for quant/) come before all others.
        """
        touching = self._touching(a_break)
        groups: dict[str, list[str]] = defaultdict(list)
        for nodeid in sorted(touching):
            groups[nodeid.partition("[")[0]].append(nodeid)
        chance = random.Random(f"{self._seed}{a_break.source}")
        for cases in groups.values():
            chance.shuffle(cases)
        ordered = sorted(groups.values(), key=lambda cases: min(self.seconds([c]) for c in cases))
        rooms = set(a_break.path.relative_to(self._root).parts[:-1])
        at_home: dict[bool, list[list[str]]] = {True: [], False: []}
        for cases in ordered:
            at_home[not rooms.isdisjoint(cases[0].partition("::")[0].split("/"))].append(cases)
        turns = (n for part in (True, False) for turn in zip_longest(*at_home[part]) for n in turn if n is not None)
        first = [n for n in self._killers[a_break.path, a_break.scope][:_KILLERS] if n in touching]
        chosen, left = [], self._each
        for nodeid in dict.fromkeys([*first, *turns]):
            seconds = self.seconds([nodeid])
            if not chosen or seconds <= left:
                chosen.append(nodeid)
                left -= seconds
        return chosen

    def seconds(self, nodeids: list[str]) -> float:
        """What tests take together."""
        return float(sum(self._known[n]["seconds"] for n in nodeids))
