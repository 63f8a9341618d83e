"""Grids: torch's own fake quantization as oracle, and the equations of docs/design.md, section 1, in float64."""

import math
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import reference
from trimtab.errors import UserError
from trimtab.kernels import cpu, encode
from trimtab.quant.grid import (
    CodebookGrid,
    Grid,
    Range,
    RangeRule,
    ScaleDtype,
    Zero,
    _errors,
    from_codes,
    group_size,
    round_clamp,
    same_form,
    set_range,
    ste_round,
    stored,
    to_levels,
)

N, K = 24, 96
BITS = (2, 3, 4, 8)
SCALE_DTYPES: tuple[ScaleDtype, ...] = ("portable", "bfloat16", "float16", "float32")
RULES: tuple[RangeRule, ...] = ("minmax", "paper")


def weight(seed: int = 0, rows: int = N, columns: int = K) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def grouped(w_NK: Tensor, grid: Grid) -> Tensor:
    return w_NK.reshape(w_NK.shape[0], -1, grid.group or w_NK.shape[1])


def tie_free(u: Tensor) -> Tensor:
    return ((u.double() - u.double().floor()) - 0.5).abs() > 1e-4


# ---- torch.fake_quantize ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
@pytest.mark.parametrize("group", [None, 32])
def test_values_and_gradient_are_those_of_fake_quantize(bits: int, zero: Zero, group: int | None) -> None:
    grid = Grid(bits, group, zero)
    w = weight()
    # Ranges of half the weight, so that levels are clipped on both sides.
    range_ = set_range(w / 2, grid)
    ours = w.clone().requires_grad_()
    levels = to_levels(ours, range_, grid)
    values = from_codes(round_clamp(levels, grid.top), range_, grid)
    upstream = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
    values.backward(upstream)

    g = group or K
    theirs = w.reshape(-1, g).clone().requires_grad_()
    zeros = torch.full((N, K // g), float(grid.center)) if range_.zero_NG is None else range_.zero_NG
    oracle = torch.fake_quantize_per_channel_affine(
        theirs, range_.scale_NG.flatten(), zeros.flatten().int(), 0, 0, grid.top
    )
    oracle.backward(upstream.reshape(-1, g))

    # torch rounds W * (1 / s) before it adds z: a tie may go the other way, and only a tie.
    certain = tie_free(levels.detach())
    assert certain.float().mean() > 0.99
    assert torch.equal(values.detach()[certain], oracle.detach().view(N, K)[certain])
    assert ours.grad is not None
    assert theirs.grad is not None
    torch.testing.assert_close(ours.grad[certain], theirs.grad.view(N, K)[certain], rtol=1e-6, atol=0)
    clipped = ours.grad == 0
    assert 0.01 < clipped.float().mean() < 0.9


@pytest.mark.parametrize("bits", BITS)
def test_a_level_on_a_tie_rounds_to_the_even_code(bits: int) -> None:
    grid = Grid(bits, None, "integer", "float32")
    for z in (0.0, 1.0, float(grid.top)):  # W / s + z is what is rounded, so z decides which neighbour is even
        range_ = Range(torch.tensor([[0.25]]), torch.tensor([[z]]), None)
        u = torch.arange(grid.top, dtype=torch.float64) + 0.5
        w = ((u - z) * 0.25).float().unsqueeze(0)
        codes = round_clamp(to_levels(w, range_, grid), grid.top)
        even = torch.where(u.floor() % 2 == 0, u.floor(), u.ceil())
        assert codes.double().flatten().tolist() == even.tolist()


# ---- ranges ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_symmetric_range_maps_the_signed_extreme_to_code_0(bits: int, group: int | None, dtype: ScaleDtype) -> None:
    grid, w = Grid(bits, group, "symmetric", dtype), weight()
    range_ = set_range(w, grid)
    assert range_.zero_NG is None
    assert range_.offset_NG is None
    w_NGg = grouped(w, grid)
    where = w_NGg.abs().argmax(-1, keepdim=True)
    extreme = w_NGg.gather(-1, where).squeeze(-1)
    assert torch.equal(range_.scale_NG, reference.stored(extreme / -(2 ** (bits - 1)), dtype))
    assert (range_.scale_NG < 0).any()
    assert (range_.scale_NG > 0).any()
    codes = grouped(round_clamp(to_levels(w, range_, grid), grid.top), grid)
    assert (codes.gather(-1, where) == 0).all()
    tie = set_range(torch.tensor([[1.0, -1.0, 0.5, 1.0]]), Grid(bits, None, "symmetric", dtype))
    assert tie.scale_NG > 0, "of two extremes the negative one is at code 0: all is in range but the other"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [None, 32])
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_asymmetric_ranges(bits: int, group: int | None, dtype: ScaleDtype) -> None:
    w = weight() + 0.03
    w[0] = w[0].abs() + 0.01  # all positive, all negative: the range still includes 0
    w[1] = -w[1].abs() - 0.01
    for zero in ("integer", "real"):
        grid = Grid(bits, group, zero, dtype)
        w_NGg = grouped(w, grid).double()
        low, high = w_NGg.amin(-1).clamp(max=0), w_NGg.amax(-1).clamp(min=0)
        range_ = set_range(w, grid)
        if zero == "integer":
            scale = (high - low) / grid.top
            assert range_.offset_NG is None
            assert range_.zero_NG is not None
            z = (-low / range_.scale_NG.double()).round().clamp(0, grid.top)
            assert torch.equal(range_.zero_NG.double(), z)
            assert (z[0] == 0).all()
        else:
            assert range_.zero_NG is None
            assert range_.offset_NG is not None
            offset = reference.stored(low.float(), dtype)
            assert torch.equal(range_.offset_NG, offset)
            assert (offset[0] == 0).all()
            scale = (high - offset.double()) / grid.top
        expected = reference.stored(scale.float(), dtype)
        torch.testing.assert_close(range_.scale_NG, expected, rtol=3e-7 if dtype == "float32" else 0, atol=0)
        # Nothing lies further than half a step, and a scale's own rounding, outside.
        u = to_levels(w, range_, grid)
        assert u.min() > -0.55 - grid.top / 100
        assert u.max() < grid.top * 1.01 + 0.55


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_paper_range(bits: int) -> None:
    """With one bit there is no largest positive code to divide by: the range is the absmax."""
    grid, w = Grid(bits, 32, "symmetric", "float32", "paper"), weight()
    absmax = grouped(w, grid).double().abs().amax(-1)
    assert torch.equal(set_range(w, grid).scale_NG, (absmax / max(2 ** (bits - 1) - 1, 1)).float())


@pytest.mark.parametrize("zero", get_args(Zero))
@pytest.mark.parametrize(("rule", "dtype"), [("lp2.4", "portable"), *((r, d) for r in RULES for d in SCALE_DTYPES)])
def test_an_all_zero_group_has_scale_1_and_stays_zero(rule: RangeRule, zero: Zero, dtype: ScaleDtype) -> None:
    grid, w = Grid(3, 32, zero, dtype, rule), weight()
    w[3] = 0
    w[5, 32:64] = 0
    range_ = set_range(w, grid)
    assert (range_.scale_NG[3] == 1).all()
    assert range_.scale_NG[5, 1] == 1
    assert range_.scale_NG[5, 0] != 1
    values = from_codes(round_clamp(to_levels(w, range_, grid), grid.top), range_, grid)
    assert torch.isfinite(values).all()
    assert (values[3] == 0).all()
    assert (values[5, 32:64] == 0).all()


@pytest.mark.parametrize("zero", get_args(Zero))
def test_a_group_of_tiny_weights_never_gets_scale_0(zero: Zero) -> None:
    for size in (1e-6, 1e-9, 1e-20, 1e-38):
        range_ = set_range(weight() * size, Grid(4, 32, zero))
        assert (range_.scale_NG != 0).all()
        assert torch.isfinite(to_levels(weight() * size, range_, Grid(4, 32, zero))).all()
    assert (range_.scale_NG.abs() == 2.0**-24).all()  # the least that float16 holds


def test_a_range_is_of_the_weight_and_not_trained_through() -> None:
    range_ = set_range(weight().requires_grad_(), Grid(4, 32, "real"))
    assert not any(t.requires_grad for t in range_ if t is not None)


def test_an_integer_zero_is_a_code_whatever_its_scale_was_rounded_to() -> None:
    """Scales near the least that float16 holds are rounded by up to a third: the zero would lie beyond the codes."""
    w_NK = torch.full((2, 32), -1.4 * 2.0**-24 * 255)
    assert (set_range(w_NK, Grid(8, None, "integer")).zero_NG == 255).all()
    assert (set_range(-w_NK, Grid(8, None, "integer")).zero_NG == 0).all()


@pytest.mark.parametrize("zero", get_args(Zero))
def test_a_search_reads_bfloat16_weights_as_what_they_are(zero: Zero) -> None:
    w_NK, grid = weight(4).bfloat16(), Grid(3, 32, zero, range="lp2.4")
    for found, exact in zip(set_range(w_NK, grid), set_range(w_NK.float(), grid), strict=True):
        assert found is exact is None or torch.equal(found, exact)


@pytest.mark.parametrize(("rule", "bits"), [("lp2", 2), ("lp2.4", 4), ("lp3", 2), ("lp3.5", 3), ("lp4", 2)])
@pytest.mark.parametrize("zero", get_args(Zero))
def test_a_search_is_never_worse_than_minmax_in_its_own_norm(rule: RangeRule, zero: Zero, bits: int) -> None:
    p, w = float(rule.removeprefix("lp")), weight(3)
    errors = []
    for chosen in ("minmax", rule):
        grid = Grid(bits, 32, zero, range=chosen)
        range_ = set_range(w, grid)
        values = from_codes(round_clamp(to_levels(w, range_, grid), grid.top), range_, grid)
        errors.append(grouped((values.double() - w.double()).abs() ** p, grid).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-6)).all()
    # ... and clearly better for many groups: the search does search.
    assert (errors[1] < errors[0] * 0.95).float().mean() > 0.1


