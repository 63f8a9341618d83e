"""Activations on a grid, one function and one layer: against compressed-tensors, torch, and the equations in float64.

The layers' contracts (start, fold, copies, bytes kept, compiling) run again over every place with rounded inputs.
"""

import copy
import pickle
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp
from safetensors.torch import load_file, save_file
from torch import Tensor

import cases
import reference
from cases import CASES, TRAINED, Case, K, N
from trimtab.errors import UserError
from trimtab.layers import linear
from trimtab.layers.linear import QuantLinear
from trimtab.methods import Rtn
from trimtab.quant.activations import (
    ActivationQuantizer,
    Activations,
    KvCache,
    Range,
    range_of,
    round_to_grid,
    token_range,
)

bits_and_zeros = pytest.mark.parametrize(("bits", "symmetric"), [(8, False), (8, True), (4, False), (4, True)])
KINDS = {
    "a8": Activations(8),
    "a4-symmetric": Activations(4, True),
    "a8-static-symmetric": Activations(8, True, "static"),
    "a4-static": Activations(4, False, "static"),
}
every_kind = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# One case for each place and for each way in which gradients are formed.
PLACES = [
    "lora-int4-g32-integer",
    "q-bara-nf4-g32",
    "qa-hira-int4-g32-real",
    "qa-lora-int4-g32-integer",
    "qa-blora-nf4-g32",
    "peqa-int3-g32-symmetric",
    "lr-qat-fixed8-int4-g32-integer",
    "lr-qat-fixed8-int4-channel-real",
    "lr-qat-fp32-int2-g32-symmetric",
    "qat-int4-g32-integer",
]
every_place = pytest.mark.parametrize("name", PLACES)


def tokens(seed: int = 0) -> Tensor:
    """(4, 7, K) of several sizes, with tokens that are zero, positive and negative."""
    x = cases.random(4, 7, K, seed=seed) * torch.logspace(-4, 3, 7).unsqueeze(-1) + cases.random(4, 7, 1, seed=seed + 1)
    x[0, 0], x[0, 1], x[0, 2], x[1, 3] = 0, x[0, 1].abs(), -x[0, 2].abs(), 0.7
    return x


# ---- the function --------------------------------------------------------------------------------------------------


@bits_and_zeros
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dynamic_is_compressed_tensors_to_the_bit(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    x = tokens().to(dtype)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="token", dynamic=True)
    scale, zero = compute_dynamic_scales_and_zp(x.float(), args, torch.nn.Identity())
    range_ = token_range(x, bits, symmetric)
    if symmetric:  # vLLM's, whose kernel serves it: the extreme is a code, not half way between two
        extreme = x.float().abs().amax(-1, keepdim=True)
        scale = torch.where(extreme == 0, scale, extreme / (2 ** (bits - 1) - 1))
    assert torch.equal(range_.scale, scale)
    live = x.float().abs().amax(-1, keepdim=True) > 0  # a range of nothing has no zero there: 0 / 0
    if range_.zero is not None:
        assert torch.equal(range_.zero[live], zero.float()[live])
    assert torch.equal(round_to_grid(x, range_, bits), fake_quantize(x.float(), scale, zero, args).to(dtype))
    assert (round_to_grid(x, range_, bits)[0, 0] == 0).all()


@bits_and_zeros
def test_static_is_compressed_tensors_to_the_bit(bits: int, symmetric: bool) -> None:
    x = tokens()
    range_ = range_of(torch.tensor(-0.3), torch.tensor(0.9), bits, symmetric)
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="tensor")
    theirs = fake_quantize(x, range_.scale, torch.zeros(()) if range_.zero is None else range_.zero, args)
    assert torch.equal(round_to_grid(x, range_, bits), theirs)


