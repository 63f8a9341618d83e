"""The space's bytes against files, the additive optimum against brute force, sensitivities against plain forward passes."""

import copy
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from skeletons import CONFIGS, skeleton
from trimtab.bit_search import sensitivity
from trimtab.bit_search.additive import front
from trimtab.bit_search.space import space, units
from trimtab.errors import UserError
from trimtab.formats.export_size import export_sizes
from trimtab.formats.native.write import save
from trimtab.layers import weights
from trimtab.methods import LrQat, Qlora, Rtn
from trimtab.models.prepare import fold, prepare
from trimtab.models.targets import targets
from trimtab.models.transformers_bridge import cast_floats
from trimtab.quant.grid import Grid
from trimtab.recipe.rules import Rule

GRID = Grid(4, 32, "integer")
EMBEDDING = Rule("model.embed_tokens", Grid(8, 32))


# ---- the additive optimum -------------------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray]:
    shape = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    count = shape[0] * shape[1]
    sizes = draw(st.lists(st.integers(0, 12), min_size=count, max_size=count))
    # Eighths add up without rounding, so that ties are ties.
    costs = draw(st.lists(st.integers(-4, 40).map(lambda n: n / 8), min_size=count, max_size=count))
    return np.array(sizes).reshape(shape), np.array(costs).reshape(shape)


def everything(sizes: np.ndarray, costs: np.ndarray) -> list[tuple[int, float]]:
    units, choices = sizes.shape
    rows = np.arange(units)
    return [
        (int(sizes[rows, list(c)].sum()), float(costs[rows, list(c)].sum()))
        for c in itertools.product(range(choices), repeat=units)
    ]


@settings(max_examples=200, deadline=None)
@given(tables(), st.integers(0, 100))
def test_the_front_is_that_of_brute_force(given: tuple[np.ndarray, np.ndarray], fixed: int) -> None:
    sizes, costs = given
    found = front(sizes, costs, fixed=fixed)
    points = {(b + fixed, c) for b, c in everything(sizes, costs)}
    best = sorted(p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points))
    assert list(zip(found.bytes.tolist(), found.cost.tolist(), strict=True)) == best
    rows = np.arange(len(sizes))
    for i, (size, cost) in enumerate(best):
        chosen = list(found.configuration(i))
        assert (sizes[rows, chosen].sum() + fixed, costs[rows, chosen].sum()) == (size, cost)
    for budget in range(best[0][0], best[-1][0] + 2):
        assert found.cost[found.within(budget)] == min(c for b, c in points if b <= budget)
    with pytest.raises(UserError, match="smallest configuration"):
        found.within(best[0][0] - 1)


@settings(max_examples=50, deadline=None)
@given(tables(), st.integers(2, 5))
def test_rounded_sizes_never_exceed_a_budget(given: tuple[np.ndarray, np.ndarray], step: int) -> None:
    sizes, costs = given
    found = front(sizes, costs, step=step)
    for i, size in enumerate(found.bytes):
        assert sizes[np.arange(len(sizes)), list(found.configuration(i))].sum() <= size


def test_a_forbidden_choice_is_not_taken() -> None:
    found = front(np.array([[1, 2], [1, 2]]), np.array([[np.inf, 1.0], [3.0, 1.0]]))
    assert [found.configuration(i) for i in range(len(found.bytes))] == [(1, 0), (1, 1)]


def test_a_front_of_a_large_space_is_quick() -> None:
    """120 units of four sizes, as in a model of 30 layers."""
    sizes = np.tile(np.array([[2, 3, 4, 8]]) * np.array([[9], [5], [24], [12]]), (30, 1))
    costs = np.random.default_rng(0).random((120, 1)) * 4.0 ** -np.array([2, 3, 4, 8])
    found = front(sizes, costs)
    assert found.bytes[0] == sizes[:, 0].sum()
    assert found.bytes[-1] == sizes[:, -1].sum()
    assert (np.diff(found.cost) < 0).all()


# ---- the space ------------------------------------------------------------------------------------------------------


def test_units_are_what_engines_fuse() -> None:
    found = units(skeleton(CONFIGS[0]), "fusion")
    assert [u.name for u in found[:4]] == [f"model.layers.0.{n}" for n in ("qkv", "o", "gate_up", "down")]
    assert len(found) == 8
    assert found[0].layers == tuple(f"model.layers.0.self_attn.{n}_proj" for n in "qkv")
    assert [len(u.layers) for u in units(skeleton(CONFIGS[0]), "layer")] == [7, 7]


@pytest.mark.parametrize("config", CONFIGS, ids=["untied", "tied", "qwen2", "gemma3"])
@pytest.mark.parametrize("method", [Rtn(), LrQat(rank=2), Qlora(rank=2)], ids=lambda m: m.name)
def test_bytes_of_a_configuration_are_a_bound_of_its_file(config: object, method: object, tmp_path: Path) -> None:
    laid_out = space(skeleton(config), method, bits=[8, 3, 16], grid=GRID, others=[EMBEDDING])  # type: ignore[arg-type]
    assert laid_out.bits == (3, 8, 16)
    chosen = tuple(torch.randint(3, (len(laid_out.units),), generator=torch.Generator().manual_seed(0)).tolist())
    assert set(chosen) == {0, 1, 2}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.bfloat16)
    prepare(model, method, laid_out.rules(chosen))
    fold(model)
    save(model, tmp_path / "out")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    tensors = len(model.state_dict()) + 1
    assert size <= laid_out.bytes(chosen) <= size + 2 * 11 * tensors + 8
    assert model.get_submodule(laid_out.units[chosen.index(0)].layers[0]).base.grid.bits == 3


