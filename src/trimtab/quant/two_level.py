"""Scales and offsets on two levels, as GGUF's k-quants store them: a float16 number for 256 weights, integers for groups.

    s = d n        o = d' m        n and m of 4 to 8 bits, a group each; d and d' (there -dmin) of a super-block of 256

A product has 11 bits and at most 8, so float32 holds it as it is, and all arithmetic of `grid` takes such scales and
offsets like any others. This is only how they are *stored*: where another grid's scale passes through bfloat16, one of
these passes through d n, straight through, in training and folding alike (`stored`). There d follows the largest number
of its super-block, which keeps the integer that it has in the stored weight; so what lies on the grid stays as it is.

A division by the scale must be possible, so its integer is never zero; an offset's may be.

Legend: N out features, G groups in a row, S super-blocks in a row, j groups in a super-block.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.quant.opaque import operator

TwoLevelName = Literal["q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]

SUPER = 256
"""Weights in a super-block."""
_LEAST = 2.0**-24
_LARGEST = 65504.0
"""Of float16."""


@dataclass(frozen=True)
class TwoLevel:
    """A k-quant: the affine grid that it is, and the integers that it has for scales and offsets."""

    bits: int
    group: int
    zero: Literal["symmetric", "real"]
    scales: tuple[int, int]
    """The least and the largest integer of a scale; never 0."""
    offsets: tuple[int, int] = (0, 0)

    @property
    def largest(self) -> float:
        """The largest scale that it stores."""
        return _LARGEST * max(map(abs, self.scales))


TWO_LEVEL: dict[str, TwoLevel] = {
    "q2_k": TwoLevel(2, 16, "real", (1, 15), (0, 15)),
    "q3_k": TwoLevel(3, 16, "symmetric", (-32, 31)),
    "q4_k": TwoLevel(4, 32, "real", (1, 63), (0, 63)),
    "q5_k": TwoLevel(5, 32, "real", (1, 63), (0, 63)),
    "q6_k": TwoLevel(6, 16, "symmetric", (-128, 127)),
}
"""By `TwoLevelName`."""


class Split(NamedTuple):
    """Numbers (N, G) on two levels."""

    super_NS: Tensor
    """d: float16."""
    integer_NG: Tensor
    """n: int8."""

    def product(self) -> Tensor:
        """d n: float32 (N, G)."""
        j = self.integer_NG.shape[1] // self.super_NS.shape[1]
        return self.super_NS.float().repeat_interleave(j, 1) * self.integer_NG.float()


def _in_supers(x_NG: Tensor, j: int) -> Tensor:
    return x_NG.unflatten(1, (-1, j))


def _extreme(x_NSj: Tensor, of_NSj: Tensor) -> Tensor:
    """Of each super-block the entry of x where `of` is largest in magnitude: (N, S, 1)."""
    return x_NSj.gather(-1, of_NSj.abs().argmax(-1, keepdim=True))


# ---- rounding -----------------------------------------------------------------------------------------------------


def _round(x_NG: Tensor, top_NS1: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """d (N, S, 1) and n (N, S, j) as floats: d brings the largest number of a super-block to the integer `top`."""
    x = _in_supers(x_NG, x_NG.shape[1] // top_NS1.shape[1])
    d = (_extreme(x, x) / top_NS1).clamp(-_LARGEST, _LARGEST).to(torch.float16).to(x.dtype)
    if low != 0:
        d = torch.where(d == 0, torch.full_like(d, _LEAST).copysign(d), d)
        n = x / d
        return d, torch.where(n.round() == 0, torch.ones_like(n).copysign(n), n.round()).clamp(low, high)
    return d, torch.where(d == 0, 0, x / d).round().clamp(low, high)


def _stored(x_NG: Tensor, integer_NG: Tensor, low: int, high: int, j: int) -> Tensor:
    kept = _in_supers(integer_NG.to(torch.int16), j)  # whose magnitudes int8 does not hold
    top = _extreme(kept, kept)
    top = torch.where(top == 0, _full(low, high), top).to(x_NG.dtype)
    d, n = _round(x_NG, top, low, high)
    return (d * n).flatten(1)


def _full(low: int, high: int) -> int:
    """The integer of the largest magnitude."""
    return low if -low > high else high


def _like(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


_operator = operator(
    "stored_two_level(Tensor x, Tensor integer, int low, int high, int j) -> Tensor",
    _stored,
    _like,
    (lambda ctx, inputs, output: None, lambda ctx, grad: (grad, None, None, None, None)),
)


def stored(x_NG: Tensor, kept: Split, limits: tuple[int, int]) -> Tensor:
    """x as the file will hold it, straight through.

    Args:
        x_NG: float32 scales or offsets, trained from those of `kept`.
        kept: the stored ones; where x equals them, it is given back as it is.
        limits: of the integers.
    """
    rounded: Tensor = _operator(x_NG, kept.integer_NG, *limits, x_NG.shape[1] // kept.super_NS.shape[1])
    return rounded


def nearest(x_NG: Tensor, limits: tuple[int, int], j: int) -> Tensor:
    """Numbers on two levels near x, whose largest in each super-block of j groups has the largest integer."""
    top = torch.full((x_NG.shape[0], x_NG.shape[1] // j, 1), float(_full(*limits)), device=x_NG.device)
    d, n = _round(x_NG, top, *limits)
    return (d * n).flatten(1)


# ---- products to their factors --------------------------------------------------------------------------------------


def split(x_NG: Tensor, limits: tuple[int, int], j: int) -> Split:
    """Factors of numbers that lie on two levels; their products are x, bit for bit.

    Several factorizations may give the same products; the one with the largest integers is found. A super-block that holds
    something not finite has NaN for d.

    Args:
        x_NG: float32.
        limits: of the integers; 0 is allowed.
        j: groups in a super-block.

    Raises:
        ValueError: if x lies on no two levels.
    """
    rows, supers = x_NG.shape[0], x_NG.shape[1] // j
    if x_NG.is_meta:
        empty = torch.empty(rows, supers, dtype=torch.float16, device="meta")
        return Split(empty, torch.empty(x_NG.shape, dtype=torch.int8, device="meta"))
    low, high = limits
    x = x_NG.reshape(-1, j)
    d = torch.full((len(x), 1), torch.nan, device=x.device)
    n = torch.zeros_like(x)
    open_ = x.isfinite().all(1).nonzero().squeeze(1)
    full = _full(low, high)
    for top in range(full, 0, -1 if full > 0 else 1):
        if not len(open_):
            break
        here = x[open_]
        tried = (_extreme(here, here) / top).to(torch.float16).float()
        found = torch.where(tried == 0, 0, here / tried).round()
        exact = ((tried * found == here) & (found >= min(low, 0)) & (found <= high)).all(1)
        d[open_[exact]], n[open_[exact]] = tried[exact], found[exact]
        open_ = open_[~exact]
    if len(open_):
        raise ValueError(f"{x[open_[0]].tolist()} are no multiples of one float16 number, up to {full} times it")
    return Split(d.to(torch.float16).reshape(rows, supers), n.to(torch.int8).reshape(x_NG.shape))


def without_zeros(scale_NG: Tensor, limits: tuple[int, int], j: int) -> Tensor:
    """Scales with the least one of its super-block in place of each zero (1 where all are), still on two levels."""
    super_, integer = split(scale_NG, limits, j)
    flat = torch.where(super_ == 0, torch.ones_like(super_), super_)
    return Split(flat, torch.where(integer == 0, torch.ones_like(integer), integer)).product()
