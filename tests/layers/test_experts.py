"""Experts that are open compute what their stacks computed, and what the equation says of the codes they became.

Oracles: transformers' own products over stacks, eager and grouped, and a float64 reference written from the equation.
"""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import trimtab as tt
from experts import CONFIGS, FOUR, logits, mixture
from trimtab.layers.experts import QuantExperts, closed, layers_in, open_up, stacks
from trimtab.methods import LrQat, Rtn
from trimtab.models.opening import open_layers


def experts_of(model: Any) -> Any:
    return next(m for m in model.modules() if stacks(m) or isinstance(m, QuantExperts))


def routed(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, choices and weights; expert 2 is nobody's choice."""
    torch.manual_seed(1)
    chosen = torch.tensor([[0, 1], [1, 3], [3, 0], [0, 3], [1, 0]])
    assert count == 4
    return torch.randn(5, 32), chosen, torch.rand(5, 2)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", CONFIGS)
def test_open_experts_compute_what_their_stacks_computed(name: str, implementation: str) -> None:
    """With gradients of the tokens and of the router's weights, which are what reaches the rest of the model."""
    model = mixture(name)
    model.config._experts_implementation = implementation
    whole = experts_of(model)
    found = []
    for module in (whole, open_copy(whole)):
        x, chosen, weight = routed(4)
        x.requires_grad_()
        weight.requires_grad_()
        y = module(x, chosen, weight)
        y.square().sum().backward()
        found.append((y.detach(), x.grad, weight.grad))
    for theirs, ours in zip(*found, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def open_copy(module: Any) -> Any:
    made = copy.deepcopy(module)
    open_up(made)
    return made


def test_what_a_mixture_is_in_float64() -> None:
    """y_t = sum of p_te down_e(silu(gate_e x_t) up_e x_t), with the very numbers that the codes stand for."""
    model = tt.prepare(mixture("mixtral"), Rtn(), FOUR)
    experts = experts_of(model)
    x, chosen, weight = routed(4)
    expected = torch.zeros(5, 32, dtype=torch.float64)
    for t in range(5):
        for c in range(2):
            e = experts[int(chosen[t, c])]
            gate_up, down = (m.base.dequantize(torch.float64) for m in (e.gate_up_proj, e.down_proj))
            gate, up = (gate_up @ x[t].double()).chunk(2)
            expected[t] += weight[t, c].double() * (down @ (gate * gate.sigmoid() * up))
    assert_close(experts(x, chosen, weight).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_number_of_all_experts_is_no_ones_choice() -> None:
    experts = open_copy(experts_of(mixture("qwen3_moe")))
    x, chosen, weight = routed(4)
    some = chosen.clone()
    some[:, 1] = 4
    assert_close(experts(x, some, weight), experts(x, chosen[:, :1], weight[:, :1]))


def test_no_copy_is_made_of_a_stack() -> None:
    experts = experts_of(mixture("gpt_oss"))
    first = stacks(experts)[0]
    for name, layer in layers_in(experts):
        if name.endswith(first.name):
            assert layer.weight.untyped_storage().data_ptr() == first.weight_ENK.untyped_storage().data_ptr()
    assert [name for name, _ in layers_in(experts)][:3] == ["0.gate_up_proj", "0.down_proj", "1.gate_up_proj"]


def test_a_stack_that_is_gone_is_not_found_without_a_word() -> None:
    experts = open_copy(experts_of(mixture("mixtral")))
    with pytest.raises(AttributeError, match=r"no stack `down_proj`: each expert is a layer of its own here"):
        _ = experts.down_proj
    assert experts[1].down_proj.weight.shape == (32, 64)
    assert not stacks(experts)
    assert not list(layers_in(experts))


@pytest.mark.parametrize("broken", ["of two dimensions", "not there", "without its bias"])
def test_what_only_declares_itself_a_stack_is_none(broken: str) -> None:
    """Each matters by itself: a module of transformers' declarations may hold anything."""
    experts = experts_of(mixture("gpt_oss"))
    assert len(stacks(experts)) == 2
    if broken == "of two dimensions":
        experts.down_proj = torch.nn.Parameter(torch.zeros(4, 4))
    elif broken == "not there":
        experts.down_proj = None
    else:
        experts.down_proj_bias = None
    assert not stacks(experts)


def test_names_lead_back_to_stacks() -> None:
    assert closed("model.layers.0.mlp.experts.3.down_proj.weight") == ("model.layers.0.mlp.experts.down_proj", 3)
    assert closed("experts.3.up_proj.weight") == ("experts.up_proj", 3)
    assert closed("mlp.experts.11.up_proj.bias") == ("mlp.experts.up_proj_bias", 11)
    assert closed("mlp.experts.11.up_proj.codes") is None
    assert closed("model.layers.mlp.down_proj.weight") is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_open_too(copied: Any) -> None:
    model = tt.prepare(mixture("mixtral"), LrQat(rank=2), FOUR)
    again = copied(model)
    assert isinstance(experts_of(again), QuantExperts)
    assert torch.equal(logits(again), logits(model))


def test_a_plan_spreads_tokens_evenly() -> None:
    """On the meta device nobody knows what the router chooses."""
    with torch.device("meta"):
        model = mixture("mixtral")
        open_layers(model)
        rows: list[int] = []
        for layer in experts_of(model).modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
        y = experts_of(model)(torch.empty(10, 32), torch.empty(10, 2, dtype=torch.int64), torch.empty(10, 2))
    assert y.shape == (10, 32)
    assert rows == [5] * 8


def test_every_expert_is_trained_where_processes_sum_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose tokens choose other experts would wait for ever, or add what is not there."""
    model = tt.prepare(mixture("mixtral"), LrQat(rank=2), FOUR)
    experts = experts_of(model)
    x, chosen, weight = routed(4)

    def with_gradients() -> list[bool]:
        model.zero_grad()
        experts(x.requires_grad_(), chosen, weight).sum().backward()
        return [all(p.grad is not None for p in experts[e].parameters() if p.requires_grad) for e in range(4)]

    alone = experts(x, chosen, weight)
    assert with_gradients() == [True, True, False, True]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert with_gradients() == [True] * 4
    assert torch.equal(experts(x, chosen, weight), alone)
