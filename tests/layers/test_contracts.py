"""The contracts of docs/design.md, section 4, on one layer: every method on every kind of grid that it admits.

Contract 5 (torch.compile), 9 (a fresh process, in test_reload.py) and 10 (FSDP2) have files of their own.
"""

import copy
import pickle
import weakref
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

import cases
import reference
from cases import CASES, SOME, TRAINED, K, N
from trimtab.layers import linear
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight
from trimtab.methods import LrQat, Rtn
from trimtab.quant.grid import CodebookGrid, Grid

every_cases = pytest.mark.parametrize("name", CASES)
every_trained = pytest.mark.parametrize("name", TRAINED)
some_cases = pytest.mark.parametrize("name", SOME)
some_trained = pytest.mark.parametrize("name", [name for name in SOME if name in TRAINED])


def folded(layer: QuantLinear) -> QuantLinear:
    assert layer.adapter is not None
    return QuantLinear(layer.adapter.fold(layer.base).weight, None, layer.bias)


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


# ---- 1. the start is the quantized base --------------------------------------------------------------------------


@every_cases
def test_the_start_is_the_quantized_base(name: str) -> None:
    case = CASES[name]
    layer, x = cases.build(case), cases.random(10, case.columns, seed=1)
    weight = cases.random(N, case.columns, seed=0, scale=0.05)
    base = QuantLinear(Rtn().build(cases.source(case, weight), case.grid)[0], None, layer.bias)
    if case.method.name == "loftq":  # it starts nearer to the float model than the base
        dense = layer.base.dequantize(torch.float32) + layer.adapter.delta.dense()  # type: ignore[union-attr,operator]
        assert (dense - weight).norm() < (base.dequantize(torch.float32) - weight).norm()
        assert relative(layer(x), x.double() @ dense.double().T + layer.bias.double()) < 1e-5  # type: ignore[union-attr]
        return
    for dtype in (torch.float32, torch.bfloat16):
        y, expected = layer(x.to(dtype)), base(x.to(dtype))
        assert y.dtype == dtype
        if case.exact_start:
            assert torch.equal(y, expected)
            assert torch.equal(layer.dequantize(dtype), base.dequantize(dtype))
    if not case.exact_start:
        ours, rtn = (w.base.integer_codes().int() for w in (layer, base))  # type: ignore[operator]
        assert (ours - rtn).abs().max() <= 1
        assert (ours != rtn).float().mean() < (0.03 if case.grid.bits < 8 else 0.3)  # type: ignore[union-attr]
    assert torch.equal(base(x), F.linear(x, base.base.dequantize(torch.float32), layer.bias))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("zero", ["symmetric", "integer", "real"])
@pytest.mark.parametrize("storage", ["fixed8", "int", "fp32"])
def test_levels_on_exact_ties_start_at_the_even_code(bits: int, zero: str, storage: str) -> None:
    """Half-integers between -2^(b-1) and 2^(b-1) - 1, both ends included: a step of 1 and a tie almost everywhere."""
    center = 2 ** (bits - 1)
    w = torch.randint(-2 * center, 2 * center - 1, (N, K), generator=torch.Generator().manual_seed(bits)) / 2
    w[:, ::32], w[:, 1::32] = -center, center - 1
    even = (w.double() + center).round()
    assert ((w % 1) == 0.5).float().mean() > 0.2
    for group in (32, None):
        grid = Grid(bits, group, zero)  # type: ignore[arg-type]
        rtn, _ = Rtn().build(w, grid)
        assert isinstance(rtn, AffineWeight)
        assert (rtn.scale == 1).all()
        assert torch.equal(rtn.integer_codes().double(), even)
        base, adapter = LrQat(rank=2, storage=storage).build(w, grid)  # type: ignore[arg-type]
        assert adapter is not None
        assert torch.equal(base.integer_codes().double(), even)  # type: ignore[operator]
        assert torch.equal(adapter.weight(base, torch.float32), rtn.dequantize(torch.float32))
        assert torch.equal(adapter.fold(base).weight.integer_codes().double(), even)  # type: ignore[operator]


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_fixed8_is_within_half_a_unit(bits: int) -> None:
    """Levels are kept to 2^-(f + 1) of a step, f = 8 - b, but for ties, which are kept on the side they round to."""
    w, grid = cases.random(N, K, seed=4, scale=0.05), Grid(bits, 32)
    base, _ = LrQat(rank=2).build(w, grid)
    assert isinstance(base, AffineWeight)
    exact = w.double() / reference.spread(base.scale.double(), K) + 2 ** (bits - 1)
    error = (base.levels().double() - exact.clamp(0, grid.top)).abs()
    inside = (exact >= 0) & (exact < grid.top)
    assert error[inside].max() <= 2.0 ** -(8 - bits + 1) + 1e-5
    assert error.max() <= 2.0 ** -(8 - bits + 1) + 1e-5


