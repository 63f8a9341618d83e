"""Rates: what one step of Adam moves is the share that was asked for, whatever the width, the rank and the layer."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from trimtab import methods
from trimtab.errors import UserError
from trimtab.layers import rates
from trimtab.layers.adapter import Kind
from trimtab.layers.linear import QuantLinear
from trimtab.layers.rates import default, param_groups
from trimtab.layers.weights import CodebookWeight, DenseWeight
from trimtab.methods import Method
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid

N, K = 96, 128
SHARE, SCALE_SHARE = 0.01, 0.004


def layer(method: Method, grid: AnyGrid | None, size: float = 0.05) -> QuantLinear:
    """A layer of weights of this size, (N, K)."""
    torch.manual_seed(1)
    base, adapter = method.build(torch.randn(N, K) * size, grid)
    return QuantLinear(base, adapter)


def one_step(of: QuantLinear, **options: Any) -> None:
    """Adam's first step on a random gradient of W: every number moves by its own rate."""
    optimizer = torch.optim.Adam(param_groups(of, SHARE, SCALE_SHARE, parametrization="relative", **options), eps=1e-20)
    assert of.adapter is not None
    torch.manual_seed(2)
    y = of.adapter.weight(of.base, torch.float32) if of.adapter.weight_parameters() else of(torch.eye(K)).T
    (y * torch.randn(N, K)).sum().backward()
    optimizer.step()


def rms(t: Tensor) -> float:
    return t.detach().square().mean().sqrt().item()


@pytest.mark.parametrize("size", [0.02, 0.5])
@pytest.mark.parametrize(
    "options", [{"rank": 4}, {"rank": 32}, {"rank": 8, "alpha": 32.0}, {"rank": 8, "k": 2}], ids=str
)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_move_by_the_share_of_a_step(bits: int, options: dict[str, Any], size: float) -> None:
    """At 8 bits by as far as at 4, which is 17 steps for one."""
    given = layer(methods.LrQat(**options), Grid(bits, 32, "integer"), size)
    one_step(given)
    assert given.adapter is not None
    assert given.adapter.delta is not None
    moved = rms(given.adapter.delta.dense()) / max(1, (2**bits - 1) / 15)
    assert 0.7 * SHARE < moved < 1.5 * SHARE


@pytest.mark.parametrize("rank", [4, 32])
@pytest.mark.parametrize(
    ("method", "grid"),
    [
        (methods.Qlora, CodebookGrid("nf4", 32)),
        (methods.Qlora, CodebookGrid("nf4", 32, double_quant=True)),
        (methods.Qlora, Grid(4, 32)),
        (methods.Qlora, Grid(8, 32)),
        (methods.QBara, CodebookGrid("nf4", 32)),
        (methods.QaLora, Grid(4, 32, "real")),
        (methods.QaBlora, Grid(4, 32, "real")),
        (methods.Lora, None),
    ],
    ids=str,
)
def test_updates_beside_the_weight_move_by_the_share_of_four_bits_step(
    method: type[Method], grid: AnyGrid | None, rank: int
) -> None:
    """In units of the weight: a normal weight's group of 32 spans about four of its deviations."""
    given = layer(method(rank=rank), grid)  # type: ignore[call-arg]
    one_step(given)
    assert given.adapter is not None
    assert given.adapter.delta is not None
    step = 4.2 * 0.05 / 15 if grid is not None else 0.05 / 3
    assert 0.6 * SHARE < rms(given.adapter.delta.dense()) / step < 1.6 * SHARE


@pytest.mark.parametrize(("bits", "wide"), [(2, 1.0), (4, 1.0), (8, 17.0)])
def test_single_numbers_move_by_their_share_exactly(bits: int, wide: float) -> None:
    """QA-HiRA's matrix and QAT's master, but for the rounding of lengths to powers of 2^(1/4)."""
    blocks = layer(methods.QaHira(alpha=4.0, mean=True), Grid(bits, 32, "real"))
    master = layer(methods.Qat(), Grid(bits, 32))
    assert blocks.adapter is not None
    assert master.adapter is not None
    before = master.adapter.master.detach().clone()  # type: ignore[union-attr, operator]
    one_step(blocks)
    one_step(master)
    moved = blocks.adapter.delta.per_group(32).abs() / blocks.base.scale.float().mean()  # type: ignore[union-attr, operator]
    assert moved.mean().item() == pytest.approx(SHARE * wide, rel=0.12)
    moved = (master.adapter.master - before).abs() / master.base.scale.float().abs().mean()  # type: ignore[operator]
    assert moved[moved > 0].mean().item() == pytest.approx(SHARE * wide, rel=0.12)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("method", [methods.Peqa(), methods.LrQat(rank=4), methods.Qat()], ids=lambda m: m.name)
