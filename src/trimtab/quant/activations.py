"""Activations on a grid: what a layer reads, and keys and values, rounded as an engine rounds them, kept as floats.

    asymmetric   s = (max - min) / (2^b - 1)      z = round(clamp(lo - min / s, lo, hi))      min <= 0 <= max
    symmetric    s = max|x| / hi                  z = 0
    q = clamp(round(x / s + z), lo, hi)           x_hat = s (q - z)           lo = -2^(b-1), hi = 2^(b-1) - 1

This is the arithmetic of compressed-tensors (W4A8 and W8A8 as `int-quantized`), to the bit, in float32 whatever is
computed in, but for the symmetric scale: that of vLLM's kernel and of LR-QAT's paper. compressed-tensors divides by
(2^b - 1) / 2, which puts the extreme of every token half way between two codes: the last bit of x would decide a whole
step, and a cached step of generation would not give what a full pass gives. The zero is a whole number: LR-QAT's public
code leaves a dynamic one unrounded, which no integer engine can hold.

`dynamic` takes min and max of every token by itself, so a token's values depend on no other token, on no padding and on
no batch; `static` has one range for the whole tensor, measured beforehand.

Gradients: straight through the rounding, 0 where q was clipped, none to s and z (a dynamic range is taken as it is found).
Dynamic ranges clip nothing, but for ties at the upper end of an asymmetric one; static ranges do.

What is rounded is never kept for backward: a layer keeps its x, which its neighbours share (q, k and v read one tensor),
and rounds it again (`kernels.recompute`); keys and values keep one bool an element.

Legend: ... leading dims, K features of a token (of one head, for keys and values).
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.quant.opaque import operator

Bits = Literal[4, 8]


def _check_bits(what: str, bits: int) -> None:
    if bits not in (4, 8):
        raise UserError(f"{what}.bits: {bits} is neither 4 nor 8")


@dataclass(frozen=True)
class Activations:
    """Round the inputs of every low-bit linear layer but the head.

    Examples:
        >>> tt.simulate(model, activations=tt.Activations(8, symmetric=True))
    """

    bits: Bits = 8
    """Width of a code: 8 or 4."""
    symmetric: bool = False
    """Whether the zero is in the middle of the codes (nothing stored) or moves with the range."""
    mode: Literal["dynamic", "static"] = "dynamic"
    """dynamic: a range for each token, computed when it is seen; static: one for a layer, from 8192 training tokens."""

    def __post_init__(self) -> None:
        _check_bits("activations", self.bits)
        if self.mode not in ("dynamic", "static"):
            raise UserError(f"activations.mode: {self.mode!r} is neither dynamic nor static")

    def describe(self) -> str:
        """For example `8-bit dynamic asymmetric`."""
        return f"{self.bits}-bit {self.mode} {'' if self.symmetric else 'a'}symmetric"


@dataclass(frozen=True)
class KvCache:
    """Round keys (after RoPE) and values: a simulation of a low-bit cache, which saves no memory here.

    Examples:
        >>> tt.simulate(model, kv=tt.KvCache(8))
    """

    bits: Bits = 8
    """Width of a code: 8 or 4. Each head of each token has a range of its own."""
    symmetric: bool = False
    """Whether the zero is in the middle of the codes or moves with the range."""

    def __post_init__(self) -> None:
        _check_bits("kv", self.bits)


class Range(NamedTuple):
    """Scale and zero, float32, broadcasting against what they round."""

    scale: Tensor
    zero: Tensor | None
    """A whole number in the code range; None for symmetric."""


def _ends(bits: int) -> tuple[int, int]:
    return -(1 << (bits - 1)), (1 << (bits - 1)) - 1


def range_of(low: Tensor, high: Tensor, bits: int, symmetric: bool) -> Range:
    """Scale and zero for values between `low` and `high`, and zero.

    Args:
        low: least values, float32 (or float64), any shape.
        high: largest values, same shape.
        bits: width of a code.
        symmetric: whether the zero is the middle of the codes.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    first, last = _ends(bits)
    span = torch.maximum(high, -low) / last if symmetric else (high - low) / (last - first)
    # A range of nothing has no scale: any will do, since its values are zero.
    scale = torch.where(span == 0, torch.finfo(span.dtype).eps, span)
    return Range(scale, None if symmetric else (first - low / scale).clamp(first, last).round())