@pytest.mark.parametrize(("rule", "bits"), [("lp2", 3), ("lp2.4", 2), ("lp3", 4), ("lp3.5", 2), ("lp4", 3)])
@pytest.mark.parametrize("zero", get_args(Zero))
def test_a_search_takes_the_best_of_100_shrunken_ranges(rule: RangeRule, zero: Zero, bits: int) -> None:
    """By brute force in float64, from the equations: groups shrunk to 1, 0.99 .. 0.01 of their extremes."""
    w, grid, top = weight(4), Grid(bits, 32, zero, range=rule), 2**bits - 1
    w_NGg = grouped(w.double(), grid)
    tried = []
    for i in range(100):
        low, high = ((1 - i / 100) * e.double() for e in (w_NGg.amin(-1), w_NGg.amax(-1)))
        middle, offset = torch.full_like(low, 2.0 ** (bits - 1)), torch.zeros_like(low)
        if zero == "symmetric":
            s = reference.stored(torch.where(high > -low, high, low) / -(2.0 ** (bits - 1)), "portable")
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            offset = reference.stored(low, "portable") if zero == "real" else offset
            s = reference.stored((high - (offset if zero == "real" else low)) / top, "portable")
            middle = torch.zeros_like(low) if zero == "real" else (-low / s).round().clamp(0, top)
        s, z, o = (t.unsqueeze(-1) for t in (s, middle, offset))
        codes = ((w_NGg - o) / s + z).round().clamp(0, top)
        error = ((s * (codes - z) + o - w_NGg).abs() ** float(rule.removeprefix("lp"))).sum(-1)
        tried.append((error, s.squeeze(-1)))
    errors = torch.stack([error for error, _ in tried])
    scales = torch.stack([s for _, s in tried]).gather(0, errors.argmin(0, keepdim=True)).squeeze(0)
    found = set_range(w, grid)
    two = errors.topk(2, 0, largest=False).values
    clear = two[1] > two[0] * (1 + 1e-4)  # neighbouring candidates may be stored alike
    assert clear.float().mean() > 0.3
    assert torch.equal(found.scale_NG[clear].double(), scales[clear])
    assert (errors.argmin(0) > 0).float().mean() > 0.3


