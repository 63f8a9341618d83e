"""The matrix of a head, lent to what multiplies by it: it can be read, and not be written to.

Losses that never make all logits at once take `lm_head.weight`, a part of it at a time, and multiply by it. Ours is made
when it is asked for, and gone when nobody holds it: whatever is written into it is lost. So `lm_head.weight.data += delta`,
by which other libraries merge, `copy_`, `weight[...] = x` and their kin raise, with what to do instead.

The rest of what is done with it gives ordinary tensors, with the gradients of what it is made of.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError

_NO_WRITES = ("requires_grad_",)
"""Names with a trailing underscore that write no number."""
_OPERATORS = (
    "__setitem__",
    *(f"__i{name}__" for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor"]),
)


class HeadMatrix(Tensor):
    """Raises a `UserError` for what would write into it."""

    layer: str

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if _writes(func, args, kwargs or {}):
            raise UserError(
                f"{_layer_of(args)}.weight is computed from few bits whenever it is asked for, so nothing can be written "
                "to it, and `.data` would be a copy: use `trimtab.fold(model)` to merge its adapter, `.dequantize(dtype)` "
                "of the layer for a copy, or keep the layer in float (`grid: null`)"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def read_only(matrix: Tensor, layer: str) -> Tensor:
    """The matrix, with its gradients; writing into it raises a `UserError` that names the layer."""
    lent = matrix.as_subclass(HeadMatrix)
    lent.layer = layer or "lm_head"
    return lent


def _layer_of(args: tuple[Any, ...]) -> str:
    return next((a.layer for a in args if isinstance(a, HeadMatrix)), "lm_head")


def _writes(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    if isinstance(kwargs.get("out"), HeadMatrix):
        return True
    if not args or not isinstance(args[0], HeadMatrix):
        return False
    name = getattr(func, "__name__", "")
    if name in ("__get__", "__set__", "__delete__"):
        which = getattr(getattr(func, "__self__", None), "__name__", "")
        return which == "data" or (name == "__set__" and which != "requires_grad")
    in_place = name.endswith("_") and not name.endswith("__")
    return (in_place and name not in _NO_WRITES) or name in _OPERATORS
