"""QA-BLoRA (arXiv 2407.17029 v2): QA-LoRA with its output repeated too.

y = x W_hat^T + (alpha / r) Repeat_e( B A Pool_g(x) )      A: (r, K / g)   B: (N / e, r)      folds into the zeros
"""

from dataclasses import dataclass

from trimtab.layers.adapters import Adapter, DeltaOffset
from trimtab.layers.deltas import DeltaShape
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, base_weight, low_rank, new_delta, pool_size, require_offset
from trimtab.quant.grid import AnyGrid, Grid


@dataclass(frozen=True, kw_only=True)
class QaBlora(Method):
    """A low-rank update, pooled and repeated, that is constant on quantization blocks and folds into their zeros."""

    name = "qa-blora"
    summary = "low-rank update of pooled inputs and repeated outputs, folds into the zeros"
    grid = Grid(4, 32, "real")
    adapter = DeltaOffset
    kind = "offset"

    rank: int = 16
    """Rank r of the update."""
    alpha: float = 16.0
    """Numerator of the scaling alpha / r."""
    repeat: int = 2
    """e: adjacent outputs that share an update; divides N."""
    pool: int | None = None
    """p, a multiple of the group; null is the group."""
    mean: bool = False
    """Whether pooling averages instead of summing."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """r (N / e + K / p) parameters."""
        pool = pool_size(self.name, self.pool, require_offset(self.name, grid), shape)
        return low_rank(self, shape, pool=pool, repeat=self.repeat, mean=self.mean)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The stored weight with a delta in the offset place."""
        base = base_weight(source, grid)
        return base, DeltaOffset(new_delta(self.delta(grid, base.shape), base))
