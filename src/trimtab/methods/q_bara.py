"""Q-BaRA (arXiv 2407.17029; published as Q-BLoRA): balance the adapter's input, output and rank.

    y = x Q(W)^T + (alpha / r) Repeat_k( B A Pool_k(x) )      A: (k r, K / k)   B: (N / k, k r)

Pooling the input and repeating the output by k saves what rank k r costs: r (N + K) parameters and LoRA's FLOPs for every
k, and delta_W[i, j] = (alpha / r) / k * (B A)[i // k, j // k], of rank up to k r.
"""

from dataclasses import dataclass

from trimtab.layers.adapters import Adapter, DeltaOutput
from trimtab.layers.deltas import DeltaShape
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, balance, base_weight, low_rank, new_delta
from trimtab.quant.grid import AnyGrid, CodebookGrid, group_size


@dataclass(frozen=True, kw_only=True)
class QBara(Method):
    """LoRA's parameters and FLOPs spent on k times the rank, by pooling the input and repeating the output."""

    name = "q-bara"
    aliases = ("q-blora",)
    summary = "pooled input, repeated output, k times LoRA's rank for the same parameters"
    grid = CodebookGrid("nf4", 64, double_quant=True)
    adapter = DeltaOutput

    rank: int = 16
    """Nominal r; the inner rank is k r."""
    alpha: float = 16.0
    """Numerator of the scaling alpha / r (nominal r)."""
    k: int = 2
    """Factor that pools inputs, repeats outputs and multiplies the rank; divides N and K."""
    mean: bool = True
    """Whether pooling averages, as in the published code, or sums."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """r (N + K) parameters for every k."""
        if grid is not None:
            group_size(grid, shape[1])
        k = balance(self.name, self.k, shape)
        return low_rank(self, shape, pool=k, repeat=k, mean=self.mean, widen=k)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The stored weight with a balanced delta in the output place."""
        base = base_weight(source, grid)
        return base, DeltaOutput(new_delta(self.delta(grid, base.shape), base))
