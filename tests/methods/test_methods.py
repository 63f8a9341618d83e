"""What a method and its adapter say of themselves before a weight is there, against what they then do."""

from dataclasses import FrozenInstanceError, asdict
from typing import Any

import pytest
import torch

import cases
from cases import CASES, TRAINED
from trimtab import methods
from trimtab.errors import UserError
from trimtab.layers.adapters import DeltaOffset, MasterLevels
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight
from trimtab.methods import Method, QaBlora, QaHira, QaLora, Qat, QBara, Rtn
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, set_range, to_levels


@pytest.mark.parametrize("name", CASES)
def test_a_method_says_what_it_attaches(name: str) -> None:
    method, adapter = CASES[name].method, cases.build(CASES[name]).adapter
    assert method.trains == (adapter is not None)
    assert method.adapter is (None if adapter is None else type(adapter))
    assert adapter is None or isinstance(adapter.weight_parameters(), tuple)
    trained = 0 if adapter is None else sum(p.numel() for p in adapter.parameters())
    assert method.trainable(CASES[name].grid, (cases.N, CASES[name].columns)) == trained


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_says_what_it_does_to_the_weight(name: str) -> None:
    layer = cases.build(TRAINED[name])
    cases.perturb(layer, TRAINED[name], 3)
    base, adapter = layer.base, layer.adapter
    assert adapter is not None
    with torch.no_grad():
        moved = not torch.equal(layer.dequantize(torch.float32), base.dequantize(torch.float32))
    assert moved == adapter.moves_weight
    fold = adapter.fold(base)
    assert adapter.folded(base.spec()) == fold.weight.spec()
    assert fold.error == 0 or fold.kind != "bitwise"
    assert not adapter.stays(merge=True)
    assert adapter.stays(merge=False) == (not moved)


# Name -> grid, rates of deltas and of scales, and the fields: what a recipe that says nothing gets.
DEFAULTS: dict[str, tuple[AnyGrid | None, float, float, dict[str, Any]]] = {
    "rtn": (Grid(4, 64), 2e-4, 1e-5, {}),
    "lora": (None, 2e-4, 1e-5, {"rank": 16, "alpha": 16.0}),
    "qlora": (CodebookGrid("nf4", 64, double_quant=True), 2e-4, 1e-5, {"rank": 16, "alpha": 16.0}),
    "loftq": (CodebookGrid("nf4", 64, double_quant=True), 2e-4, 1e-5, {"rank": 16, "alpha": 16.0, "turns": 5}),
    "qa-lora": (Grid(4, 32, "real"), 2e-4, 1e-5, {"rank": 16, "alpha": 16.0, "pool": None, "mean": False}),
    "q-bara": (
        CodebookGrid("nf4", 64, double_quant=True),
        2e-4,
        1e-5,
        {"rank": 16, "alpha": 16.0, "k": 2, "mean": True},
    ),
    "qa-hira": (Grid(4, 32, "real"), 1e-4, 1e-5, {"alpha": 1.0, "repeat": 1, "pool": None, "mean": False}),
    "qa-blora": (
        Grid(4, 32, "real"),
        2e-4,
        1e-5,
        {"rank": 16, "alpha": 16.0, "repeat": 2, "pool": None, "mean": False},
    ),
    "peqa": (Grid(4, 64), 2e-4, 5e-5, {}),
    "lr-qat": (
        Grid(4, 64),
        1e-3,
        1e-5,
        {"rank": 32, "alpha": 1.0, "storage": "fixed8", "k": 1, "mean": True, "svd": False},
    ),
    "qat": (Grid(4, 64), 5e-5, 1e-5, {}),
}


@pytest.mark.parametrize("method", methods.ALL, ids=lambda m: m.name)
def test_the_defaults_are_those_that_were_measured(method: type[Method]) -> None:
    """A default is part of a method: a rate ten times off, a mean for a sum, train another model without a word."""
    grid, lr, lr_scale, options = DEFAULTS[method.name]
    assert (method.grid, method.lr, method.lr_scale) == (grid, lr, lr_scale)
    assert asdict(method()) == {"adapter_dtype": "bfloat16", **options}
    with pytest.raises(FrozenInstanceError):
        method().adapter_dtype = "float32"  # type: ignore[misc]
    with pytest.raises(TypeError, match="positional"):
        method("bfloat16")  # type: ignore[call-arg]


@pytest.mark.parametrize("method", methods.ALL, ids=lambda m: m.name)
def test_a_group_that_does_not_divide_is_refused_before_a_weight_is_there(method: type[Method]) -> None:
    grid = CodebookGrid("nf4", 48) if method.name in ("qlora", "loftq") else Grid(4, 48, "real")
    with pytest.raises(UserError, match=r"group 48 does not divide the 64 input features; use one of \[16, 32, 64\]"):
        method().delta(grid, (8, 64))


