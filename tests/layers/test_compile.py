"""Contract 5: every method compiles as one graph, and compiled it is what it is uncompiled: values, gradients, folding.

Also under inductor, which is what people compile with: unlike `aot_eager` it leaves out casts to a narrower type and back.
What decides a code is therefore an operator (`quant.opaque`): compiled and eager weights are equal bit for bit, so a folded
layer, compiled, gives the very bits of the trained one, compiled.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import cases
from cases import ALPHA, CASES, RANK, SOME, K, N
from trimtab.layers.linear import QuantLinear
from trimtab.methods import LrQat, Qlora
from trimtab.quant.activations import ActivationQuantizer, Activations, range_of, round_to_grid, token_range
from trimtab.quant.grid import CodebookGrid

# Dynamo itself instantiates the class that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BY_METHOD = {name: [key for key in SOME if SOME[key].name == name] for name in {case.name for case in SOME.values()}}
FEW = sorted({key for keys in BY_METHOD.values() for key in (keys[0], keys[-1])})
"""Two kinds of grid for each method: tracing takes a second."""


def outcome(
    layer: Callable[[Tensor], Tensor], x: Tensor, module: nn.Module
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(torch.cos(torch.arange(y.numel()).view(y.shape)).to(y.dtype))
    grads = {name: p.grad for name, p in module.named_parameters() if p.grad is not None}
    for p in module.parameters():
        p.grad = None
    return y.detach(), grads, x.grad


@pytest.mark.parametrize("name", FEW)
def test_compiles_as_one_graph(name: str) -> None:
    dtype = torch.float32 if FEW.index(name) % 2 else torch.bfloat16
    torch._dynamo.reset()
    layer = cases.build(CASES[name])
    if layer.adapter is not None:
        cases.perturb(layer, CASES[name], seed=0)
    x = cases.random(6, layer.base.shape[1], seed=1).to(dtype)
    y, grads, of_x = outcome(layer, x, layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y_, grads_, of_x_ = outcome(compiled, x, layer)
    close = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y_, y, **close)
    assert grads_.keys() == grads.keys()
    for key, grad in grads.items():
        scale = grad.abs().max().clamp(min=1e-6)
        torch.testing.assert_close(grads_[key] / scale, grad / scale, **close)
    torch.testing.assert_close(of_x_, of_x, **close)


# ---- inductor: each graph takes seconds of a C++ compiler -----------------------------------------------------------

EPSILON = 1e-5
"""Largest difference of compiled and eager outputs, of the largest output."""

_balanced = CASES["lr-qat-k2-int3-g32-symmetric"]
INDUCTOR = {
    "balanced lr-qat in bf16": replace(_balanced, method=LrQat(rank=RANK, alpha=ALPHA, k=2, storage="bf16")),
    **{
        name: CASES[name]
        for name in (
            "lr-qat-fixed8-int3-channel-symmetric",
            "lr-qat-bf16-int3-g32-integer",
            "lr-qat-fp32-int4-g32-real",
            "qat-int3-channel-symmetric",
            "peqa-int3-channel-symmetric",
            "qa-hira-int3-channel-integer",
            "qa-hira-nf4-g32-double",
            "qa-lora-int3-g32-real",
            "qa-blora-int4-g32-integer",
            "q-bara-int4-g32-integer",
            "qlora-nf4-g32-double",
            "loftq-nf4-g32",
            "lora-float",
        )
    },
}


class Block(nn.Module):
    """A layer between elementwise operations for the compiler to fuse it with; powers of two change no bit."""

    def __init__(self, layer: QuantLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x * 0.5) * 2
        return y


def compiled(module: nn.Module) -> Callable[[Tensor], Tensor]:
    torch._dynamo.reset()
    made: Callable[[Tensor], Tensor] = torch.compile(module, fullgraph=True, dynamic=False)
    return made


def gradients(run: Callable[[Tensor], Tensor], block: nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    leaf = x.clone().requires_grad_()
    run(leaf).backward(g)
    assert leaf.grad is not None
    found = {n.removeprefix("layer.adapter."): p.grad for n, p in block.named_parameters() if p.grad is not None}
    block.zero_grad()
    return {**found, "x": leaf.grad}


def distance(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)).item()


def train_compare_fold(block: Block, run: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Three compiled steps at a visible rate; then compiled against eager, and both against themselves folded."""
    layer = block.layer
    assert layer.adapter is not None
    optimizer = torch.optim.AdamW([p for p in block.parameters() if p.requires_grad], lr=5e-3)
    for seed in range(3):
        run(cases.random(*x.shape, seed=300 + seed).requires_grad_()).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    x = x.clone().requires_grad_()  # as in the graph that is there
    y, eager = run(x).detach(), block(x).detach()
    assert (y - eager).abs().max() <= EPSILON * eager.abs().max()
    fold = layer.adapter.fold(layer.base)
    if fold.kind == "bitwise":
        folded = Block(QuantLinear(fold.weight, None, layer.bias, inputs=layer.inputs))
        assert torch.equal(folded(x), eager)
        assert torch.equal(compiled(folded)(x), y)


