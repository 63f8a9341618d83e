"""Scales and offsets on two levels: what lies there stays, what does not is rounded as the equation says."""

import pytest
import torch
from torch import Tensor

import cases
import reference
from trimtab.errors import UserError
from trimtab.layers.weights import AffineWeight
from trimtab.quant import two_level
from trimtab.quant.grid import Grid, k_quant, of_width, set_range
from trimtab.quant.two_level import TWO_LEVEL
from trimtab.recipe.rules import parse_grid

FORMS = [(name, which) for name in cases.INTEGERS for which in (0, 1) if cases.INTEGERS[name][which] != (0, 0)]


def groups(name: str) -> int:
    """In a super-block."""
    return 256 // (k_quant(name).group or 0)


def on_levels(name: str, which: int, seed: int, supers: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers (N, G) and their factors, of any size, the largest integer of a super-block not always the limit."""
    low, high = cases.INTEGERS[name][which]
    draw, j = torch.Generator().manual_seed(seed), groups(name)
    n = torch.randint(low, high + 1, (40, supers * j), generator=draw)
    n[:20] = (n[:20] // 3).clamp(min=max(low, -(10**9)))
    if low != 0:
        n[n == 0] = 1
    sizes = torch.rand(40, supers, generator=draw) * 8 - 7
    d = ((-1 if which else 1) * 10.0**sizes).to(torch.float16).float()
    return (d.repeat_interleave(j, 1) * n).float(), d, n


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_lies_there_stays(form: tuple[str, int], seed: int) -> None:
    (name, which), limits = form, cases.INTEGERS[form[0]][form[1]]
    x, _, n = on_levels(name, which, seed)
    found = two_level.split(x, limits, groups(name))
    assert torch.equal(found.product(), x)
    assert found.integer_NG.dtype == torch.int8
    assert found.integer_NG.min() >= min(limits[0], 0)
    assert found.integer_NG.max() <= limits[1]
    assert torch.equal(two_level.stored(x, found, limits), x)
    own = two_level.Split(found.super_NS, n.to(torch.int8))
    assert torch.equal(two_level.stored(x, own, limits), x), "by the file's own integers, too"


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_does_not_is_rounded_as_the_equation_says(form: tuple[str, int]) -> None:
    (name, which), limits = form, cases.INTEGERS[form[0]][form[1]]
    x, _, _ = on_levels(name, which, 7)
    kept = two_level.split(x, limits, groups(name))
    moved = (x * (1 + 0.3 * cases.random(*x.shape, seed=1))).requires_grad_()
    found = two_level.stored(moved, kept, limits)
    exact = reference.on_two_levels(moved.detach().double(), kept.integer_NG, *limits, groups(name))
    assert torch.equal(found.detach().double(), exact)
    assert torch.equal(two_level.split(found.detach(), limits, groups(name)).product(), found.detach())
    found.backward(g := cases.random(*x.shape, seed=2))
    assert moved.grad is not None
    assert torch.equal(moved.grad, g), "straight through"


@pytest.mark.parametrize("name", cases.INTEGERS)
@pytest.mark.parametrize("rule", ["minmax", "lp2"])
def test_a_range_from_float(name: str, rule: str) -> None:
    """Nearly as good as free scales, also beside a group of zeros, whose scale of 1 must not rule its super-block."""
    w, grid = cases.random(24, 768, seed=3, scale=0.02), k_quant(name, rule)  # type: ignore[arg-type]
    free = Grid(grid.bits, grid.group, grid.zero, "float32", grid.range)
    w[2, 64:96], w[3, :256] = 0, 0
    found = set_range(w, grid)
    assert (found.scale_NG != 0).all()
    assert torch.allclose(found.scale_NG[3, : groups(name)].abs(), torch.ones(()), atol=1e-3)
    made, best = (AffineWeight.quantize(w, g).dequantize(torch.float32) for g in (grid, free))
    assert (made[w == 0] == 0).all() or grid.zero == "real"
    error, least = ((x - w).norm(dim=1) / w.norm(dim=1) for x in (made, best))
    assert (error < (1.2 if grid.bits > 2 else 1.3) * least).all()


@pytest.mark.parametrize("name", cases.INTEGERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_a_weight(name: str, dtype: torch.dtype) -> None:
    """As an embedding reads them: those of the whole matrix."""
    weight, rows = AffineWeight.quantize(cases.random(24, 512, seed=5), k_quant(name)), torch.tensor([3, 0, 23, 3])  # type: ignore[arg-type]
    assert torch.equal(weight.dequantize(dtype, rows=rows), weight.dequantize(dtype)[rows])
    few, whole = weight.range(rows), weight.range()
    assert all(a is b or torch.equal(a, b[rows]) for a, b in zip(few, whole, strict=True))  # type: ignore[index,arg-type]


def test_zeros_and_what_is_not_finite() -> None:
    x = torch.tensor([[0.0] * 8 + [0.0, 3.0] + [1.0] * 6])
    made = two_level.without_zeros(x, (1, 63), 8)
    assert made.tolist() == [[1.0] * 8 + [made[0, 8].item(), 3.0] + [1.0] * 6]
    assert made[0, 8] > 0
    assert two_level.split(made, (1, 63), 8).product().equal(made)
    broken = two_level.split(torch.tensor([[torch.nan] * 8 + [torch.inf] * 8]), (1, 63), 8)
    assert broken.super_NS.isnan().all()


@pytest.mark.parametrize("tiny", [0.0, 1e-12])
@pytest.mark.parametrize("name", cases.INTEGERS)
def test_a_scale_that_float16_cannot_hold_is_the_least_one(name: str, tiny: float) -> None:
    """Never 0, by which no level could be divided; offsets may be 0."""
    kind, j = TWO_LEVEL[name], groups(name)
    x = torch.full((1, j), tiny)
    assert two_level.nearest(x, kind.scales, j).abs().tolist() == [[2.0**-24] * j]
    if kind.zero == "real":
        assert two_level.nearest(x, kind.offsets, j).tolist() == [[0.0] * j]


@pytest.mark.parametrize("name", cases.INTEGERS)
def test_a_group_of_one_value_keeps_it(name: str) -> None:
    """Among others in its super-block; and one whose scale happens to be 1 keeps its own."""
    grid = k_quant(name)
    assert grid.group is not None
    w = cases.random(2, 256, seed=3)
    w[0, : grid.group] = 0.75
    w[1] *= (2**grid.bits - 1) / (w[1].max() - w[1].min())
    found = AffineWeight.quantize(w, grid).dequantize(torch.float32)
    step = (w.amax(1) - w.amin(1)) / (2**grid.bits - 1)
    assert ((found - w).abs().amax(1) <= 1.5 * step).all()


def test_what_is_on_no_two_levels_is_refused() -> None:
    with pytest.raises(ValueError, match="no multiples of one float16 number"):
        two_level.split(torch.tensor([[1.0, 0.3] + [1.0] * 6]), (1, 15), 8)


def test_a_grid_of_its_own_bits_group_and_zero() -> None:
    assert parse_grid({"kquant": "q4_k"}, "rules[0].grid") == Grid(4, 32, "real", "q4_k")
    assert parse_grid({"kquant": "q2_k", "range": "lp2"}, "here") == Grid(2, 16, "real", "q2_k", "lp2")
    assert k_quant("q6_k").describe() == "q6_k"
    for wrong, words in {
        "q7_k": "grid kquant: 'q7_k' is none of q2_k, q3_k, q4_k, q5_k, q6_k",
        "bits": r"rules\[0\].grid.bits: a k-quant has its own; write {kquant: q4_k}",
    }.items():
        value = {"kquant": "q4_k", "bits": 3} if wrong == "bits" else {"kquant": wrong}
        with pytest.raises(UserError, match=words):
            parse_grid(value, "rules[0].grid")
    with pytest.raises(
        UserError, match=r"q4_k has 4 bits, groups of 32 and a zero that is real; write `{kquant: q4_k}`"
    ):
        Grid(4, 64, "real", "q4_k")
    with pytest.raises(UserError, match=r"blocks of 256, which do not divide the 576 input features"):
        AffineWeight.quantize(torch.zeros(2, 576), k_quant("q4_k"))


def test_widths() -> None:
    assert of_width(k_quant("q4_k", "lp2"), 3) == k_quant("q3_k", "lp2")
    with pytest.raises(UserError, match="no k-quant of 8 bits"):
        of_width(k_quant("q4_k"), 8)
