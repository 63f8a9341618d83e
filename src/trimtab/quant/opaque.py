"""Arithmetic that decides what is stored, as operators that a compiler calls and does not look into.

A compiler computes what it sees as it likes. Inductor leaves out a cast to a narrower type and back, on a GPU it contracts
a product and a sum to one rounding and divides approximately, and a small matrix product may become a sum of its own. All
that is harmless in an activation. In a factor, a scale, a zero or a level it is not: another code is used than is folded.
So whatever decides one of these is an operator, on every device: its values are those of eager torch, compiled or not.

    stored           x as its stored dtype holds it                        straight through
    low_rank         gain * B A, or gain * M
    plus_low_rank    x + gain * B A, in one pass
    levels_of        W / s + z, or (W - o) / s
    moved_zeros      clamp(round(z - D / s), 0, top)                       straight through where it is not clipped

What is left between them in `layers` is copies and single sums, which every compiler rounds alike. Gradients decide
nothing: they are plain torch, for a compiler to fuse. Levels to weights (`kernels.levels`) and rounded activations
(`activations`) are operators made here, too; packed codes have theirs in `kernels.dequantize`.

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("trimtab", "FRAGMENT")


def operator(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    backward: tuple[Callable[..., None], Callable[..., Any]] | None = None,
) -> Callable[..., Any]:
    """A function as an operator of torch.library, for all devices.

    Args:
        schema: name, arguments and results, as torch.library writes them.
        kernel: eager torch. It gives back fresh tensors, never an argument, and what it decides by matrix products it
            does outside autocast (`exact`). However its arguments are laid out, its results are made contiguous.
        fake: the same for tensors without data: shapes and dtypes only, contiguous, which compilers rely on.
        backward: what is kept for backward (`setup_context`), and the gradients of all arguments; None where none are.
    """

    def run(*arguments: Any) -> Any:
        made = kernel(*arguments)
        return tuple(t.contiguous() for t in made) if isinstance(made, tuple) else made.contiguous()

    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"trimtab::{name}", fake, lib=_LIBRARY)
    if backward is not None:
        keep, gradients = backward
        torch.library.register_autograd(f"trimtab::{name}", gradients, setup_context=keep, lib=_LIBRARY)
    made: Callable[..., Any] = getattr(torch.ops.trimtab, name).default
    return made


def exact(tensor: Tensor) -> torch.autocast:
    """A stretch in which autocast leaves products in their own dtype."""
    return torch.autocast(tensor.device.type, enabled=False)


# ---- rounding to a stored dtype -----------------------------------------------------------------------------------


LARGEST_PORTABLE = 65280.0
"""The largest number that bfloat16 and float16 both hold."""


def _stored(x: Tensor, dtype: str) -> Tensor:
    if dtype == "portable":
        return x.clamp(-LARGEST_PORTABLE, LARGEST_PORTABLE).to(torch.bfloat16).to(torch.float16).to(x.dtype)
    return x.to(getattr(torch, dtype)).to(x.dtype)


def _keep_nothing(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _like_first(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_trained = operator(
    "stored(Tensor x, str dtype) -> Tensor", _stored, _like_first, (_keep_nothing, lambda ctx, grad: (grad, None))
)
_frozen = operator("stored_frozen(Tensor x, str dtype) -> Tensor", _stored, _like_first)
"""Without a gradient: a third of the call's price, which generation with an adapter pays for each factor of each layer."""


def stored(x: Tensor, dtype: str) -> Tensor:
    """x as its stored dtype holds it (see `grid.stored`), straight through."""
    if dtype != "portable" and getattr(torch, dtype) == x.dtype:
        return x
    rounded: Tensor = (_trained if torch.is_grad_enabled() and x.requires_grad else _frozen)(x, dtype)
    return rounded


# ---- low-rank updates ---------------------------------------------------------------------------------------------


def _low_rank(b: Tensor, a: Tensor | None, gain: float) -> Tensor:
    if a is None:
        return b * gain
    with exact(b):
        return (b @ a).mul_(gain)


def _low_rank_fake(b: Tensor, a: Tensor | None, gain: float) -> Tensor:
    return b.new_empty(b.shape if a is None else (b.shape[0], a.shape[1]))


def _keep_factors(ctx: Any, inputs: tuple[Tensor, Tensor | None, float], output: Tensor) -> None:
    b, a, ctx.gain = inputs
    ctx.save_for_backward(None if a is None else b, a)


def _low_rank_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    b, a = ctx.saved_tensors
    if a is None:
        return grad * ctx.gain, None, None
    with exact(grad):
        return (grad @ a.t()) * ctx.gain, (b.t() @ grad) * ctx.gain, None


