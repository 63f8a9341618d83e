"""The device that a model computes on: which one a name means here, and what the device says of its memory.

    auto      the GPU that is there (cuda, else xpu, else mps), else the CPU
    cuda      the CUDA device that is current, cuda:0 unless somebody chose another; cuda:N names one
    cpu, mps, xpu

A name is resolved where a recipe, a command or a call names it; everything below is given a `torch.device` with its number,
and puts each tensor there when it is read or made.

Memory is the device's own: on the CPU that of the computer, which `memory.process` measures. What a GPU's context and
libraries (cuBLAS, the kernels that are loaded) take beside tensors is not in torch's counts and has to fit, too.
"""

import re
from contextlib import suppress
from typing import Any, NamedTuple

import torch

from trimtab.errors import UserError

NAMES = "auto, cpu, cuda, cuda:N, mps, xpu or xpu:N"
CPU = torch.device("cpu")
_NAME = re.compile(r"auto|cpu|mps|(cuda|xpu)(:\d+)?")
_GPUS = ("cuda", "xpu", "mps")
_NO_FLOAT64 = ("mps",)
_CONTEXT_BYTES = {"cuda": 450 * 2**20, "xpu": 450 * 2**20}
"""What the context of a process takes on a device: an assumption, no GPU was measured for it."""
_LIBRARY_BYTES = {"cuda": 200 * 2**20, "xpu": 200 * 2**20}
"""The same of what comes with the first products, workspaces and loaded kernels: an assumption, too."""


class Memory(NamedTuple):
    """Of a device, in bytes."""

    free: int
    """What this process could still take, its context taken off, torch's own reserve not counted."""
    total: int


def check_name(name: str, key: str = "model.device") -> str:
    """The name itself; a `UserError` if it is none that a device has anywhere."""
    if not _NAME.fullmatch(name):
        raise UserError(f"{key}: {name!r} is none of {NAMES}")
    return name


def resolve(name: str | torch.device, key: str = "model.device") -> torch.device:
    """The device that a name means here, with its number.

    Args:
        name: see above.
        key: where it was named, for the message.

    Raises:
        UserError: for a name that is none, or a device that is not here.
    """
    name = check_name(str(name).removesuffix(":0") if str(name).startswith(("cpu", "mps")) else str(name), key)
    if name == "auto":
        kind = next((kind for kind in _GPUS if _available(kind)), "cpu")
        return resolve(kind, key)
    kind, _, number = name.partition(":")
    if kind == "cpu":
        return CPU
    if not _available(kind):
        raise UserError(f"{key}: {name} is not here ({_why_not(kind)}); set {key}=auto or cpu")
    module: Any = torch.get_device_module(kind)
    count = 1 if kind == "mps" else module.device_count()
    index = int(number) if number else 0 if kind == "mps" else module.current_device()
    if index >= count:
        raise UserError(f"{key}: there is no {name}: {kind} devices here are 0 to {count - 1}")
    return torch.device(kind, index)


def _available(kind: str) -> bool:
    return torch.backends.mps.is_available() if kind == "mps" else bool(torch.get_device_module(kind).is_available())


def _why_not(kind: str) -> str:
    if kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        return f"torch {torch.__version__} is built without CUDA"
    return f"torch {torch.__version__} finds none"


def described(device: torch.device) -> str:
    """The device for people: `cuda:0 (NVIDIA H200)`."""
    if device.type not in ("cuda", "xpu"):
        return str(device) if device.type == "cpu" else device.type
    return f"{device} ({torch.get_device_module(device).get_device_name(device)})"


def double(tensor: torch.Tensor) -> torch.Tensor:
    """The numbers in float64: on the tensor's device, or on the host where that has none (mps)."""
    return tensor.cpu().double() if tensor.device.type in _NO_FLOAT64 else tensor.double()


def kept_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a tensor of a file has on a device: mps holds no float64."""
    return torch.float32 if dtype == torch.float64 and device.type in _NO_FLOAT64 else dtype


# ---- its memory --------------------------------------------------------------------------------------------------


def memory(device: torch.device) -> Memory | None:
    """Free and total memory of a device; None for the CPU, whose memory is the computer's."""
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return Memory(max(total - torch.mps.driver_allocated_memory(), 0), total)
    if device.type not in ("cuda", "xpu"):
        return None
    return Memory(*torch.get_device_module(device).mem_get_info(device))


def beside_tensors(kind: str, *, begun: bool = False) -> int:
    """Bytes that a device's context and libraries take beside tensors; 0 on the CPU.

    Args:
        kind: cpu, cuda, mps or xpu.
        begun: whether the context is there already, as it is once `memory` has been asked.
    """
    return _LIBRARY_BYTES.get(kind, 0) + (0 if begun else _CONTEXT_BYTES.get(kind, 0))


def reset_peak(device: torch.device) -> None:
    """Begin a new peak of `peak_bytes`."""
    if device.type in ("cuda", "xpu"):
        torch.get_device_module(device).reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int | None:
    """Most bytes of tensors on the device since `reset_peak` (on mps: now, it keeps no peak); None for the CPU."""
    if device.type == "mps":
        return int(torch.mps.current_allocated_memory())
    if device.type not in ("cuda", "xpu"):
        return None
    return int(torch.get_device_module(device).max_memory_allocated(device))


def release(device: torch.device) -> None:
    """Give back what torch keeps of the device's memory for later tensors: another model comes."""
    if device.type in _GPUS:
        torch.get_device_module(device).empty_cache()


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked."""
    if device.type in _GPUS:
        with suppress(NotImplementedError):
            torch.accelerator.synchronize(device)


__all__ = [
    "CPU", "NAMES", "Memory", "beside_tensors", "check_name", "described", "double", "kept_as", "memory", "peak_bytes",
    "release", "reset_peak", "resolve", "wait",
]  # fmt: skip
