"""What glibc's heap is asked for: by its own names and numbers, on Linux alone, and nothing where it lacks them."""

import ctypes
import sys
from typing import Any

import pytest

from trimtab.kernels import heap

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


class Glibc:
    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        if name not in ("malloc_trim", "mallopt"):
            raise AttributeError(name)
        return lambda *args: self.calls.append((name, args))


@pytest.mark.parametrize(
    ("platform", "library", "asked"),
    [("linux", Glibc(), True), ("linux", object(), False), ("darwin", Glibc(), False), ("win32", Glibc(), False)],
)
def test_what_the_heap_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, platform: str, library: object, asked: bool
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library if name is None else pytest.fail(f"loads {name}"))
    heap.trim()
    assert heap.return_freed() is asked
    wanted = [("malloc_trim", (0,)), ("mallopt", (M_MMAP_THRESHOLD, 4 * 1024 * 1024))]
    assert getattr(library, "calls", []) == (wanted if asked else [])