@pytest.mark.skipif(cpu.library() is None, reason="no C kernels")
@pytest.mark.parametrize("rule", ["lp2", "lp2.4", "lp3", "lp3.5", "lp4"])
@pytest.mark.parametrize("zero", get_args(Zero))
def test_the_searching_kernel_finds_the_same_ranges(rule: RangeRule, zero: Zero) -> None:
    """Its sums are in float32 and another order; an all-zero group and whole rows are among the groups."""
    for group in (32, None):
        w, grid = weight(5), Grid(3, group, zero, range=rule)
        w[2, :32] = 0
        range_, p = set_range(w, Grid(3, group, zero)), float(rule.removeprefix("lp"))
        values = from_codes(round_clamp(to_levels(w, range_, grid), grid.top), range_, grid)
        exact = grouped((values.double() - w.double()).abs() ** p, grid).sum(-1)
        for found in (encode._errors(w, range_, grid, p), _errors(w, range_, grid, p)):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-30)
        ours, plain = encode.ranges(w, grid), set_range(w, grid)
        assert (ours.scale_NG == plain.scale_NG).float().mean() > 0.98
        for found, same in zip(
            encode.ranges(w.bfloat16(), grid), encode.ranges(w.bfloat16().float(), grid), strict=True
        ):
            assert found is same is None or torch.equal(found, same)


