"""What every stored weight is, and the one that is a plain matrix of floats.

Legend: N out features, K in features, T tokens.
"""

from abc import ABC, abstractmethod
from typing import Any, Self

import torch
from torch import Tensor, nn

from trimtab.kernels import cpu, dequantize, workspace
from trimtab.kernels.arguments import rows_of
from trimtab.layers import intact
from trimtab.quant import packing
from trimtab.quant.grid import AnyGrid

Spec = dict[str, Any]


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter that is stored and never trained."""
    return nn.Parameter(packing.owned(tensor), requires_grad=False)


class Weight(nn.Module, ABC):
    """A stored (N, K) matrix."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self._kept: intact.Kept = {}

    def intact(self) -> Self:
        """This weight; a `UserError` that names the tensor if one is no longer as it was stored."""
        whose = f"{type(self).__name__} of {self.shape[0]} x {self.shape[1]}"
        intact.stored(whose, self._kept, self)
        return self

    @property
    @abstractmethod
    def grid(self) -> AnyGrid | None:
        """The grid that the values lie on; None for a dense weight."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype, *, rows: Tensor | None = None, reuse: bool = False) -> Tensor:
        """The matrix (N, K), or the given rows of it, rounded once to `dtype`.

        With `reuse` the result may lie in memory that the next such call overwrites (see `kernels.workspace`).
        """

    @abstractmethod
    def spec(self) -> Spec:
        """What `from_spec` needs to lay this weight out without data."""

    def product_of_few(self, x_TK: Tensor) -> Tensor | None:
        """x W^T (T, N) of a few rows without ever writing W, summed in float32; None where there is no such way."""
        on_gpu = dequantize.on_gpu(x_TK)
        if x_TK.dtype == torch.float64 or not (on_gpu or cpu.serves(x_TK)):
            return None
        shape = x_TK.shape[0], self.shape[0]
        if on_gpu:  # where each further operator has a price of its own
            y = torch.empty(shape, dtype=x_TK.dtype, device=x_TK.device)
            return y if self._multiply(y, x_TK) else None
        y = torch.empty(shape)
        x = x_TK if x_TK.dtype == torch.bfloat16 else x_TK.float()
        return y.to(x_TK.dtype) if self._multiply(y, x) else None

    def _multiply(self, y: Tensor, x_TK: Tensor) -> bool:
        """Fill y (T, N) with x W^T, if this kind can; dtypes are those of the operator."""
        return False

    def result(self, dtype: torch.dtype, rows: Tensor | None, reuse: bool) -> Tensor:
        """Memory for what `dequantize` returns."""
        shape = (self.shape[0] if rows is None else rows.numel(), self.shape[1])
        device = next(self.parameters()).device
        return (
            workspace.take("weight", shape, dtype, device) if reuse else torch.empty(shape, dtype=dtype, device=device)
        )

    def stored_bytes(self) -> int:
        """Bytes of all tensors as kept in memory and on disk."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


class DenseWeight(Weight):
    """A weight kept as floats: the base of 16-bit LoRA."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__((weight_NK.shape[0], weight_NK.shape[1]))
        self.weight = frozen(weight_NK)

    @property
    def grid(self) -> None:
        """A dense weight is on no grid."""
        return None

    def dequantize(self, dtype: torch.dtype, *, rows: Tensor | None = None, reuse: bool = False) -> Tensor:
        """The matrix itself, cast to `dtype`."""
        return rows_of(intact.floating("weight", self.weight, self.shape), rows).to(dtype)

    def spec(self) -> Spec:
        """Kind, shape and dtype."""
        return {"kind": "dense", "shape": list(self.shape), "dtype": str(self.weight.dtype).removeprefix("torch.")}
