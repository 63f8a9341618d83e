"""Contract 5: every method compiles as one graph, forward and backward, and gives what it gives uncompiled."""

import pytest
import torch
from torch import Tensor, nn

import cases
from cases import CASES, SOME, K

# Dynamo itself instantiates the class that it traces.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

BY_METHOD = {name: [key for key in SOME if SOME[key].name == name] for name in {case.name for case in SOME.values()}}
FEW = sorted({key for keys in BY_METHOD.values() for key in (keys[0], keys[-1])})
"""Two kinds of grid for each method: tracing takes a second."""


def outcome(layer: nn.Module, x: Tensor, module: nn.Module) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
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
    x = cases.random(6, K, seed=1).to(dtype)
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
