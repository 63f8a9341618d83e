"""A saved model as anybody loads it: by transformers' own `from_pretrained`, each tensor read onto the device.

With a `device_map` transformers asks for accelerate, which trimtab's core does not need. Without it the packed model passes
through the computer's memory as a whole, and a warning says so once.
"""

import logging
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import is_accelerate_available

from trimtab.devices import CPU
from trimtab.models import believable
from trimtab.models.layout import auto_class

_log = logging.getLogger("trimtab")


def reload(path: str | os.PathLike[str], dtype: Any, device: torch.device) -> PreTrainedModel:
    """The model of a directory that transformers reads: one of ours, or of a format that it knows by itself.

    Args:
        path: the directory.
        dtype: to compute in, or "auto".
        device: to compute on.
    """
    believable.look_over(Path(path))
    believable.read_generation(Path(path))
    direct = device == CPU or is_accelerate_available()
    placed: dict[str, Any] = {} if device == CPU or not direct else {"device_map": {"": device}}
    kind = auto_class(AutoConfig.from_pretrained(path, trust_remote_code=False))
    model: PreTrainedModel = kind.from_pretrained(path, dtype=dtype, trust_remote_code=False, **placed)
    if not direct:
        _warn()
        model.to(device)  # type: ignore[arg-type]
    return model


@cache
def _warn() -> None:
    _log.warning(
        "accelerate is not installed, so a saved model passes through the computer's memory: pip install accelerate"
    )
