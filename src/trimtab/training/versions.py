"""Versions of what decides the last digits of a run's numbers: libraries, Python, and the machine."""

import os
import platform
import sys
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch

_LIBRARIES = (
    "trimtab",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "peft",
    "bitsandbytes",
)


@lru_cache
def versions() -> dict[str, str]:
    """Libraries that are installed, Python, and the machine."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return found | {"machine": f"{sys.platform} {platform.machine()}, {os.cpu_count()} processors{gpu}"}
