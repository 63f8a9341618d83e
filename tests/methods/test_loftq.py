"""LoftQ and the SVD start against float64 loops, and against peft's own LoftQ where the two can be compared."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import cases
import reference
import tiny
from trimtab.errors import UserError
from trimtab.layers import weights
from trimtab.layers.adapters import DeltaLevels, DeltaOutput
from trimtab.layers.deltas import DeltaShape, PooledDelta
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, DenseWeight
from trimtab.methods import Loftq, LrQat, Rtn
from trimtab.models.gptq import Gptq
from trimtab.models.load import load
from trimtab.models.prepare import fitted_starts
from trimtab.pipeline.run import Quiet, run
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid
from trimtab.recipe import recipe

N, K = 48, 64
GRIDS: list[AnyGrid] = [
    CodebookGrid("nf4", 32), CodebookGrid("nf2", 16), CodebookGrid("nf3", 32, double_quant=True),
    Grid(2, 32, "integer"), Grid(3, None), Grid(4, 16, "real"),
]  # fmt: skip


def layer(w: Tensor, grid: AnyGrid, **options: Any) -> tuple[Any, DeltaOutput]:
    base, adapter = Loftq(**{"rank": 4, "alpha": 8.0, **options}).build(w, grid)
    assert isinstance(adapter, DeltaOutput)
    return base, adapter


def low_rank(residual: Tensor, rank: int) -> Tensor:
    u, s, v = torch.linalg.svd(residual)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


@pytest.mark.parametrize("alpha", [8.0, 4.0, -0.5])
@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe())
def test_turns_are_those_of_a_float64_loop(grid: AnyGrid, alpha: float) -> None:
    """Whatever the scaling alpha / r: codes, the update and the error that is left, turn by turn to the best one."""
    w = cases.random(N, K, seed=1, scale=0.05)
    update, tried = torch.zeros(N, K, dtype=torch.float64), []
    for _ in range(5):
        q = weights.quantize((w.double() - update).float(), grid)
        residual = w.double() - q.dequantize(torch.float64)
        update = low_rank(residual, 4)
        tried.append(((residual - update).norm().item(), q, update))
    errors = [error for error, _, _ in tried]
    best = next((i for i in range(4) if errors[i + 1] >= errors[i]), 4)
    base, adapter = layer(w, grid, alpha=alpha, adapter_dtype="float32")
    left = (w.double() - base.dequantize(torch.float64) - adapter.delta.dense().double()).norm().item()
    assert left == pytest.approx(errors[best], rel=2e-3)
    assert (base.integer_codes() != tried[best][1].integer_codes()).float().mean() < 0.002
    torch.testing.assert_close(adapter.delta.dense().double(), tried[best][2], rtol=0.05, atol=2e-4)
    assert adapter.fitted is not None
    assert (
        adapter.fitted[0]
        == f"loftq {best + 1} turns, {'at the limit' if best == 4 else 'its error had stopped falling'}"
    )
    first = (w.double() - tried[0][1].dequantize(torch.float64)).norm().item()
    assert adapter.fitted[1] == pytest.approx(errors[best] / first, rel=2e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: g.describe())
def test_it_starts_nearer_than_its_base_and_never_gets_worse_with_turns(grid: AnyGrid) -> None:
    """With factors in bfloat16, as they are trained; the layer that is computed is the one that was fitted."""
    w, x = cases.random(N, K, seed=2, scale=0.05), cases.random(7, K, seed=3)
    errors = []
    for turns in (1, 2, 3, 5, 20):
        base, adapter = layer(w, grid, turns=turns)
        dense = base.dequantize(torch.float32) + adapter.delta.dense()
        y = QuantLinear(base, adapter)(x)
        torch.testing.assert_close(y, x @ dense.T, rtol=1e-4, atol=1e-4)
        errors.append((dense - w).norm().item())
    assert errors == sorted(errors, reverse=True)
    plain = (weights.quantize(w, grid).dequantize(torch.float32) - w).norm().item()
    assert errors[0] < 0.95 * plain
    assert "stopped falling" in adapter.fitted[0]  # type: ignore[index]


@pytest.mark.parametrize("options", [{"turns": 0}, {"alpha": 0.0}], ids=str)
def test_a_fit_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"loftq: alpha .* and turns .* leave nothing to fit; raise them"):
        layer(torch.ones(N, K), CodebookGrid("nf4", 32), **options)
    Loftq(turns=1).delta(CodebookGrid("nf4", 32), (N, K))


def test_where_nothing_is_left_to_fit_no_turn_is_taken() -> None:
    base, adapter = layer(torch.zeros(N, K), CodebookGrid("nf4", 32))
    assert adapter.fitted == ("loftq 0 turns, its error had stopped falling", 0.0)
    assert adapter.idle(base)


def test_peft_fits_the_same_update_in_its_first_turn() -> None:
    """peft leaves the scaling out (its issue 1982), so it is compared at alpha = r. It names a GPU in its source."""
    pytest.importorskip("bitsandbytes")
    theirs = pytest.importorskip("peft.utils.loftq_utils")
    on_cpu = dict(vars(theirs))
    exec(
        "from __future__ import annotations\n" + inspect.getsource(theirs.loftq_init).replace('"cuda"', '"cpu"'), on_cpu
    )
    w = cases.random(128, 128, seed=4, scale=0.05)
    dequantized, a, b = on_cpu["loftq_init"](w, num_bits=4, reduced_rank=8, num_iter=1)
    base, adapter = layer(w, CodebookGrid("nf4", 64), rank=8, turns=1, adapter_dtype="float32")
    torch.testing.assert_close(base.dequantize(torch.float32), dequantized, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(adapter.delta.dense(), b @ a, rtol=1e-2, atol=1e-4)


# ---- LR-QAT's SVD start --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("grid", [g for g in GRIDS if isinstance(g, Grid)], ids=lambda g: g.describe())
def test_svd_starts_at_the_fractions_that_int_drops(grid: Grid, k: int) -> None:
    """clamp(W / s + z) - q and its leading singular values in float64, of the means over k x k tiles; codes do not move."""
    w, rank = cases.random(N, K, seed=7, scale=0.05), 6
    base, adapter = LrQat(rank=rank, alpha=3.0, storage="int", svd=True, k=k, adapter_dtype="float32").build(w, grid)
    assert isinstance(base, AffineWeight)
    assert isinstance(adapter, DeltaLevels)
    assert adapter.delta is not None
    range_ = base.range()
    zero = torch.full_like(range_.scale_NG, 2.0 ** (grid.bits - 1)) if range_.zero_NG is None else range_.zero_NG
    zero = torch.zeros_like(zero) if range_.offset_NG is not None else zero
    offset = torch.zeros_like(zero) if range_.offset_NG is None else range_.offset_NG
    scale, zero, offset = (reference.spread(t.double(), K) for t in (range_.scale_NG, zero, offset))
    u = ((w.double() - offset) / scale + zero).clamp(0, grid.top)
    means = (u - u.round()).reshape(N // k, k, K // k, k).mean((1, 3))
    exact = low_rank(means, k * rank).repeat_interleave(k, 0).repeat_interleave(k, 1)
    exact *= min(1.0, 0.49 / exact.abs().max().item())
    torch.testing.assert_close(adapter.delta.dense().double(), exact, rtol=1e-3, atol=1e-4)
    rtn = weights.quantize(w, grid)
    assert torch.equal(base.codes, rtn.codes)
    assert torch.equal(adapter.fold(base).weight.dequantize(torch.float32), rtn.dequantize(torch.float32))
    # The kept level is nearer to the float weight than whole codes are.
    assert (base.levels() + adapter.delta.dense() - u).norm() < (0.99 if k == 1 else 1.0) * (base.levels() - u).norm()


def test_svd_is_refused_where_there_is_nothing_to_start_from() -> None:
    w, grid = cases.random(N, K, seed=8), Grid(4, 32)
    for method in (LrQat(svd=True), LrQat(svd=True, storage="fp32"), LrQat(svd=True, storage="int", alpha=0.0)):
        with pytest.raises(UserError, match="svd"):
            method.delta(grid, (N, K))
    method = LrQat(svd=True, storage="int", rank=4)
    with pytest.raises(UserError, match="codes already"):
        method.build(weights.quantize(w, grid), grid)
    with torch.device("meta"):
        base, _ = method.build(torch.empty(N, K), grid)
    assert base.codes.is_meta  # type: ignore[union-attr]


def test_what_it_cannot_start_from_is_refused() -> None:
    w, grid = cases.random(N, K, seed=5), Grid(4, 32)
    with pytest.raises(UserError, match="codes already"):
        Loftq().build(weights.quantize(w, grid), grid)
    with pytest.raises(UserError, match="in float"):
        Loftq().delta(None, (N, K))
    with pytest.raises(UserError, match="alpha 0"):
        Loftq(alpha=0.0).delta(grid, (N, K))
    other = weights.quantize(w, Grid(8, 32))
    base, _ = layer(other.dequantize(torch.float32), grid)
    again, _ = Loftq(rank=4, alpha=8.0).build(other, grid)
    assert torch.equal(again.dequantize(torch.float32), base.dequantize(torch.float32))
    dense, _ = Loftq(rank=4, alpha=8.0).build(DenseWeight(w), grid)
    assert torch.equal(dense.dequantize(torch.float32), layer(w, grid)[0].dequantize(torch.float32))


def test_the_nearest_update_of_any_form() -> None:
    """Against least squares over dense tiles: the mean over a tile, then the leading singular values of the means."""
    target = cases.random(N, K, seed=6).double()
    forms = ((4, 1, 1, False), (3, 2, 2, True), (2, 8, 1, False), (None, 4, 2, True), (99, 1, 1, True))
    for rank, pool, repeat, mean in forms:
        shape = DeltaShape(
            out_features=N, in_features=K, rank=rank, scaling=0.7, pool=pool, repeat=repeat, mean=mean, dtype="float32"
        )
        delta = PooledDelta(shape)
        delta.approach(target.float())
        tiles = target.reshape(N // repeat, repeat, K // pool, pool).mean((1, 3))
        inner = tiles if rank is None else low_rank(tiles, min(rank, *tiles.shape))
        exact = inner.repeat_interleave(repeat, 0).repeat_interleave(pool, 1)
        torch.testing.assert_close(delta.dense().double(), exact, rtol=1e-4, atol=1e-4)


def test_a_run_says_once_how_many_turns_were_taken(tmp_path: Path) -> None:
    tiny.model(tmp_path / "model")
    text = tiny.text(tmp_path / "data.jsonl")
    method = {"name": "loftq", "rank": 4}
    said: list[str] = []

    class Listening(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    values = tiny.recipe(tmp_path / "model", text, tmp_path / "out", method=method, evaluate={"parity": False})
    run(recipe.from_dict(values), show=Listening())
    lines = [line for line in said if line.startswith("loftq")]
    assert lines
    assert sum(int(line.split(": ")[1].split()[0]) for line in lines) == 14
    assert all(0 < float(line.split("layers, ")[1].split()[0]) < 1 for line in lines)
    with pytest.raises(UserError, match="finds its own codes"):
        load(str(tmp_path / "model"), Loftq(), start=Gptq(tokens=torch.zeros(1, 4, dtype=torch.int64)))
    assert fitted_starts(load(str(tmp_path / "model"), Rtn())[0]) == []