@pytest.mark.parametrize("name", INDUCTOR)
def test_compiled_is_eager_is_folded(name: str) -> None:
    """The default backend trained another model than is folded: logits off by 0.25 for LR-QAT, 0.47 for QAT.

    And under torch 2.11 gradients were zero for float storages and for QAT.
    """
    layer, x, g, exact = cases.trained(INDUCTOR[name])
    block = Block(layer)
    run = compiled(block)
    ours, eager = gradients(run, block, 2 * x, g / 2), gradients(block, block, 2 * x, g / 2)
    assert ours.keys() == eager.keys() == {*exact.grads, "x"}
    for parameter, reference in {**exact.grads, "x": exact.dx / 2}.items():
        assert distance(ours[parameter], reference) <= 1e-6 + 2 * distance(eager[parameter], reference), parameter
    train_compare_fold(block, run, x)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lr-qat-fixed8-int3-g32-integer", Activations(bits=8)),
        ("qa-lora-int3-g32-real", Activations(bits=4, symmetric=True, mode="static")),
    ],
)
def test_rounded_activations_compile_to_the_same_values(name: str, kind: Activations) -> None:
    layer, x, g, _ = cases.trained(CASES[name])
    static = range_of(torch.tensor(-2.0), torch.tensor(2.0), kind.bits, kind.symmetric)
    layer.inputs = ActivationQuantizer(kind, static if kind.mode == "static" else None)
    block = Block(layer)
    run = compiled(block)
    ours, eager = gradients(run, block, 2 * x, g), gradients(block, block, 2 * x, g)
    assert ours.keys() == eager.keys()
    for parameter, grad in eager.items():
        assert grad.abs().max() > 0
        assert distance(ours[parameter], grad) <= EPSILON, parameter
    train_compare_fold(block, run, x)


