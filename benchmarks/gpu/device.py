"""What the sections of `run.py` share: how time and memory are taken on their device, and what their JSON begins with."""

import argparse
import json
import platform
import statistics
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

LIBRARIES = ("torch", "triton", "transformers", "trl", "accelerate", "peft", "bitsandbytes")


def arguments(about: str | None) -> argparse.Namespace:
    """What every section is given."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, in seconds: it shows that all runs")
    parser.add_argument("--out", type=Path, required=True, help="the JSON to write")
    return parser.parse_args()


def wait(device: str) -> None:
    """Until the device has done all that was queued."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: str, rounds: int = 20) -> float:
    """The median time of a call, after two that do not count; on a GPU by its own clock."""
    for _ in range(2):
        call()
    wait(device)
    times = []
    for _ in range(rounds):
        if torch.device(device).type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            wait(device)
            times.append(first.elapsed_time(last) / 1000)
        else:
            began = perf_counter()
            call()
            times.append(perf_counter() - began)
    return statistics.median(times)


def forget(device: str) -> None:
    """Begin to measure memory again."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def allocated(device: str) -> int | None:
    """`max_memory_allocated` since `forget`, in bytes; None on a CPU."""
    return torch.cuda.max_memory_allocated(device) if torch.device(device).type == "cuda" else None


@contextmanager
def syncs(device: str) -> Iterator[list[str]]:
    """Where the host waits for the device inside, as torch warns of it; always empty on a CPU."""
    seen: list[str] = []
    if torch.device(device).type != "cuda":
        yield seen
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield seen
    finally:
        torch.cuda.set_sync_debug_mode("default")
    seen += [f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchroniz" in str(w.message)]


def environment(device: str) -> dict[str, Any]:
    """Where this was measured."""
    found: dict[str, Any] = {"device": device, "machine": platform.machine(), "python": platform.python_version()}
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory_bytes": properties.total_memory, "cuda": torch.version.cuda}
    for library in LIBRARIES:
        try:
            found[library] = version(library)
        except PackageNotFoundError:
            found[library] = None
    return found


class Rows:
    """Rows of a section, written as they come: what is lost by a fault is what has not begun.

    Args:
        args: of `arguments`.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self._to = args.out
        self._found = {"environment": environment(args.device), "tiny": args.tiny, "rows": {}}
        self.failed = 0
        self._write()

    def add(self, name: str, make: Callable[[], dict[str, Any]]) -> None:
        """Makes a row; one that fails holds its error."""
        began = perf_counter()
        try:
            row = make()
        except Exception as error:  # noqa: BLE001  the next row is made all the same
            row = {"error": f"{type(error).__name__}: {error}"[:2000]}
            self.failed += 1
        self._found["rows"][name] = {**row, "took_seconds": round(perf_counter() - began, 2)}
        print(f"{name}: {self._found['rows'][name]}", flush=True)
        self._write()

    def _write(self) -> None:
        self._to.parent.mkdir(parents=True, exist_ok=True)
        self._to.write_text(json.dumps(self._found, indent=1) + "\n")
