"""Every method at the edges of its equations, on layers of one row, one column, and 2^k - 1 and 2^k + 1 of either.

Groups of one weight and of the whole row, pools of the whole row, repeats of every output, ranks of one and beyond the
layer. At each either a `UserError` says what does not fit, or all that the contracts ask of an ordinary layer holds.
"""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import cases
from cases import Case
from trimtab.errors import UserError
from trimtab.layers import linear
from trimtab.layers.linear import QuantLinear
from trimtab.methods import Loftq, Lora, LrQat, Peqa, QaBlora, QaHira, QaLora, Qat, QBara, Qlora, Rtn
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid
from trimtab.quant.packing import owned

SIZES = [(1, 1), (1, 8), (8, 1), (15, 17), (17, 15), (33, 31)]
ALPHA = 2.0


def grids(k: int) -> Iterator[AnyGrid | None]:
    """Each kind with groups of one weight, of a part of the row, of all of it; widths and double quantization by turns."""
    yield None
    widths, doubles = itertools.cycle((2, 3, 4, 8)), itertools.cycle((False, True))
    groups = [1, k, None, *[g for g in (3, 4) if k % g == 0 and g < k]]
    for group in groups:
        for zero in ("symmetric", "integer", "real"):
            yield Grid(next(widths), group, zero)  # type: ignore[arg-type]
        for book in ("nf4", "nf3", "nf2", "fp4"):
            yield CodebookGrid(book, group, next(doubles))  # type: ignore[arg-type]
        next(widths)
        next(doubles)


def edges(n: int, k: int, grid: AnyGrid | None) -> Iterator[Case]:
    """Every method that this grid may have, at both ends of what it can be given."""
    factors: dict[str, Any] = {"factors": ("delta.A", "delta.B"), "grid": grid}
    ranks = (1, 2 * max(n, k))
    for rank in ranks:
        lora = {**factors, "rank": rank, "scaling": ALPHA / rank}
        about = {"rank": rank, "alpha": ALPHA}
        yield Case(name="lora", method=Lora(**about), place="output", **lora)
        yield Case(name="qlora", method=Qlora(**about), place="output", **lora)
        yield Case(name="loftq", method=Loftq(**about), place="output", **lora)
        for b in {1, n, k}:
            balanced = {**lora, "rank": rank * b, "pool": b, "repeat": b, "mean": True}
            yield Case(name=f"q-bara k={b}", method=QBara(**about, k=b), place="output", **balanced)
            yield Case(name=f"lr-qat k={b}", method=LrQat(**about, k=b), place="levels", **balanced)
        for storage in ("int", "bf16", "fp32"):
            yield Case(name=f"lr-qat {storage}", method=LrQat(**about, storage=storage), place="levels", **lora)  # type: ignore[arg-type]
        yield Case(name="lr-qat svd", method=LrQat(**about, storage="int", svd=True), place="levels", **lora)
        group = k if grid is None or grid.group is None else grid.group
        for pool, repeat in itertools.product({group, k}, {1, n}):
            offset = {**lora, "place": "offset", "pool": pool, "repeat": repeat}
            if repeat == 1:
                yield Case(name=f"qa-lora {pool}", method=QaLora(**about, pool=pool), **offset)
            yield Case(name=f"qa-blora {pool} {repeat}", method=QaBlora(**about, pool=pool, repeat=repeat), **offset)
            if rank == 1:
                hira = {**offset, "factors": ("delta.M",), "scaling": ALPHA, "rank": None}
                yield Case(
                    name=f"qa-hira {pool} {repeat}", method=QaHira(alpha=ALPHA, pool=pool, repeat=repeat), **hira
                )
    yield Case(name="peqa", method=Peqa(), grid=grid, place="levels")
    yield Case(name="qat", method=Qat(), grid=grid, place="master")


def move(layer: QuantLinear, case: Case, seed: int) -> None:
    """As `cases.perturb`, also where one number has no spread."""
    assert layer.adapter is not None
    step = cases.steps(layer)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in layer.adapter.named_parameters():
            noise = torch.randn_like(p)
            if name == "scale":
                p.mul_(1 + 0.1 * noise)
            else:
                p.add_(noise * (step if name in ("offset", "master") else 1.0))
        if case.factors:
            last, delta = layer.adapter.get_parameter(case.factors[-1]), layer.adapter.delta
            target = 1.0 if case.place == "levels" else step.mean()
            last.mul_(target / delta.dense().abs().mean().clamp_min(1e-6))  # type: ignore[union-attr,operator]


def close(ours: Tensor | None, exact: Tensor, of: str) -> None:
    assert ours is not None, of
    assert ours.isfinite().all(), of
    # Of terms that cancel, as in the single sum of a layer of one number, only the absolute error is bounded.
    assert (ours.double() - exact).norm() <= 1e-4 * exact.norm() + 1e-5, of