def test_rounded_keys_compile_to_the_same_values() -> None:
    """In bfloat16: the cast to float32 and back is the operator's own."""

    def attend(k: Tensor) -> Tensor:
        return round_to_grid(k * 0.5, token_range(k * 0.5, 4, False), 4) * 2

    torch._dynamo.reset()
    found = []
    for run in (attend, torch.compile(attend, fullgraph=True, dynamic=False)):
        k = cases.random(2, 3, 5, 16, seed=0).bfloat16().requires_grad_()
        y = run(k)
        y.backward(torch.ones_like(y))
        found.append((y.detach(), k.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["qat-int3-channel-symmetric"])
def test_compiled_in_bfloat16_is_folded(name: str) -> None:
    layer, x, _, _ = cases.trained(CASES[name])
    assert layer.adapter is not None
    x = x.bfloat16().requires_grad_()
    y = compiled(Block(layer))(x)
    assert torch.equal(compiled(Block(QuantLinear(layer.adapter.fold(layer.base).weight, None, layer.bias)))(x), y)


def test_factors_of_rank_one_act_as_bfloat16_holds_them() -> None:
    """Of one column inductor makes a product of numbers, without the cast that a matrix product would ask for."""
    base, adapter = Qlora(rank=1, alpha=ALPHA).build(cases.random(N, K, seed=0, scale=0.05), CodebookGrid("nf4", 32))
    layer = QuantLinear(base, adapter)
    x, found = cases.random(6, K, seed=1).bfloat16(), []
    for p in layer.adapter.parameters():  # type: ignore[union-attr]
        p.data.normal_(0, 0.3)
    for _ in range(2):
        with torch.no_grad():
            found.append(compiled(layer)(x))
        for p in layer.adapter.parameters():  # type: ignore[union-attr]
            p.data.copy_(p.bfloat16())
    assert torch.equal(*found)


def products(run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run(x).sum().backward()
    return sum(event.count for event in found.key_averages() if event.key in ("aten::mm", "aten::addmm"))


@pytest.mark.parametrize("rounded", [False, True], ids=["", "inputs"])
@pytest.mark.parametrize(
    "name", ["lr-qat-fixed8-int3-g32-integer", "qa-hira-int3-channel-integer", "qlora-nf4-g32-double"]
)
def test_a_compiled_step_has_no_more_products_and_keeps_no_weight(name: str, rounded: bool) -> None:
    """What stands in a checkpoint and is asked for in backward is made again, and SiLU asks for a product."""
    layer = cases.build(CASES[name])
    cases.perturb(layer, CASES[name], seed=0)
    layer.inputs = ActivationQuantizer(Activations(8)) if rounded else None
    x, kept = cases.random(6, K, seed=1).requires_grad_(), []

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(layer(x * 0.5))

    torch._dynamo.reset()
    run = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    run(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run(x)
    assert kept
    assert not [t.shape for t in kept if t.is_floating_point() and t.numel() == N * K]
    assert products(run, x) <= products(block, x)


@pytest.mark.parametrize("rounded", [False, True], ids=["", "inputs"])
@pytest.mark.parametrize("name", ["lr-qat-fixed8-int3-g32-integer", "qlora-nf4-g32-double"])
def test_within_a_checkpoint_a_layer_runs_the_same_graph(name: str, rounded: bool) -> None:
    """As `train.activation_checkpointing` has it: forward once more, which keeps no weight for its backward, either."""
    layer = cases.build(CASES[name])
    cases.perturb(layer, CASES[name], seed=0)
    layer.inputs = ActivationQuantizer(Activations(8)) if rounded else None
    x = cases.random(6, K, seed=1)

    def block(x: Tensor) -> Tensor:
        return torch.nn.functional.silu(layer(x * 0.5))

    torch._dynamo.reset()
    run = torch.compile(block, fullgraph=True, backend="aot_eager_decomp_partition")
    bare = outcome(run, x, layer)
    graphs = counters["stats"]["unique_graphs"]
    again = partial(checkpoint, run, use_reentrant=False)
    checkpointed = outcome(again, x, layer)
    assert counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(checkpointed, bare, rtol=0, atol=0)
    assert all(grad.abs().max() > 0 for grad in checkpointed[1].values())
    x.requires_grad_()
    assert products(again, x) <= products(partial(checkpoint, block, use_reentrant=False), x)
    kept: list[torch.Size] = []
    checkpoint(lambda x: _Look.apply(run(x), kept), x, use_reentrant=False).sum().backward()
    assert bare[0].shape in kept
    assert not [shape for shape in kept if shape.numel() == N * K]


class _Look(torch.autograd.Function):
    """The last in a checkpoint: it asks for what it saved, so that all before it has been made again, and looks around."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, kept: list[torch.Size]) -> Tensor:
        ctx.save_for_backward(y)
        ctx.kept = kept
        return y.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        held = [*ctx.saved_tensors]
        gc.collect()
        ctx.kept += [t.shape for t in gc.get_objects() if type(t) is Tensor and t.is_floating_point()]
        del held
        return grad, None


@pytest.mark.parametrize(
    "name",
    ["lr-qat-fixed8-int3-g32-integer", "qat-int3-channel-symmetric", "qa-lora-int3-g32-real", "qlora-nf4-g32-double"],
)
def test_layers_of_one_kind_share_one_graph(name: str) -> None:
    """Nothing of ours makes a compiler start over for each layer, until its limit of eight is reached."""
    torch._dynamo.reset()
    counter = CompileCounter()
    x = cases.random(6, K, seed=1).requires_grad_()
    for seed in range(10):
        layer = cases.build(CASES[name], seed=seed)
        layer.compile(backend=counter, fullgraph=True)
        layer(x)
    assert counter.frame_count == 1
