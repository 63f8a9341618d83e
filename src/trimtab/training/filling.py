"""Filling a teacher's cache: rows appended to files in a folder beside it, which takes its name when all are there.

    <cache>.unfinished/teacher.json     how many sequences are there, and a hash of the rows of each file up to that one
    <cache>.unfinished/log_probs.npy    a header for all rows, then those that were written so far

A row counts when it, and all before it, are on the disk and the record says so: what a killed process left behind the last
record is cut off, and if the rows before it are not what was written, filling begins again. Files are written, not mapped:
on a full disk writing fails, while touching a page of a map ends the process.
"""

import hashlib
import io
import json
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from trimtab.errors import UserError

RECORD = "teacher.json"
ARRAYS: dict[str, np.dtype[Any]] = {"log_probs": np.dtype(np.float16), "ids": np.dtype(np.int32)}
"""Files of rows, and the numbers in them; a row of the first has one more, the mass of all other tokens."""
_PIECE = 1 << 22


def begin(folder: Path, state: dict[str, Any], first: Any) -> "Filling":
    """A cache with no row yet.

    Args:
        folder: made again; what is in it goes.
        state: key, hash of the sequences, their count, and `width`, the tokens that are kept.
        first: (sequences + 1,) int64, the first row of each.

    Raises:
        UserError: if the rows cannot fit on the disk.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    filling = Filling(folder, {**state, "done": 0, "hashes": {}}, first)
    filling.check_space()
    filling.record()  # before there is anything that it does not say whose it is
    held = io.BytesIO()
    np.save(held, first)
    # By Python: numpy, writing into a file, does not notice that the end of it found no room.
    (folder / "first.npy").write_bytes(held.getbuffer())
    for name, dtype in ARRAYS.items():
        with (folder / f"{name}.npy").open("wb") as file:
            shape = (int(first[-1]), filling.columns(name))
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
    filling.open()
    return filling


def go_on(folder: Path, state: dict[str, Any]) -> "Filling | None":
    """What an earlier process has begun, cut where its record ends; None where that is not what it wrote."""
    filling = None
    with suppress(OSError, EOFError, ValueError, IndexError, KeyError, TypeError):
        filling = Filling(folder, state, np.load(folder / "first.npy"))
        filling.open()
        if filling.is_as_recorded():
            return filling
    if filling is not None:
        filling.close()
    return None


class Filling:
    """Rows on their way into a cache.

    Args:
        folder: of the cache that is not whole yet.
        state: its record.
        first: first row of each sequence.
    """

    def __init__(self, folder: Path, state: dict[str, Any], first: Any) -> None:
        self.folder, self.state, self.first = folder, state, first
        self._files: dict[str, Any] = {}
        self._hashes = {name: hashlib.blake2b(digest_size=16) for name in ARRAYS}
        self._starts: dict[str, int] = {}

    @property
    def done(self) -> int:
        """Sequences whose rows are written."""
        return int(self.state["done"])

    def columns(self, name: str) -> int:
        """Numbers in a row of a file."""
        return int(self.state["width"]) + (name == "log_probs")

    def _row_bytes(self, name: str) -> int:
        return self.columns(name) * ARRAYS[name].itemsize

    def _left_bytes(self) -> int:
        rows = int(self.first[-1]) - int(self.first[self.done])
        return rows * sum(self._row_bytes(name) for name in ARRAYS)

    def check_space(self) -> None:
        """Raise a `UserError` if the rows that are missing do not fit on the disk."""
        free = shutil.disk_usage(self.folder).free
        if free < self._left_bytes():
            raise UserError(
                f"distill.cache: {self.folder} needs {self._left_bytes() / 1e6:,.0f} MB more, and its disk has "
                f"{free / 1e6:,.0f} MB left; make room, lower distill.top_k, or name a directory on another disk"
            )

    def open(self) -> None:
        """Open the files at their headers' ends."""
        for name in ARRAYS:
            file = (self.folder / f"{name}.npy").open("r+b", buffering=0)
            self._files[name] = file
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_1_0(file)
            self._starts[name] = file.tell()

    def close(self) -> None:
        """Let go of the files."""
        for file in self._files.values():
            file.close()

    def is_as_recorded(self) -> bool:
        """Whether the rows are what the record says, with what is behind them cut off."""
        rows = int(self.first[self.done])
        for name, file in self._files.items():
            left = rows * self._row_bytes(name)
            while left and (piece := file.read(min(left, _PIECE))):
                self._hashes[name].update(piece)
                left -= len(piece)
            if left or (self.done and self._hashes[name].hexdigest() != self.state["hashes"].get(name)):
                return False
            file.truncate()
        return True

    def add(self, sequences: int, log_probs: Any, ids: Any) -> None:
        """Write the rows of the next sequences; they count from the next `record` on."""
        made = {name: known.copy() for name, known in self._hashes.items()}
        for name, rows in (("log_probs", log_probs), ("ids", ids)):
            content = memoryview(np.ascontiguousarray(rows, dtype=ARRAYS[name]).tobytes())
            self._write(name, content)
            made[name].update(content)
        # At once: what fails or is stopped between two files leaves a state of rows that are in both.
        self._hashes = made
        self.state |= {
            "done": self.done + sequences,
            "hashes": {name: known.hexdigest() for name, known in made.items()},
        }

    def _write(self, name: str, content: Any) -> None:
        at = 0
        while at < len(content):
            at += self._files[name].write(content[at:])

    def record(self) -> None:
        """Have all rows on the disk, and then say so."""
        for file in self._files.values():
            os.fsync(file.fileno())
        new = self.folder / f"{RECORD}.new"
        try:
            with new.open("w", encoding="utf-8") as file:
                file.write(json.dumps(self.state, indent=2) + "\n")
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, self.folder / RECORD)
        except OSError:
            with suppress(OSError):
                new.unlink(missing_ok=True)
            raise
