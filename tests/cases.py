"""Every method on every kind of grid that it admits, with what docs/design.md says of it: what the contracts run over.

Nothing here asks the library what a method is: place, pool, repeat, scaling, rank and the number of trained values are
copied from the table of section 2.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

import reference
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.methods import Loftq, Lora, LrQat, Method, Peqa, QaBlora, QaHira, QaLora, Qat, QBara, Qlora, Rtn
from trimtab.methods.base import Source
from trimtab.models import gptq
from trimtab.models.block_start import Rounding
from trimtab.models.gptq import Gptq
from trimtab.quant import codebook
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, k_quant

N, K, RANK, ALPHA = 48, 64, 4, 8.0
BITS, ZEROS, GROUPS = (2, 3, 4, 8), ("symmetric", "integer", "real"), (32, None)
INTEGERS = {
    "q2_k": ((1, 15), (0, 15)),
    "q3_k": ((-32, 31), (0, 0)),
    "q4_k": ((1, 63), (0, 63)),
    "q5_k": ((1, 63), (0, 63)),
    "q6_k": ((-128, 127), (0, 0)),
}
"""Of scales and of minima, by the layout of GGUF's k-quants."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One method on one grid."""

    name: str
    method: Method
    grid: AnyGrid | None
    place: str
    """none, output, offset, levels or master."""
    pool: int = 1
    repeat: int = 1
    mean: bool = False
    rank: int | None = None
    """Inner rank of the factors; None where there are none."""
    scaling: float = 1.0
    factors: tuple[str, ...] = ()
    """Names of the trained factors."""
    start: Literal["rtn", "gptq", "block"] = "rtn"
    """Where codes come from: rounding to nearest, GPTQ, or levels, scales and zeros that were trained (block by block)."""

    @property
    def columns(self) -> int:
        """K: super-blocks of 256 need more of them."""
        return 2 * 256 if isinstance(self.grid, Grid) and self.grid.scale_dtype in INTEGERS else K

    @property
    def group(self) -> int:
        return self.columns if self.grid is None or self.grid.group is None else self.grid.group

    @property
    def real(self) -> bool:
        return isinstance(self.grid, Grid) and self.grid.zero == "real"

    @property
    def exact_start(self) -> bool:
        """Whether the start has RTN's codes: bfloat16 levels may fall on the other side of a boundary."""
        return getattr(self.method, "storage", "int") != "bf16"

    @property
    def sizes(self) -> dict[str, int]:
        """Trained numbers of each parameter, by the table of the methods."""
        rows, columns, scales = N // self.repeat, self.columns // self.pool, N * (self.columns // self.group)
        rank = self.rank or 0
        known = {"delta.A": rank * columns, "delta.B": rows * rank, "delta.M": rows * columns}
        sizes = {name: known[name] for name in self.factors}
        if self.place in ("levels", "master"):
            sizes["scale"] = scales
            if self.real:
                sizes["offset"] = scales
        if self.place == "master":
            sizes["master"] = N * self.columns
        return sizes


def _grid_name(grid: AnyGrid | None) -> str:
    return "float" if grid is None else grid.describe().replace(" ", "-")


