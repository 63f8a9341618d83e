"""Rates: what one step of Adam moves is the share that was asked for, whatever the width, the rank and the layer."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trimtab import methods
from trimtab.errors import UserError
from trimtab.layers.linear import QuantLinear
from trimtab.layers.rates import default, param_groups
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
    """So that a checkpoint goes on with a lower rate."""
    made = model(methods.LrQat(rank=4), Grid(4, 32, "real"))
    first = param_groups(made, 0.01, 0.01, steps=50)
    second = param_groups(made, 0.0013, 0.0013, steps=50)
    assert [[id(p) for p in g["params"]] for g in first] == [[id(p) for p in g["params"]] for g in second]
    assert [g["lr"] * 0.13 for g in first] == pytest.approx([g["lr"] for g in second])


def test_defaults_are_read_from_what_is_trained_and_fall_with_the_length_of_a_run() -> None:
    grid = Grid(4, 32, "real")
    for method in (methods.LrQat(), methods.Peqa(), methods.Qat(), methods.QaHira(), methods.QaLora(), methods.Qlora()):
        given = layer(method, grid)
        rates = default(method.kind, 400)
        explicit = param_groups(given, *rates)
        assert param_groups(given, steps=400) == explicit
        assert default(method.kind, 100).scale == pytest.approx(2 * rates.scale)
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