def test_scales_and_offsets_move_the_ends_of_the_range_by_their_share(method: Method, bits: int) -> None:
    given = layer(method, Grid(bits, 32, "real"))
    assert given.adapter is not None
    before = [p.detach().clone() for p in (given.adapter.scale, given.adapter.offset)]  # type: ignore[union-attr, operator]
    one_step(given)
    step = before[0].mean() * max(1, (2**bits - 1) / 15)
    for p, was, ends in zip((given.adapter.scale, given.adapter.offset), before, ((2**bits - 1) / 2, 1), strict=True):  # type: ignore[arg-type]
        moved = (p.detach() - was).abs() * ends / step  # type: ignore[operator]
        # QAT's offset has a gradient where a weight is clipped alone.
        assert moved[moved > 0].mean().item() == pytest.approx(SCALE_SHARE, rel=0.12)


def model(method: Method, grid: AnyGrid | None) -> nn.Module:
    """Two layers of different sizes, a frozen norm and one that is trained."""
    frozen = nn.LayerNorm(K)
    frozen.requires_grad_(False)
    return nn.Sequential(layer(method, grid), frozen, layer(method, grid, 0.9), nn.LayerNorm(K))


@pytest.mark.parametrize(("left", "share"), [(None, 1.0), (0.8, 0.8), (0.25, 0.25), (0.0, 0.05)])
def test_a_fitted_start_moves_by_what_it_has_left(left: float | None, share: float) -> None:
    given = layer(methods.Loftq(rank=8), Grid(2, 32, "real"))
    assert given.adapter is not None
    assert given.adapter.fitted is not None
    found = {}
    for fitted in (None, ("loftq 1 turn", left)):
        given.adapter.fitted = None if left is None else fitted  # type: ignore[assignment]
        found[fitted is None] = sorted(group["lr"] for group in param_groups(given, SHARE))
    quotients = np.array(found[False]) / np.array(found[True])
    assert len(quotients) == 2, "A and B"
    np.testing.assert_allclose(quotients, share, rtol=2**0.25 - 1)  # lengths are rounded


def test_every_parameter_is_in_one_group_and_scales_have_no_decay() -> None:
    made = model(methods.LrQat(rank=4), Grid(4, 32, "real"))
    groups = param_groups(made, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in made.parameters() if p.requires_grad)
    scales = {id(p) for name, p in made.named_parameters() if not name.endswith((".A", ".B"))}
    for group in groups:
        assert group["weight_decay"] == (0.0 if id(group["params"][0]) in scales else 0.1)
        assert len({id(p) in scales for p in group["params"]}) == 1
    assert len(groups) <= 7, "layers of like size share groups"


def test_rates_of_groups_follow_the_rate_asked_for_and_keep_their_members() -> None:
    """So that a checkpoint continues with a lower rate."""
    made = model(methods.LrQat(rank=4), Grid(4, 32, "real"))
    first = param_groups(made, 0.01, 0.01, steps=50)
    second = param_groups(made, 0.0013, 0.0013, steps=50)
    assert [[id(p) for p in g["params"]] for g in first] == [[id(p) for p in g["params"]] for g in second]
    assert [g["lr"] * 0.13 for g in first] == pytest.approx([g["lr"] for g in second])


SHARES = {
    "output": (0.005, 0.018),
    "offset": (0.010, 0.018),
    "blocks": (0.015, 0.018),
    "levels": (0.005, 0.018),
    "scales": (0.005, 0.022),
    "master": (0.004, 0.018),
}
"""Of a delta or master, and of scales, in 100 steps: what docs/rates.md says was measured."""


def test_defaults_are_read_from_what_is_trained_and_fall_with_the_length_of_a_run() -> None:
    grid = Grid(4, 32, "real")
    for method in (methods.LrQat(), methods.Peqa(), methods.Qat(), methods.QaHira(), methods.QaLora(), methods.Qlora()):
        given = layer(method, grid)
        falling = default(method.kind, 400)
        explicit = param_groups(given, *falling)
        assert param_groups(given, steps=400) == explicit
        assert default(method.kind, 100).scale == pytest.approx(2 * falling.scale)
    shares = {kind: (default(kind, 100).delta, default(kind, 100).scale) for kind in get_args(Kind)}
    assert shares == SHARES
    assert default("levels", 30) == default("levels", 1) > default("levels", 31)
    assert default("levels", 10_000) < default("levels", 100) < default("levels", 30)


