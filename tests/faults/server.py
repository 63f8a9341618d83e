"""A warm process that has everything loaded, and forks a child for each fault: importing torch again would take seconds.

Started with the shim (`LD_PRELOAD`), a folder, and requests as lines of JSON on its standard input:

    {"operation": "save"}                              what it does undisturbed: {"calls": 87}
    {"operation": "save", "at": 12, "fault": -1}       one fault: {"problem": "", "status": -9, "call": "write /x", ..}
"""

import gc
import importlib
import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/tiny.py

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}

import torch

from faults import shim
from faults.operations import CARELESS, OPERATIONS, Operation, is_whole, left_over, shown
from trimtab import faults

LIBRARIES = (
    "trl",
    "optuna",
    "gguf",
    "trimtab.cli",
    "trimtab.training.trainer",
    "trimtab.bit_search.workers",
    "matplotlib.pyplot",
)
SHIM = shim.functions()
KNOWN = {**OPERATIONS, "careless": CARELESS}


class Server:
    """Faults in operations below a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._work = folder, folder / "work"
        self._expected: dict[str, tuple[dict[str, str], set[str], int]] = {}

    def undisturbed(self, name: str) -> dict[str, Any]:
        """What an operation does when nothing happens, twice: the same, or nothing could be compared."""
        operation = KNOWN[name]
        shutil.rmtree(self._work, ignore_errors=True)
        self._must(lambda: self._loaded(lambda: operation.given(self._work)), f"{name}: what is there before")
        shutil.copytree(self._work, self._folder / name, symlinks=True)
        self._load()
        self._must(lambda: self._loaded(lambda: (operation.do(self._work), is_whole(self._work, operation))), name)
        self._load()
        before = operation.results(self._work)
        self._begin(name)
        calls, found = self._must(lambda: self._counted(operation), name), operation.results(self._work)
        if found != before:
            raise SystemExit(f"{name}: two undisturbed ones differ: {shown(found, before)}")
        self._expected[name] = found, {f.name for f in self._work.iterdir()}, int(calls)
        return {"calls": int(calls)}

    def fault(self, name: str, at: int, what: int) -> dict[str, Any]:
        """What comes of one fault."""
        operation = KNOWN[name]
        self._begin(name)
        status, said, call = self._apart(lambda: self._do(operation), at, what)
        answer = {"status": status, "call": call, "said": said[-2000:] if status not in (0, -9) else ""}
        return answer | {"problem": self._problem(name, operation, status, said, call, what)}

    def _problem(self, name: str, operation: Operation, status: int, said: str, call: str, what: int) -> str:
        if what == shim.DIES and status != -9 and call:
            return f"ended with {status} where it was to be killed"
        if what > 0 and call and status not in (0, 2):
            return "ended in a traceback"
        if status == 2 and len([line for line in said.splitlines() if line.startswith("error: ")]) != 1:
            return "said more than one line, or none"
        expected, names, _ = self._expected[name]
        found = self._must(lambda: is_whole(self._work, operation), "looking at what is there", answer=True)
        if found:
            return f"half-written: {found}"
        status, said, _ = self._apart(lambda: operation.again(self._work))
        if status:
            return f"does not go on: {said[-1500:]}"
        results = operation.results(self._work)
        if results != expected:
            return f"not the same bits: {shown(results, expected)}"
        left = left_over(self._work, names)
        return f"left behind: {left}" if left else ""

    def _loaded(self, call: Callable[[], Any]) -> None:
        """Do something, and write down which modules it loaded."""
        before = set(sys.modules)
        call()
        (self._folder / "modules").write_text("\n".join(m for m in sys.modules if m not in before))

    def _load(self) -> None:
        """Load what a child has loaded, once for all that follow."""
        for module in (self._folder / "modules").read_text().split():
            with suppress(ImportError, AttributeError):  # one that is made by another is not a file
                importlib.import_module(module)
        gc.collect()
        gc.freeze()  # else each child would look through all of it, and copy the pages

    def _begin(self, name: str) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        shutil.copytree(self._folder / name, self._work, symlinks=True)

    def _do(self, operation: Operation) -> None:
        with faults.told():  # as the command line does
            operation.do(self._work)

    def _counted(self, operation: Operation) -> str:
        SHIM.faults_arm(os.fsencode(self._work), 0, shim.COUNTS, -1)
        operation.do(self._work)
        return str(SHIM.faults_count())

    def _must(self, call: Callable[[], Any], what: str, answer: bool = False) -> str:
        status, said, _ = self._apart(lambda: (self._folder / "answer").write_text(str(call() or "")))
        if status:
            raise SystemExit(f"{what}: {said}")
        return (self._folder / "answer").read_text()

    def _apart(self, call: Callable[[], Any], at: int = 0, what: int = shim.COUNTS) -> tuple[int, str, str]:
        """Exit status, what was said, and the call that a fault came in, of a child."""
        files = [self._folder / "said", self._folder / "call"]
        child = os.fork()
        if child == 0:
            said, told = (os.open(file, os.O_RDWR | os.O_CREAT | os.O_TRUNC) for file in files)
            os.dup2(said, 1)
            os.dup2(said, 2)
            status = 1
            try:
                if at:
                    SHIM.faults_arm(os.fsencode(self._work), at, what, told)
                call()
                status = 0
            except SystemExit as left:
                status = int(left.code or 0)
            except BaseException:  # noqa: BLE001
                traceback.print_exc()
            finally:
                SHIM.faults_disarm()
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        _, ended = os.waitpid(child, 0)
        said, told = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        return os.waitstatus_to_exitcode(ended), said, told.strip()


def main() -> None:
    """Answer requests until there are none."""
    torch.set_num_threads(1)
    for library in LIBRARIES:
        importlib.import_module(library)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = Server(Path(sys.argv[1]))
    for line in sys.stdin:
        asked = json.loads(line)
        if "at" in asked:
            answer = server.fault(asked["operation"], asked["at"], asked["fault"])
        else:
            answer = server.undisturbed(asked["operation"])
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
