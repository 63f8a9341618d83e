"""What takes the place of a family's own objects: a subclass of the family's class, for an object that exists already.

`transformers` asks `isinstance` of a model and of its experts, saves them under their class's name and initialises them by
what they are. So an object of ours is of the family's class, under the same name, with our answers before the family's.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


@cache
def class_over(ours: Any, kind: Any) -> type:
    """A subclass of both, under the name of the family's class."""
    about = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
    return type(kind.__name__, (ours, kind), about)


def empty_over(ours: type, kind: type) -> nn.Module:
    """An object of that class without anything in it, for copies and pickles: no module has the class under its name."""
    made: Any = class_over(ours, kind)
    module: nn.Module = made.__new__(made)
    return module


def seems_read(shape: tuple[int, ...]) -> Tensor:
    """What stands for a weight while transformers reads a file: families initialise weights of other modules by name, and
    pass over what was read.
    """
    done = torch.empty(shape, device="meta")
    done._is_hf_initialized = True  # type: ignore[attr-defined]
    return done
