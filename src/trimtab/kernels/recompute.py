"""y = x W^T where W is rebuilt whenever it is needed: the one line that decides what backward keeps.

`linear(x, source, bias)` asks its source for W in forward, throws it away, and asks again in backward. What survives
between the two is x (only where the weight is trained) and what the source itself reads: codes, scales, factors. Neither
W, nor levels, nor any other N x K float tensor outlives the call; W lies in memory that every layer shares (`workspace`),
and so does dW. Where inputs are rounded to a grid the same holds for them: x is kept, since the layers beside this one
read it too, and rounded again.

`torch.utils.checkpoint` around the same two operations is the plain way to say this (under `torch.compile` it stands around
the weight alone); the function below does the same with less bookkeeping, never keeps x for a frozen weight, and hands
dW to the source, which knows its gradients: `docs/log.md` has the numbers.

Legend: B batch rows (leading dims), N out features, K in features.
"""

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from trimtab.kernels import workspace


class Source(Protocol):
    """What a weight is rebuilt from."""

    def dequantize(self, dtype: torch.dtype, *, reuse: bool = False) -> Tensor:
        """W (N, K), the same bits each time; without `reuse` and under grad mode, differentiable in what is trained."""

    def weight_parameters(self) -> tuple[Tensor, ...]:
        """The leaves that W depends on and that want gradients."""

    def weight_gradients(self, grad_NK: Tensor) -> tuple[Tensor | None, ...]:
        """Their gradients from dL/dW, which may be overwritten."""

    def uses_output(self, dtype: torch.dtype) -> bool:
        """Whether `gradients_from_output` may serve instead (see `channel`): the product is then kept, too."""

    def gradients_from_output(
        self, grad_BN: Tensor, x_BK: Tensor, y_BN: Tensor
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """W as `dequantize` with `reuse`, and the gradients without forming dL/dW; None where that would cost more."""


class InputQuantizer(Protocol):
    """What rounds x before it meets W (see `activations`)."""

    def __call__(self, x: Tensor) -> Tensor:
        """x_hat, the same bits each time; under grad mode, differentiable."""

    def passed(self, x: Tensor, grad: Tensor) -> Tensor:
        """dL/dx from dL/dx_hat, which may be overwritten."""


def _rows(t: Tensor) -> Tensor:
    """All leading dimensions as one."""
    return t.reshape(-1, t.shape[-1])


class _RebuiltLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, source: Source, bias: Tensor | None, inputs: InputQuantizer | None, *trained: Tensor
    ) -> Tensor:
        ctx.source, ctx.inputs, ctx.trained = source, inputs, trained
        y = F.linear(x if inputs is None else inputs(x), source.dequantize(x.dtype, reuse=True), bias)
        if bias is not None:  # then it is a view, which autograd lets nobody change in place (RoCBERT does)
            y = y.detach()
        by_output = bool(trained) and source.uses_output(x.dtype)
        keeps_x = trained or (inputs is not None and ctx.needs_input_grad[0])
        ctx.save_for_backward(*((x, y) if by_output else (x,) if keeps_x else ()))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        source: Source = ctx.source
        inputs: InputQuantizer | None = ctx.inputs
        found, x, y = None, *(*ctx.saved_tensors, None, None)[:2]
        if y is not None:
            seen = x if inputs is None else inputs(x)
            weight, found = source.gradients_from_output(_rows(grad), _rows(seen), _rows(y))
        elif ctx.needs_input_grad[0]:
            weight = source.dequantize(grad.dtype, reuse=True)
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        if grad_x is not None and inputs is not None:
            grad_x = inputs.passed(x, grad_x)
        if not ctx.trained:
            return grad_x, None, None, None
        if found is None:
            grad_BN, x_BK = _rows(grad), _rows(x if inputs is None else inputs(x))
            grad_NK = workspace.take("gradient", (grad_BN.shape[1], x_BK.shape[1]), grad.dtype, grad.device)
            torch.mm(grad_BN.t(), x_BK, out=grad_NK)
            found = source.weight_gradients(grad_NK)
        return grad_x, None, None, None, *found


def linear(x_BK: Tensor, source: Source, bias_N: Tensor | None = None, inputs: InputQuantizer | None = None) -> Tensor:
    """x W^T + bias with W from `source`, made again in backward.

    Args:
        x_BK: (..., K).
        source: makes W in x's dtype.
        bias_N: frozen bias (N,), or None.
        inputs: rounds x first, or None.

    Returns:
        (..., N) in x's dtype.
    """
    if torch.compiler.is_compiling():
        # The product stays outside: a compiler would make again in backward whatever is within.
        weight = checkpoint(source.dequantize, x_BK.dtype, use_reentrant=False)
        seen = x_BK if inputs is None else checkpoint(inputs, x_BK, use_reentrant=False)
        return F.linear(seen, weight, bias_N)
    y: Tensor = _RebuiltLinear.apply(x_BK, source, bias_N, inputs, *source.weight_parameters())  # type: ignore[no-untyped-call]
    return y
