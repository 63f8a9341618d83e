"""A model of names and shapes: parameters on the meta device, buffers real."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register go to the meta device at once; buffers (rotary frequencies) stay real.

    `torch.device("meta")` as a context would take buffers along, and what is not in a file could not be had again.
    """
    register: Callable[..., None] = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        if parameter is not None:
            made = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
            made.__dict__.update(parameter.__dict__)
            module._parameters[name] = made

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
