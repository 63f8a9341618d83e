"""What trimtab changes in its process so that training on a CPU is fast: the one place, done once, and to be switched off.

    products    torch's own CPU kernels of half-precision products, replaced where the processor has no instructions for
                them (`products`): 3 to 30 times faster, sums in another order
    heap        glibc gives large freed blocks back at once (`heap.return_freed`): training's peak is what lives

Both act on the whole process, other libraries' tensors included. So each is announced once, by the logger `trimtab`
and by a run's own messages (`announcements`), and neither is done where TRIMTAB_TUNE=0 is set or `trimtab.tune(False)`
was called; that call also takes the replaced kernels out again.
"""

import logging
import os

import torch

from trimtab.kernels import heap, products

_log = logging.getLogger("trimtab")
_heap_done = False
_untold: list[str] = []


def allowed() -> bool:
    """Whether the process may be changed: unless TRIMTAB_TUNE is 0, which `tune(False)` sets."""
    return os.environ.get("TRIMTAB_TUNE") != "0"


def tune(enabled: bool = True) -> None:
    """Allow, or forbid and undo, what trimtab changes in this process: CPU kernels of torch, and the heap.

    Args:
        enabled: False leaves torch's kernels and the heap alone from now on. The heap's option, where training has set it
            already, stays: glibc cannot take it back.

    Examples:
        >>> tt.tune(False)  # before the first model is loaded
    """
    # In the environment, so that processes started from here (the reload that a run compares, workers of a search) follow.
    os.environ["TRIMTAB_TUNE"] = "1" if enabled else "0"
    if not enabled:
        products.uninstall()


def _announce(text: str) -> None:
    _log.info(text)
    _untold.append(text)


def announcements() -> list[str]:
    """What was changed in this process and not told by this function before."""
    told = list(_untold)
    _untold.clear()
    return told


def workspace_bytes(dtype: torch.dtype) -> int:
    """What a product of this dtype takes beside its operands and result, in bytes, for plans of memory."""
    return products.workspace_bytes(dtype) if allowed() else 0


def for_models() -> None:
    """Before a model is loaded or prepared: half-precision products, where this processor is slow at them."""
    if allowed() and products.install():
        _announce(
            "this processor has no AVX-512: products of bfloat16 and float16 are taken in float32 in this process; "
            "TRIMTAB_TUNE=0 or trimtab.tune(False) leaves torch's own kernels"
        )


def for_training() -> None:
    """Before training: large freed blocks go back to the system."""
    global _heap_done
    if allowed() and not _heap_done and heap.return_freed():
        _heap_done = True
        _announce(
            "the heap of this process gives freed blocks of 4 MiB and more back at once; TRIMTAB_TUNE=0 or "
            "trimtab.tune(False) leaves it alone"
        )
