"""Round to nearest: W_hat = s * (clamp(round(W / s) + z) - z). Nothing is trained."""

from dataclasses import dataclass

from trimtab.layers.adapters import Adapter
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, base_weight
from trimtab.quant.grid import AnyGrid, Grid, group_size


@dataclass(frozen=True, kw_only=True)
class Rtn(Method):
    """Round to nearest, no training: the baseline of every table."""

    name = "rtn"
    summary = "round to nearest, nothing trained"
    grid = Grid(4, 64)
    trains = False
    adapter = None

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> None:
        """Nothing; checks the group."""
        if grid is not None:
            group_size(grid, shape[1])

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The rounded weight, without an adapter."""
        return base_weight(source, grid), None