def test_relative_error_of_the_signed_extreme_and_of_paper() -> None:
    w, error = weight(0, 128, 512), {}
    for rule in ("minmax", "paper"):
        grid = Grid(2, 32, range=rule)
        range_ = set_range(w, grid)
        values = from_codes(round_clamp(to_levels(w, range_, grid), grid.top), range_, grid)
        error[rule] = ((values - w).norm() / w.norm()).item()
    assert error["minmax"] == pytest.approx(0.37, abs=0.03)
    assert error["paper"] == pytest.approx(0.66, abs=0.03)


# ---- storage -----------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(st.floats(-65280, 65280, width=32))
def test_portable_values_are_exact_in_both_formats(value: float) -> None:
    x = torch.tensor([value])
    kept = stored(x, "portable")
    assert torch.equal(kept.to(torch.bfloat16).float(), kept)
    assert torch.equal(kept.to(torch.float16).float(), kept)
    assert torch.equal(stored(kept, "portable"), kept)
    # Rounded once, to 8 bits of significand or float16's smallest step.
    assert abs(kept.item() - value) <= max(abs(value) * 2**-8, 2.0**-24)


def test_portable_values_end_where_float16_does() -> None:
    """Beyond 65280, the largest that both formats hold, a value is that; never infinite, which is all that float16 has."""
    x = torch.tensor([65281.0, 65504.0, 7e4, 3e38, -65281.0, -7e4, -3e38])
    assert torch.equal(stored(x, "portable"), 65280 * x.sign())
    weight_NK = torch.tensor([[-3e6, 1.0], [3e6, -3e6], [1e-3, -1e-3]])
    for zero in ("symmetric", "integer", "real"):
        assert all(t.isfinite().all() for t in set_range(weight_NK, Grid(3, None, zero)) if t is not None)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_storage_is_straight_through_and_exact_with_gradient(dtype: ScaleDtype) -> None:
    x = torch.cat([weight().flatten(), weight(1).flatten() * 1e4, torch.tensor([0.0, 2.0**-24, 3e-8, 1e-9, -65280.0])])
    leaf = x.clone().requires_grad_()
    kept = stored(leaf, dtype)
    assert torch.equal(kept.detach(), stored(x, dtype))
    assert torch.equal(kept.detach(), reference.stored(x, dtype))
    kept.sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 1).all()


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", get_args(Zero))
@pytest.mark.parametrize("dtype", SCALE_DTYPES)
def test_bfloat16_weights_are_the_float32_weights_rounded_once(bits: int, zero: Zero, dtype: ScaleDtype) -> None:
    grid = Grid(bits, 8, zero, dtype)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, grid.top + 1, (64, 40), generator=generator)
    scale = stored(torch.randn(64, 5, generator=generator), dtype)
    zeros = torch.randint(0, grid.top + 1, (64, 5), generator=generator).float()
    offset = stored(torch.randn(64, 5, generator=generator), dtype)
    range_ = Range(scale, zeros if zero == "integer" else None, offset if zero == "real" else None)
    values = from_codes(codes.to(torch.uint8), range_, grid)
    assert values.dtype == torch.float32
    q, s = codes.double().view(64, 5, 8), scale.double().unsqueeze(-1)
    z = zeros.double().unsqueeze(-1) if zero == "integer" else 2.0 ** (bits - 1)
    exact = (s * q + offset.double().unsqueeze(-1) if zero == "real" else s * (q - z)).view(64, 40)
    if zero == "real":  # a fused multiply-add, or one more rounding
        torch.testing.assert_close(values.double(), exact, rtol=2e-6, atol=1e-7)
    else:
        assert torch.equal(values, exact.float())
    for narrow in (torch.bfloat16, torch.float16):
        for given_codes in (codes.to(torch.uint8), codes.float()):
            got = from_codes(given_codes, range_, grid, narrow)
            assert got.dtype == narrow
            assert torch.equal(got, values.to(narrow))


