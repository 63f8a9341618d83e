"""Full quantization-aware training (LSQ, arXiv 1902.08153), with a float master weight.

W_hat = s * ( clamp( ste_round( W / s + z ), 0, 2^b - 1 ) - z )      W and s trained
ds    = sum over the group of G * (q - z - inside * W / s)           G = dL/dW_hat, inside = not clipped
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.layers.adapters import Adapter, MasterLevels
from trimtab.layers.weights import AffineWeight, Weight
from trimtab.methods.base import Method, Source, as_affine, base_weight, require_affine, scales
from trimtab.quant.grid import AnyGrid, Grid, from_codes, group_size


@dataclass(frozen=True, kw_only=True)
class Qat(Method):
    """Every weight trained through the rounding: the quality to reach, at the memory to avoid."""

    name = "qat"
    summary = "every weight trained through the rounding (LSQ)"
    grid = Grid(4, 64)
    adapter = MasterLevels
    kind = "master"
    lr = 5e-5

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> None:
        """No delta; checks the grid."""
        group_size(require_affine(self.name, grid), shape[1])

    def trainable(self, grid: AnyGrid | None, shape: tuple[int, int]) -> int:
        """N K, and the scales."""
        return shape[0] * shape[1] + scales(self.name, grid, shape)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The rounded weight with a trained float master."""
        affine = require_affine(self.name, grid)
        base = as_affine(base_weight(source, affine))
        return base, MasterLevels(_master(source), base)


def _master(source: Source) -> Tensor:
    """The float weight; where a start gave levels instead, the weight that has these levels."""
    if isinstance(source, Tensor):
        return source
    if isinstance(source, AffineWeight) and not source.packed:
        return from_codes(source.levels(), source.range(), source.grid)
    return source.dequantize(torch.float32)