def _token_range(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    low, high = (t.to(_work(x)) for t in torch.aminmax(x, dim=-1, keepdim=True))
    scale, zero = range_of(low, high, bits, symmetric)
    return scale, scale.new_empty(0) if zero is None else zero


def _token_range_fake(x: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor]:
    scale = x.new_empty((*x.shape[:-1], 1), dtype=_work(x))
    return scale, scale.new_empty(0) if symmetric else torch.empty_like(scale)


_token_range_operator = operator(
    "token_range(Tensor x, int bits, bool symmetric) -> (Tensor, Tensor)", _token_range, _token_range_fake
)


def token_range(x: Tensor, bits: int, symmetric: bool) -> Range:
    """The range of each token of x (..., K): scale and zero (..., 1)."""
    scale, zero = _token_range_operator(x.detach(), bits, symmetric)
    return Range(scale, None if symmetric else zero)


def _work(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unclamped(x: Tensor, range_: Range) -> Tensor:
    """round(x / s + z), not yet clamped."""
    u = x.detach().to(_work(x), copy=True).div_(range_.scale)
    return (u if range_.zero is None else u.add_(range_.zero)).round_()


def _values(codes: Tensor, range_: Range, bits: int, dtype: torch.dtype) -> Tensor:
    codes = codes.clamp_(*_ends(bits))
    return (codes if range_.zero is None else codes.sub_(range_.zero)).mul_(range_.scale).to(dtype)


def _outside(codes: Tensor, bits: int) -> Tensor:
    first, last = _ends(bits)
    return (codes < first).logical_or_(codes > last)


def _round(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, keep: bool) -> tuple[Tensor, Tensor]:
    range_ = Range(scale, zero)
    codes = _unclamped(x, range_)
    outside = _outside(codes, bits) if keep else x.new_empty(0, dtype=torch.bool)
    return _values(codes, range_, bits, x.dtype), outside


def _round_fake(x: Tensor, scale: Tensor, zero: Tensor | None, bits: int, keep: bool) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape if keep else 0, dtype=torch.bool)


def _keep_outside(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _round_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return grad.masked_fill(ctx.saved_tensors[0], 0), None, None, None, None


_round_operator = operator(
    "round_to_grid(Tensor x, Tensor scale, Tensor? zero, int bits, bool keep) -> (Tensor, Tensor)",
    _round,
    _round_fake,
    (_keep_outside, _round_backward),
)


def round_to_grid(x: Tensor, range_: Range, bits: int) -> Tensor:
    """x_hat, in x's shape and dtype; its gradient passes where x was not clipped."""
    rounded: Tensor = _round_operator(x, *range_, bits, torch.is_grad_enabled() and x.requires_grad)[0]
    return rounded


class ActivationQuantizer(nn.Module):
    """The plug of a layer that rounds what it reads.

    Args:
        kind: bits, zero, and where ranges come from.
        range_: of one number each, for `static`; frozen and saved with the layer.
    """

    def __init__(self, kind: Activations, range_: Range | None = None) -> None:
        super().__init__()
        assert (range_ is not None) == (kind.mode == "static"), kind
        self.kind = kind
        zero = None if range_ is None else range_.zero
        # Of shape (1,), not (): FSDP2 refuses parameters without a dimension to shard.
        self.scale = None if range_ is None else _frozen(range_.scale.float().view(1))
        self.zero = None if zero is None else _frozen(zero.to(torch.int8).view(1))

    def _range(self, x: Tensor) -> Range:
        if self.scale is None:
            return token_range(x, self.kind.bits, self.kind.symmetric)
        return Range(self.scale, None if self.zero is None else self.zero.float())

    def forward(self, x: Tensor) -> Tensor:
        """x_hat (..., K) in x's dtype, differentiable."""
        return round_to_grid(x, self._range(x), self.kind.bits)

    def passed(self, x: Tensor, grad: Tensor) -> Tensor:
        """dL/dx from dL/dx_hat, which is overwritten: 0 where x was clipped."""
        return grad.masked_fill_(_outside(_unclamped(x, self._range(x)), self.kind.bits), 0)

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to lay this plug out without data."""
        return asdict(self.kind)

    def extra_repr(self) -> str:
        """For example `8 bits, asymmetric, dynamic`."""
        return f"{self.kind.bits} bits, {'' if self.kind.symmetric else 'a'}symmetric, {self.kind.mode}"


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def from_spec(spec: dict[str, Any]) -> ActivationQuantizer:
    """A plug laid out by its spec, with no data yet."""
    kind = Activations(**spec)
    if kind.mode == "dynamic":
        return ActivationQuantizer(kind)
    return ActivationQuantizer(kind, Range(torch.empty(1), None if kind.symmetric else torch.empty(1)))
