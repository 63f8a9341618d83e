"""All of it without compiled kernels, as on a machine without a C compiler: the plain torch references alone."""

import pytest
import torch
from torch import Tensor

import cases
from cases import SOME, TRAINED, K, N
from trimtab.kernels import channel, cpu, dequantize, encode
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.methods import Rtn
from trimtab.quant.grid import CodebookGrid, Grid

TRAINED_SOME = [name for name in SOME if name in TRAINED]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """No compiled kernels from here on."""
    monkeypatch.setattr(cpu, "library", lambda: None)
    assert not encode.fits(torch.zeros(2, 2))
    assert not channel.fits(torch.zeros(2, 2), torch.bfloat16)


@pytest.mark.parametrize("name", TRAINED_SOME)
def test_outputs_and_gradients_are_those_of_the_equations(plain: None, name: str) -> None:
    layer, x, g, exact = cases.trained(TRAINED[name])
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(g)
    found = {"y": (y, exact.y), "x": (leaf.grad, exact.dx)}
    found |= {n: (layer.get_parameter(f"adapter.{n}").grad, grad) for n, grad in exact.grads.items()}
    for of, (ours, wanted) in found.items():
        assert ours is not None
        assert (ours.double() - wanted).norm() <= 1e-4 * wanted.norm(), of


@pytest.mark.parametrize("name", TRAINED_SOME)
def test_folded_is_trained(plain: None, name: str) -> None:
    layer, x, _, _ = cases.trained(TRAINED[name])
    fold = layer.adapter.fold(layer.base)  # type: ignore[union-attr]
    if fold.kind != "bitwise":
        return
    after = QuantLinear(fold.weight, None, layer.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # takes no part in what decides codes
        assert torch.equal(layer.dequantize(torch.float32), after.dequantize(torch.float32))
        inside = layer.adapter.fold(layer.base).weight  # type: ignore[union-attr]
        assert torch.equal(inside.dequantize(torch.float32), after.dequantize(torch.float32))
    for dtype in DTYPES:
        assert torch.equal(layer(x.to(dtype)), after(x.to(dtype)))


@pytest.mark.parametrize("name", SOME)
def test_weights_are_those_of_the_kernels(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What is stored, its values, and rows of them; by a search of ranges, what it finds may differ by a rounding."""
    compiled = cases.build(SOME[name]).base
    rows = torch.tensor([5, 0, N - 1, 5])
    values = [(compiled.dequantize(d), compiled.dequantize(d, rows=rows)) for d in DTYPES]
    monkeypatch.setattr(cpu, "library", lambda: None)
    base = cases.build(SOME[name]).base
    for key, tensor in compiled.state_dict().items():
        assert torch.equal(base.state_dict()[key], tensor), key
    for dtype, (whole, some) in zip(DTYPES, values, strict=True):
        assert torch.equal(base.dequantize(dtype), whole)
        assert torch.equal(base.dequantize(dtype, rows=rows), some)


GRIDS = [
    Grid(4, 32), Grid(3, None, "integer"), Grid(8, 16, "real"),
    CodebookGrid("nf4", 32), CodebookGrid("nf3", None, double_quant=True), CodebookGrid("fp4", 16),
]  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe().replace(" ", "-"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3])
def test_products_of_few_rows(grid: Grid | CodebookGrid, dtype: torch.dtype, rows: int) -> None:
    weight, x = Rtn().build(cases.random(N, K, seed=0), grid)[0], cases.random(rows, K, seed=1).to(dtype)
    y = torch.empty(rows, N)
    if isinstance(weight, AffineWeight):
        dequantize._affine_product(y, x, weight.codes, *weight.range(), weight.grid.bits, weight.grid.center)
    else:
        assert isinstance(weight, CodebookWeight)
        dequantize._codebook_product(y, x, weight.codes, *weight._about(weight.offset))
    exact = x.double() @ weight.dequantize(torch.float32).double().t()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_without_kernels_a_single_token_goes_the_ordinary_way(plain: None) -> None:
    layer, x = QuantLinear(Rtn().build(cases.random(N, K, seed=0), Grid(4, 32))[0]), cases.random(3, 1, K, seed=1)
    assert layer.base.product_of_few(x[:, 0]) is None
    with torch.no_grad():
        y: Tensor = layer(x)
    assert torch.equal(y, x @ layer.dequantize(torch.float32).t())
