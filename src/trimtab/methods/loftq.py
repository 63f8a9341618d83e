"""LoftQ (arXiv 2310.08659): a QLoRA whose codes and factors start together as close to the float weight as they get.

    least || W - Q - s B A ||  over Q on the grid and A, B of rank r        eq. 6, by turns:
    Q = quantize( W - s B A )         s B A = the r leading singular values of W - Q        s = alpha / r

The published code leaves s out of both lines, so that its start is off by s (peft issue 1982). Here the factors also pass
through their own dtype before the next turn: the error is that of the layer which is trained. It need not fall in every
turn, so the turns end with the first that does not lower it, and the best pair is kept.

After the start it is QLoRA: the factors stay beside the codes, or merge into a dense copy. They hold part of W, so they
belong to these codes and to no other base.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers import weights
from trimtab.layers.adapters import Adapter, DeltaOutput
from trimtab.layers.deltas import DeltaShape
from trimtab.layers.weights import Weight
from trimtab.methods.base import Method, Source, low_rank, new_delta
from trimtab.quant.grid import AnyGrid, CodebookGrid, group_size, same_form


@dataclass(frozen=True, kw_only=True)
class Loftq(Method):
    """QLoRA with codes and factors that start together near the float weight."""

    name = "loftq"
    adapter = DeltaOutput
    summary = "QLoRA that starts near the float weight: codes and factors fitted by turns"
    grid = CodebookGrid("nf4", 64, double_quant=True)
    rounds_itself = True

    rank: int = 16
    """Rank r of the update."""
    alpha: float = 16.0
    """Numerator of the scaling alpha / r."""
    turns: int = 5
    """Quantize and fit at most this often; fewer where the error stops falling."""

    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape:
        """r (N + K) parameters."""
        if grid is None:
            raise UserError(
                f"{self.name} makes up for a grid; this layer is in float: set a grid in `rules`, or use lora"
            )
        if self.alpha == 0 or self.turns < 1:
            raise UserError(f"{self.name}: alpha {self.alpha} and turns {self.turns} leave nothing to fit; raise them")
        group_size(grid, shape[1])
        return low_rank(self, shape)

    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """The codes and the delta of the best turn."""
        assert grid is not None, "delta() refused it"
        if isinstance(source, Weight) and same_form(source.grid, grid):
            raise UserError(
                f"{self.name} starts from a float weight, and this one is {grid.describe()} codes already, so nothing "
                "is left to fit; use qlora, or another grid"
            )
        weight = source.dequantize(torch.float32) if isinstance(source, Weight) else source
        base = weights.quantize(weight, grid)
        adapter = DeltaOutput(new_delta(self.delta(grid, base.shape), base))
        return (base if weight.is_meta else self._fit(weight.float(), base, grid, adapter)), adapter

    @torch.no_grad()
    def _fit(self, weight_NK: Tensor, base: Weight, grid: AnyGrid, adapter: DeltaOutput) -> Weight:
        delta = adapter.delta
        residual = weight_NK - base.dequantize(torch.float32)
        first = least = residual.norm().item()
        best, taken, ended = base, 0, "at the limit"
        for _ in range(self.turns):
            kept = {name: p.clone() for name, p in delta.named_parameters()}
            delta.approach(residual)
            error = (residual - delta.dense()).norm().item()
            if error >= least:
                delta.load_state_dict(kept)
                ended = "its error had stopped falling"
                break
            best, least, taken = base, error, taken + 1
            base = weights.quantize(weight_NK - delta.dense(), grid)
            residual = weight_NK - base.dequantize(torch.float32)
        adapter.fitted = f"loftq {taken} turns, {ended}", least / max(first, 1e-30)
        return best