# ---- 2. gradients --------------------------------------------------------------------------------------------------


@every_trained
def test_outputs_and_gradients_are_those_of_the_equations(name: str) -> None:
    case = TRAINED[name]
    layer, x, g, exact = cases.trained(case)
    leaf = x.clone().requires_grad_()
    y = layer(leaf)
    y.backward(g)
    assert relative(y, exact.y) < 1e-5
    assert leaf.grad is not None
    assert relative(leaf.grad, exact.dx) < 1e-5
    got = {n.removeprefix("adapter."): p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert set(got) == set(exact.grads) == set(case.sizes)
    for parameter, grad in exact.grads.items():
        assert grad.norm() > 0
        assert relative(got[parameter], grad) < 1e-4, parameter
    if isinstance(layer.base, AffineWeight) and case.place in ("levels", "master"):
        assert relative(layer.dequantize(torch.float32), exact.weight) < 1e-6
        assert exact.clipped > 0 or not case.factors


@some_cases
def test_inputs_of_any_shape(name: str) -> None:
    """As nn.Linear: one row without a batch dimension, several batch dimensions, no rows at all."""
    layer = cases.build(SOME[name])
    k = SOME[name].columns
    x = cases.random(6, k, seed=9)
    y = layer(x)
    for shape in ((k,), (2, 3, k), (0, k), (1, 0, k)):
        part = x.flatten()[: torch.Size(shape).numel()].view(shape).requires_grad_()
        out = layer(part)
        assert out.shape == (*shape[:-1], N)
        rows = out.detach().reshape(-1, N)
        torch.testing.assert_close(rows, y[: len(rows)].detach(), rtol=1e-5, atol=1e-5)
        out.sum().backward()
        assert part.grad is not None
        assert part.grad.shape == part.shape


@some_cases
def test_only_what_is_trained_wants_gradients(name: str) -> None:
    case = CASES[name]
    layer = cases.build(case)
    wanting = {n.removeprefix("adapter."): p.numel() for n, p in layer.named_parameters() if p.requires_grad}
    assert wanting == case.sizes
    assert all(p.dtype == torch.float32 for p in layer.parameters() if p.requires_grad)
    assert not list(layer.buffers())  # FSDP2 shards parameters only
    with torch.no_grad():
        frozen = layer(cases.random(3, layer.base.shape[1], seed=2))
    assert frozen.grad_fn is None
    y = layer(cases.random(3, layer.base.shape[1], seed=2))
    assert y.requires_grad == bool(wanting)
    assert torch.equal(y, frozen)


# ---- 3. folded is trained ------------------------------------------------------------------------------------------


@every_trained
def test_folded_is_trained(name: str) -> None:
    case = TRAINED[name]
    layer, x, _, exact = cases.trained(case)
    assert layer.adapter is not None
    fold = layer.adapter.fold(layer.base)
    if case.place == "output":
        dense = layer.base.dequantize(torch.float64) + layer.adapter.delta.dense().double()  # type: ignore[union-attr,operator]
        assert fold.kind == "algebraic"
        assert isinstance(fold.weight, DenseWeight)
        error = relative(fold.weight.weight, dense)
        assert error < 4e-3
        assert fold.error == pytest.approx(error, rel=1e-3, abs=1e-7)
        assert relative(folded(layer)(x), exact.y) < 4e-3
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(folded(layer).dequantize(torch.float32), fold.weight.dequantize(torch.float32))
        return
    assert (fold.kind, fold.error) == ("bitwise", 0.0)
    after = folded(layer)
    assert all(not p.requires_grad for p in after.parameters())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(layer.dequantize(dtype), after.dequantize(dtype))
        assert torch.equal(layer(x.to(dtype)), after(x.to(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer.dequantize(torch.float32), after.dequantize(torch.float32))
        assert torch.equal(layer(x), after(x))
        inside = folded(layer)
    assert torch.equal(inside.dequantize(torch.float32), after.dequantize(torch.float32))
    with torch.no_grad():
        assert torch.equal(layer(x), after(x))
    _moved_enough(layer, after, case, exact)


def _moved_enough(layer: QuantLinear, after: QuantLinear, case: cases.Case, exact: reference.Result) -> None:
    """That the test above meant something: codes flipped, zeros moved, and the folded numbers are the equations'."""
    before, now = layer.base, after.base
    if isinstance(now, CodebookWeight):
        assert isinstance(before, CodebookWeight)
        assert torch.equal(now.codes, before.codes)
        assert now.offset is not None
        assert now.offset.abs().max() > 0
        return
    assert isinstance(before, AffineWeight)
    assert isinstance(now, AffineWeight)
    assert now.storage == "int"
    flipped = (before.integer_codes() != now.integer_codes()).float().mean()
    if case.place == "offset" or not (case.factors or case.place == "master"):
        assert flipped == 0
    else:
        assert flipped > 0.3
        assert torch.equal(now.integer_codes().double(), exact.codes)
    if case.place == "offset":
        assert torch.equal(now.scale, before.scale)
        moved = now.zero != before.zero if now.zero is not None else now.offset != before.offset
        assert moved.float().mean() > 0.3  # type: ignore[union-attr]


@some_trained
def test_backward_under_autocast_uses_the_weight_of_forward(name: str) -> None:
    """W is rebuilt after autocast has ended: dx must still be g times the very W that forward used."""
    layer, x, g, _ = cases.trained(TRAINED[name])
    if TRAINED[name].place == "output":
        return
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(leaf)
        weight = layer.dequantize(torch.bfloat16).detach()
    y.backward(g.bfloat16())
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, (g.bfloat16() @ weight).float())


# ---- 4. copies -----------------------------------------------------------------------------------------------------


@some_cases
def test_copies_and_casts_change_nothing(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    layer, x = cases.build(case), cases.random(5, case.columns, seed=2)
    if case.place != "none":
        cases.perturb(layer, case, 3)
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    narrow, y = layer(x.bfloat16()), layer(x)
    save_file(state, tmp_path / "layer.safetensors")

    with torch.device("meta"):
        laid_out = linear.from_spec(layer.spec(), torch.float32)
    assert isinstance(laid_out, QuantLinear)
    assert all(p.is_meta for p in laid_out.parameters())
    assert laid_out.spec() == layer.spec()
    laid_out.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    copied, pickled = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    for other in (laid_out, copied, pickled):
        assert torch.equal(other(x), y)
        assert {n: p.requires_grad for n, p in other.named_parameters()} == {
            n: p.requires_grad for n, p in layer.named_parameters()
        }
        assert other.spec() == layer.spec()
    if case.place != "none":
        with torch.no_grad():
            next(iter(copied.adapter.parameters())).add_(1)  # type: ignore[union-attr]
    for cast in (layer.to(torch.bfloat16), layer.half(), layer.float()):
        after = cast.state_dict()
        assert after.keys() == state.keys()
        for key, kept in state.items():
            assert after[key].dtype == kept.dtype
            assert torch.equal(after[key], kept), key
    assert torch.equal(layer(x), y)
    assert torch.equal(layer(x.bfloat16()), narrow)


# ---- 6. what backward keeps ----------------------------------------------------------------------------------------


@some_cases
def test_bytes_kept_for_backward(name: str) -> None:
    """At most the input, pooled inputs and the R numbers a row between the factors, and copies of the adapter."""
    case = CASES[name]
    layer, rows, k = cases.build(case, bias=False), 16, case.columns
    x = cases.random(rows, k, seed=5).requires_grad_()
    owned = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        held.append(t)  # alive, so that no address is used twice
        return t

    held: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(x)
    factors = sum(case.sizes[f] for f in case.factors)
    allowed = {
        "none": 0,
        "output": rows * (k // case.pool + (case.rank or 0)) + factors,
        "levels": rows * k,
        "master": rows * k,
        # the sums of x over groups, D as it is shared by rows and groups, and levels of the zeros with their scales
        "offset": rows * (k // case.group) + factors + 5 * N * (k // case.group),
    }[case.place]
    assert sum(kept.values()) <= 4 * allowed
    assert 4 * allowed < 4 * N * k + layer.base.stored_bytes()


@some_cases
def test_an_input_that_backward_does_not_need_is_freed(name: str) -> None:
    case = CASES[name]
    layer, leaf = cases.build(case), cases.random(4, case.columns, seed=6).requires_grad_()
    x = leaf * 1
    alive = weakref.ref(x)
    y = layer(x)
    del x
    kept = case.place in ("levels", "master") or (case.place == "output" and case.pool == 1)
    assert (alive() is not None) == kept
    y.sum().backward()


# ---- 7. sizes ------------------------------------------------------------------------------------------------------


@every_cases
def test_stored_bytes_and_trained_numbers(name: str) -> None:
    case, grid = CASES[name], CASES[name].grid
    layer, k = cases.build(case), case.columns
    groups = N * (k // case.group)
    if grid is None:
        closed = 4 * N * k
    elif isinstance(grid, CodebookGrid):
        absmax = groups + 4 * -(-groups // 256) + 4 if grid.double_quant else groups if grid.powers else 4 * groups
        closed = N * k * 4 // 8 + absmax
    else:
        storage = getattr(case.method, "storage", "int")
        width = {"int": grid.bits, "fixed8": 8, "bf16": 16, "fp32": 32}[storage]
        kinds = {"symmetric": 1, "integer": 1.5, "real": 2}[grid.zero]
        each = groups + 2 * N * (k // 256) if grid.scale_dtype in cases.INTEGERS else 2 * groups
        closed = N * k * width // 8 + int(each * kinds)
    assert layer.base.stored_bytes() == closed
    assert closed == sum(p.numel() * p.element_size() for p in layer.base.parameters())
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert case.method.trainable(grid, (N, k)) == trained == sum(case.sizes.values())


def test_equal_ranks_cost_equal_numbers() -> None:
    """LoRA, Q-BaRA and LR-QAT of rank r train r (N + K) numbers in the delta; QA-HiRA N K / (g e)."""
    for name in ("lora", "q-bara", "lr-qat-fixed8", "lr-qat-k2"):
        case = CASES[f"{name}-int4-g32-real"]
        delta = case.method.delta(case.grid, (N, K))
        assert delta is not None
        assert delta.parameters == cases.RANK * (N + K)
    assert CASES["qa-hira-int4-g32-real"].method.trainable(Grid(4, 32, "real"), (N, K)) == N * K // (32 * 2)


# ---- 8. it learns --------------------------------------------------------------------------------------------------

FACTOR = 0.5


@some_trained
def test_a_small_fit_lowers_the_loss(name: str) -> None:
    """Towards a layer of the same kind whose trainable parameters were moved."""
    case = TRAINED[name]
    layer, x = cases.build(case), cases.random(64, case.columns, seed=7)
    teacher = copy.deepcopy(layer)
    cases.perturb(teacher, case, 8)
    with torch.no_grad():
        target = teacher(x)
    step = cases.steps(layer).mean().item()
    rates = {"delta.A": 0.05, "delta.B": 0.05, "delta.M": 0.2 * step, "scale": 0.02 * step}
    rates["delta.M"] *= case.pool if case.mean else 1
    rates |= {"offset": 0.05 * step, "master": 0.3 * step}
    if case.place in ("output", "offset") and case.rank:
        rates["delta.B"] = 0.05 * step
    optimizer = torch.optim.Adam(
        [{"params": p, "lr": rates[n]} for n, p in layer.adapter.named_parameters()]  # type: ignore[union-attr]
    )
    losses = []
    for _ in range(30):
        loss = F.mse_loss(layer(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    # LoftQ's A starts small, and the teacher's noise on it is of another size: more steps away than Kaiming's.
    factor = 1.0 if case.method.name == "loftq" else FACTOR
    assert losses[-1] < factor * losses[0], (losses[0], losses[-1])
