"""QA-HiRA (arXiv 2407.17029 v1): one matrix, constant on every quantization block.

    y = x W_hat^T + alpha Repeat_e( M Pool_g(x) )      M: (N / e, K / g)      folds into the zeros: o' = o + D

N K / (g e) parameters of rank up to min(N / e, K / g). M starts at zero, which is no saddle: its gradient is not zero.
(The public code starts M at random, so that its first step is not its base; and its pool of 4 does not fold.)
"""

from dataclasses import dataclass

from trimtab.layers.adapters import Adapter, DeltaOffset
from trimtab.layers.deltas import DeltaShape
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, base_weight, new_delta, pool_size, require_offset
from trimtab.quant.grid import AnyGrid, Grid


@dataclass(frozen=True, kw_only=True)
class QaHira(Method):
    """A full-rank update of one number a quantization block (or e of them), which folds into the zeros."""

    name = "qa-hira"
    summary = "one matrix, constant on quantization blocks, folds into the zeros"
    grid = Grid(4, 32, "real")
    adapter = DeltaOffset
    kind = "blocks"
    lr = 1e-4

    alpha: float = 1.0
    """Scaling of M."""
    repeat: int = 1
    """e: adjacent outputs that share an update; divides N."""
    pool: int | None = None
    """p, a multiple of the group; null is the group."""
    mean: bool = False
    """Whether pooling averages instead of summing (under Adam, only a factor p in the learning rate)."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """N K / (p e) parameters."""
        return DeltaShape(
            out_features=shape[0],
            in_features=shape[1],
            rank=None,
            scaling=self.alpha,
            pool=pool_size(self.name, self.pool, require_offset(self.name, grid), shape),
            repeat=self.repeat,
            mean=self.mean,
            dtype=self.adapter_dtype,
        )

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The stored weight with a single matrix in the offset place."""
        base = base_weight(source, grid)
        return base, DeltaOffset(new_delta(self.delta(grid, base.shape), base))
