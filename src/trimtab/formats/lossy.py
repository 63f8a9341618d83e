"""What `--allow-lossy` does to the layers that a format refuses: the nearest thing that it holds, and what that costs.

A layer's trained matrix (a kept adapter added) is rounded to the grid of the format that is nearest to its own: the bits
it has or the next more, its own group, an integer zero for a real one. Where no grid fits, it becomes a float matrix.
This is the one place where an export rounds, and it says how far it moved the weights.

Legend: N out features, K in features.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from trimtab.formats.declaration import Engine, Form, Format, Layer, Refusal
from trimtab.formats.dense.write import matrix
from trimtab.formats.refusals import not_run
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.weights import AffineWeight, DenseWeight, Weight
from trimtab.models.finite import require_held
from trimtab.models.transposed import replace_by
from trimtab.quant.grid import Grid, Zero


class Change(NamedTuple):
    """What was done to one layer."""

    layer: Layer
    """As it is now."""
    squared_error: float
    """Sum over the matrix of (new - old)^2."""
    squares: float
    """Sum of old^2."""


def nearest_grid(format_: Format, layer: Layer, dtype: torch.dtype, engine: Engine | None = None) -> Grid | None:
    """The grid of the format (that the engine runs) nearest to the layer's; None where none fits its shape or kind."""
    forms = [f for f in format_.forms if layer.kind in f.kinds and f.table is None]
    if not forms or layer.grid is None:
        return None
    old = layer.grid if isinstance(layer.grid, Grid) else Grid(layer.grid.bits, layer.grid.group, "integer")
    widths = sorted({b for f in forms for b in f.bits})
    zeros: tuple[Zero, ...] = (old.zero, "integer", "real", "symmetric")
    groups = (old.group, *(f.group_of for f in forms if f.group_of > 1), 32, None)
    for bits in (*(b for b in widths if b >= old.bits), *(b for b in reversed(widths) if b < old.bits)):
        for zero in zeros:
            for group in groups:
                if group is not None and layer.shape[1] % group:
                    continue
                made = Grid(bits, group, zero)
                if _runs(replace(layer, grid=made, adapter=None), format_, dtype, engine):
                    return made
    return None


def _runs(layer: Layer, format_: Format, dtype: torch.dtype, engine: Engine | None) -> bool:
    if not isinstance(format_.form(layer, dtype), Form):
        return False
    return engine is None or not not_run(engine, format_, [layer], dtype)


def make_room(
    model: Any,
    format_: Format,
    layers: Sequence[Layer],
    refused: Sequence[Refusal],
    dtype: torch.dtype,
    engine: Engine | None = None,
) -> list[Change]:
    """Change, in place, the refused layers of a model into what the format holds and the engine runs."""
    by_name = {layer.name: layer for layer in layers}
    changes: dict[str, Change] = {}
    for refusal in refused:
        layer = by_name[refusal.layer]
        if not _runs(layer, format_, dtype, engine):
            changes[layer.name] = _change(model, layer, nearest_grid(format_, layer, dtype, engine), dtype)
            continue
        together = _joined(layer, by_name)
        grids = [part.grid for part in together]
        widest = None if None in grids else max((g for g in grids if isinstance(g, Grid)), key=_capacity, default=None)
        for part in together:
            if part.grid != widest and part.name not in changes:
                changes[part.name] = _change(model, part, widest, dtype)
    return list(changes.values())


def _capacity(grid: Grid) -> tuple[int, bool]:
    return grid.bits, grid.zero != "symmetric"


def _joined(layer: Layer, by_name: dict[str, Layer]) -> list[Layer]:
    """The layers that engines join with this one, itself among them; those that are not ours are in float."""
    parent = layer.name.rpartition(".")[0]
    return [by_name.get(f"{parent}.{p}", replace(layer, name=f"{parent}.{p}", grid=None)) for p in layer.joined]


def _change(model: Any, layer: Layer, grid: Grid | None, dtype: torch.dtype) -> Change:
    old = model.get_submodule(layer.name)
    with torch.no_grad():
        whole = matrix(old, torch.float32)
        base: Weight = DenseWeight(whole.to(dtype)) if grid is None else AffineWeight.quantize(whole, grid)
        if isinstance(base, AffineWeight):
            require_held(layer.name, base.range().scale_NG, base.grid)
        error = (base.dequantize(torch.float32) - whole).square().sum().item()
    if isinstance(old, QuantEmbedding):
        new: Any = QuantEmbedding(base, old.dtype, old.padding_idx, old.scale)
    else:
        new = QuantLinear(base, None, old.bias)
    replace_by(model, layer.name, new)
    return Change(replace(layer, grid=grid, adapter=None), error, whole.square().sum().item())