@pytest.mark.parametrize("method", [QaHira(), QaLora(), QaBlora()], ids=lambda m: m.name)
def test_pooling_is_a_sum_over_the_group_by_default(method: Method) -> None:
    """A factor or a number of 1/2 everywhere moves every weight by the same, whatever the size of the group."""
    layer = QuantLinear(*method.build(cases.random(8, 64, seed=0), method.grid))
    assert isinstance(layer.adapter, DeltaOffset)
    assert layer.adapter.delta.shape.pool == 32
    with torch.no_grad():
        for p in layer.adapter.delta.parameters():
            p.fill_(0.5)
        moved = layer.dequantize(torch.float32) - layer.base.dequantize(torch.float32)
    expected = 0.5 if isinstance(method, QaHira) else 0.25 * 16
    torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=0, atol=0.02)


@pytest.mark.parametrize("grid", [Grid(3, 32, "integer"), Grid(2, None, "real"), Grid(4, 32)])
def test_a_master_starts_at_the_levels_that_a_start_gave(grid: Grid) -> None:
    """GPTQ's levels have a fraction: a master at their codes would have lost it."""
    levels = cases.random(8, 64, seed=1).mul(2).add(grid.center).clamp(0, grid.top)
    range_ = set_range(cases.random(8, 64, seed=0), grid)
    source = AffineWeight.of_levels(levels, range_, grid, "fp32")
    base, adapter = Qat().build(source, grid)
    assert isinstance(adapter, MasterLevels)
    torch.testing.assert_close(to_levels(adapter.master, range_, grid), levels, rtol=1e-5, atol=1e-5)
    assert isinstance(base, AffineWeight)
    assert torch.equal(base.integer_codes(), levels.round().to(torch.uint8))
    for source_grid in (grid, CodebookGrid("nf4", 32), None):
        stored, _ = Rtn().build(cases.random(8, 64, seed=0), source_grid)
        _, adapter = Qat().build(stored, grid)
        assert torch.equal(adapter.master, stored.dequantize(torch.float32))  # type: ignore[union-attr]


def test_a_master_is_idle_until_a_code_or_a_scale_of_it_moves() -> None:
    base, adapter = Qat().build(cases.random(cases.N, cases.K, seed=0), Grid(4, 32, "real", "float32"))
    assert isinstance(adapter, MasterLevels)
    assert adapter.idle(base)
    with torch.no_grad():
        kept = adapter.scale[0, 0].clone()
        adapter.scale[0, 0] *= 1 + 1e-5  # no code moves
        assert not adapter.idle(base)
        adapter.scale[0, 0] = kept
        assert adapter.idle(base)
        adapter.master[0, 0] += 2 * adapter.scale.max()
    assert not adapter.idle(base)


def test_the_table_of_methods() -> None:
    """One row each: its names, its own grid, what it is and what may be set."""
    rows = {names.split(", ")[0]: (names, grid, options) for names, grid, _, options in methods.table()}
    assert [*rows] == [m.name for m in methods.ALL] == [*DEFAULTS]
    for name, (grid, *_, options) in DEFAULTS.items():
        said = {"adapter_dtype": "bfloat16", **options}
        assert rows[name][1] == ("float" if grid is None else grid.describe())
        assert rows[name][2] == ", ".join(f"{option}={value}" for option, value in said.items())
    assert all(names.split(", ")[1:] == [*methods.get(name).aliases] for name, (names, *_) in rows.items())


def test_a_balance_that_does_not_divide_says_which_would() -> None:
    for shape, said in (((12, 16), "3 does not divide the 16 input features"), ((16, 12), "3 .* 16 output features")):
        with pytest.raises(UserError, match=rf"q-bara: k {said}; use one of \[1, 2, 4\]"):
            QBara(k=3).delta(Grid(4, 4), shape)
    with pytest.raises(UserError, match=r"k 0 does not divide the 16 input features; use one of \[1, 2, 4, 8, 16\]"):
        QBara(k=0).delta(Grid(4, 4), (16, 16))


def test_what_a_method_cannot_act_on_is_refused_by_its_name() -> None:
    ranked = [m for m in methods.ALL if "rank" in DEFAULTS[m.name][3]]
    assert len(ranked) == 7
    for rank in (0, -1):
        for method in ranked:
            with pytest.raises(UserError, match=f"^{method.name}: rank {rank} is not a positive number"):
                method(rank=rank).delta(Grid(4, 32, "real"), (64, 64))  # type: ignore[call-arg]
    for moved in (QaHira(), QaLora(), QaBlora()):
        with pytest.raises(UserError, match=f"^{moved.name} acts in the zeros of a grid; this layer is in float"):
            moved.delta(None, (64, 64))
    for method in ranked:
        if method not in (QaLora, QaBlora):
            assert method(rank=1).delta(Grid(4, 32), (64, 64)).rank in (1, 2)  # type: ignore[call-arg, union-attr]


def test_an_unknown_method_or_option_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"no method 'lr-qta'.*lr-qat"):
        methods.get("lr-qta")
    with pytest.raises(
        UserError, match=r"method.rnak: lora has no such option.*rank.*it has adapter_dtype, rank, alpha"
    ):
        methods.make("lora", rnak=4)
    assert methods.make("lora", rank=4) == methods.Lora(rank=4)
    assert all(methods.get(alias) is m for m in methods.ALL for alias in (m.name, *m.aliases))
