"""A trainer's arguments for one device: by themselves they take the first GPU, and with two of them `nn.DataParallel`.

transformers has no option for it: which device a single process trains on is decided in `TrainingArguments`, and accelerate
decides it again. Both are told here, before there is a trainer. Where several processes train together, each of them has
been given its device by the process that started it, and nothing is changed.
"""

from typing import Any, TypeVar

import torch

_Arguments = TypeVar("_Arguments")


def placed(args: _Arguments, device: torch.device) -> _Arguments:
    """The same arguments, training on this device alone; it is the current one of its kind from then on."""
    told: Any = args
    if device.type == "cpu" or told.world_size > 1:  # the CPU is an option of theirs (`use_cpu`)
        return args
    torch.get_device_module(device).set_device(device) if device.type != "mps" else None
    vars(told)["_setup_devices"] = device
    told._n_gpu = 1
    told.distributed_state.device = device
    return args
