"""Breaks the numerical core on purpose, one small change at a time, and lists what no test notices.

    make mutate ARGS="--minutes 30"                        a sample of everything, the same each time
    make mutate ARGS="--only src/trimtab/quant/grid.py"    one file or folder
    make mutate ARGS="--again"                             what survived before, after a test was written

A row is written for each break as soon as it is known (runs/mutation/results.jsonl), so a stopped run continues where
it was. What survives is a missing test, dead code, or an equivalent: no test could tell. Equivalents stand in
mutation/equivalents.yaml, each with its reason.
"""

import argparse
import gc
import importlib
import json
import os
import random
import shutil
import sys
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import yaml

from mutation.reach import Reach, learn
from mutation.trial import (
    Break,
    Compiler,
    FirstFailure,
    Patient,
    Verdict,
    breaks_of,
    fork,
    fresh,
    live_functions,
    overruns,
    put_in_place,
    run_items,
    verdict_of,
)  # fmt: skip

SOURCES = tuple(f"src/trimtab/{room}" for room in ("quant", "methods", "layers", "kernels"))
NOT_BROKEN = ("triton_gpu.py", "triton_parts.py", "triton_products.py", "triton_channel.py")  # runs on GPUs only
TESTS = (
    "tests/quant", "tests/methods", "tests/layers", "tests/kernels", "tests/recipe", "tests/memory/test_memory.py",
    "tests/models/test_gptq.py", "tests/models/test_prepare.py", "tests/formats/test_export_gptq.py",
)  # fmt: skip
SANITIZERS = "tests/kernels/test_sanitizers.py"
NOT_RUN = (
    "tests/kernels/test_triton.py", "tests/kernels/test_triton_compiled.py",  # a GPU's
    "tests/layers/test_compile.py", SANITIZERS,  # minutes; apart
)  # fmt: skip
IN_OTHER_PROCESSES = (  # which import what is not broken
    "tests/memory/test_memory.py::test_a_plan_is_what_training_takes",
    "tests/memory/test_memory.py::test_peak_memory_is_the_packed_model_and_one_float_layer",
    "tests/kernels/test_kernels.py::test_without_a_compiler_one_warning_and_the_same_values",
)
_ENDINGS = ("*.py", "*.c", "*.h")
PRELOADED = ["torch", "transformers", "peft"]
LEARNING_SECONDS = 3600


class Results:
    """What is known of each break: one row in a file for each, the last one counts."""

    def __init__(self, file: Path, root: Path, equivalents: Path) -> None:
        self._file, self._root = file, root
        self._rows: dict[str, Verdict] = {}
        self._once: set[str] = set()
        """What no test noticed at first."""
        if file.exists():
            for line in file.read_text().splitlines():
                row = json.loads(line)
                self._rows[key := row.pop("break")] = row
                if row["verdict"] in ("survived", "unreached"):
                    self._once.add(key)
        listed = yaml.safe_load(equivalents.read_text()) if equivalents.exists() else None
        self._equivalents = {
            (e["path"], e["source"].strip(), e["change"].strip(), e.get("scope", "")) for e in listed or ()
        }

    def equivalent(self, a_break: Break) -> bool:
        """Whether the list says, with a reason, that no test could tell."""
        path = a_break.path.relative_to(self._root).as_posix()
        return any((path, a_break.source, a_break.change, s) in self._equivalents for s in ("", a_break.scope))

    def verdict(self, a_break: Break) -> str:
        """killed, survived, unreached, unchanged, invalid, or nothing yet."""
        return str(self._rows.get(a_break.key(self._root), {}).get("verdict", ""))

    def killers(self) -> Iterator[tuple[Path, str, str]]:
        """File, function and test of every break that was noticed."""
        for key, row in self._rows.items():
            if row["verdict"] == "killed":
                path, scope, *_ = key.split(" | ")
                yield self._root / path, scope, row["by"]

    def add(self, a_break: Break, verdict: Verdict) -> None:
        """Write a row."""
        key = a_break.key(self._root)
        self._rows[key] = verdict
        with self._file.open("a") as file:
            file.write(json.dumps({"break": key, **verdict}) + "\n")

    def report(self, breaks: Iterable[Break]) -> int:
        """Print what no test noticed and the counts; returns the number of survivors."""
        counts: Counter[str] = Counter()
        mended = 0
        for one in sorted(breaks, key=lambda b: (b.path, b.line)):
            verdict = "equivalent" if self.equivalent(one) else self.verdict(one) or "not tried"
            counts[verdict] += 1
            mended += verdict == "killed" and one.key(self._root) in self._once
            if verdict in ("survived", "unreached"):
                print(f"{one.path.relative_to(self._root)}:{one.line}: {verdict}: {one.change}\n    {one.source}")
        print(f"{mended} that are killed now had survived before")
        order = ("killed", "survived", "unreached", "equivalent", "unchanged", "invalid", "not tried")
        print(f"{counts.total()} breaks: " + ", ".join(f"{counts[v]} {v}" for v in order if counts[v]))
        return counts["survived"] + counts["unreached"]