def test_the_paper_has_one_rate_for_all_deltas_and_one_for_all_scales() -> None:
    made = model(methods.LrQat(rank=4), Grid(4, 32, "real"))
    groups = param_groups(made, 1e-3, 1e-5, parametrization="paper")
    assert [group["lr"] for group in groups] == [1e-3, 1e-5]
    with pytest.raises(UserError, match="'paper' has no rates of its own; give lr and lr_scale"):
        param_groups(made, 1e-3, parametrization="paper")


def test_a_model_that_trains_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="the model trains nothing"):
        param_groups(nn.Sequential(layer(methods.Rtn(), Grid(4, 32))))


def test_adapters_that_act_no_more_have_a_rate() -> None:
    """alpha 0 switches an adapter off: nothing to divide by."""
    assert all(group["lr"] > 0 for group in param_groups(layer(methods.Qlora(alpha=0.0), Grid(4, 32))))


def test_groups_stand_in_one_order_whatever_the_rates_are() -> None:
    """A resumed optimizer has its moments by the places of groups."""
    made = model(methods.LrQat(rank=4), Grid(4, 32, "real"))
    zero, more = param_groups(made, 0.01, 0.0), param_groups(made, 0.01, 0.5)
    assert [[id(p) for p in g["params"]] for g in zero] == [[id(p) for p in g["params"]] for g in more]


def ab(rank: int, columns: int, gain: float) -> dict[str, float]:
    """Lengths of A, and of B in units of the step, by the formulas."""
    a = 1 / np.sqrt(3 * columns)
    return {"A": 10 * a, "B": 1 / gain / (a * np.sqrt(rank * (1 + 2 / np.pi * rank / columns)))}


