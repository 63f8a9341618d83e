"""LR-QAT (arXiv 2406.06385): a low-rank shift inside the rounding of a frozen, down-cast integer weight.

    Phi   = store( clamp(W / s0 + z, 0, 2^b - 1) )                       eq. 6, 7; once, then W is dropped
    W_hat = s * ( clamp( ste_round( Phi + (alpha / r) B A ), 0, 2^b - 1 ) - z )        eq. 8
    fold    q = clamp( round( Phi + (alpha / r) B A ), 0, 2^b - 1 );  s, z unchanged

A, B and the outer scale s are trained. With `k` > 1 the delta is Q-BaRA's: pooled, repeated, of inner rank k r for the
same parameters.
"""

from dataclasses import dataclass

from trimtab.adapters import Adapter, DeltaLevels
from trimtab.deltas import DeltaShape
from trimtab.grid import AnyGrid, Grid, group_size
from trimtab.methods.base import Method, Source, as_affine, balance, low_rank, new_delta, require_affine, scales, start
from trimtab.weights import Storage, Weight


@dataclass(frozen=True, kw_only=True)
class LrQat(Method):
    """Quantization-aware training at LoRA's memory: the shift acts before rounding and folds into plain integers."""

    name = "lr-qat"
    summary = "low-rank shift inside the rounding, folds into plain integers"
    grid = Grid(4, 64)
    lr = 1e-3

    rank: int = 32
    """r."""
    alpha: float = 1.0
    """Numerator of the scaling alpha / r, in steps of the grid."""
    storage: Storage = "fixed8"
    """Phi: fixed8 (8 bits with a fraction), int (b bits, fraction lost), bf16 or fp32 (ablations)."""
    k: int = 1
    """Above 1, a balanced delta: inputs pooled and outputs repeated by k, inner rank k r."""
    mean: bool = True
    """Whether the balanced delta's pool averages or sums."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """r (N + K) numbers for every k."""
        group_size(require_affine(self.name, grid), shape[1])
        k = balance(self.name, self.k, shape)
        return low_rank(self, shape, pool=k, repeat=k, mean=self.mean, widen=k)

    def trainable(self, grid: AnyGrid | None, shape: tuple[int, int]) -> int:
        """r (N + K), and the scales."""
        return self.delta(grid, shape).numbers + scales(self.name, grid, shape)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """Phi with a delta in the levels place. A source that is already codes on this grid has no fraction left."""
        base = as_affine(start(source, require_affine(self.name, grid), self.storage))
        return base, DeltaLevels(new_delta(self.delta(grid, base.shape), base), base)