def test_weights_are_computed_in_float32_from_scales_of_any_dtype() -> None:
    codes, scale = torch.arange(256).view(1, 256), torch.tensor([[1.0078125]])
    exact = (codes - 128) * 1.0078125
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(from_codes(codes, Range(scale.to(dtype), None, None), Grid(8, None)), exact)


def test_from_codes_is_differentiable_in_all_it_reads() -> None:
    upstream = torch.randn(4, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for zero in get_args(Zero):
        grid = Grid(4, 6, zero, "float32")
        codes = torch.randint(0, 16, (4, 12), generator=torch.Generator().manual_seed(1)).float().requires_grad_()
        scale, offset = (weight(i, 4, 2).requires_grad_() for i in (2, 3))
        z = torch.full((4, 2), 3.0)
        from_codes(
            codes, Range(scale, z if zero == "integer" else None, offset if zero == "real" else None), grid
        ).backward(upstream.float())
        g_NGg, q_NGg = upstream.view(4, 2, 6), codes.detach().double().view(4, 2, 6)
        center = {"symmetric": 8.0, "integer": 3.0, "real": 0.0}[zero]
        assert scale.grad is not None
        assert codes.grad is not None
        torch.testing.assert_close(scale.grad.double(), (g_NGg * (q_NGg - center)).sum(-1), rtol=1e-5, atol=1e-5)
        per_code = (g_NGg * scale.detach().double().unsqueeze(-1)).view(4, 12)
        torch.testing.assert_close(codes.grad.double(), per_code, rtol=1e-5, atol=1e-7)
        if zero == "real":
            assert offset.grad is not None
            torch.testing.assert_close(offset.grad.double(), g_NGg.sum(-1), rtol=1e-5, atol=1e-5)


# ---- straight-through rounding ------------------------------------------------------------------------------------


def test_ste_round_is_half_to_even_with_gradient_1() -> None:
    u = torch.tensor([-1.5, -0.5, 0.49999997, 0.5, 1.5, 2.5, 254.5, 7.3], requires_grad=True)
    rounded = ste_round(u)
    assert rounded.tolist() == [-2.0, 0.0, 0.0, 0.0, 2.0, 2.0, 254.0, 7.0]
    rounded.backward(torch.arange(8.0))
    assert u.grad is not None
    assert u.grad.tolist() == list(range(8))


def test_clamp_keeps_its_own_gradient() -> None:
    u = torch.tensor([-3.0, -0.6, -0.4, 0.0, 7.0, 15.0, 15.4, 15.6, 99.0], requires_grad=True)
    codes = round_clamp(u, 15)
    assert codes.tolist() == [0, 0, 0, 0, 7, 15, 15, 15, 15]
    codes.sum().backward()
    assert u.grad is not None
    assert u.grad.tolist() == [0, 0, 1, 1, 1, 1, 1, 0, 0]


@settings(max_examples=150, deadline=None)
@given(st.floats(-1e5, 1e5, width=32))
def test_rounding_straight_through_gives_the_very_value(value: float) -> None:
    x = torch.tensor([value], requires_grad=True)
    assert ste_round(x).item() == round(value)


# ---- grids as values ----------------------------------------------------------------------------------------------


def test_a_grid_is_checked_when_it_is_made() -> None:
    for wrong, said in (
        ({"bits": 0}, "bits"),
        ({"bits": 9}, "bits"),
        ({"group": 0}, "group"),
        ({"zero": "none"}, "zero"),
        ({"scale_dtype": "int8"}, "scale_dtype"),
        ({"range": "lp5"}, "range"),
    ):
        with pytest.raises(UserError, match=said):
            Grid(**wrong)  # type: ignore[arg-type]


def test_a_group_that_does_not_divide_says_which_would() -> None:
    assert group_size(Grid(4, None), 100) == 100
    assert group_size(Grid(4, 32), 96) == 32
    with pytest.raises(UserError, match=r"64.*96.*\[16, 32\]"):
        group_size(Grid(4, 64), 96)
    with pytest.raises(UserError, match=r"\[16, 32, 64, 128, 256\] or null"):
        group_size(Grid(4, 48), 512)
    with pytest.raises(UserError, match=r"features; use null"):
        group_size(Grid(4, 64), 40)


def test_same_form_ignores_only_how_ranges_are_chosen() -> None:
    assert same_form(Grid(4, 32, range="lp2"), Grid(4, 32))
    for other in (Grid(3, 32), Grid(4, 64), Grid(4, 32, "real"), Grid(4, 32, scale_dtype="float16"), None):
        assert not same_form(Grid(4, 32), other)
    assert math.isclose(Grid(3).center, 4)
    assert Grid(3).top == 7


def test_a_grid_by_default() -> None:
    """What a recipe that says nothing gets, and that no one changes it in place."""
    assert Grid() == Grid(bits=4, group=None, zero="symmetric", scale_dtype="portable", range="minmax")
    assert CodebookGrid() == CodebookGrid(codebook="nf4", group=64, double_quant=False)
    for grid in (Grid(), CodebookGrid()):
        with pytest.raises(FrozenInstanceError):
            grid.group = 32  # type: ignore[misc]
    assert Grid(1, 1).group == CodebookGrid("nf4", 1).group == 1
    said = [Grid(3, 32, "real"), Grid(8), CodebookGrid("nf3", None), CodebookGrid(double_quant=True)]
    assert [g.describe() for g in said] == ["int3 g32 real", "int8 channel symmetric", "nf3 channel", "nf4 g64 double"]
    stores = {
        "portable": torch.bfloat16,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "float32": torch.float32,
    }
    assert {d: Grid(scale_dtype=d).storage for d in SCALE_DTYPES} == stores


@pytest.mark.parametrize(
    ("rows", "columns", "taken"), [(300, 1024, [256, 44]), (2, 1 << 19, [1, 1]), (2, 1 << 17, [2])]
)
def test_a_search_looks_at_some_rows_at_a_time(rows: int, columns: int, taken: list[int]) -> None:
    """262144 weights together, or one row: what it needs beside the weight stays small."""
    seen: list[int] = []

    def errors(w_NK: Tensor, tried: Range, grid: Grid, p: float) -> Tensor:
        assert (w_NK.shape[0], p) == (tried.scale_NG.shape[0], 2.4)
        seen.append(w_NK.shape[0])
        return torch.zeros_like(tried.scale_NG)

    w, grid = torch.ones(1, 1).expand(rows, columns), Grid(3, None, range="lp2.4")
    found = set_range(w, grid, (torch.ones(rows, 1), torch.ones(rows, 1)), errors)
    assert seen == [n for n in taken for _ in range(100)]
    assert torch.equal(found.scale_NG, set_range(w[:, :1], Grid(3, None)).scale_NG)  # of equals the first
    seen.clear()
    lows = torch.ones(rows, 1, device="meta")
    set_range(torch.empty(rows, columns, device="meta"), grid, (lows, lows), errors)
    assert seen == [rows] * 100