def _cases() -> Iterator[Case]:
    lora: dict[str, Any] = {"rank": RANK, "scaling": ALPHA / RANK, "factors": ("delta.A", "delta.B")}
    balanced = {**lora, "rank": 2 * RANK, "pool": 2, "repeat": 2, "mean": True}
    affine: list[Grid] = [Grid(b, g, z) for b in BITS for z in ZEROS for g in GROUPS]  # type: ignore[arg-type]
    tables = [*(CodebookGrid("nf4", 32, double_quant=d) for d in (False, True)), CodebookGrid("mxfp4", 32)]
    for grid in (*affine, *tables, None):
        yield Case(name="rtn", method=Rtn(), grid=grid, place="none")
        yield Case(name="lora", method=Lora(rank=RANK, alpha=ALPHA), grid=grid, place="output", **lora)
        if grid not in affine:  # the same code as LoRA's
            yield Case(name="qlora", method=Qlora(rank=RANK, alpha=ALPHA), grid=grid, place="output", **lora)
        yield Case(name="q-bara", method=QBara(rank=RANK, alpha=ALPHA, k=2), grid=grid, place="output", **balanced)
    for moving in (*(g for g in affine if g.zero != "symmetric"), *tables):
        p = moving.group or K
        hira = {"pool": p, "repeat": 2, "scaling": 1.5, "factors": ("delta.M",)}
        yield Case(name="qa-hira", method=QaHira(alpha=1.5, repeat=2), grid=moving, place="offset", **hira)
        offset: dict[str, Any] = {"grid": moving, "place": "offset", "pool": p, **lora}
        yield Case(name="qa-lora", method=QaLora(rank=RANK, alpha=ALPHA), **offset)
        yield Case(name="qa-blora", method=QaBlora(rank=RANK, alpha=ALPHA, repeat=2), repeat=2, **offset)
    for grid in affine:
        yield Case(name="peqa", method=Peqa(), grid=grid, place="levels")
        yield Case(name="qat", method=Qat(), grid=grid, place="master")
        for storage in ("fixed8", "int", "bf16", "fp32"):
            method = LrQat(rank=RANK, alpha=ALPHA, storage=storage)  # type: ignore[arg-type]
            yield Case(name=f"lr-qat-{storage}", method=method, grid=grid, place="levels", **lora)
        method = LrQat(rank=RANK, alpha=ALPHA, k=2)
        yield Case(name="lr-qat-k2", method=method, grid=grid, place="levels", **balanced)
        method = LrQat(rank=RANK, alpha=ALPHA, storage="int", svd=True)
        yield Case(name="lr-qat-svd", method=method, grid=grid, place="levels", **lora)
    for grid in (*affine, *tables):
        yield Case(name="loftq", method=Loftq(rank=RANK, alpha=ALPHA), grid=grid, place="output", **lora)
    yield from _from_starts(lora)
    yield from _two_levels(lora)
    # A pool of several groups, and averages.
    wide = Grid(4, 16, "real")
    yield Case(
        name="qa-hira-wide-mean",
        method=QaHira(alpha=1.5, pool=32, mean=True),
        grid=wide,
        place="offset",
        **{**hira, "pool": 32, "repeat": 1, "mean": True},
    )
    yield Case(
        name="qa-lora-wide",
        method=QaLora(rank=RANK, alpha=ALPHA, pool=32),
        grid=replace(wide, zero="integer"),
        place="offset",
        pool=32,
        **lora,
    )


def _from_starts(lora: dict[str, Any]) -> Iterator[Case]:
    """Each place, and each way to keep what GPTQ, or training a block, found."""
    levels: list[tuple[Method, str, dict[str, Any]]] = [
        (Rtn(), "none", {}), (Lora(rank=RANK, alpha=ALPHA), "output", lora), (Peqa(), "levels", {}), (Qat(), "master", {}),
        *((LrQat(rank=RANK, alpha=ALPHA, storage=s), "levels", lora) for s in ("fixed8", "int", "fp32")),  # type: ignore[arg-type]
        (LrQat(rank=RANK, alpha=ALPHA, storage="int", svd=True), "levels", lora),
    ]  # fmt: skip
    for i, (method, place, about) in enumerate(levels):
        for j, grid in enumerate(
            (Grid(3, 32, "integer"), Grid(2, None, "real"), Grid(4, 32), Grid(8, None, "integer"))
        ):
            name = f"gptq-{i}-{method.name}"
            if (i + j) % 2:
                name = f"block-{i}-{method.name}"
                yield Case(name=name, method=method, grid=grid, place=place, start="block", **about)
            if (i + j) % 2 == 0 or i == 4:
                yield Case(name=name, method=method, grid=grid, place=place, start="gptq", **about)
    double = CodebookGrid("nf4", 32, double_quant=True)
    for table in (double, CodebookGrid("mxfp4", 32)):
        yield Case(name="gptq-qlora", method=levels[1][0], grid=table, place="output", start="gptq", **lora)
    hira = {"pool": 32, "repeat": 2, "scaling": 1.5, "factors": ("delta.M",)}
    for grid in (Grid(3, 32, "integer"), Grid(3, 32, "real"), double):
        yield Case(
            name="gptq-qa-hira", method=QaHira(alpha=1.5, repeat=2), grid=grid, place="offset", start="gptq", **hira
        )