LENGTHS: dict[str, tuple[Method, AnyGrid | None, float, dict[str, float]]] = {
    "levels": (methods.LrQat(rank=4, alpha=8.0), Grid(4, 32, "real"), 1, {**ab(4, K, 2.0), "s": 2 / 15, "o": 1}),
    "fine": (methods.LrQat(rank=32, alpha=8.0), Grid(8, 32), 17, {**ab(32, K, 0.25), "s": 2 / 255}),
    "balanced": (methods.LrQat(rank=4, alpha=8.0, k=2), Grid(2, 32), 1, {**ab(8, K // 2, 1.0), "s": 2 / 3}),
    "nf4": (methods.Qlora(rank=8, alpha=4.0), CodebookGrid("nf4", 32), 2 / 15, ab(8, K, 0.5)),
    "nf2": (methods.Qlora(rank=8, alpha=4.0), CodebookGrid("nf2", 32, double_quant=True), 2 / 3, ab(8, K, 0.5)),
    "affine": (methods.Qlora(rank=8, alpha=4.0), Grid(8, 32), 17, ab(8, K, 0.5)),
    "off": (methods.Qlora(rank=8, alpha=0.0), Grid(4, 32), 1, ab(8, K, 1.0)),
    "blocks": (methods.QaHira(alpha=4.0, mean=True), Grid(3, 32, "real"), 1, {"M": 8.0}),
    "float": (methods.Lora(rank=8, alpha=4.0), None, 1 / 3, ab(8, K, 0.5)),
    "master": (methods.Qat(), Grid(8, 32, "real"), 17, {"master": 1, "s": 2 / 255, "o": 1}),
    "scales": (methods.Peqa(), Grid(5, 32), 31 / 15, {"s": 2 / 31}),
}
"""Method, grid, a step in units of what is stored, and lengths in steps (of A: absolute)."""


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("name", LENGTHS)
def test_rates_are_shares_of_the_lengths_of_the_formulas(
    name: str, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unrounded, in float64 from what is stored, of a weight in bfloat16; for the mean of zeros stands 1."""
    monkeypatch.setattr(rates, "_rounded", lambda length: length)
    method, grid, step, lengths = LENGTHS[name]
    torch.manual_seed(1)
    base, adapter = method.build(torch.randn(N, K).bfloat16() * (0 if zeros else 0.05), grid)
    assert adapter is not None
    if isinstance(base, DenseWeight):
        size = rms(base.weight.double())
    else:
        scale = base.read_absmax() if isinstance(base, CodebookWeight) else base.scale
        size = scale.double().abs().mean().item()  # type: ignore[union-attr, operator]
    step *= size or 1
    levels = name in ("levels", "fine", "balanced")
    unit = {"A": 1.0, "B": step / (size if levels else 1)}
    share = {"s": SCALE_SHARE, "o": SCALE_SHARE}
    wanted = {n: length * unit.get(n, step) * share.get(n, SHARE) for n, length in lengths.items()}
    groups = param_groups(QuantLinear(base, adapter), SHARE, SCALE_SHARE)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    short = {"scale": "s", "offset": "o"}
    found = {short.get(n, n.removeprefix("delta.")): rate[id(p)] for n, p in adapter.named_parameters()}
    assert found == pytest.approx(wanted, rel=1e-5)


def test_one_absolute_rate_of_scales_suits_each_width_in_proportion() -> None:
    """The largest weight of b bits moves by (2^b - 1) ds. Offsets and what has no width keep the rate."""
    made = [layer(methods.Peqa(), Grid(b, 32, "real")) for b in (2, 4, 8)]
    made.append(layer(methods.QaHira(), CodebookGrid("nf4", 32)))
    groups = param_groups(nn.ModuleList(made), 1e-3, 1e-5, parametrization="paper", scale_bits=4)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    found = [[rate[id(p)] for p in m.adapter.parameters()] for m in made]  # type: ignore[union-attr]
    exact = [[1e-5 * 15 / 3, 1e-5], [1e-5, 1e-5], [1e-5 * 15 / 255, 1e-5], [1e-3]]
    assert [pytest.approx(x) for x in exact] == found


def test_what_is_frozen_has_no_group_and_what_is_shared_has_one() -> None:
    first, second = (layer(methods.Qlora(rank=4), Grid(4, 32)) for _ in range(2))
    first.get_parameter("adapter.delta.A").requires_grad_(False)
    second.adapter.delta.B = first.get_parameter("adapter.delta.B")  # type: ignore[union-attr]
    grouped = [p for group in param_groups(nn.ModuleList([first, second])) for p in group["params"]]
    wanted = [first.get_parameter("adapter.delta.B"), second.get_parameter("adapter.delta.A")]
    assert sorted(map(id, grouped)) == sorted(map(id, wanted))


def test_what_somebody_trains_as_well_moves_by_the_share_of_its_size() -> None:
    """Root mean square, rounded as lengths are; 1 where it is zero, and where rates are absolute."""
    made = nn.Sequential(layer(methods.Peqa(), Grid(4, 32)), nn.LayerNorm(K))
    weight, bias = made[1].weight, made[1].bias
    with torch.no_grad():
        weight.copy_(torch.tensor([-6.0, 2.0]).repeat(K // 2))  # of size 20^(1/2), next to 2^(9/4)
    for parametrization, of_weight in (("relative", 2**2.25), ("paper", 1.0)):
        groups = param_groups(made, SHARE, SCALE_SHARE, parametrization=parametrization)  # type: ignore[arg-type]
        rate = {id(p): group["lr"] for group in groups for p in group["params"]}
        assert rate[id(weight)] == pytest.approx(SCALE_SHARE * of_weight)
        assert rate[id(bias)] == pytest.approx(SCALE_SHARE)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_on_grids_of_two_bits_defaults_do_not_fall(kind: Kind) -> None:
    """Every length has the rates of 30 steps; each layer's own width decides."""
    assert default(kind, 300, 2) == default(kind, 30, 2) == default(kind, 30) == default(kind, 30, 3)
    assert default(kind, 300, 3) == default(kind, 300) < default(kind, 300, 1)


def test_each_layer_has_the_defaults_of_its_own_width() -> None:
    mixed = nn.Sequential(*(layer(methods.Peqa(), Grid(bits, 32)) for bits in (2, 3)))
    found = {}
    for steps in (30, 120):
        moves = {id(p): group["lr"] for group in param_groups(mixed, steps=steps) for p in group["params"]}
        found[steps] = np.array([moves[id(one.adapter.scale)] for one in mixed])  # type: ignore[union-attr]
    np.testing.assert_allclose(found[120] / found[30], [1.0, 0.5])


def test_defaults_of_a_run_of_a_hundred_steps_without_decay() -> None:
    made = model(methods.LrQat(rank=4), Grid(4, 32, "real"))
    assert param_groups(made) == param_groups(made, steps=100, weight_decay=0.0)


def test_groups_stand_from_the_longest_to_the_shortest_scales_last() -> None:
    """An order that no later version may change: checkpoints are read by it."""
    groups = param_groups(model(methods.LrQat(rank=4), Grid(4, 32, "real")), 1.0, 1.0, weight_decay=0.1)
    order = [(group["weight_decay"] == 0, -group["lr"]) for group in groups]
    assert order == sorted(order)
    assert len(order) > 4
    quarters = 4 * np.log2([group["lr"] for group in groups])
    assert quarters == pytest.approx(quarters.round(), abs=1e-6), "of layers of like size there is one group"
