"""The fused kernels against the plain torch references, and how the C ones are built or done without."""

import itertools
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from trimtab.kernels import channel, cpu, dequantize, encode, shifted, workspace
from trimtab.layers.adapters import DeltaLevels
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.methods import LrQat
from trimtab.quant.codebook import from_codebook, table, to_codebook
from trimtab.quant.grid import CodebookGrid, Grid, from_codes, set_range, to_levels
from trimtab.quant.packing import pack

SHAPES = ((48, 96, 32), (7, 160, 32), (5, 160, 40), (33, 60, 20), (5, 72, 12), (16, 577, None), (3, 5, None))
DTYPES = (torch.bfloat16, torch.float32)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_c_kernels_run_here() -> None:
    assert cpu.library() is not None, "the tests below would compare the references with themselves"


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("storage", ["int", "fixed8"])
def test_affine_values_have_the_reference_bits(zero: str, storage: str) -> None:
    for bits, (n, k, group) in itertools.product(range(1, 9), SHAPES):
        grid = Grid(bits, group, zero)  # type: ignore[arg-type]
        weight = AffineWeight.quantize(random(n, k, seed=n), grid, storage)  # type: ignore[arg-type]
        rows = torch.tensor([2, 0, 2, 1])
        for dtype in DTYPES:
            expected = from_codes(weight.integer_codes(), weight.range(), grid, dtype)
            assert torch.equal(weight.dequantize(dtype), expected), (bits, n, k, group)
            assert torch.equal(weight.dequantize(dtype, rows=rows), expected[rows]), (bits, n, k, group)


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4"])
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_codebook_values_have_the_reference_bits(name: str, double: bool, moved: bool) -> None:
    for n, k, group in SHAPES:
        grid = CodebookGrid(name, group, double)  # type: ignore[arg-type]
        weight = CodebookWeight.quantize(random(n, k, seed=n), grid)
        offset = random(*weight.absmax.shape, seed=1) if moved else None
        rows = torch.tensor([2, 0, 2, 1])
        for dtype in DTYPES:
            expected = from_codebook(weight.integer_codes(), weight.read_absmax(), table(grid), offset).to(dtype)
            assert torch.equal(weight.dequantize(dtype, offset_NG=offset), expected)
            assert torch.equal(weight.dequantize(dtype, rows=rows, offset_NG=offset), expected[rows])


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("storage", ["int", "fixed8"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_encoding_is_that_of_the_torch_functions(bits: int, zero: str, storage: str, dtype: torch.dtype) -> None:
    for n, k, group in SHAPES:
        w = random(n, k, seed=n).to(dtype)
        w[0, : group or k] = 0
        grid = Grid(bits, group, zero)  # type: ignore[arg-type]
        range_ = set_range(w, grid)
        levels = to_levels(w.float(), range_, grid).clamp(0, grid.top)
        expected = AffineWeight.of_levels(levels, range_, grid, storage)  # type: ignore[arg-type]
        found = AffineWeight.quantize(w, grid, storage)  # type: ignore[arg-type]
        assert encode.fits(w)
        for name, tensor in expected.state_dict().items():
            assert torch.equal(found.state_dict()[name], tensor), (n, k, name)


@pytest.mark.parametrize("name", ["nf4", "nf3", "nf2", "fp4"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_table_encoding_is_that_of_the_torch_functions(name: str, dtype: torch.dtype) -> None:
    for n, k, group in SHAPES:
        w = random(n, k, seed=n).to(dtype)
        w[0, : group or k] = 0
        grid = CodebookGrid(name, group)  # type: ignore[arg-type]
        codes, absmax = to_codebook(w, grid)
        found = CodebookWeight.quantize(w, grid)
        assert torch.equal(found.codes, pack(codes, grid.bits))
        assert torch.equal(found.absmax, absmax)


def moved(bits: int, zero: str, storage: str) -> Iterator[tuple[AffineWeight, dequantize.Levels]]:
    for n, k, group in SHAPES:
        grid = Grid(bits, group, zero)  # type: ignore[arg-type]
        weight = AffineWeight.quantize(random(n, k, seed=n), grid, storage)  # type: ignore[arg-type]
        for rank in (1, 5, 32):
            factors = random(rank, k, seed=2).bfloat16().float(), random(n, rank, seed=3).bfloat16().float()
            yield weight, weight.described(weight.range(), factors, 0.3)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("storage", ["int", "fixed8"])
def test_shifted_levels_round_as_in_the_reference(bits: int, zero: str, storage: str) -> None:
    for weight, about in moved(bits, zero, storage):
        levels = dequantize.level_values(about, weight.shape[1])
        near_tie = ((levels % 1) - 0.5).abs() < 1e-5  # the order of the sum over the rank decides there
        codes, expected = (torch.empty(weight.shape, dtype=torch.uint8) for _ in range(2))
        dequantize.levels(codes, *about)
        dequantize._levels(expected, *about)
        assert torch.equal(codes[~near_tie], expected[~near_tie])
        assert near_tie.float().mean() < 0.01 or weight.shape[1] < 20
        for dtype in DTYPES:
            values = torch.empty(weight.shape, dtype=dtype)
            dequantize.levels(values, *about)
            range_ = weight.range()
            assert torch.equal(values, from_codes(codes, range_, weight.grid, dtype)), "codes and weights disagree"


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
def test_level_gradients_agree_with_float64(bits: int, zero: str) -> None:
    """From the equations: dU = s G inside, ds = sum G (q - z), do = sum G; G in bfloat16, dU rounded to it once."""
    for weight, about in moved(bits, zero, "fixed8" if bits < 8 else "int"):
        grad = random(*weight.shape, seed=4).bfloat16()
        scale = about.scale_NG
        levels = dequantize.level_values(about, weight.shape[1])
        codes = levels.round().clamp(0, 2**bits - 1).double()
        inside = (levels.round() >= 0) & (levels.round() <= 2**bits - 1)
        g, groups = grad.double().unflatten(1, (scale.shape[1], -1)), codes.unflatten(1, (scale.shape[1], -1))
        zeros = 0.0 if zero == "real" else about.center if about.zero_NG is None else about.zero_NG.unsqueeze(-1)
        of_scale = torch.empty_like(scale)
        of_offset = torch.empty_like(scale) if zero == "real" else None
        of_levels = grad.clone()
        dequantize.level_gradients(of_levels, of_scale, of_offset, *about)
        torch.testing.assert_close(of_scale.double(), (g * (groups - zeros)).sum(-1), rtol=1e-4, atol=1e-4 * 2**bits)
        if of_offset is not None:
            torch.testing.assert_close(of_offset.double(), g.sum(-1), rtol=1e-4, atol=1e-4)
        exact = ((g * scale.unsqueeze(-1).double()).flatten(1) * inside).to(torch.bfloat16)
        assert (of_levels != exact).float().mean() < 1e-3, "more than double rounding explains"


def per_channel(zero: str, shift: float) -> tuple[AffineWeight, dequantize.Levels, Tensor, Tensor]:
    grid = Grid(3, None, zero)  # type: ignore[arg-type]
    weight = AffineWeight.quantize(random(40, 65, seed=0), grid, "fixed8")
    factors = random(4, 65, seed=1).bfloat16().float(), random(40, 4, seed=2).bfloat16().float()
    about = weight.described(weight.range(), factors, shift)
    return weight, about, random(24, 40, seed=3).bfloat16(), random(24, 65, seed=4).bfloat16()


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("shift", [0.01, 0.5])
def test_gradients_per_channel_are_those_of_autograd_in_float64(zero: str, shift: float) -> None:
    """The equations of `kernels.channel`, clipped levels and all, against autograd over the forward equation."""
    weight, about, g, x = per_channel(zero, shift)
    leaves = [t.double().requires_grad_() for t in (about.a_RK, about.b_NR, about.scale_NG) if t is not None]
    offset = None if about.offset_NG is None else about.offset_NG.double().requires_grad_()
    a, b, s = leaves
    levels = weight.levels().double() + shift * b @ a
    rounded = levels + (levels.round() - levels).detach()
    codes = rounded.clamp(0, 7)
    z = about.center if about.zero_NG is None else about.zero_NG.double()
    w = s * codes + offset if offset is not None else s * (codes - z)
    wanted = [*leaves, offset] if offset is not None else leaves
    y = x.double() @ w.t()
    expected = torch.autograd.grad(y, wanted, g.double())

    factors_and_range = [name for name in about._fields if name.endswith(("_RK", "_NR", "_NG"))]
    given = {name: getattr(about, name) for name in factors_and_range}
    doubles = about._replace(**{name: None if t is None else t.double() for name, t in given.items()})
    clipped = channel.clipped_levels(about, 65)
    assert (len(clipped[0]) > 50) == (shift > 0.1)
    found = channel.gradients(doubles, g.double(), x.double(), y.detach(), clipped)
    for ours, exact in zip([t for t in found if t is not None], expected, strict=True):
        torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("shift", [0.01, 0.5])
def test_gradients_per_channel_in_bfloat16(zero: str, shift: float) -> None:
    """The C kernels: the clipped levels are the reference's, and both ways agree as far as bfloat16 goes."""
    weight, about, g, x = per_channel(zero, shift)
    made = torch.empty(weight.shape, dtype=torch.bfloat16)
    clipped = channel.weight_and_clipped(about, made)
    expected = torch.empty_like(made)
    dequantize.levels(expected, *about)
    assert torch.equal(made, expected)
    assert all(torch.equal(a, b) for a, b in zip(clipped, channel.clipped_levels(about, 65), strict=True))
    ours = channel.gradients(about, g, x, x @ made.t(), clipped)
    dense = shifted.gradients(about, (g.float().t() @ x.float()))
    for mine, other in zip(ours, dense, strict=True):
        if mine is not None and other is not None:
            assert (mine - other).norm() <= 0.02 * other.norm()


def test_what_is_clipped_lies_in_the_row() -> None:
    """Also where a factor is no longer finite: beyond the row's end 0 times infinity is not a number."""
    weight, about, _, _ = per_channel("symmetric", 0.5)
    assert about.b_NR is not None
    lost = about._replace(b_NR=torch.full_like(about.b_NR, torch.inf))
    rows, columns = channel.weight_and_clipped(lost, torch.empty(weight.shape, dtype=torch.bfloat16))
    assert rows.tolist() == [row for row in range(40) for _ in range(65)]
    assert columns.tolist() == [*range(65)] * 40


def test_sums_over_tokens_are_taken_in_float32() -> None:
    """Of 3000 products in bfloat16; in bfloat16 itself such a sum is off by a percent."""
    g, x = random(3000, 5, seed=1).abs().bfloat16(), random(3000, 7, seed=2).abs().bfloat16()
    n, k = torch.tensor([0, 4, 2]), torch.tensor([6, 0, 3])
    exact = (g.double().t() @ x.double())[n, k]
    torch.testing.assert_close(channel._entries(g, x, n, k).double(), exact, rtol=1e-5, atol=0)
    exact = (g.double() * x[:, :5].double()).sum(0)
    torch.testing.assert_close(channel._columns(g, x[:, :5].contiguous()).double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(24, 40), (2, 12, 40)])
def test_gradients_that_are_one_number_everywhere(shape: tuple[int, ...]) -> None:
    """A sum's gradient is spread over its rows by strides of 0; kernels read rows."""
    weight, _, _, x = per_channel("symmetric", 0.5)
    layer = QuantLinear(*LrQat(rank=4).build(weight, weight.grid))
    x, found = x.unflatten(0, shape[:-1]), []
    assert layer.uses_output(torch.bfloat16)
    for spread in (torch.ones(1, dtype=torch.bfloat16).expand(shape), torch.ones(shape, dtype=torch.bfloat16)):
        layer.zero_grad()
        layer(x).backward(spread)
        found.append([p.grad for p in layer.weight_parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("compiled", [True, False])
def test_ties_at_both_ends_of_the_range(bits: int, compiled: bool) -> None:
    """Half to even: -0.5 is code 0 and moves on; top + 0.5, top being odd, is clipped, and top + 0.25 is not."""
    top = 2**bits - 1
    shifts = torch.tensor([-1.0, -0.75, -0.5, -0.25, 0.0, 0.25, 0.5, 0.75, 1.0]).unsqueeze(1)
    phi = pack(torch.arange(top + 1, dtype=torch.uint8).repeat(9, 1), bits)
    one = torch.ones(9, 1)
    about = dequantize.Levels(phi, bits, False, torch.ones(1, top + 1), shifts, 1.0, one, torch.zeros(9, 1), None, 0.0)
    wanted = [[round(q + float(s)) for q in range(top + 1)] for s in shifts]  # Python rounds half to even, too
    codes = torch.tensor([[min(max(q, 0), top) for q in row] for row in wanted])
    inside = torch.tensor([[0 <= q <= top for q in row] for row in wanted])
    assert inside[2, 0]
    assert not inside[1, 0]
    assert inside[5, top]
    assert not inside[6, top]
    levels, gradients = (
        (dequantize.levels, dequantize.level_gradients)
        if compiled
        else (dequantize._levels, dequantize._level_gradients)
    )
    for dtype in (torch.uint8, torch.float32, torch.bfloat16):
        out = torch.empty(9, top + 1, dtype=dtype)
        levels(out, *about)
        assert torch.equal(out.long(), codes)
    grad, of_scale = torch.ones(9, top + 1, dtype=torch.bfloat16), torch.empty(9, 1)
    gradients(grad, of_scale, None, *about)
    assert torch.equal(grad == 1, inside)
    assert torch.equal(grad == 0, ~inside)
    assert torch.equal(of_scale[:, 0], codes.sum(1).float())
    made = torch.empty(9, top + 1, dtype=torch.bfloat16)
    for clipped in (channel.weight_and_clipped(about, made), channel.clipped_levels(about, top + 1)):
        assert torch.equal(torch.stack(clipped, 1), (~inside).nonzero())


@pytest.mark.parametrize("count", [0, 1, 511, 512, 513, 1024, 1500])
def test_entries_of_a_product_to_the_last_chunk(count: int) -> None:
    """They are summed 512 at a time: the last, shorter chunk, too (NaN gradients once more than 512 levels clip)."""
    g, x = random(7, 40, seed=1).bfloat16(), random(7, 70, seed=2).bfloat16()
    n, k = (torch.arange(count) * step % size for step, size in ((7, 40), (11, 70)))
    exact = (g.double().t() @ x.double())[n, k]
    torch.testing.assert_close(cpu.entries_of_product(g, x, n, k).double(), exact, rtol=1e-5, atol=1e-5)
    assert (cpu.entries_of_product(g * 0, x, n, k) == 0).all()
    columns = max(count // 8, 1)
    a, b = random(7, columns, seed=3).bfloat16(), random(7, columns, seed=4).bfloat16()
    found = cpu.column_products(a, b).double()
    torch.testing.assert_close(found, (a.double() * b.double()).sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power", [2, 2.4, 3, 3.5, 4])
def test_distances_are_raised_to_a_few_units_in_the_last_place(power: float) -> None:
    """Groups of one weight that lies beyond the largest code, by 1e-4 to 1000 steps."""
    w = 7 + torch.logspace(-4, 3, 300).unsqueeze(1)
    out = torch.empty(300, 1)
    cpu.range_errors(out, w, torch.ones(300, 1), torch.zeros(300, 1), None, 0.0, 3, power)
    torch.testing.assert_close(out.double(), (w.double() - 7) ** power, rtol=6e-7, atol=0)


@pytest.mark.parametrize(("clipped", "by_output"), [(0, True), (256, True), (257, False)])
def test_the_output_serves_while_one_level_in_128_is_clipped(clipped: int, by_output: bool) -> None:
    """Beyond that the sums over single levels cost more than dL/dW."""
    levels = torch.full((128, 256), 3.0)
    levels.view(-1)[:clipped] = 7.0  # moved by a step it lies beyond the codes
    range_ = set_range(random(128, 256, seed=0), Grid(3))
    base, adapter = LrQat(rank=1, storage="int").build(AffineWeight.of_levels(levels, range_, Grid(3)), Grid(3))
    assert isinstance(adapter, DeltaLevels)
    assert adapter.delta is not None
    with torch.no_grad():
        for p in adapter.delta.parameters():
            p.fill_(1)
    assert adapter.uses_output(base, torch.bfloat16)
    x, g = random(4, 256, seed=1).bfloat16(), random(4, 128, seed=2).bfloat16()
    wanted = adapter.weight_parameters()
    weight, found = adapter.gradients_from_output(base, g, x, x @ adapter.weight(base, torch.bfloat16).t(), wanted)
    assert torch.equal(weight, adapter.weight(base, torch.bfloat16))
    assert (found is not None) == by_output


def test_gradients_where_more_levels_clip_than_one_chunk_holds() -> None:
    """As above, through the gradients of a layer."""
    grid = Grid(3, None, "integer")
    weight = AffineWeight.quantize(random(40, 70, seed=0), grid, "fixed8")
    about = weight.described(weight.range(), (random(4, 70, seed=1), random(40, 4, seed=2)), 3.0)
    clipped = channel.clipped_levels(about, 70)
    assert len(clipped[0]) > 512
    assert len(clipped[0]) % 512
    made, g, x = (
        torch.empty(40, 70, dtype=torch.bfloat16),
        random(24, 40, seed=3).bfloat16(),
        random(24, 70, seed=4).bfloat16(),
    )
    dequantize.levels(made, *about)
    found = channel.gradients(about, g, x, x @ made.t(), clipped)
    dense = shifted.gradients(about, g.float().t() @ x.float())
    for ours, other in zip(found[:2], dense[:2], strict=True):
        assert ours is not None
        assert other is not None
        assert (ours - other).norm() <= 0.02 * other.norm()


FEW = [
    *(Grid(b, g, zero) for b in (2, 3, 4, 8) for g in (32, 64, None) for zero in ("symmetric", "integer", "real")),
    Grid(4, 32, "integer", scale_dtype="float16"),
    *(CodebookGrid(name, 32, double) for name in ("nf4", "nf3") for double in (False, True)),
]


@pytest.mark.parametrize("grid", FEW, ids=lambda g: g.describe())
@pytest.mark.parametrize(
    "shape", [(50, 192), (7, 320), (3, 1088)], ids=str
)  # 320 / 2 and 1088 / 2 are no multiple of 64
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_few_rows(grid: Grid | CodebookGrid, shape: tuple[int, int], rows: int) -> None:
    """In float32 to rounding; for a bfloat16 x the weights may be float32, or bfloat16 as `dequantize` makes them."""
    if grid.group and shape[1] % grid.group:
        grid = replace(grid, group=32)
    kind = AffineWeight if isinstance(grid, Grid) else CodebookWeight
    weight, x = kind.quantize(random(*shape, seed=0), grid), random(rows, shape[1], seed=1)  # type: ignore[arg-type]
    y = weight.product_of_few(x)
    assert y is not None
    exact = x.double() @ weight.dequantize(torch.float32).double().t()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)

    narrow = torch.empty(rows, shape[0])
    assert weight._multiply(narrow, x.bfloat16())
    ways = [x.bfloat16().double() @ weight.dequantize(d).double().t() for d in (torch.float32, torch.bfloat16)]
    assert min((narrow.double() - way).abs().max() for way in ways) < 1e-4
    assert weight.product_of_few(x.bfloat16()).dtype == torch.bfloat16  # type: ignore[union-attr]


def test_every_dtype_gets_the_codes_that_folding_gets() -> None:
    """A level beside a tie must not round one way while training in float16 and the other way when it is folded."""
    weight = AffineWeight.quantize(random(2048, 512, seed=0), Grid(4, None), "int")
    about = weight.described(weight.range(), (random(32, 512, seed=1), random(2048, 32, seed=2)), 0.3)
    codes, other = (torch.empty(weight.shape, dtype=torch.uint8) for _ in range(2))
    dequantize.levels(codes, *about)
    dequantize._levels(other, *about)
    assert not torch.equal(codes, other), "no level is near enough to a tie to tell the two orders of adding apart"
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        values = torch.empty(weight.shape, dtype=dtype)
        dequantize.levels(values, *about)
        assert torch.equal(values, from_codes(codes, weight.range(), weight.grid, dtype)), dtype


@pytest.mark.parametrize("grid", [Grid(8, 32), CodebookGrid("nf4", 32)])
@pytest.mark.parametrize("row", [-1, 8, 1 << 40])
def test_a_row_that_is_not_there(grid: Grid | CodebookGrid, row: int) -> None:
    """A token id beyond the vocabulary must not read whatever memory lies there."""
    kind = AffineWeight if isinstance(grid, Grid) else CodebookWeight
    weight = kind.quantize(random(8, 64, seed=0), grid)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=f"row {row} of a weight that has 8"):
        weight.dequantize(torch.bfloat16, rows=torch.tensor([0, row]))
    narrow = weight.dequantize(torch.bfloat16, rows=torch.tensor([7, 0], dtype=torch.int32))
    assert torch.equal(narrow, weight.dequantize(torch.bfloat16)[[7, 0]])
    assert weight.dequantize(torch.bfloat16, rows=torch.tensor([], dtype=torch.int64)).shape == (0, 64)


def test_a_large_bias_does_not_drown_the_gradient_of_the_scales() -> None:
    """As beside Qwen2's keys: the scales' gradient must not be read off an output that is mostly bias."""
    base, adapter = LrQat(rank=2).build(random(40, 64, seed=0), Grid(4, None))
    x, g = random(32, 64, seed=1).bfloat16(), random(32, 40, seed=2).bfloat16()
    found = {}
    for size in (0.0, 300.0):
        layer = QuantLinear(base, adapter, torch.full((40,), size))
        layer(x).backward(g)
        found[size] = layer.adapter.scale.grad  # type: ignore[union-attr]
        layer.adapter.scale.grad = None  # type: ignore[union-attr]
    assert (found[300.0] - found[0.0]).norm() <= 0.01 * found[0.0].norm()  # type: ignore[operator,union-attr]


@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_a_number_stays_so(bits: int) -> None:
    """A diverged run must be seen: the loss has to become NaN."""
    weight = AffineWeight.quantize(random(8, 64, seed=0), Grid(bits, 32))
    range_ = weight.range()
    range_.scale_NG[3, 1] = torch.nan
    shift = torch.full((1, 64), torch.nan), torch.ones(8, 1)
    for dtype in DTYPES:
        assert weight.dequantize(dtype, range_=range_)[3, 32:].isnan().all()
        out = torch.empty(8, 64, dtype=dtype)
        dequantize.levels(out, *weight.described(weight.range(), shift))
        assert out.isnan().all()
    codes = torch.full((8, 64), 3, dtype=torch.uint8)
    dequantize.levels(codes, *weight.described(weight.range(), shift))
    assert (codes == 0).all()  # no integer stands for it, and what a cast gives is anything


def test_operators_keep_the_rules_of_torch() -> None:
    """Schema, fake tensors and dispatch, by torch's own checker."""
    weight = AffineWeight.quantize(random(16, 64, seed=0), Grid(4, 32, "integer"), "fixed8")
    plain = AffineWeight.quantize(random(16, 64, seed=0), Grid(4, 32, "integer"))
    about = weight.described(weight.range(), (random(4, 64, seed=1), random(16, 4, seed=2)), 0.5)
    out, scale = torch.empty(16, 64), torch.empty(16, 2)
    table_weight = CodebookWeight.quantize(random(16, 64, seed=0), CodebookGrid("nf4", 32, double_quant=True))
    checks = ("test_schema", "test_faketensor")
    cases = {
        dequantize.affine: (out, plain.codes, None, *plain.range(), 4, 8.0),
        dequantize.affine_product: (torch.empty(2, 16), random(2, 64, seed=3), plain.codes, *plain.range(), 4, 8.0),
        dequantize.codebook: (out, table_weight.codes, None, *table_weight._about(None)),
        dequantize.levels: (out, *about),
        dequantize.level_gradients: (random(16, 64, seed=4).bfloat16(), scale, None, *about),
    }
    for operator, arguments in cases.items():
        torch.library.opcheck(operator, arguments, test_utils=checks)


def test_a_workspace_is_reused_and_never_fake() -> None:
    a = workspace.take("test", (4, 8), torch.float32, torch.device("cpu"))
    b = workspace.take("test", (2, 8), torch.bfloat16, torch.device("cpu"))
    assert a.data_ptr() == b.data_ptr()
    assert workspace.take("other", (4, 8), torch.float32, torch.device("cpu")).data_ptr() != a.data_ptr()
    with torch._subclasses.fake_tensor.FakeTensorMode():
        assert isinstance(
            workspace.take("test", (4, 8), torch.float32, torch.device("cpu")), torch._subclasses.fake_tensor.FakeTensor
        )
    workspace.clear()


SCRIPT = """
import sys, warnings
warnings.simplefilter("error")
import torch
from trimtab.quant.grid import Grid
from trimtab.layers.weights import AffineWeight
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    w = AffineWeight.quantize(torch.arange(64.0).view(2, 32), Grid(4, 32))
    first, again = w.dequantize(torch.bfloat16), w.dequantize(torch.bfloat16)
print(len(seen), *(str(s.message).splitlines()[0] for s in seen), sep="|")
print(first.float().sum().item())
"""


def run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env={**os.environ, **environment}, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_without_a_compiler_one_warning_and_the_same_values(tmp_path: Path) -> None:
    here = run(TRIMTAB_CACHE=str(tmp_path / "built"))
    assert here[0] == "0"
    assert [f.suffix for f in (tmp_path / "built").iterdir()] == [".so"]
    none = run(TRIMTAB_CACHE=str(tmp_path / "none"), PATH=str(tmp_path), CC="")
    assert none[0].startswith("1|no C compiler found")
    broken = tmp_path / "cc"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no such option >&2; exit 1\n")
    broken.chmod(0o755)
    failed = run(TRIMTAB_CACHE=str(tmp_path / "failed"), CC=str(broken))
    assert failed[0].startswith("1|trimtab's C kernels could not be built")
    assert "no such option" in failed[0]
    assert list((tmp_path / "failed").iterdir()) == []
    assert run(TRIMTAB_KERNELS="torch")[0] == "0"
    assert here[1] == none[1] == failed[1] == run(TRIMTAB_KERNELS="torch")[1]


def test_no_warning_is_raised_here() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cpu.library.__wrapped__()
