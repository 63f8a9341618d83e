"""What the contracts leave out of one layer: rows of a weight, large weights in pieces, embeddings, bfloat16 gradients."""

import pytest
import torch
import torch.nn.functional as F

import cases
from cases import SOME, TRAINED, K, N
from trimtab.kernels import cpu, encode
from trimtab.layers import specs, weights
from trimtab.layers.linear import QuantEmbedding, QuantLinear, from_spec
from trimtab.layers.weights import AffineWeight, DenseWeight, Weight
from trimtab.methods import LrQat, Method, Peqa, QaBlora, QaHira, QaLora, Qat, Rtn
from trimtab.quant.activations import ActivationQuantizer, Activations
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid

GRIDS: list[AnyGrid] = [
    Grid(4, 32),
    Grid(3, None, "integer", "float16"),
    Grid(8, 16, "real", "float32"),
    Grid(2, 16, "integer", range="lp2.4"),
    CodebookGrid("nf4", 32),
    CodebookGrid("nf3", 16, double_quant=True),
    CodebookGrid("mxfp4", 32),
]
grids = pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe().replace(" ", "-"))


def tensors(weight: Weight) -> dict[str, torch.Tensor]:
    return {n: p.data for n, p in weight.named_parameters()}


@pytest.mark.parametrize("name", SOME)
def test_rows_are_rows_of_the_whole(name: str) -> None:
    base = cases.build(SOME[name]).base
    rows = torch.tensor([5, 0, N - 1, 5])
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(base.dequantize(dtype, rows=rows), base.dequantize(dtype)[rows])


