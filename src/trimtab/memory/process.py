"""What the system says of processes: memory of this one, and whether another is still the one it was.

Imports nothing of trimtab, and nothing that a system may lack; the only file that imports psutil.

"Resident" is anonymous resident memory where the system tells it apart (Linux): file-mapped pages, which the kernel can
drop, are not counted. A peak that can be reset is Linux's; elsewhere the peak is that of the whole process.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> None:
    """Start a new peak where the system can (Linux); elsewhere the peak is that of the whole process."""
    if _CLEAR.exists():
        _CLEAR.write_text("5")


def peak_bytes() -> int:
    """Largest resident memory of this process since `reset_peak`, in bytes."""
    if _STATUS.exists():
        return _status("VmHWM")
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident_bytes() -> int:
    """Anonymous resident memory of this process now, in bytes (all of it where the system does not tell)."""
    return _status("RssAnon") if _STATUS.exists() else int(psutil.Process().memory_info().rss)


def available_bytes() -> int:
    """Memory that this system could still give to a process, in bytes."""
    return int(psutil.virtual_memory().available)


@contextmanager
def memory_errors() -> Iterator[None]:
    """Let a want of memory be a `MemoryError` everywhere: torch raises other errors than its own for some.

    Those are the processor's (a bare RuntimeError of c10/core/impl/alloc_cpu.cpp) and what a GPU's driver, not torch's
    allocator, could not give.
    """
    try:
        yield
    except RuntimeError as error:
        if any(words in str(error) for words in ("DefaultCPUAllocator: ", "CUDA error: out of memory")):
            raise MemoryError(str(error)) from error
        raise


def boot_seconds() -> int:
    """When this system was started, in seconds since 1970."""
    return int(psutil.boot_time())


def born(pid: int) -> str:
    """When a process began: a later process of the same number is another. "" if there is none, or only its zombie."""
    try:
        found = psutil.Process(pid)
        if found.status() == psutil.STATUS_ZOMBIE:
            return ""
        began: float = found.create_time()
    except psutil.Error:
        return ""
    # Linux counts from its start; psutil adds the time of that, which moves whenever somebody sets the clock.
    return f"{began - psutil.boot_time() if psutil.LINUX else began:.2f}"


def _status(field: str) -> int:
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    return 0