@pytest.mark.parametrize(
    ("config", "format_"),
    [
        (config, format_)
        for config in CONFIGS
        for format_ in ("gguf", "compressed-tensors", "mlx", "dense")
        if (config.model_type, format_) != ("gemma3_text", "gguf")  # whose windows llama.cpp computes otherwise
    ],
)
def test_bytes_may_be_those_of_another_format(config: object, format_: str) -> None:
    """Additive, and what `plan` says of the format; test_export_size holds that to files."""
    method = LrQat(rank=2)
    laid_out = space(
        skeleton(config), method, bits=[8, 3, 16], grid=Grid(4, 32, "symmetric"), others=[EMBEDDING], size_of=format_
    )
    for seed in range(3):
        chosen = tuple(torch.randint(3, (len(laid_out.units),), generator=torch.Generator().manual_seed(seed)).tolist())
        model = skeleton(config)
        cast_floats(model, torch.bfloat16)
        placed = targets(model, method, laid_out.rules(chosen))
        assert {format_: laid_out.bytes(chosen)} == export_sizes(
            model, placed, method, dtype=torch.bfloat16, only=[format_]
        )


def test_a_format_that_does_not_hold_a_choice_is_named() -> None:
    with pytest.raises(UserError, match=r"search.budget_of: gguf: model.layers.0.self_attn.q_proj: has 8-bit codes"):
        space(skeleton(CONFIGS[0]), Rtn(), bits=[8, 4], grid=GRID, size_of="gguf")  # type: ignore[arg-type]


# ---- sensitivities --------------------------------------------------------------------------------------------------

IDS = torch.arange(36).view(3, 12) % 70
PLACEMENTS = (Grid(2, 32, "integer"), Grid(4, 32, "integer"), None)


def float_model(config: object) -> PreTrainedModel:
    torch.manual_seed(2)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()
    for p in model.parameters():
        p.data += 0.1 * torch.randn_like(p)
    return model


def rounded(config: object, layers: tuple[str, ...], grid: Grid) -> PreTrainedModel:
    model = float_model(config)
    for name in layers:
        linear = model.get_submodule(name)
        linear.weight.data = weights.quantize(linear.weight.data, grid).dequantize(torch.float32)
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=["untied", "tied", "qwen2", "gemma3"])
def test_exact_sensitivity_is_kl_by_whole_passes(config: object) -> None:
    model = float_model(config)
    found_units = units(model, "fusion")
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = sensitivity.exact(model, found_units, PLACEMENTS, IDS, micro_batch=2)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with torch.no_grad():
        p = model(input_ids=IDS).logits.double().softmax(-1)
        for u in (0, 3, 6):
            for c in (0, 1):
                logits = rounded(config, found_units[u].layers, PLACEMENTS[c])(input_ids=IDS).logits.double()  # type: ignore[arg-type]
                kl = (p * (p.log() - logits.log_softmax(-1))).sum(-1).mean().item()
                assert found.cost_UC[u, c] == pytest.approx(kl, rel=1e-3, abs=1e-7)
    assert (found.cost_UC[:, 2] == 0).all()
    # 4 units and 2 grids in each of 2 layers: a whole pass each for the first, half for the second; and two float passes.
    assert found.passes == 2 + 8 * 1 + 8 * 0.5


def test_fisher_is_the_second_derivative_of_kl() -> None:
    """Its diagonal by plain autograd, over every label that could have been drawn, each with its probability."""
    model = float_model(CONFIGS[2])
    with torch.no_grad():
        model.lm_head.weight *= 3  # predictions that are far from uniform, and from the text
    found_units, ids = units(model, "layer"), IDS[:1, :5]
    found = sensitivity.fisher(model, found_units, PLACEMENTS, ids.repeat(600, 1))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    squares = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for place in range(4):
        log_p = model(input_ids=ids).logits[0, place].log_softmax(-1)
        for label in range(len(log_p)):
            model.zero_grad()
            log_p[label].backward(retain_graph=True)
            for n, p in model.named_parameters():
                if p.grad is not None:
                    squares[n] += p.grad.square() * log_p[label].exp().detach()
    expected = np.zeros((2, 3))
    for u, unit in enumerate(found_units):
        for c in (0, 1):
            other = rounded(CONFIGS[2], unit.layers, PLACEMENTS[c])  # type: ignore[arg-type]
            for name in unit.layers:
                moved = other.get_submodule(name).weight - model.get_submodule(name).weight
                expected[u, c] += 0.5 * (moved.square() * squares[f"{name}.weight"]).sum().item() / 4
    np.testing.assert_allclose(found.cost_UC, expected, rtol=0.15)
    text = sum(((model(input_ids=ids).logits[0, t].softmax(-1)[ids[0, t + 1]]).item() < 0.5) for t in range(4))
    assert text, "labels of the text would do as well"