class Run:
    """Tries breaks, `jobs` at a time, until they or the minutes are over."""

    def __init__(self, options: argparse.Namespace, results: Results, scratch: Path, breaks: int) -> None:
        self.options, self.results, self.scratch = options, results, scratch
        self.store = scratch.parent / "reach.json"
        self.breaks = breaks

    def try_all(self, breaks: list[Break], reach: Reach, work: Callable[[Break, list[str], Path], Verdict]) -> None:
        """Fork a child for each, in their share of the minutes, which learning does not count to."""
        deadline = time.monotonic() + 60 * self.options.minutes * len(breaks) / self.breaks
        running: dict[int, tuple[Break, Path]] = {}
        queue = iter(enumerate(breaks))
        while True:
            while len(running) < self.options.jobs and time.monotonic() < deadline:
                number, one = next(queue, (0, None))
                if one is None:
                    break
                tests = reach.tests(one)
                if not tests:
                    self.results.add(one, {"verdict": "unreached"})
                    continue
                answer = self.scratch / f"{os.getpid()}-{number}.json"
                limit = (15 if one.path.suffix == ".py" else 60) + 3 * reach.seconds(tests)  # C: another process sweeps
                running[fork(lambda b=one, t=tests, a=answer: work(b, t, a), answer, limit)] = one, answer  # type: ignore[misc]
            if not running:
                return
            pid, status = os.wait()
            one, answer = running.pop(pid)
            verdict = verdict_of(status, answer)
            self.results.add(one, verdict)
            if verdict["verdict"] == "killed":
                reach.killed(one, verdict["by"])
            elif verdict["verdict"] == "survived":
                print(f"{one.path.name}:{one.line}: {one.change}", flush=True)

    def reach(self) -> Reach:
        """What has been learned of the tests."""
        reach = Reach(self.options.root, self.store, self.options.each, self.options.seed)
        for path, scope, by in self.results.killers():
            reach.remember(path, scope, by)
        return reach

    def pytest_options(self) -> list[str]:
        """How tests are collected in every child."""
        words = [
            "-q -s -p no:cacheprovider -p no:xdist -p no:faulthandler",
            "-W ignore::pytest.PytestAssertRewriteWarning",
        ]
        ignored = [*(f"--ignore={name}" for name in NOT_RUN), *(f"--deselect={name}" for name in IN_OTHER_PROCESSES)]
        return [*" ".join(words).split(), "-m", "not slow", f"--rootdir={self.options.root}", *ignored]


