"""Trying cases: in a child of bounded time and memory, which tries one after another and is replaced when it dies.

A case is a target and a number: `float:17`. What it changes is drawn from a generator seeded with both (and with the seed
of the run), so that it is made again by its name. Its outcome is one of

    refused     a `UserError` in one line
    same        read, with the numbers of the original
    legal       read, with other numbers, which another library (the target's peer) reads in it, too, or which the changed
                file says where there is no other: text that was edited is another text
    other       read with numbers that the peer does not read
    exception   any other exception, an error of several lines, or one that cannot be printed
    hang        no end within `SECONDS` of the processor, or a minute in which it hardly had any
    died        the process was ended by a signal
"""

import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import torch
from torch import Tensor

from fuzz.artefacts import ARTEFACTS, TARGETS, Read, spoil
from trimtab.errors import UserError

SECONDS = 15
IDLE = 60
"""Seconds of the clock: who had less than one of the processor in these waits for what never comes. The clock alone tells
of nothing else: on a machine that does ten things at once it says that all of them hang."""
MEMORY = 4 * 2**30
"""Bytes of addresses beyond those that the process has when it begins."""
ROUNDING = 0.05
"""Of the logits' spread: what two orders of computing in bfloat16 may make."""
BAD = ("other", "exception", "hang", "died")


class Case(NamedTuple):
    """One change of one artefact."""

    target: str
    number: int
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.target}:{self.number}"


class Result(NamedTuple):
    """What came of a case."""

    case: str
    file: str
    change: str
    outcome: str
    kind: str = ""
    """Of an exception: its type, and the lines that it came through."""
    message: str = ""
    seconds: float = 0.0


class Hung(BaseException):
    """The time is over."""


class Bench:
    """The artefacts, made once, and what is read of each when nothing is changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._right: dict[tuple[str, str], Read] = {}

    def artefact(self, name: str) -> Path:
        place = self.folder / "artefacts" / name
        if not place.exists():
            place.mkdir(parents=True)
            ARTEFACTS[name](place)
        return place

    def copy(self, target: str, to: str) -> Path:
        made = self.artefact(TARGETS[target].made)
        place = self.folder / to
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(made, place)
        for file in place.rglob("*"):  # a recipe names its files by their whole paths
            if file.suffix == ".yaml":
                file.write_text(file.read_text().replace(str(made), str(place)))
        return place

    def right(self, target: str, file: str) -> Read:
        """What is read where nothing is changed; `file` is the one that would be."""
        if (target, file) not in self._right:
            self._right[target, file] = TARGETS[target].read(self.copy(target, "right"), file)
        return self._right[target, file]


def attempt(bench: Bench, case: Case) -> Result:
    """Try one case in this process."""
    target = TARGETS[case.target]
    rng = random.Random(f"{case.seed} {case}")
    place = bench.copy(case.target, "case")
    file, change = spoil(target, place, rng)
    right = bench.right(case.target, file)
    begun = time.monotonic()

    def result(outcome: str, kind: str = "", message: str = "") -> Result:
        return Result(str(case), file, change, outcome, kind, message[:1000], round(time.monotonic() - begun, 3))

    _watch()
    try:
        found = target.read(place, file)
    except UserError as error:
        return result(*_judged(error))
    except Hung as error:
        return result("hang", _through(error))
    except BaseException as error:  # noqa: BLE001  (that is what is looked for)
        return result("exception", _through(error), f"{type(error).__name__}: {error}"[:1000])
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
    if found.words == right.words:
        return result("same")
    if target.peer is None:
        return result("legal")
    return result(*_beside(target.peer, place, found))


def _judged(error: UserError) -> tuple[str, str, str]:
    message = str(error)
    try:
        message.encode()
    except UnicodeEncodeError:
        return "exception", "UserError that cannot be printed", message.encode("utf-8", "backslashreplace").decode()
    if len(message.splitlines()) != 1 or len(message) > 2000:
        return "exception", f"UserError of several lines, or too long: {_through(error)}", message
    return "refused", "", message


def _beside(peer: Callable[[Path], Tensor], place: Path, found: Read) -> tuple[str, str, str]:
    """Whether another library reads the same numbers."""
    assert found.logits is not None
    try:
        theirs = peer(place)
    except Exception as error:  # noqa: BLE001  (whatever it is, they do not read it)
        return "other", "numbers where the peer fails", f"{type(error).__name__}: {error}"
    if theirs.shape != found.logits.shape:
        return "other", "numbers of another shape than the peer's", str(tuple(theirs.shape))
    finite = theirs.isfinite()  # whether infinity less infinity comes of it is the order of computing
    ours, theirs = found.logits[finite].double(), theirs[finite].double()  # in float32 their spread may be no number
    apart, spread = (float((ours - theirs).abs().max()), float(theirs.std())) if len(ours) > 1 else (0.0, 0.0)
    alike = torch.equal(found.logits.isfinite(), finite) and apart <= ROUNDING * spread
    return (
        ("legal", "", "") if alike else ("other", "numbers that are not the peer's", f"{apart:g} of {spread:g} apart")
    )


def _watch() -> None:
    """Raise `Hung` in this process when it hangs."""
    used = [time.process_time()]

    def late(*_: int | FrameType | None) -> None:
        raise Hung

    def looked_at(*_: int | FrameType | None) -> None:
        before, used[0] = used[0], time.process_time()
        if used[0] - before < 1:
            raise Hung

    signal.signal(signal.SIGPROF, late)
    signal.signal(signal.SIGALRM, looked_at)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, IDLE, IDLE)


def _through(error: BaseException) -> str:
    """An exception's type, the last line of ours that it came through, and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if "/src/trimtab/" in f.filename]
    where = [f"{Path(f.filename).name}:{f.name}" for f in (ours[-1:] + frames[-1:])]
    return f"{type(error).__name__} in {' > '.join(dict.fromkeys(where))}"


