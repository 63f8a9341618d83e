"""LR-QAT (arXiv 2406.06385): a low-rank shift inside the rounding of a frozen, down-cast integer weight.

    Phi   = store( clamp(W / s0 + z, 0, 2^b - 1) )                       eq. 6, 7; once, then W is dropped
    W_hat = s * ( clamp( ste_round( Phi + (alpha / r) B A ), 0, 2^b - 1 ) - z )        eq. 8
    fold    q = clamp( round( Phi + (alpha / r) B A ), 0, 2^b - 1 );  s, z unchanged

A, B and the outer scale s are trained. With `k` > 1 the delta is Q-BaRA's: pooled, repeated, of inner rank k r for the
same parameters.

With `svd` A and B start at what whole codes lose: the leading singular values of clamp(W / s0 + z) - q, in steps of the
grid already, so nothing is divided by s. Only where Phi is `int`: a Phi that keeps fractions holds that residual itself.
The codes stay those of the base, so where the start would reach half a step and move one, all of it is shrunk.
"""

from dataclasses import dataclass

import torch

from trimtab.errors import UserError
from trimtab.layers.adapters import Adapter, DeltaLevels
from trimtab.layers.deltas import DeltaShape, PooledDelta
from trimtab.layers.weights import AffineWeight, Storage, Weight
from trimtab.methods.base import (
    Method,
    Source,
    as_affine,
    balance,
    base_weight,
    low_rank,
    new_delta,
    require_affine,
    scales,
)
from trimtab.quant.grid import AnyGrid, Grid, group_size

_HALF = 0.49
"""Steps that an SVD start may move a level by; below a half by more than bfloat16 factors round."""


@dataclass(frozen=True, kw_only=True)
class LrQat(Method):
    """Quantization-aware training at LoRA's memory: the shift acts before rounding and folds into plain integers."""

    name = "lr-qat"
    summary = "low-rank shift inside the rounding, folds into plain integers"
    grid = Grid(4, 64)
    adapter = DeltaLevels
    kind = "levels"
    lr = 1e-3

    rank: int = 32
    """Rank r of the update."""
    alpha: float = 1.0
    """Numerator of the scaling alpha / r, in steps of the grid."""
    storage: Storage = "fixed8"
    """Phi: fixed8 (8 bits with a fraction), int (b bits, fraction lost), bf16 or fp32 (ablations)."""
    k: int = 1
    """Above 1, a balanced delta: inputs pooled and outputs repeated by k, inner rank k r."""
    mean: bool = True
    """Whether the balanced delta's pool averages or sums."""
    svd: bool = False
    """Start A and B at the fractions that `storage: int` drops, instead of at zero."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """r (N + K) parameters for every k."""
        group_size(require_affine(self.name, grid), shape[1])
        k = balance(self.name, self.k, shape)
        if self.svd and (self.storage != "int" or self.alpha == 0):
            raise UserError(
                f"{self.name}: svd: makes up for the fractions that `storage: int` drops, with an alpha; here storage is "
                f"{self.storage}, alpha {self.alpha}: change them, or leave svd out"
            )
        return low_rank(self, shape, pool=k, repeat=k, mean=self.mean, widen=k)

    def trainable(self, grid: AnyGrid | None, shape: tuple[int, int]) -> int:
        """r (N + K), and the scales."""
        return self.delta(grid, shape).parameters + scales(self.name, grid, shape)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """Phi with a delta in the levels place. A source that is already codes on this grid has no fraction left."""
        affine = require_affine(self.name, grid)
        base = as_affine(base_weight(source, affine, self.storage))
        delta = new_delta(self.delta(grid, base.shape), base)
        if self.svd and not base.codes.is_meta:
            self._start_at(as_affine(base_weight(source, affine, "fp32")), base, delta)
        return base, DeltaLevels(delta, base)

    @torch.no_grad()
    def _start_at(self, fine: AffineWeight, base: AffineWeight, delta: PooledDelta) -> None:
        residual = fine.levels() - base.levels()
        if not residual.any():
            raise UserError(
                f"{self.name}: svd: starts from the fractions of levels, and this weight is codes already; start from the "
                "float model, or leave svd out"
            )
        delta.approach(residual)
        assert delta.B is not None
        delta.B.mul_((_HALF / delta.dense().abs().amax()).clamp(max=1.0))