class InsideFunctions:
    """A pytest plugin: instead of running the tests that were collected, break functions and run what may notice."""

    def __init__(self, run: Run, breaks: list[Break], files: set[str]) -> None:
        self._run, self._breaks, self._files = run, breaks, files

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        cases = defaultdict(list)
        for item in items:
            cases[item.nodeid.partition("[")[0]].append(item)
        most = self._run.options.cases
        chance = random.Random(0)  # at even distances some parameters would always have the same value
        items[:] = [item for some in cases.values() for item in chance.sample(some, min(most, len(some)))]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        run = self._run
        answer = run.scratch / "learned.json"
        print(f"{len(session.items)} tests; learning which lines each of them runs", flush=True)
        pid = fork(
            lambda: learn(session.items, self._files, run.store) or {"verdict": "learned"}, answer, LEARNING_SECONDS
        )
        found = verdict_of(os.waitpid(pid, 0)[1], answer)
        assert found["verdict"] == "learned", found
        items = {item.nodeid: item for item in session.items}
        live = live_functions(self._files)
        if any(one.path.suffix in (".c", ".h") for one in self._breaks):
            compiler = Compiler(run.scratch / "builds")
            compiler.start()
        gc.collect()
        gc.freeze()  # pages of what exists stay shared between this process and its forks

        def work(one: Break, tests: list[str], answer: Path) -> Verdict:
            if one.path.suffix in (".c", ".h"):
                against = compiler.put_in(one, answer.with_suffix(""))
            else:
                try:
                    against = "" if put_in_place(one, live) else "invalid"
                except ValueError:  # it closes over another number of variables
                    against = "invalid"
            if against:
                return {"verdict": against}
            first = FirstFailure()
            session.config.pluginmanager.register(first)
            found = run_items([items[n] for n in tests], first)
            if one.path.suffix == ".py" or found["verdict"] == "killed":
                return found
            folder = answer.with_suffix("")
            if compiler.same(one, folder):
                return {"verdict": "unchanged"}
            return {"verdict": "killed", "by": SANITIZERS} if overruns(folder / "c") else found

        reach = run.reach()
        run.try_all([one for one in self._breaks if reach.runs(one)], reach, work)
        return True


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(SOURCES), metavar="PATH", help="files or folders to break")
    parser.add_argument("--tests", nargs="+", default=list(TESTS), metavar="PATH", help="tests that may notice")
    parser.add_argument("--minutes", type=float, default=30, help="stop starting breaks after this long")
    parser.add_argument("--each", type=float, default=20, help="seconds of tests for a break; likeliest first")
    parser.add_argument("--cases", type=int, default=10**6, help="at most this many cases of a test function")
    parser.add_argument("--sample", type=int, help="at most this many breaks")
    parser.add_argument("--seed", type=int, default=0, help="orders the breaks")
    parser.add_argument("--jobs", type=int, default=1, help="breaks at a time")
    parser.add_argument("--again", action="store_true", help="try once more what survived")
    parser.add_argument("--list", action="store_true", help="only list what is known")
    parser.add_argument("--preload", nargs="*", default=PRELOADED, help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, default=Path(__file__).parents[1], help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.root = options.root.resolve()
    return options


def files_of(options: argparse.Namespace) -> list[Path]:
    """The files that are broken."""
    named = [options.root / name for name in options.only]
    found = [p for n in named for p in ([n] if n.is_file() else [q for e in _ENDINGS for q in n.rglob(e)])]
    return sorted(p for p in set(found) if p.name not in NOT_BROKEN)


def prepare(names: list[str]) -> None:
    """Import what is never broken, once."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            print(f"{name} is not installed: tests that need it are not run", file=sys.stderr)


def collect(options: list[str], plugin: object) -> None:
    """Import the package and its tests in a child, so that this process can still import them broken."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            code = int(pytest.main(options, plugins=[plugin, Patient()]))
        except BaseException:  # noqa: BLE001  (the parent's code must not run here)
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)
    _, status = os.waitpid(pid, 0)
    if status:
        sys.exit("the tests cannot be collected")


def main() -> int:
    """Try, then list."""
    options = arguments()
    os.chdir(options.root)
    scratch = (
        options.root / "runs" / "mutation" / f"scratch-{os.getpid()}"
    )  # what is known is listed while a run goes on
    listed = options.root / "tests" / "mutation" / "equivalents.yaml"
    results = Results(scratch.parent / "results.jsonl", options.root, listed)
    everything = [one for path in files_of(options) for one in breaks_of(path)]
    wanted = ("", "survived", "unreached") if options.again else ("",)
    breaks = [one for one in everything if not results.equivalent(one) and results.verdict(one) in wanted]
    if options.again:
        breaks = [one for one in breaks if results.verdict(one)]
    random.Random(options.seed).shuffle(breaks)
    breaks = breaks[: options.sample]
    if breaks and not options.list:
        scratch.mkdir(parents=True)
        os.environ["OMP_NUM_THREADS"] = "1"  # a child of a process with a pool of threads would wait for them for ever
        prepare(options.preload)
        run = Run(options, results, scratch, len(breaks))
        traced = argparse.Namespace(root=options.root, only=[*SOURCES, *options.only])
        plugin = InsideFunctions(run, breaks, {str(p) for p in files_of(traced) if p.suffix == ".py"})
        collect([*run.pytest_options(), *options.tests], plugin)
        results = run.results = Results(scratch.parent / "results.jsonl", options.root, listed)
        reach = run.reach()
        at_import = [one for one in breaks if not reach.runs(one)]
        run.try_all(at_import, reach, lambda one, tests, _: fresh(one, tests, run.pytest_options()))
        shutil.rmtree(scratch)
    return 1 if results.report(everything) else 0


if __name__ == "__main__":
    sys.exit(main())