# ---- in a child -----------------------------------------------------------------------------------------------------


def try_all(folder: Path, cases: Sequence[Case], deadline: float | None = None) -> Iterator[Result]:
    """Try cases in turn; whatever kills the process is a result, too.

    Args:
        folder: a new one, for artefacts.
        cases: what to try.
        deadline: of `time.monotonic`: no case is begun after it.
    """
    bench = Bench(folder)
    for target in dict.fromkeys(case.target for case in cases):  # before there are children, which would each do it
        for file in TARGETS[target].files:
            bench.right(target, file)
    rest = list(cases)
    while rest and not (deadline is not None and time.monotonic() > deadline):
        done = 0
        for result in _child(bench, rest, deadline):
            done += 1
            yield result
        if not done:
            return
        rest = rest[done:]


def _child(bench: Bench, cases: Sequence[Case], deadline: float | None) -> Iterator[Result]:
    read, write = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has threads, which this process never started
        pid = os.fork()
    if not pid:
        os.close(read)
        _work(bench, cases, deadline, write)
    os.close(write)
    with os.fdopen(read, "rb") as lines:
        buffer, begun = b"", None
        while True:
            ready = _ready(lines.fileno(), pid)
            piece = os.read(lines.fileno(), 65536) if ready else b""
            if not piece:
                break
            buffer += piece
            *whole, buffer = buffer.split(b"\n")
            for line in whole:
                values = json.loads(line)
                if isinstance(values, int):
                    begun = values
                else:
                    begun = None
                    yield Result(*values)
        if not ready:
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if begun is not None:
            outcome = "died" if ready else "hang"
            yield Result(str(cases[begun]), "", _change_of(bench, cases[begun]), outcome, f"signal {status & 0x7F}")


def _ready(pipe: int, pid: int) -> bool:
    """Whether a child says something before it hangs, in a library, say, in which no signal is heard."""
    begun = last = _used(pid)
    while not select.select([pipe], [], [], 1.5 * IDLE)[0]:
        before, last = last, _used(pid)
        if last - before < 1 or last - begun > 2 * SECONDS:
            return False
    return True


def _used(pid: int) -> float:
    """Seconds of the processor that another process had."""
    times = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")


def _change_of(bench: Bench, case: Case) -> str:
    place = bench.copy(case.target, "again")
    return ": ".join(spoil(TARGETS[case.target], place, random.Random(f"{case.seed} {case}")))


def _work(bench: Bench, cases: Sequence[Case], deadline: float | None, out: int) -> None:
    try:
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        warnings.simplefilter("ignore")
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**34, 2**34))
        for i, case in enumerate(cases):
            if deadline is not None and time.monotonic() > deadline:
                break
            os.write(out, f"{i}\n".encode())
            os.write(out, json.dumps(attempt(bench, case)).encode() + b"\n")
    except BaseException:  # noqa: BLE001  (a child never returns into its parent)
        traceback.print_exc(file=sys.__stderr__)
    finally:
        os._exit(0)
