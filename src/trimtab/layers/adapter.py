"""What an adapter is: the questions that a layer, a plan and a format ask it.

An adapter answers three questions about the stored weight it is attached to: which matrix multiplies x (`weight`, built
again whenever it is needed), what is added to the product (`output`), and which stored weight equals the two together
(`fold`).

What others need to know of a kind of adapter (does it move W? is it a LoRA? what is stored once it is folded?) its class
answers, so that a plan or a format can ask before a weight is there. Nobody compares the names of places.

Legend: B batch rows, N out features, K in features.
"""

import copy
from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
from torch import Tensor, nn

from trimtab.layers.deltas import PooledDelta
from trimtab.layers.weights import Spec, Weight
from trimtab.quant.grid import AnyGrid

FoldKind = Literal["bitwise", "algebraic", "lossy"]
Kind = Literal["output", "offset", "blocks", "levels", "scales", "master"]
"""What is trained: factors beside the weight or in its zeros, one number for a block, a shift of levels, scales alone, or
the weight itself."""


class Fold(NamedTuple):
    """A stored weight that stands for weight and adapter together."""

    weight: Weight
    kind: FoldKind
    """bitwise: the same bits in every dtype; algebraic: equal but for rounding; lossy: information is gone."""
    error: float
    """Relative Frobenius error of the folded weight; 0 for bitwise."""


class Adapter(nn.Module, ABC):
    """What is trained on one layer."""

    place: ClassVar[str]
    """Its word in specs and reports."""
    kind: Kind
    """What it trains, which decides its default rates (`rates`)."""
    moves_weight: ClassVar[bool] = True
    """Whether W is made with it, and folding puts it into what is stored; else it acts beside W."""
    acts_in_codes: ClassVar[bool] = False
    """Whether it trains levels or their scales: training then repairs small roundings, and no LoRA equals it."""
    reads_rounded_inputs: ClassVar[bool] = False
    """Whether `output` is given the inputs as W sees them, rounded."""
    delta: PooledDelta | None
    """Its update, if it has one."""
    fitted: tuple[str, float] | None = None
    """How a fitted start was found, and its share of the base's error; for reports, not saved."""

    def weight(self, base: Weight, dtype: torch.dtype, *, reuse: bool = False) -> Tensor:
        """The (N, K) matrix that multiplies x, differentiable in `weight_parameters`.

        With `reuse` it may lie in memory that the next such call overwrites.
        """
        return base.dequantize(dtype, reuse=reuse)

    def weight_parameters(self) -> tuple[nn.Parameter, ...]:
        """The parameters that `weight` depends on."""
        return ()

    def weight_gradients(
        self, base: Weight, grad_NK: Tensor, wanted: tuple[nn.Parameter, ...]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of the `wanted` among `weight_parameters` from dL/dW, which may be overwritten."""
        with torch.enable_grad():
            weight = self.weight(base, grad_NK.dtype)
        return torch.autograd.grad(weight, wanted, grad_NK)

    def uses_output(self, base: Weight, dtype: torch.dtype) -> bool:
        """Whether `gradients_from_output` may serve."""
        return False

    def gradients_from_output(
        self, base: Weight, grad_BN: Tensor, x_BK: Tensor, y_BN: Tensor, wanted: tuple[nn.Parameter, ...]
    ) -> tuple[Tensor, tuple[Tensor | None, ...] | None]:
        """`weight` with `reuse`, and the gradients of the `wanted` from dL/dy, x and y; None if dL/dW is cheaper."""
        return self.weight(base, grad_BN.dtype, reuse=True), None

    def output(self, base: Weight, x_BK: Tensor) -> Tensor | None:
        """What is added to the product (..., N), or None."""
        return None

    @classmethod
    def is_lora(cls, grid: AnyGrid | None) -> bool:
        """Whether it is an ordinary LoRA (`PooledDelta.as_plain`) beside a weight on this grid."""
        return not cls.acts_in_codes

    @classmethod
    def stays(cls, merge: bool) -> bool:
        """Whether it is still beside the weight after folding, which merges what does not move W or leaves it."""
        return not (cls.moves_weight or merge)

    def graph_bytes(self, base: Weight, dtype: torch.dtype) -> int:
        """Bytes, for each entry of W, that autograd has at once in backward of the graph that makes W; 0 without one."""
        return 0

    def merged(self, base: Weight, dtype: torch.dtype) -> Tensor:
        """The (N, K) matrix that base and adapter are, rounded to `dtype` once; differentiable in what is trained."""
        return self.weight(base, dtype)

    @abstractmethod
    def idle(self, base: Weight) -> bool:
        """Whether base and adapter are now, bit for bit, the base alone, as most are before training."""

    @torch.no_grad()
    def frozen(self, base: Weight) -> tuple[Weight, "Self | None"]:
        """What computes for good what base and adapter compute now: nothing trained is in it, and no copy of the codes."""
        if self.idle(base):
            return base, None
        copied = copy.deepcopy(self).requires_grad_(False)
        if copied.delta is not None:
            copied.delta.to(getattr(torch, copied.delta.shape.dtype))  # which its factors pass through anyway
        return base, copied

    @abstractmethod
    def fold(self, base: Weight) -> Fold:
        """The stored weight that equals base and adapter."""

    @classmethod
    @abstractmethod
    def folded(cls, weight: Spec) -> Spec:
        """The spec of the weight that `fold` gives, from that of the base."""

    def spec(self) -> dict[str, Any]:
        """What `from_spec` needs to lay this adapter out without data."""
        return {"place": self.place, "delta": None if self.delta is None else asdict(self.delta.shape)}
