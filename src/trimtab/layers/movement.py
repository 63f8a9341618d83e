"""What training moved of a stored weight: how many of its codes, and how many groups' scales, zeros or offsets.

A run reports it beside what folding changed, which is nothing: of the two, only this says whether training did anything.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from trimtab.layers.weights import AffineWeight, CodebookWeight, Weight


class Movement(NamedTuple):
    """Codes and groups that moved, and how many there are; all 0 for weights in float."""

    codes: int = 0
    of_codes: int = 0
    groups: int = 0
    """Groups whose scale, zero or offset is another one, as stored."""
    of_groups: int = 0


def total(movements: Iterable[Movement]) -> Movement:
    """Of several layers together."""
    return Movement(*map(sum, zip(*movements, strict=True)))


def movement(before: Weight, after: Weight) -> Movement:
    """From a weight to what folding made of it. A merged weight is in float: its codes are gone, none is said to move."""
    if not isinstance(before, AffineWeight | CodebookWeight):
        return Movement()
    codes, (rows, columns) = before.integer_codes(), before.shape
    ranges = _ranges(before)
    if not isinstance(after, AffineWeight | CodebookWeight):
        return Movement(0, rows * columns, 0, ranges.shape[1])
    moved = (codes != after.integer_codes()).sum()
    groups = (ranges != _ranges(after)).any(0).sum()
    return Movement(int(moved), rows * columns, int(groups), ranges.shape[1])


def _ranges(weight: AffineWeight | CodebookWeight) -> Tensor:
    """Scale, zero and offset of every group: float32 (parts, N G), zero where a weight has none."""
    parts: tuple[Tensor | None, ...]
    parts = (weight.read_absmax(), weight.offset) if isinstance(weight, CodebookWeight) else weight.range()
    first = parts[0]
    assert first is not None
    return torch.stack([torch.zeros_like(first) if t is None else t for t in parts]).flatten(1)
