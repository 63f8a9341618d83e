"""LoRA (arXiv 2106.09685): y = x W^T + (alpha / r) B A x, W in float and frozen."""

from dataclasses import dataclass

from trimtab.layers.adapters import Adapter, DeltaOutput
from trimtab.layers.deltas import DeltaShape
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, base_weight, low_rank, new_delta
from trimtab.quant.grid import AnyGrid, group_size


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """A low-rank update beside a frozen weight: in float by default, or on any grid."""

    name = "lora"
    summary = "low-rank update beside a frozen float weight"
    grid = None
    adapter = DeltaOutput

    rank: int = 16
    """Rank r of the update."""
    alpha: float = 16.0
    """Numerator of the scaling alpha / r."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """r (N + K) parameters."""
        if grid is not None:
            group_size(grid, shape[1])
        return low_rank(self, shape)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The stored weight with a delta in the output place."""
        base = base_weight(source, grid)
        return base, DeltaOutput(new_delta(self.delta(grid, base.shape), base))
