"""y = x W^T where W is rebuilt whenever it is needed: the one line that decides what backward keeps.

`linear(x, build, ...)` calls `build()` to get W in forward, throws it away, and calls it again in backward. What survives
between the two is x (only where the weight is trained) and what `build` itself reads: codes, scales, factors. Neither W,
nor levels, nor any other N x K float tensor outlives the call.

`torch.utils.checkpoint` around the same two operations is the plain way to say this (and is what runs under
`torch.compile`); the function below does the same with less bookkeeping, never keeps x for a frozen weight, and hands
dW straight to the graph of `build`: `docs/log.md` has the numbers.

Legend: B batch rows (leading dims), N out features, K in features.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class _RebuiltLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, build: Callable[[], Tensor], bias: Tensor | None, *trained: Tensor) -> Tensor:
        ctx.build, ctx.trained = build, trained
        ctx.save_for_backward(*((x,) if trained else ()))
        return F.linear(x, build(), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.trained:
            return (grad @ ctx.build() if ctx.needs_input_grad[0] else None), None, None
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            weight = ctx.build()
        grad_x = grad @ weight.detach() if ctx.needs_input_grad[0] else None
        grad_weight = grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])
        return grad_x, None, None, *torch.autograd.grad(weight, ctx.trained, grad_weight)


def linear(
    x_BK: Tensor, build: Callable[[], Tensor], bias_N: Tensor | None = None, trained: tuple[Tensor, ...] = ()
) -> Tensor:
    """x W^T + bias with W = build(), rebuilt in backward.

    Args:
        x_BK: (..., K).
        build: makes W (N, K) in x's dtype; it must give the same bits each time it is called.
        bias_N: frozen bias (N,), or None.
        trained: the leaf parameters that `build` reads and that want gradients.

    Returns:
        (..., N) in x's dtype.
    """
    if torch.compiler.is_compiling():
        return checkpoint(lambda t: F.linear(t, build(), bias_N), x_BK, use_reentrant=False)
    needed = tuple(p for p in trained if p.requires_grad)
    return _RebuiltLinear.apply(x_BK, build, bias_N, *needed)  # type: ignore[no-untyped-call]
