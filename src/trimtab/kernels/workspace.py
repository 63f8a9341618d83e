"""One reused buffer for weights that exist only while they are used.

A fresh allocation of tens of megabytes is mapped, faulted in page by page and unmapped each time, which on a CPU costs more
than filling it (33 MB: 13 ms against 0.7). A weight that is multiplied once and dropped can live in the same memory every
time. The rule: a slot's taker must be done with it before anything else could take it, and nothing may keep a view.

Under a dispatch mode (fake tensors), under `torch.compile` and on devices with a caching allocator a fresh tensor is given
out instead.
"""

import threading

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_kept = threading.local()


def take(slot: str, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape with unspecified contents, in the memory that the slot had before.

    Args:
        slot: what it is for; two tensors that live at the same time need two slots.
        shape: rows, columns.
        dtype: its dtype.
        device: its device.
    """
    plain = device.type == "cpu" and not torch.compiler.is_compiling() and _get_current_dispatch_mode() is None
    if not plain:
        return torch.empty(shape, dtype=dtype, device=device)
    buffers: dict[str, Tensor] = _kept.__dict__.setdefault("buffers", {})
    size = shape[0] * shape[1] * dtype.itemsize
    buffer = buffers.get(slot)
    if buffer is None or buffer.numel() < size:
        buffers.pop(slot, None)
        buffer = None  # the old one is gone before the new one is made
        buffer = buffers[slot] = torch.empty(
            size, dtype=torch.uint8
        )  # made in inference mode, its views serve training, too
    return buffer[:size].view(dtype).view(shape)


def clear() -> None:
    """Give the buffers of this thread back."""
    _kept.__dict__.pop("buffers", None)