def _two_levels(lora: dict[str, Any]) -> Iterator[Case]:
    """Each place on each k-quant."""
    for grid in map(k_quant, INTEGERS):
        yield Case(name="rtn", method=Rtn(), grid=grid, place="none")
        yield Case(name="lora", method=Lora(rank=RANK, alpha=ALPHA), grid=grid, place="output", **lora)
        yield Case(name="peqa", method=Peqa(), grid=grid, place="levels")
        yield Case(name="qat", method=Qat(), grid=grid, place="master")
        for storage in ("fixed8", "int", "fp32"):
            method = LrQat(rank=RANK, alpha=ALPHA, storage=storage)  # type: ignore[arg-type]
            yield Case(name=f"lr-qat-{storage}", method=method, grid=grid, place="levels", **lora)
        if grid.zero == "real":
            p = grid.group or 0
            about: dict[str, Any] = {"grid": grid, "place": "offset", "pool": p}
            hira = {"repeat": 2, "scaling": 1.5, "factors": ("delta.M",)}
            yield Case(name="qa-hira", method=QaHira(alpha=1.5, repeat=2), **about, **hira)
            yield Case(name="qa-lora", method=QaLora(rank=RANK, alpha=ALPHA), **about, **lora)
    for i, grid in enumerate((k_quant("q2_k", "lp2"), k_quant("q3_k"), k_quant("q4_k", "lp2"))):
        method = (LrQat(rank=RANK, alpha=ALPHA), Peqa())[i % 2]
        yield Case(
            name=f"gptq-{method.name}",
            method=method,
            grid=grid,
            place="levels",
            start="gptq",
            **({} if i % 2 else lora),
        )


def _thinned(case: Case) -> bool:
    """One width for each method, zero and group, all four in turn: for contracts in which the width hardly matters."""
    grid = case.grid
    if not isinstance(grid, Grid) or grid.group not in GROUPS or case.start != "rtn":
        return True
    turn = len(case.name) + 2 * ZEROS.index(grid.zero) + GROUPS.index(grid.group)
    return grid.bits == BITS[turn % 4]


CASES = {f"{c.name}-{_grid_name(c.grid)}": c for c in _cases()}
TRAINED = {name: c for name, c in CASES.items() if c.place != "none"}
SOME = {name: c for name, c in CASES.items() if _thinned(c)}


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def source(case: Case, weight_NK: Tensor) -> Source:
    """What the method is given: the weight, what GPTQ made of it for correlated inputs, or what block-wise training may."""
    if case.start == "rtn" or case.grid is None:
        return weight_NK
    if case.start == "block":
        assert isinstance(case.grid, Grid)
        trained = Rounding(weight_NK, case.grid, "all")
        for seed, (moved, far) in enumerate(((trained.c, 0.5), (trained.log_scale, 0.1), (trained.moved, 0.8))):
            moved.detach().add_(random(*moved.shape, seed=seed, scale=far))
        return trained.stored()
    x = random(100, case.columns, seed=50)
    x += x.roll(1, 1)
    return gptq.quantize(weight_NK, x.T @ x, case.grid, Gptq(tokens=torch.zeros(1, 1, dtype=torch.int64)))


def build(case: Case, weight_NK: Tensor | None = None, *, bias: bool = True, seed: int = 0) -> QuantLinear:
    """A layer of the case, on a random weight if none is given."""
    torch.manual_seed(seed)
    weight_NK = random(N, case.columns, seed=seed, scale=0.05) if weight_NK is None else weight_NK
    base, adapter = case.method.build(source(case, weight_NK), case.grid)
    return QuantLinear(base, adapter, random(N, seed=seed + 1) if bias else None)


def steps(layer: QuantLinear) -> Tensor:
    """The size of a step of the grid, (N, 1); a stand-in where there is no affine grid."""
    if isinstance(layer.base, AffineWeight):
        return layer.base.range().scale_NG.abs().mean(1, keepdim=True)
    return torch.full((layer.base.shape[0], 1), 0.01)


def perturb(layer: QuantLinear, case: Case, seed: int) -> None:
    """Move every trained number, far enough that codes flip and some levels are clipped."""
    adapter = layer.adapter
    assert adapter is not None
    torch.manual_seed(seed)
    step = steps(layer)
    with torch.no_grad():
        for name, p in adapter.named_parameters():
            noise = torch.randn_like(p)
            if name == "scale":
                p.mul_(1 + 0.1 * noise)
            elif name == "offset":
                p.add_(0.3 * step * noise)
            elif name == "master":
                p.add_(1.5 * step * noise)
            else:
                p.add_(noise)
        if case.factors:
            last = adapter.get_parameter(case.factors[-1])  # B or M: makes the update 1.5 steps of the grid
            target = 1.5 if case.place == "levels" else 1.5 * step.mean()
            last.mul_(target / adapter.delta.dense().std())  # type: ignore[union-attr,operator]