@grids
def test_a_large_weight_is_quantized_in_pieces_of_rows(grid: AnyGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    w = cases.random(N, K, seed=0, scale=0.05)
    whole = tensors(weights.quantize(w, grid))
    monkeypatch.setattr(weights, "_rows_at_once", lambda _: 7)
    pieces = weights.quantize(w, grid)
    assert pieces.shape == (N, K)
    assert tensors(pieces).keys() == whole.keys()
    for key, tensor in tensors(pieces).items():
        assert tensor.dtype == whole[key].dtype
        assert torch.equal(tensor, whole[key]), key


@grids
def test_equal_weights_without_numbers_are_laid_out_once(grid: AnyGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan has hundreds of them, each with tensors of its own."""
    w, made, plain = cases.random(N, K, seed=0, scale=0.05), [], weights._quantize
    monkeypatch.setattr(weights, "_quantize", lambda *given: made.append(given) or plain(*given))
    weights._laid_out.cache_clear()
    real, one, two = (weights.quantize(x, grid) for x in (w, w.to("meta"), w.to("meta")))
    assert [len(given) for given in made] == [3, 3]
    for empty in (one, two):
        assert {n: (t.shape, t.dtype) for n, t in tensors(empty).items()} == {
            n: (t.shape, t.dtype) for n, t in tensors(real).items()
        }
    assert not {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


@grids
def test_quantizing_what_is_quantized_changes_nothing(grid: AnyGrid) -> None:
    """A stored source is taken code for code; a coarser copy of its values does not come back finer."""
    base, _ = Rtn().build(cases.random(N, K, seed=1, scale=0.05), grid)
    again, _ = Rtn().build(base, grid)
    assert again is base
    other, _ = Rtn().build(base, Grid(8, 16))
    assert isinstance(other, AffineWeight)
    assert other.grid == Grid(8, 16)
    error = (other.dequantize(torch.float32) - base.dequantize(torch.float32)).abs().max()
    assert error < 2 * other.scale.abs().max()
    assert torch.equal(other.codes, AffineWeight.quantize(base.dequantize(torch.float32), Grid(8, 16)).codes)
    dense, _ = Rtn().build(base, None)
    assert isinstance(dense, DenseWeight)
    assert torch.equal(dense.weight, base.dequantize(torch.bfloat16))


@grids
@pytest.mark.parametrize("scale", [None, 6.928])
def test_an_embedding_gives_rows_in_its_dtype(grid: AnyGrid, scale: float | None) -> None:
    base, _ = Rtn().build(cases.random(N, K, seed=2), grid)
    embedding = QuantEmbedding(base, torch.float32, scale=scale)
    before = {n: t.clone() for n, t in tensors(base).items()}
    ids = torch.tensor([[0, 7, 7], [N - 1, 3, 0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        embedding.to(dtype)
        rows = embedding(ids)
        assert rows.dtype == dtype
        table = base.dequantize(dtype)
        expected = F.embedding(ids, table)
        assert torch.equal(rows, expected if scale is None else expected * torch.tensor(scale, dtype=dtype))
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in tensors(base).items())
    assert (embedding.num_embeddings, embedding.embedding_dim) == (N, K)


@pytest.mark.parametrize("name", [n for n in SOME if n in TRAINED])
def test_bfloat16_is_close_to_the_equations(name: str) -> None:
    layer, x, g, exact = cases.trained(TRAINED[name])
    leaf = x.bfloat16().requires_grad_()
    y = layer(leaf)
    assert y.dtype == torch.bfloat16
    y.backward(g.bfloat16())
    assert (y.detach().double() - exact.y).norm() < 1e-2 * exact.y.norm()
    assert leaf.grad is not None
    assert (leaf.grad.double() - exact.dx).norm() < 1e-2 * exact.dx.norm()
    for parameter, grad in exact.grads.items():
        ours = layer.get_parameter(f"adapter.{parameter}").grad
        assert ours is not None
        assert ours.dtype == torch.float32  # masters are float32, whatever is computed in
        assert (ours.double() - grad).norm() < 2e-2 * grad.norm(), parameter


def test_a_master_follows_its_own_scale() -> None:
    """LSQ: moving s moves codes, where LR-QAT's frozen inner scale leaves them."""
    flips = {}
    for name in ("qat-int4-g32-symmetric", "lr-qat-fixed8-int4-g32-symmetric"):
        layer = cases.build(TRAINED[name])
        assert layer.adapter is not None
        before = layer.adapter.fold(layer.base).weight.integer_codes()  # type: ignore[operator]
        with torch.no_grad():
            layer.adapter.scale.mul_(1.5)  # type: ignore[union-attr,operator]
        flips[name[:3]] = (layer.adapter.fold(layer.base).weight.integer_codes() != before).any().item()  # type: ignore[operator]
    assert flips == {"qat": True, "lr-": False}


@pytest.mark.parametrize("name", SOME)
def test_a_weight_is_laid_out_in_the_dtypes_that_it_is_stored_in(name: str) -> None:
    """Loading fills what was laid out: levels kept in float32 would be read into bfloat16 without a word."""
    base = cases.build(SOME[name]).base
    with torch.device("meta"):
        laid_out = tensors(specs.from_spec(base.spec()))
    about = {n: (t.shape, t.dtype) for n, t in tensors(base).items()}
    assert {n: (t.shape, t.dtype) for n, t in laid_out.items()} == about


@pytest.mark.parametrize("name", TRAINED)
def test_the_matrix_is_the_same_with_and_without_its_graph(name: str) -> None:
    layer = cases.build(TRAINED[name])
    cases.perturb(layer, TRAINED[name], 3)
    for dtype in (torch.float32, torch.bfloat16):
        with torch.no_grad():
            plain = layer.dequantize(dtype)
        assert torch.equal(layer.dequantize(dtype), plain)


@pytest.mark.parametrize("method", [QaHira(), QaLora(rank=4), QaBlora(rank=4)], ids=lambda m: m.name)
def test_an_offset_learns_from_what_its_weight_multiplies(method: Method) -> None:
    """Under simulated activations the gradient of a block's zero is g^T of the sums of x_hat, not of x."""
    x, g = cases.random(10, 64, seed=1), cases.random(10, 48, seed=2)
    layer = QuantLinear(*method.build(cases.random(48, 64, seed=0), Grid(4, 32, "real")))
    layer.inputs = ActivationQuantizer(Activations(4))
    assert layer.adapter is not None
    delta = layer.adapter.delta
    assert delta is not None
    torch.nn.init.normal_(delta.get_parameter("M" if delta.M is not None else "B"))
    layer(x).backward(g)
    found = [p.grad for p in delta.parameters()]
    of_blocks = [g.T @ seen.unflatten(1, (2, 32)).sum(2) for seen in (layer.inputs(x), x)]
    right, wrong = (torch.autograd.grad(delta.per_group(32), tuple(delta.parameters()), block) for block in of_blocks)
    for got, expected, unrounded in zip(found, right, wrong, strict=True):
        assert got is not None
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(got, unrounded, rtol=1e-2)


@pytest.mark.parametrize("name", [n for n, case in TRAINED.items() if case.place in ("levels", "master")])
def test_the_matrix_has_the_gradients_of_the_equations(name: str) -> None:
    """Asked for as a tensor, as a compiled layer asks: its own graph, not the one of the layer's product."""
    layer, x, g, exact = cases.trained(TRAINED[name])
    layer.dequantize(torch.float32).t().backward(x.t() @ g)  # dL/dW, laid out by columns
    for parameter, grad in exact.grads.items():
        found = layer.get_parameter(f"adapter.{parameter}").grad
        assert found is not None, parameter
        assert (found.double() - grad).norm() < 1e-4 * grad.norm(), parameter


def test_features_are_named_as_in_a_linear_layer() -> None:
    layer = cases.build(cases.CASES["rtn-int4-g32-integer"])
    assert (layer.in_features, layer.out_features) == (K, N)


@pytest.mark.parametrize("columns", [1, 64])
def test_which_inputs_go_by_the_way_of_one_token(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """(B, 1, K) with B up to 8 and no gradients; all others make W, and where W moves so do those."""
    seen: list[torch.Size] = []
    real = AffineWeight.product_of_few
    monkeypatch.setattr(AffineWeight, "product_of_few", lambda self, x: (seen.append(x.shape), real(self, x))[1])
    weight = cases.random(N, columns, seed=0)
    layer = QuantLinear(Rtn().build(weight, Grid(4, None))[0], bias=cases.random(N, seed=2))
    for shape, few in (
        ((8, 1), True), ((1, 1), True), ((9, 1), False), ((8, 2), False), ((8,), False), ((1,), False), ((), False),
        ((2, 1, 1), False),
    ):  # fmt: skip
        x = cases.random(*shape, columns, seed=1)
        seen.clear()
        with torch.no_grad():
            y = layer(x)
        assert seen == ([(shape[0], columns)] if few else []), shape
        torch.testing.assert_close(y, F.linear(x, layer.dequantize(torch.float32), layer.bias), rtol=1e-5, atol=1e-5)
        layer(x)
        assert len(seen) == few
    moving = QuantLinear(*Peqa().build(weight, Grid(4, None)))
    seen.clear()
    with torch.no_grad():
        moving(cases.random(2, 1, columns, seed=1))
    assert not seen


@grids
def test_what_no_kernel_reads_is_quantized_alike(grid: AnyGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    """A transposed weight, one in float64: through torch, in pieces, to the same tensors as by the kernels."""
    w = cases.random(N, K, seed=0, scale=0.05)
    expected = tensors(weights.quantize(w, grid))
    others = {"transposed": w.t().contiguous().t(), "float64": w.double()}
    for rows in (N, N // 2, 7):
        monkeypatch.setattr(weights, "_rows_at_once", lambda _, rows=rows: rows)
        for name, other in others.items():
            assert not encode.fits(other)
            found = weights.quantize(other, grid)
            assert found.shape == (N, K)
            assert tensors(found).keys() == expected.keys()
            for key, tensor in tensors(found).items():
                assert tensor.dtype == expected[key].dtype
                assert torch.equal(tensor, expected[key]), (name, key)


@pytest.mark.parametrize("name", SOME)
def test_bytes_of_the_graph_that_makes_a_weight(name: str) -> None:
    """What a plan counts for an entry of W: three float32 tensors, a bool and four in the dtype; a master's gradients."""
    layer, place = cases.build(SOME[name]), SOME[name].place
    if layer.adapter is None:
        return
    floats = place == "levels" and getattr(SOME[name].method, "storage", "int") in ("bf16", "fp32")
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        wanted = 13 + 4 * size if floats or place == "master" else 0
        assert layer.adapter.graph_bytes(layer.base, dtype) == wanted + 4 * (place == "master")


@pytest.mark.parametrize("name", [n for n in SOME if n in TRAINED])
def test_merged_is_base_and_adapter_together(name: str) -> None:
    layer, case = cases.build(TRAINED[name]), TRAINED[name]
    cases.perturb(layer, case, 3)
    adapter = layer.adapter
    assert adapter is not None
    for dtype in (torch.float32, torch.bfloat16):
        merged = adapter.merged(layer.base, dtype)
        assert merged.dtype == dtype
        if case.place == "output":
            exact = layer.base.dequantize(torch.float32) + adapter.delta.dense()  # type: ignore[union-attr,operator]
            assert torch.equal(merged, exact.to(dtype))
        else:
            assert torch.equal(merged, layer.dequantize(dtype))
            assert case.place != "offset" or not layer.dequantize(dtype).requires_grad


@pytest.mark.parametrize("name", [n for n in SOME if n in TRAINED])
def test_merged_has_the_gradients_of_the_equations(name: str) -> None:
    """What a loss that multiplies by a head's matrix itself hands to the head's adapter."""
    layer, x, g, exact = cases.trained(TRAINED[name])
    assert layer.adapter is not None
    layer.adapter.merged(layer.base, torch.float32).backward(g.t() @ x)
    for parameter, grad in exact.grads.items():
        found = layer.get_parameter(f"adapter.{parameter}").grad
        assert found is not None, parameter
        assert (found.double() - grad).norm() < 1e-4 * grad.norm(), parameter


def test_offsets_move_from_those_that_a_table_has_already() -> None:
    first, second = (QaHira().build(cases.random(N, K, seed=0), CodebookGrid("nf4", 32)) for _ in range(2))
    for _, adapter in (first, second):
        torch.nn.init.normal_(adapter.delta.M)  # type: ignore[union-attr, arg-type]
    moved = first[1].fold(first[0]).weight  # type: ignore[union-attr]
    update = second[1].delta.dense()  # type: ignore[union-attr]
    found = QuantLinear(moved, second[1]).dequantize(torch.float32)
    torch.testing.assert_close(found, moved.dequantize(torch.float32) + update, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SOME)
def test_a_layer_is_laid_out_by_its_spec(name: str) -> None:
    layer = cases.build(SOME[name])
    with torch.device("meta"):
        laid_out = from_spec(layer.spec(), torch.float32)
    wanted = {n: (t.shape, t.dtype) for n, t in layer.state_dict().items()}
    assert {n: (t.shape, t.dtype) for n, t in laid_out.state_dict().items()} == wanted


def test_which_gradients_are_read_from_the_output() -> None:
    """Those of levels with one scale to a row, in bfloat16, without a bias: all others would keep y for nothing."""
    for name, case in SOME.items():
        layer = cases.build(case, bias=False)
        fits = case.place == "levels" and bool(case.factors) and case.group == case.columns and layer.base.packed  # type: ignore[union-attr]
        assert layer.uses_output(torch.bfloat16) == (fits and cpu.serves(torch.ones(1))), name
        assert not layer.uses_output(torch.float32)
        assert not cases.build(case).uses_output(torch.bfloat16)


def _range_of(w: torch.Tensor, zero: str) -> list[torch.Tensor]:
    range_ = AffineWeight.quantize(w, Grid(4, 32, zero)).range()  # type: ignore[arg-type]
    return [t for t in range_ if t is not None]


@pytest.mark.parametrize("bits", [6, 7, 8])
def test_eight_bits_leave_no_fraction_to_keep(bits: int) -> None:
    w, grid = cases.random(N, K, seed=0), Grid(bits, 32)
    wanted = "int" if bits == 8 else "fixed8"
    assert AffineWeight.quantize(w, grid, "fixed8").storage == wanted
    fine = AffineWeight.quantize(w, grid, "fp32")
    kept = fine.kept_as("fixed8")
    assert kept.storage == wanted
    assert torch.equal(kept.integer_codes(), fine.integer_codes())
    assert {t.dtype for zero in ("integer", "real") for t in _range_of(w, zero)} == {torch.float32}
    assert {kept.levels().dtype, fine.levels().dtype, fine.kept_as("int").levels().dtype} == {torch.float32}


@pytest.mark.parametrize("bias", [False, True])
def test_what_a_layer_gives_may_be_changed_in_place(bias: bool) -> None:
    """Some families add to it in place (RoCBERT), which autograd forbids for a view."""
    layer, x = (
        cases.build(cases.CASES["lora-int4-g32-integer"], bias=bias),
        cases.random(2, 2, K, seed=1).requires_grad_(),
    )
    layer.adapter = None
    y = layer(x)
    y.add_(1)
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, layer.dequantize(torch.float32).sum(0).expand(2, 2, K), atol=1e-5)


@pytest.mark.parametrize("dtype", ["portable", "float16", "float32"])
@pytest.mark.parametrize("method", [Peqa(), LrQat(rank=2), Qat()], ids=lambda m: m.name)
def test_masters_are_copies_of_their_own(method: Method, dtype: str) -> None:
    """Trained in float32, in memory that neither the stored weight nor the caller's has a share in."""
    w = cases.random(N, K, seed=0)
    base, adapter = method.build(w, Grid(4, 32, "real", dtype))  # type: ignore[arg-type]
    assert adapter is not None
    kept = {t.untyped_storage().data_ptr() for t in base.parameters()}
    before = {n: t.clone() for n, t in tensors(base).items()}
    for name in ("scale", "offset"):
        master = adapter.get_parameter(name)
        assert master.dtype == torch.float32
        assert master.is_leaf
        assert torch.equal(master, before[name].float())
        assert master.untyped_storage().data_ptr() not in kept
    if isinstance(method, Qat):
        assert torch.equal(adapter.get_parameter("master"), w)


@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("storage", ["bf16", "fp32"])
def test_levels_in_float_are_those_of_a_weight_in_float32(zero: str, storage: str) -> None:
    """Whatever the weight's own dtype: of the same numbers, the same levels."""
    w, grid = cases.random(N, K, seed=0).bfloat16(), Grid(4, 32, zero)  # type: ignore[arg-type]
    expected = tensors(weights.quantize(w.float(), grid, storage))  # type: ignore[arg-type]
    for other in (w, w.double()):
        found = tensors(weights.quantize(other, grid, storage))  # type: ignore[arg-type]
        assert all(torch.equal(t, expected[n]) for n, t in found.items())


def test_a_large_weight_is_taken_in_pieces_of_four_million_numbers() -> None:
    for columns, rows in ((1 << 10, 1 << 12), (3 << 10, 1365), (1 << 22, 1), (1 << 23, 1)):
        assert weights._rows_at_once(torch.empty(1).expand(5000, columns)) == rows
    assert weights._rows_at_once(torch.empty(5000, 1 << 23, device="meta")) == 5000


def test_what_is_computed_in_float64_stays_so_for_one_token() -> None:
    layer, x = cases.build(cases.CASES["rtn-int4-g32-integer"]), cases.random(2, 1, K, seed=1).double()
    assert layer.base.product_of_few(x[:, 0]) is None
    with torch.no_grad():
        exact = x @ layer.base.dequantize(torch.float64).t() + layer.bias.double()  # type: ignore[union-attr]
        torch.testing.assert_close(layer(x), exact, rtol=1e-12, atol=1e-12)


def test_factors_are_not_scaled_unless_asked() -> None:
    base = cases.build(cases.CASES["lr-qat-fixed8-int4-g32-integer"]).base
    assert isinstance(base, AffineWeight)
    assert base.described(base.range(), (torch.ones(1, K), torch.ones(N, 1))).gain == 1


@pytest.mark.parametrize("name", [n for n in TRAINED if n.startswith("lr-qat-") and "-channel-" in n])
def test_gradients_from_the_output_are_close_to_the_equations(name: str) -> None:
    """Per channel, without a bias and in bfloat16, as a model's layers are."""
    layer, x, g, exact = cases.trained(TRAINED[name])
    layer.bias = None
    layer(x.bfloat16().requires_grad_()).backward(g.bfloat16())
    for parameter, grad in exact.grads.items():
        ours = layer.get_parameter(f"adapter.{parameter}").grad
        assert ours is not None
        assert (ours.double() - grad).norm() < 2e-2 * grad.norm(), parameter


def test_levels_are_kept_as_asked_and_codes_as_they_are() -> None:
    """Whole codes have no fraction to bring into another storage."""
    w, grid = cases.random(N, K, seed=0), Grid(4, 32)
    for storage in ("int", "fixed8"):
        packed = AffineWeight.quantize(w, grid, storage)  # type: ignore[arg-type]
        assert packed.kept_as("fp32") is packed.kept_as("int") is packed.kept_as("fixed8") is packed
    fine = AffineWeight.quantize(w, grid, "fp32")
    assert fine.kept_as("fp32") is fine
    for storage in ("int", "fixed8", "bf16"):
        other = fine.kept_as(storage)  # type: ignore[arg-type]
        assert other.storage == storage
        assert torch.equal(other.scale, fine.scale)
        if storage != "bf16":
            assert torch.equal(other.integer_codes(), fine.integer_codes())
