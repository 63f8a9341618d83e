"""PEQA (arXiv 2305.14152): codes frozen, scales (and real offsets) trained.

W_hat = s * (q - z)      ds = sum over the group of dL/dW_hat * (q - z)
"""

from dataclasses import dataclass

from trimtab.layers.adapters import Adapter, DeltaLevels
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, as_affine, base_weight, require_affine, scales
from trimtab.quant.grid import AnyGrid, Grid, group_size


@dataclass(frozen=True, kw_only=True)
class Peqa(Method):
    """Scales only: the codes stay, so nothing has to be folded but the scales."""

    name = "peqa"
    summary = "scales (and real offsets) only"
    grid = Grid(4, 64)
    adapter = DeltaLevels
    kind = "scales"
    lr_scale = 5e-5

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> None:
        """No delta; checks the grid."""
        group_size(require_affine(self.name, grid), shape[1])

    def trainable(self, grid: AnyGrid | None, shape: tuple[int, int]) -> int:
        """N G scales, twice that with real offsets."""
        return scales(self.name, grid, shape)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The rounded weight with trained scales."""
        base = as_affine(base_weight(source, require_affine(self.name, grid)))
        return base, DeltaLevels(None, base)
