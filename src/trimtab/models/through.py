"""Something else than a model's forward, through what is wrapped around it.

DDP has to see the forward of every micro-step to know when gradients are to be averaged, FSDP2 has to gather the
parameters that lie outside the blocks. Both do so where the model is called, so a loss that is not made of all logits is
computed there: in place of the forward, once.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trimtab import processes


def through(model: Any, inner: PreTrainedModel, call: Callable[..., Tensor], **inputs: Any) -> Tensor:
    """What `call(**inputs)` gives where `inner` is called by `model`.

    Args:
        model: `inner`, or what is wrapped around it.
        inner: whose forward does not run; `call` may run its parts.
        call: gets the inputs as they have come through.
        inputs: what the forward takes.
    """
    if model is inner and processes.count() == 1:
        return call(**inputs)

    def instead(*_: Any, **given: Any) -> Tensor:
        return call(**given)

    with replaced(inner, instead):
        found: Tensor = model(**inputs)
    return found


@contextmanager
def replaced(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """With another forward of a module; one that stood on it before comes back."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward  # the class has it
        else:
            module.forward = own
