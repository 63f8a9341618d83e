"""What a method is: a frozen dataclass that is also its block in a recipe, with one function, `build`.

`build` takes a weight (a float matrix, or one that is already quantized) and the grid that the rules chose for
it, and gives back the stored weight and the adapter that trains it. Everything else about a method follows from those.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers import weights
from trimtab.layers.adapter import Adapter, Kind
from trimtab.layers.deltas import AdapterDtype, DeltaShape, PooledDelta
from trimtab.layers.weights import AffineWeight, DenseWeight, Storage, Weight
from trimtab.quant.grid import AnyGrid, Grid, group_size, same_form

Source = Tensor | Weight
"""Where a layer starts: a float (N, K) matrix, or a weight that is already stored."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to fine-tune a quantized layer."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `trimtab methods`."""
    aliases: ClassVar[tuple[str, ...]] = ()
    grid: ClassVar[AnyGrid | None]
    """Grid of every linear layer but the head where a recipe has no rules; None keeps weights in float."""
    lr: ClassVar[float] = 2e-4
    """Adam's rate of deltas (of the master weight, for QAT) as its paper has it: for `parametrization: paper`."""
    lr_scale: ClassVar[float] = 1e-5
    """The same of scales and offsets."""
    kind: ClassVar[Kind] = "output"
    """What it trains, which decides the default rates (`layers.rates`)."""
    rounds_itself: ClassVar[bool] = False
    """Whether the method finds its own codes, so that it cannot start from another's."""
    trains: ClassVar[bool] = True
    """Whether it trains anything."""
    adapter: ClassVar[type[Adapter] | None]
    """The kind of adapter that `build` attaches; None where it attaches none."""

    adapter_dtype: AdapterDtype = "bfloat16"
    """Dtype that trained factors pass through wherever they act."""

    @abstractmethod
    def build(self, source: Source, grid: AnyGrid | None) -> tuple[Weight, Adapter | None]:
        """Quantize one layer and attach what trains it.

        Args:
            source: float (N, K), or a stored weight, taken code for code where its grid is of the same form.
            grid: from the rules; None for a float base.

        Raises:
            UserError: where the method cannot act on this grid or shape.
        """

    @abstractmethod
    def delta(self, grid: AnyGrid | None, shape: tuple[int, int]) -> DeltaShape | None:
        """The update of a layer (N, K) on this grid, or None: what counts and checks a layer without touching it.

        Raises:
            UserError: where the method cannot act on this grid or shape.
        """

    def trainable(self, grid: AnyGrid | None, shape: tuple[int, int]) -> int:
        """Trainable parameters of a layer (N, K)."""
        delta = self.delta(grid, shape)
        return 0 if delta is None else delta.parameters


def low_rank(
    method: "LowRank", shape: tuple[int, int], *, pool: int = 1, repeat: int = 1, mean: bool = False, widen: int = 1
) -> DeltaShape:
    """The shape of a delta with factors A and B, scaled by alpha / r with the nominal r; inner rank `widen` * r."""
    if method.rank < 1:
        raise UserError(f"{method.name}: rank {method.rank} is not a positive number")
    return DeltaShape(
        out_features=shape[0],
        in_features=shape[1],
        rank=widen * method.rank,
        scaling=method.alpha / method.rank,
        pool=pool,
        repeat=repeat,
        mean=mean,
        dtype=method.adapter_dtype,
    )


def balance(method: str, k: int, shape: tuple[int, int]) -> int:
    """k, if a balanced delta of a layer (N, K) can have it."""
    for features, side in ((shape[1], "input"), (shape[0], "output")):
        if k < 1 or features % k:
            fits = [d for d in (1, 2, 4, 8, 16) if shape[0] % d == 0 and shape[1] % d == 0]
            raise UserError(f"{method}: k {k} does not divide the {features} {side} features; use one of {fits}")
    return k


class LowRank(Protocol):
    """A method with a nominal rank and an alpha."""

    name: ClassVar[str]

    @property
    def rank(self) -> int: ...  # noqa: D102
    @property
    def alpha(self) -> float: ...  # noqa: D102
    @property
    def adapter_dtype(self) -> AdapterDtype: ...  # noqa: D102


def scales(method: str, grid: AnyGrid | None, shape: tuple[int, int]) -> int:
    """Parameters: scales, and offsets where they are real: what the levels and master places train."""
    affine = require_affine(method, grid)
    groups = shape[0] * (shape[1] // group_size(affine, shape[1]))
    return groups * (2 if affine.zero == "real" else 1)


def base_weight(source: Source, grid: AnyGrid | None, storage: Storage = "int") -> Weight:
    """The stored weight that a layer starts from.

    A stored source whose grid has the asked form is taken code for code (levels in float, as `gptq` gives them, are kept
    as `storage`); any other is dequantized and rounded again. `grid` None gives a dense weight.
    """
    if isinstance(source, Weight):
        if same_form(source.grid, grid) and grid is not None:
            return source.kept_as(storage) if isinstance(source, AffineWeight) else source
        source = source.dequantize(source.weight.dtype if isinstance(source, DenseWeight) else _float_dtype(grid))
    return DenseWeight(source) if grid is None else weights.quantize(source, grid, storage)


def _float_dtype(grid: AnyGrid | None) -> torch.dtype:
    return torch.bfloat16 if grid is None else torch.float32


def require_affine(method: str, grid: AnyGrid | None) -> Grid:
    """The grid, if it is affine."""
    if not isinstance(grid, Grid):
        found = "float" if grid is None else grid.describe()
        raise UserError(f"{method} needs an affine grid (bits, group, zero), not {found}; set one in `rules`")
    return grid


def require_offset(method: str, grid: AnyGrid | None) -> AnyGrid:
    """The grid, if its zeros can move."""
    if grid is None:
        raise UserError(f"{method} acts in the zeros of a grid; this layer is in float: set a grid in `rules`")
    if isinstance(grid, Grid) and grid.zero == "symmetric":
        raise UserError(
            f"{method} acts in the zeros of a grid; {grid.describe()} has none: use `zero: real` or `integer`"
        )
    return grid


def pool_size(method: str, pool: int | None, grid: AnyGrid, shape: tuple[int, int]) -> int:
    """The pool p of an update that is constant on quantization blocks: the group, or a multiple of it."""
    group = group_size(grid, shape[1])
    if pool is None:
        return group
    if pool % group:
        raise UserError(f"{method}: pool {pool} is not a multiple of the group {group}; use {group} or {2 * group}")
    return pool


def new_delta(shape: DeltaShape, base: Weight) -> PooledDelta:
    """A fresh delta on the device of the weight that it shifts."""
    return PooledDelta(shape, next(base.parameters()).device)


def as_affine(weight: Weight) -> AffineWeight:
    """The weight, known to be affine because its grid was checked."""
    assert isinstance(weight, AffineWeight)
    return weight