@bits_and_zeros
def test_forward_and_gradient_are_those_of_torch(bits: int, symmetric: bool) -> None:
    """`fake_quantize_per_channel_affine`, rows as channels. It multiplies by 1 / s, so a tie may fall the other way."""
    x, g = cases.random(16, K, seed=3), cases.random(16, K, seed=4)
    low, high = x.amin(1, keepdim=True) * 0.7, x.amax(1, keepdim=True) * 0.5  # narrow: clips at both ends
    range_ = range_of(low, high, bits, symmetric)
    zero = torch.zeros(16, dtype=torch.int32) if range_.zero is None else range_.zero.flatten().int()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    y = round_to_grid(ours, range_, bits)
    first, last = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    expected = torch.fake_quantize_per_channel_affine(theirs, range_.scale.flatten(), zero, 0, first, last)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    y.backward(g)
    expected.backward(g)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert 0.02 < (ours.grad == 0).float().mean() < 0.5


def equations(x: Tensor, low: Tensor, high: Tensor, bits: int, symmetric: bool) -> tuple[Tensor, Tensor, float]:
    """x_hat and where it passes gradients, in float64, one number after the other as the equations stand; and the gap."""
    lo, hi = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = low.double().clamp(max=0).expand_as(x), high.double().clamp(min=0).expand_as(x)
    if symmetric:
        s, z = torch.maximum(high, -low) / hi, torch.zeros_like(high)
    else:
        s = (high - low) / (2**bits - 1)
        z = torch.round(torch.clamp(lo - low / s, lo, hi))
    u = x.double() / s + z
    q = torch.round(u)
    inside = (q >= lo) & (q <= hi)
    return s * (q.clamp(lo, hi) - z), inside, reference.gap(u)


@bits_and_zeros
def test_dynamic_forward_and_gradient_are_those_of_the_equations(bits: int, symmetric: bool) -> None:
    x, g = cases.random(9, K, seed=2), cases.random(9, K, seed=5)
    exact, inside, gap = equations(x, x.amin(1, keepdim=True), x.amax(1, keepdim=True), bits, symmetric)
    assert gap > 1e-6
    leaf = x.clone().requires_grad_()
    y = round_to_grid(leaf, token_range(leaf, bits, symmetric), bits)
    y.backward(g)
    torch.testing.assert_close(y.detach().double(), exact, rtol=1e-5, atol=1e-6)
    assert leaf.grad is not None
    assert torch.equal(leaf.grad, g)
    assert inside.all()


@bits_and_zeros
def test_a_token_depends_on_no_other(bits: int, symmetric: bool) -> None:
    x = tokens()
    whole = round_to_grid(x, token_range(x, bits, symmetric), bits)
    assert torch.equal(round_to_grid(x[2:3], token_range(x[2:3], bits, symmetric), bits), whole[2:3])
    assert torch.equal(round_to_grid(x[2, 4], token_range(x[2, 4], bits, symmetric), bits), whole[2, 4])
    padded = F.pad(x[2:3], (0, 0, 5, 5), value=9.0)
    assert torch.equal(round_to_grid(padded, token_range(padded, bits, symmetric), bits)[:, 5:-5], whole[2:3])


def test_a_number_that_is_none_stays_loud() -> None:
    x = tokens()
    x[1, 1, 1] = torch.nan
    y = round_to_grid(x, token_range(x, 8, False), 8)
    assert y[1, 1].isnan().any()
    assert not y[1, 2].isnan().any()


def test_what_is_rounded_by_default() -> None:
    assert Activations() == Activations(bits=8, symmetric=False, mode="dynamic")
    assert KvCache() == KvCache(bits=8, symmetric=False)
    for kind in (Activations(), KvCache()):
        with pytest.raises(FrozenInstanceError):
            kind.bits = 4  # type: ignore[misc]


def test_bad_kinds_say_so() -> None:
    with pytest.raises(UserError, match=r"activations.bits: 5 is neither 4 nor 8"):
        Activations(5)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"kv.bits: 16 is neither 4 nor 8"):
        KvCache(16)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"activations.mode: 'live' is neither"):
        Activations(8, False, "live")  # type: ignore[arg-type]


# ---- a layer -------------------------------------------------------------------------------------------------------


