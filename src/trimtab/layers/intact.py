"""Whether a layer's tensors still are what it was made of.

Engines reach past `Module._apply`: mixed precision of FSDP2 and DeepSpeed, or a line `p.data = p.data.bfloat16()`, casts
parameters of any module. What that does depends on the tensor:

    stored    codes, scales, zeros, absmax: a cast changes the model. Refused, with the tensor's name, wherever it is used.
    trained   factors, masters of scales and offsets: float32 that passes through its storage dtype anyway, so a cast to a
              float type is taken as it is; another shape or device is refused.
"""

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.kernels.arguments import CAST, described

Kept = dict[str, tuple[torch.dtype, torch.Size]]
"""Dtype and shape that each stored tensor was made with."""


def kept(weight: nn.Module) -> Kept:
    """What `stored` holds the parameters of a weight to."""
    return {name: (p.dtype, p.shape) for name, p in weight.named_parameters(recurse=False)}


def stored(whose: str, expected: Kept, weight: nn.Module) -> None:
    """A `UserError` unless every tensor has its dtype and shape, is contiguous, and all are on one device."""
    first: tuple[str, torch.device] | None = None
    for name, (dtype, shape) in expected.items():
        t = getattr(weight, name)
        if t is None or t.dtype != dtype or t.shape != shape or not t.is_contiguous():
            wanted = f"contiguous {str(dtype).removeprefix('torch.')} {tuple(shape)}"
            raise UserError(f"{whose}: {name} is {described(t)} and should be {wanted}; {CAST}")
        first = first or (name, t.device)
        if t.device != first[1]:
            raise UserError(f"{whose}: {name} is on {t.device} and {first[0]} on {first[1]}; {CAST}")


def floating(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """The tensor itself; a `UserError` unless it has this shape, a float type and, if one is named, this device."""
    if tensor.shape != shape or not tensor.is_floating_point() or tensor.device != (device or tensor.device):
        wanted = f"of a float type, {tuple(shape)}{'' if device is None else f' on {device}'}"
        raise UserError(f"{name} is {described(tensor)} and should be {wanted}; {CAST}")
    return tensor


def trained(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device | None = None) -> Tensor:
    """The same as float32, differentiable."""
    return floating(f"the trained {name}", tensor, shape, device).float()


def on(device: torch.device, layer: nn.Module, beside: str = "the layer's input") -> None:
    """A `UserError` that names a parameter that is elsewhere: beside one without data, torch answers without data."""
    for name, p in layer.named_parameters():
        if p.device != device:
            raise UserError(f"{name} is {described(p)}, and {beside} is on {device}; move the whole model")