def whole(layer: QuantLinear, label: str) -> None:
    """Saved and read again it is the same, and nothing that is kept is spread out or a piece of something larger."""
    for name, p in layer.named_parameters():
        kept = p.detach()
        assert owned(kept) is kept, (label, name)
    read = load(save(layer.state_dict()))
    with torch.device("meta"):
        laid_out = linear.from_spec(layer.spec(), torch.float32)
    laid_out.load_state_dict(read, assign=True)
    for name, p in laid_out.named_parameters():
        assert torch.equal(p, layer.get_parameter(name)), (label, name)


def hold(case: Case, n: int, k: int) -> bool:
    """The contracts on one layer; False where the method refuses the grid or the shape."""
    label = f"{case.name} on {'float' if case.grid is None else case.grid.describe()} ({n}, {k}), rank {case.rank}"
    weight = cases.random(n, k, seed=0, scale=0.05)
    torch.manual_seed(0)
    try:
        case.method.delta(case.grid, (n, k))  # as `prepare` asks before it builds anything
        base, adapter = case.method.build(weight, case.grid)
    except UserError:
        return False
    layer = QuantLinear(base, adapter)
    x, g = cases.random(5, k, seed=1), cases.random(5, n, seed=2)
    if case.name != "loftq" and "bf16" not in case.name:
        assert torch.equal(layer(x), QuantLinear(Rtn().build(weight, case.grid)[0])(x)), label
    move(layer, case, 3)
    exact = cases.expected(layer, case, x, g)
    if exact.gap > 5e-5:
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(g)
        close(y.detach(), exact.y, label)
        close(leaf.grad, exact.dx, label)
        for name, grad in exact.grads.items():
            close(layer.adapter.get_parameter(name).grad, grad, f"{label}: {name}")  # type: ignore[union-attr]
        layer.zero_grad()
    whole(layer, label)
    fold = layer.adapter.fold(layer.base)  # type: ignore[union-attr]
    folded = QuantLinear(fold.weight)
    whole(folded, label)
    if fold.kind == "bitwise":
        assert torch.equal(folded(x), layer(x)), label
        assert torch.equal(folded.dequantize(torch.bfloat16), layer.dequantize(torch.bfloat16)), label
    return True


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_every_method_at_the_edges_of_its_equations(n: int, k: int) -> None:
    """One combination in seven, another one for each size: all 5017 of them held once, in a minute and a half."""
    every = enumerate(case for grid in grids(k) for case in edges(n, k, grid))
    some = [case for i, case in every if i % 7 == SIZES.index((n, k)) or case.name in ("peqa", "qat")]
    held = {case.name.split()[0] for case in some if hold(case, n, k)}
    assert held == {
        "lora", "qlora", "loftq", "q-bara", "lr-qat", "qa-lora", "qa-blora", "qa-hira", "peqa", "qat",
    }  # fmt: skip


@pytest.mark.parametrize(("n", "k"), SIZES)
@pytest.mark.parametrize("grid", [CodebookGrid("nf4", None), CodebookGrid("nf3", None, True), Grid(4, None, "real")])
def test_an_offset_that_is_shared_has_its_own_memory(grid: AnyGrid, n: int, k: int) -> None:
    """NF4 with QA-HiRA that repeats every output, or QA-LoRA that pools the row, kept an offset of stride 0."""
    shared = [case for case in edges(n, k, grid) if case.place == "offset" and case.pool == k and case.repeat in (1, n)]
    assert len(shared) >= 5
    assert all(hold(case, n, k) for case in shared if case.rank in (None, 1))


def test_what_does_not_fit_is_named() -> None:
    weight = cases.random(15, 17, seed=0)
    for method, grid, said in (
        (QaHira(repeat=2), Grid(4, None, "real"), "repeat 2 does not divide the 15 output features"),
        (QaLora(pool=2), Grid(4, 1, "real"), "pool 2 does not divide the 17 input features"),
        (QaLora(pool=1), Grid(4, None, "real"), "pool 1 is not a multiple of the group 17"),
        (QBara(k=17), Grid(4, None), "k 17 does not divide the 15 output features"),
        (Rtn(), Grid(4, 16), "group 16 does not divide the 17 input features"),
    ):
        with pytest.raises(UserError, match=said):
            method.build(weight, grid)


def test_what_is_kept_has_its_own_memory() -> None:
    large = cases.random(8, 64, seed=0)
    for piece in (large[2:4], large[:, :32], large[:1].expand(4, 64), large.t()):
        base, adapter = Qat().build(piece, replace(Grid(4), scale_dtype="float32"))
        for name, p in (*base.named_parameters(), *adapter.named_parameters()):  # type: ignore[union-attr]
            assert p.untyped_storage().nbytes() == p.numel() * p.element_size(), name
        dense, _ = Lora(rank=1).build(piece, None)
        assert dense.weight.untyped_storage().nbytes() == 4 * piece.numel()
        assert dense.weight.is_contiguous()
