"""Peaks of a stage's memory: the process's on the host, and where the model is elsewhere, the device's beside it."""

import gc

import torch

from trimtab import devices
from trimtab.memory import process


def begin(device: torch.device) -> None:
    """Begin a stage: what came before it, and is gone, no longer counts."""
    gc.collect()
    devices.release(device)
    process.reset_peak()
    devices.reset_peak(device)


def peaks(device: torch.device) -> dict[str, int]:
    """Peaks since `begin`, by their names in `metrics.json`."""
    there = devices.peak_bytes(device)
    return {"peak_memory_bytes": process.peak_bytes()} | ({} if there is None else {"device_peak_memory_bytes": there})