def plugged(layer: QuantLinear, kind: Activations) -> QuantLinear:
    """With rounded inputs; static ranges that clip a few of a hundred normal numbers."""
    range_ = range_of(torch.tensor(-1.8), torch.tensor(1.9), kind.bits, kind.symmetric)
    layer.inputs = ActivationQuantizer(kind, range_ if kind.mode == "static" else None)
    return layer


def of_equations(layer: QuantLinear, case: Case, x: Tensor, g: Tensor, kind: Activations) -> reference.Result:
    """What the layer does, from what it does to a given x_hat: an output adapter reads x, all else x_hat."""
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    if kind.mode == "static":
        low, high = torch.tensor(-1.8), torch.tensor(1.9)
    seen, inside, _ = equations(x, low, high, kind.bits, kind.symmetric)
    result = cases.expected(layer, case, seen, g)
    dx = inside * result.dx
    if case.place != "output":
        return result._replace(dx=dx)
    plain = cases.expected(layer, case, x.double(), g)
    delta = plain.y - x.double() @ plain.weight.T - (0 if layer.bias is None else layer.bias.double())
    of_delta = plain.dx - g.double() @ plain.weight
    y = seen @ plain.weight.T + delta + (0 if layer.bias is None else layer.bias.double())
    return plain._replace(y=y, dx=inside * (g.double() @ plain.weight) + of_delta)


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.detach().double() - exact).norm() / exact.norm().clamp_min(1e-30)).item()


@every_place
@every_kind
def test_outputs_and_gradients_of_a_layer_are_those_of_the_equations(name: str, kind: Activations) -> None:
    case = TRAINED[name]
    layer, x, g, _ = cases.trained(case)
    exact = of_equations(layer, case, x, g, kind)
    leaf = x.clone().requires_grad_()
    y = plugged(layer, kind)(leaf)
    y.backward(g)
    assert relative(y, exact.y) < 1e-5
    assert leaf.grad is not None
    assert relative(leaf.grad, exact.dx) < 1e-5
    got = {n.removeprefix("adapter."): p.grad for n, p in layer.named_parameters() if p.grad is not None}
    assert set(got) == set(exact.grads)
    for parameter, grad in exact.grads.items():
        assert relative(got[parameter], grad) < 1e-4, parameter


@pytest.mark.parametrize("name", ["lr-qat-fixed8-int4-channel-real", "lr-qat-fixed8-int4-g32-integer"])
def test_bfloat16_gradients_are_close_to_the_equations(name: str) -> None:
    """Per channel they come from the output: it must be that of the rounded input."""
    case, kind = TRAINED[name], KINDS["a4-static"]
    layer, x, g, _ = cases.trained(case)
    layer.bias = None
    x, g = x.bfloat16(), g.bfloat16()
    exact = of_equations(layer, case, x.float(), g.float(), kind)
    leaf = x.clone().requires_grad_()
    plugged(layer, kind)(leaf).backward(g)
    assert leaf.grad is not None
    assert relative(leaf.grad, exact.dx) < 1e-2
    for parameter, grad in exact.grads.items():
        assert relative(layer.get_parameter(f"adapter.{parameter}").grad, grad) < 2e-2, parameter  # type: ignore[arg-type]


@every_place
@every_kind
def test_the_start_is_the_rounded_base_on_rounded_inputs(name: str, kind: Activations) -> None:
    case, x = CASES[name], cases.random(10, K, seed=1)
    layer = plugged(cases.build(case), kind)
    base = Rtn().build(cases.random(N, K, seed=0, scale=0.05), case.grid)[0]
    plain = plugged(QuantLinear(base, None, layer.bias), kind)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(layer(x.to(dtype)), plain(x.to(dtype)))
        assert layer(x.to(dtype)).dtype == dtype
    assert layer.inputs is not None
    assert torch.equal(plain(x), F.linear(layer.inputs(x), base.dequantize(torch.float32), layer.bias))
    assert not torch.equal(plain(x), QuantLinear(base, None, layer.bias)(x))