def expected(layer: QuantLinear, case: Case, x: Tensor, g: Tensor) -> reference.Result:
    """What the equations give for the layer's numbers, in float64."""
    base, adapter, grid, columns = layer.base, layer.adapter, case.grid, layer.base.shape[1]
    x, g = x.double(), g.double()
    values = {} if adapter is None else {n: p.detach().double() for n, p in adapter.named_parameters()}
    update = None
    if case.factors:
        factors = {n.removeprefix("delta."): reference.stored(values[n], "bfloat16") for n in case.factors}
        update = reference.Update(factors, case.scaling, case.pool, case.repeat, case.mean)
    if isinstance(base, CodebookWeight):
        codes = reference.unpacked(base.codes, base.grid.bits, columns).long()
        table = codebook.table(base.grid).double()[codes]
        absmax = base.read_absmax().double()
        weight = table * reference.spread(absmax, columns)
        assert update is not None
        if case.place == "output":
            return _with_bias(reference.output_place(x, g, weight, update), layer)
        zeros = torch.zeros_like(absmax)
        return _with_bias(
            reference.offset_real(x, g, weight, zeros, update, lambda o: reference.stored(o, "float32")), layer
        )
    if not isinstance(base, AffineWeight):
        assert update is not None
        return _with_bias(reference.output_place(x, g, base.dequantize(torch.float64), update), layer)
    assert isinstance(grid, Grid)
    center = torch.full(base.scale.shape, 2.0 ** (grid.bits - 1), dtype=torch.float64)
    middle = center if base.zero is None else base.zero.double()
    phi = reference.phi(base.codes, base.storage, grid.bits, middle, columns)
    zero = torch.zeros_like(center) if grid.zero == "real" else middle
    kept = base.range()
    scale = _held(base, 0)(values.get("scale", kept.scale_NG.double()))
    offset = None if kept.offset_NG is None else kept.offset_NG.double()
    if "offset" in values:
        offset = _held(base, 1)(values["offset"])
    if case.place == "levels":
        result = reference.levels_place(x, g, phi, scale, zero, offset, update, grid.bits)
    elif case.place == "master":
        result = reference.master_place(x, g, values["master"], scale, zero, offset, grid.bits)
    else:
        assert update is not None
        plain = reference.spread(scale, columns) * (phi - reference.spread(zero, columns))
        if case.place == "output":
            weight = plain + (0 if offset is None else reference.spread(offset, columns))
            result = reference.output_place(x, g, weight, update)
        elif offset is not None:
            result = reference.offset_real(x, g, plain, offset, update, _held(base, 1))
        else:
            result = reference.offset_integer(x, g, phi, scale, zero, update, grid.bits)
    return _with_bias(result, layer)


def _held(base: AffineWeight, which: int) -> Callable[[Tensor], Tensor]:
    """What the file holds of scales (0) or offsets (1)."""
    dtype = base.grid.scale_dtype
    if dtype not in INTEGERS:
        return lambda x: reference.stored(x, dtype)
    integers = (base.scale, base.offset)[which]
    assert integers is not None
    return lambda x: reference.on_two_levels(x, integers, *INTEGERS[dtype][which], 256 // (base.grid.group or 0))


def _with_bias(result: reference.Result, layer: QuantLinear) -> reference.Result:
    return result if layer.bias is None else result._replace(y=result.y + layer.bias.double())


def trained(case: Case) -> tuple[QuantLinear, Tensor, Tensor, reference.Result]:
    """A perturbed layer with an input, an upstream gradient and what the equations give.

    Tries seeds until no level is so close to a rounding boundary that float32 and float64 may disagree on its side.
    """
    for seed in range(100):
        layer = build(case, seed=seed)
        perturb(layer, case, seed)
        x, g = random(10, case.columns, seed=seed + 100), random(10, N, seed=seed + 200)
        result = expected(layer, case, x, g)
        if result.gap > 5e-5:
            return layer, x, g, result
    raise AssertionError("no seed keeps every level away from a boundary")
