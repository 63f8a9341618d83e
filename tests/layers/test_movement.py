"""How much training moved, counted by hand on weights of a few numbers."""

import pytest
import torch

from trimtab.layers.movement import Movement, movement, total
from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight, Weight
from trimtab.quant.grid import CodebookGrid, Grid, Range
from trimtab.quant.packing import pack

CODES = torch.arange(24, dtype=torch.uint8).view(3, 8) % 8
SCALE = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def affine(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, offset: torch.Tensor | None) -> Weight:
    kind = "integer" if zero is not None else "real" if offset is not None else "symmetric"
    return AffineWeight(pack(codes, 3), Range(scale, zero, offset), Grid(3, 4, kind), 8)  # type: ignore[arg-type]


def changed(t: torch.Tensor, *at: tuple[int, int]) -> torch.Tensor:
    t = t.clone()
    for row, column in at:
        t[row, column] += 1
    return t


def test_codes_and_groups_are_counted_once_each() -> None:
    zero = torch.zeros(3, 2)
    before = affine(CODES, SCALE, zero, None)
    assert movement(before, before) == Movement(0, 24, 0, 6)
    after = affine(changed(CODES, (0, 0), (2, 5)), changed(SCALE, (0, 1)), zero, None)
    assert movement(before, after) == Movement(2, 24, 1, 6)
    both = affine(CODES, changed(SCALE, (1, 0)), changed(zero, (0, 1), (1, 0), (2, 1)), None)
    assert movement(before, both) == Movement(0, 24, 3, 6)
    real = affine(CODES, SCALE, None, zero)
    assert movement(real, affine(CODES, SCALE, None, changed(zero, (2, 0)))) == Movement(0, 24, 1, 6)
    symmetric = affine(CODES, SCALE, None, None)
    assert movement(symmetric, affine(CODES, changed(SCALE, (2, 1)), None, None)) == Movement(0, 24, 1, 6)


@pytest.mark.parametrize("double", [False, True])
def test_a_codebook_moves_by_its_offset(double: bool) -> None:
    w = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    before = CodebookWeight.quantize(w, CodebookGrid("nf4", 4, double))
    offset = torch.zeros(3, 2)
    offset[1, 1] = 0.5
    assert movement(before, before.with_offset(offset)) == Movement(0, 24, 1, 6)
    other = CodebookWeight(changed(before.codes, (0, 0)), before_absmax(before), before.grid, 8)
    assert movement(before, other) == Movement(1, 24, 0, 6)


def before_absmax(weight: CodebookWeight) -> tuple[torch.Tensor, ...]:
    kept = (weight.absmax, weight.absmax_scale, weight.absmax_mean)
    return tuple(t.detach() for t in kept if t is not None)


def test_a_float_weight_has_no_codes_and_a_merged_one_lost_them() -> None:
    dense, low = DenseWeight(torch.ones(3, 8)), affine(CODES, SCALE, None, None)
    assert movement(dense, dense) == Movement() == (0, 0, 0, 0)
    assert movement(low, dense) == Movement(0, 24, 0, 6)


def test_several_layers_are_added_up() -> None:
    assert total([Movement(1, 24, 2, 6), Movement(), Movement(3, 8, 0, 2)]) == Movement(4, 32, 2, 8)