@every_place
@every_kind
def test_folded_is_trained(name: str, kind: Activations) -> None:
    case = TRAINED[name]
    layer, x, _, _ = cases.trained(case)
    plugged(layer, kind)
    assert layer.adapter is not None
    if case.place == "output":
        return  # kept; merging is refused (test_simulation.py)
    after = QuantLinear(layer.adapter.fold(layer.base).weight, None, layer.bias, inputs=layer.inputs)
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(layer(x.to(dtype)), after(x.to(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(layer(x), after(x))


def test_autocast_rounds_what_the_layer_computes_with() -> None:
    """The input is cast first, then rounded in float32: the numbers of a bfloat16 model."""
    layer, x = plugged(cases.build(CASES[PLACES[6]]), KINDS["a8"]), cases.random(5, K, seed=3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = layer(x)
    assert torch.equal(inside, layer(x.bfloat16()))


@every_kind
def test_a_step_of_generation_reads_rounded_inputs(kind: Activations) -> None:
    layer = plugged(QuantLinear(cases.build(CASES["rtn-int4-g32-integer"]).base), kind)
    x = cases.random(3, 1, K, seed=3)
    with torch.no_grad():
        step = layer(x)
    torch.testing.assert_close(step, layer(x.expand(3, 2, K))[:, :1], rtol=1e-5, atol=1e-6)


@every_place
@every_kind
def test_copies_change_nothing(name: str, kind: Activations, tmp_path: Path) -> None:
    layer, x = plugged(cases.build(CASES[name]), kind), cases.random(5, K, seed=2)
    y = layer(x)
    save_file({k: v.clone() for k, v in layer.state_dict().items()}, tmp_path / "layer.safetensors")
    with torch.device("meta"):
        laid_out = linear.from_spec(layer.spec(), torch.float32)
    laid_out.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    for other in (laid_out, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.bfloat16()):
        assert torch.equal(other(x), y)
        assert other.spec() == layer.spec()
    assert all(not p.requires_grad for n, p in layer.named_parameters() if n.startswith("inputs"))
    assert not list(layer.buffers())


@every_place
def test_bytes_kept_for_backward(name: str) -> None:
    """Beside what is kept without rounding, the input: not a rounded copy of it."""
    kept = {}
    for kind in (None, KINDS["a8"]):
        layer = cases.build(CASES[name], bias=False)
        if kind is not None:
            plugged(layer, kind)
        x = cases.random(16, K, seed=5).requires_grad_()
        owned = {p.untyped_storage().data_ptr() for p in (*layer.parameters(), x)}
        seen: dict[int, Tensor] = {}

        def pack(t: Tensor, owned: set[int] = owned, seen: dict[int, Tensor] = seen) -> Tensor:
            if t.untyped_storage().data_ptr() not in owned:
                seen[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            layer(x)
        kept[kind] = sum(t.untyped_storage().nbytes() for t in seen.values())
    assert kept[KINDS["a8"]] == kept[None]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("name", "kind"), [(PLACES[6], "a8"), (PLACES[2], "a4-static"), (PLACES[0], "a4-symmetric")])
def test_compiles_as_one_graph(name: str, kind: str) -> None:
    torch._dynamo.reset()
    layer, x = plugged(cases.build(CASES[name]), KINDS[kind]), cases.random(6, K, seed=1)
    cases.perturb(layer, CASES[name], seed=0)
    found = []
    for module in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        y.square().mean().backward()
        grads = [p.grad for p in layer.parameters() if p.grad is not None]
        found.append([y.detach(), leaf.grad, *grads])
        for p in layer.parameters():
            p.grad = None
    assert len(found[0]) == len(found[1]) > 2
    for ours, plain in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def test_a_range_of_one_number_is_saved() -> None:
    wide = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    inputs = ActivationQuantizer(KINDS["a4-static"], Range(wide, torch.tensor(-3.0)))
    assert not any(p.requires_grad for p in inputs.parameters())
    state = inputs.state_dict()
    assert {n: (t.dtype, tuple(t.shape)) for n, t in state.items()} == {
        "scale": (torch.float32, (1,)),
        "zero": (torch.int8, (1,)),
    }