_low_rank_operator = operator(
    "low_rank(Tensor b, Tensor? a, float gain) -> Tensor",
    _low_rank,
    _low_rank_fake,
    (_keep_factors, _low_rank_backward),
)


def low_rank(b_NR: Tensor, a_RK: Tensor | None, gain: float) -> Tensor:
    """gain * B A, (N, K), or with None for A gain * B; in the factors' dtype, also under autocast."""
    product: Tensor = _low_rank_operator(b_NR, a_RK, gain)
    return product


def _plus_low_rank(x: Tensor, b: Tensor, a: Tensor, gain: float) -> Tensor:
    with exact(x):
        return torch.addmm(x, b, a, alpha=gain)


def _keep_both(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    _, b, a, ctx.gain = inputs
    ctx.save_for_backward(b, a)


_plus_low_rank_operator = operator(
    "plus_low_rank(Tensor x, Tensor b, Tensor a, float gain) -> Tensor",
    _plus_low_rank,
    _like_first,
    (_keep_both, lambda ctx, grad: (grad, *_low_rank_backward(ctx, grad))),
)


def plus_low_rank(x_NK: Tensor, b_NR: Tensor, a_RK: Tensor, gain: float) -> Tensor:
    """x + gain * B A, also under autocast in the dtype of its arguments."""
    total: Tensor = _plus_low_rank_operator(x_NK, b_NR, a_RK, gain)
    return total


# ---- levels -------------------------------------------------------------------------------------------------------


def _grouped(x_NK: Tensor, groups: int) -> Tensor:
    return x_NK.unflatten(1, (groups, -1))


def _levels_of(weight: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, center: float) -> Tensor:
    w_NGg, s = _grouped(weight, scale.shape[1]), scale.unsqueeze(-1)
    if offset is not None:
        return ((w_NGg - offset.unsqueeze(-1)) / s).flatten(1)
    return (w_NGg / s + (center if zero is None else zero.unsqueeze(-1))).flatten(1)


def _levels_of_fake(weight: Tensor, scale: Tensor, *_: Any) -> Tensor:
    return weight.new_empty(weight.shape, dtype=torch.promote_types(weight.dtype, scale.dtype))


def _keep_weight(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weight, scale, _, offset, _ = inputs
    ctx.save_for_backward(weight, scale, offset)


def _levels_of_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale, offset = ctx.saved_tensors
    wants_weight, wants_scale, _, wants_offset, _ = ctx.needs_input_grad
    of_shifted = _grouped(grad, scale.shape[1]) / scale.unsqueeze(-1)
    of_scale = None
    if wants_scale:
        w_NGg = _grouped(weight, scale.shape[1])
        shifted = w_NGg if offset is None else w_NGg - offset.unsqueeze(-1)
        of_scale = -(of_shifted * shifted).sum(-1) / scale
    of_offset = -of_shifted.sum(-1) if wants_offset and offset is not None else None
    return of_shifted.flatten(1) if wants_weight else None, of_scale, None, of_offset, None


_levels_operator = operator(
    "levels_of(Tensor weight, Tensor scale, Tensor? zero, Tensor? offset, float center) -> Tensor",
    _levels_of,
    _levels_of_fake,
    (_keep_weight, _levels_of_backward),
)


def levels_of(
    weight_NK: Tensor, scale_NG: Tensor, zero_NG: Tensor | None, offset_NG: Tensor | None, center: float
) -> Tensor:
    """W / s + z (z = center where there are no zeros), or (W - o) / s; see `grid.to_levels`."""
    levels: Tensor = _levels_operator(weight_NK, scale_NG, zero_NG, offset_NG, center)
    return levels


# ---- zeros --------------------------------------------------------------------------------------------------------


def _moved_zeros(zero: Tensor, update: Tensor, scale: Tensor, top: int) -> Tensor:
    return (zero - update / scale).round_().clamp_(0, top)


def _keep_zeros(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.top = inputs[3]


def _moved_zeros_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    zero, update, scale = ctx.saved_tensors
    rounded = (zero - update / scale).round()
    inside = (rounded >= 0) & (rounded <= ctx.top)
    return None, torch.where(inside, -grad / scale, 0), None, None


_zeros_operator = operator(
    "moved_zeros(Tensor zero, Tensor update, Tensor scale, int top) -> Tensor",
    _moved_zeros,
    _like_first,
    (_keep_zeros, _moved_zeros_backward),
)


def moved_zeros(zero_NG: Tensor, update_NG: Tensor, scale_NG: Tensor, top: int) -> Tensor:
    """clamp(round(z - D / s), 0, top): whole numbers as floats, differentiable in D."""
    moved: Tensor = _zeros_operator(zero_NG, update_NG, scale_NG, top)
    return moved
