"""The server, asked: `with Asking(folder) as asking` starts it, and each question is one fault."""

import errno
import json
import os
import random
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any

from faults import shim

FAULTS = {"killed": shim.DIES, "full disk": errno.ENOSPC, "failing disk": errno.EIO, "read-only disk": errno.EROFS}
"""What comes at the n-th call."""


class Asking:
    """A warm process with the shim, while the block runs.

    Args:
        folder: its own, on a disk with room.
    """

    def __init__(self, folder: Path) -> None:
        library = shim.build(folder)
        environment = os.environ | {"LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(folder)]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._log = (folder / "log").open("w+")
        self._server = subprocess.Popen(command, env=environment, stderr=self._log, **pipes)

    def __enter__(self) -> "Asking":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()
        self._log.close()

    def __call__(self, operation: str, at: int | None = None, fault: str = "") -> dict[str, Any]:
        """See `server`."""
        asked: dict[str, Any] = {"operation": operation}
        if at is not None:
            asked |= {"at": at, "fault": FAULTS[fault]}
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(asked) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            self._log.seek(0)
            raise RuntimeError(f"{asked}: the server ended\n{self._log.read()[-3000:]}")
        found: dict[str, Any] = json.loads(answer)
        return found


def points(calls: int, wanted: int, seed: int | None = None) -> list[int]:
    """Numbers of calls, spread over all of them; with a seed, one drawn from each part."""
    wanted = min(wanted, calls)
    edges = [calls * i // wanted for i in range(wanted + 1)]
    if seed is None:
        return [1 + (calls - 1) * i // max(1, wanted - 1) for i in range(wanted)]
    draw = random.Random(seed)
    return [draw.randint(low + 1, high) for low, high in pairwise(edges)]
