"""Grids: what the values of a quantized weight can be, and the pure functions between weights, levels and codes.

An affine grid has unsigned codes q in [0, 2^b - 1], one scale s for each group of g weights along K, and one of three
kinds of zero:

    symmetric   w = s * (q - 2^(b-1))     nothing stored
    integer     w = s * (q - z)           z an integer in the code range
    real        w = s * q + o             o a real offset

A *level* u is the real-valued coordinate on the grid before rounding: u = w / s + z, or (w - o) / s. All of trimtab's
training methods act on one of these quantities; nothing else in the library knows the arithmetic.

A codebook grid (NF4 and its kin) looks codes up in a table: w = absmax * table[q] (+ offset).

Exactness rests on two habits. Scales and offsets are rounded to the dtype that the file will hold *before* any weight
is put on the grid, and `from_codes` is the one way back, in training, folding and serving alike.

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.quant import opaque
from trimtab.quant.mxfp4 import BLOCK as _POWERS_GROUP
from trimtab.quant.two_level import SUPER, TWO_LEVEL, TwoLevel, nearest

Zero = Literal["symmetric", "integer", "real"]
ScaleDtype = Literal["portable", "bfloat16", "float16", "float32", "q2_k", "q3_k", "q4_k", "q5_k", "q6_k"]
Codebook = Literal["nf4", "nf3", "nf2", "fp4", "mxfp4"]
RangeRule = Literal["minmax", "paper", "lp2", "lp2.4", "lp3", "lp3.5", "lp4"]

_STORAGE = {
    "portable": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    **dict.fromkeys(TWO_LEVEL, torch.float32),  # what their products need
}
_CANDIDATES = 100
"""Shrunken ranges tried by the L_p search, as in LR-QAT's paper."""
_SEARCHED = 1 << 18
"""Weights that the search looks at together."""


@dataclass(frozen=True)
class Grid:
    """An affine grid of `bits` bits with one scale for each `group` weights along the input dimension.

    Examples:
        >>> model, tokenizer = tt.load(name, tt.methods.LrQat(), [{"match": "*", "grid": tt.Grid(4, 64, "integer")}])
    """

    bits: int = 4
    """Width of a code: 1 to 8."""
    group: int | None = None
    """Weights that share a scale, along the input dimension; null is per channel (one scale a row)."""
    zero: Zero = "symmetric"
    """symmetric (nothing stored), integer (a code) or real (an offset in weight units)."""
    scale_dtype: ScaleDtype = "portable"
    """Stored dtype of scales and offsets; portable values are exact in both bfloat16 and float16, and q2_k .. q6_k are the
    two levels of GGUF's k-quants (see `two_level`), each of which has one width, group and zero."""
    range: RangeRule = "minmax"
    """How scales are chosen: minmax, paper (absmax / (2^(b-1) - 1)), or lp2 .. lp4 (search for the least L_p error)."""

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise UserError(f"grid bits: {self.bits} is not between 1 and 8")
        if self.group is not None and self.group < 1:
            raise UserError(f"grid group: {self.group} is not a positive number (null is per channel)")
        _choose("grid zero", self.zero, ("symmetric", "integer", "real"))
        _choose("grid scale_dtype", self.scale_dtype, tuple(_STORAGE))
        _choose("grid range", self.range, RangeRule.__args__)  # type: ignore[attr-defined]
        kind = self.two_level
        if kind is not None and (self.bits, self.group, self.zero) != (kind.bits, kind.group, kind.zero):
            raise UserError(
                f"grid scale_dtype: {self.scale_dtype} has {kind.bits} bits, groups of {kind.group} and a zero that is "
                f"{kind.zero}; write `{{kquant: {self.scale_dtype}}}`"
            )

    @property
    def top(self) -> int:
        """The largest code."""
        return (1 << self.bits) - 1

    @property
    def center(self) -> int:
        """The code that stands for zero on a symmetric grid."""
        return 1 << (self.bits - 1)

    @property
    def storage(self) -> torch.dtype:
        """The dtype that scales and offsets are kept and saved in, or that holds their products on two levels."""
        return _STORAGE[self.scale_dtype]

    @property
    def two_level(self) -> TwoLevel | None:
        """How scales and offsets are stored on two levels, if they are."""
        return TWO_LEVEL.get(self.scale_dtype)

    def describe(self) -> str:
        """For example `int4 g32 integer`, or `q4_k`."""
        if self.two_level is not None:
            return self.scale_dtype
        return f"int{self.bits} {'channel' if self.group is None else f'g{self.group}'} {self.zero}"


@dataclass(frozen=True)
class CodebookGrid:
    """A grid whose values are a table, scaled by the largest magnitude of each group: NF4, NF3, NF2, FP4; or MXFP4, scaled
    by a power of two in groups of 32.

    Examples:
        >>> grid = tt.CodebookGrid("nf4", group=64, double_quant=True)
        >>> model, tokenizer = tt.load(name, tt.methods.Qlora(), [{"match": "*", "grid": grid}])
    """

    codebook: Codebook = "nf4"
    """The table of values."""
    group: int | None = 64
    """Weights that share an absmax, along the input dimension; null is per channel."""
    double_quant: bool = False
    """Whether the absmax are themselves quantized to 8 bits in blocks of 256 (QLoRA's double quantization)."""

    def __post_init__(self) -> None:
        _choose("grid codebook", self.codebook, Codebook.__args__)  # type: ignore[attr-defined]
        if self.group is not None and self.group < 1:
            raise UserError(f"grid group: {self.group} is not a positive number (null is per channel)")
        if self.powers and (self.group != _POWERS_GROUP or self.double_quant):
            raise UserError(
                f"grid codebook: mxfp4 has groups of {_POWERS_GROUP} and no double_quant; write "
                f"{{codebook: mxfp4, group: {_POWERS_GROUP}}}"
            )

    @property
    def bits(self) -> int:
        """Width of a code."""
        return int(self.codebook[-1])

    @property
    def powers(self) -> bool:
        """Whether scales are powers of two, stored as exponents."""
        return self.codebook == "mxfp4"

    def describe(self) -> str:
        """For example `nf4 g64 double`."""
        group = "channel" if self.group is None else f"g{self.group}"
        return f"{self.codebook} {group}{' double' if self.double_quant else ''}"


AnyGrid = Grid | CodebookGrid


def k_quant(name: str, range_: RangeRule = "minmax") -> Grid:
    """The grid of a k-quant of GGUF, `q2_k` to `q6_k`; a `UserError` for any other name."""
    _choose("grid kquant", name, tuple(TWO_LEVEL))
    kind = TWO_LEVEL[name]
    return Grid(kind.bits, kind.group, kind.zero, name, range_)  # type: ignore[arg-type]


def of_width(grid: AnyGrid, bits: int) -> AnyGrid:
    """A grid of the same kind whose codes have so many bits; a `UserError` if there is none."""
    if isinstance(grid, CodebookGrid):
        if bits not in (2, 3, 4):
            raise UserError(f"there is no codebook of {bits} bits; take 2, 3 or 4, or an affine grid")
        return grid if bits == grid.bits else replace(grid, codebook=f"nf{bits}")  # type: ignore[arg-type]
    if grid.two_level is None:
        return replace(grid, bits=bits)
    if f"q{bits}_k" not in TWO_LEVEL:
        raise UserError(f"there is no k-quant of {bits} bits; take 2 to 6, or a grid of bits, group and zero")
    return k_quant(f"q{bits}_k", grid.range)


def same_form(a: AnyGrid | None, b: AnyGrid | None) -> bool:
    """Whether values on one grid are values on the other as they stand: equal but for how ranges are chosen."""
    if isinstance(a, Grid) and isinstance(b, Grid):
        return replace(a, range=b.range) == b
    return a == b


def _choose(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UserError(f"{what}: {value!r} is none of {', '.join(known)}")


def group_size(grid: AnyGrid, in_features: int) -> int:
    """The group size g on a row of `in_features` weights; a `UserError` if it does not divide them."""
    if grid.group is None:
        return in_features
    if in_features % grid.group:
        divisors = [g for g in (16, 32, 64, 128, 256) if in_features % g == 0]
        remedy = f"use one of {divisors} or null (per channel)" if divisors else "use null (per channel)"
        raise UserError(f"group {grid.group} does not divide the {in_features} input features; {remedy}")
    if isinstance(grid, Grid) and grid.two_level is not None and in_features % SUPER:
        raise UserError(
            f"{grid.scale_dtype} stores rows in blocks of {SUPER}, which do not divide the {in_features} input features; "
            f"use {{bits: {grid.bits}, group: 32}} there"
        )
    return grid.group


# ---- straight-through rounding ----------------------------------------------------------------------------------


def ste_round(x: Tensor) -> Tensor:
    """Round half to even; the gradient passes straight through.

    Exact: `round(x) - x` has no rounding error (Sterbenz), and the sum gives round(x) back.
    """
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def round_clamp(u: Tensor, top: int) -> Tensor:
    """`clamp(ste_round(u), 0, top)`: codes as floats; the gradient is 1 inside and 0 where a level was clipped."""
    return ste_round(u).clamp(0, top)


def stored(x: Tensor, scale_dtype: ScaleDtype) -> Tensor:
    """x as the file will hold it, straight-through.

    Args:
        x: float32 or float64 scales, offsets or updates, any shape.
        scale_dtype: see `Grid`.

    Returns:
        Same shape and dtype as x, every value exact in the storage dtype; `portable` is exact in bfloat16 *and*
        float16, so magnitudes are kept between 2^-24 and 65280 there. What is stored on two levels depends on what is
        beside it: `AffineWeight.stored_scale` and `stored_offset` know it.
    """
    return opaque.stored(x, scale_dtype)


# ---- ranges -----------------------------------------------------------------------------------------------------


class Range(NamedTuple):
    """Scales and zeros of one weight, float32, each exact in the grid's storage dtype."""

    scale_NG: Tensor
    zero_NG: Tensor | None
    """Integer zeros, as floats; None for symmetric and real."""
    offset_NG: Tensor | None
    """Real offsets; None for symmetric and integer."""

    def of(self, rows: slice) -> "Range":
        """Those of some rows."""
        return Range(*(None if t is None else t[rows] for t in self))  # type: ignore[arg-type]


Errors = Callable[[Tensor, "Range", Grid, float], Tensor]
"""(w, range, grid, p) to the sum of |w - w_hat|^p over each group, float32 (N, G)."""


def set_range(
    weight_NK: Tensor, grid: Grid, extremes: tuple[Tensor, Tensor] | None = None, errors: Errors | None = None
) -> Range:
    """Choose scales and zeros by the grid's range rule.

    Args:
        weight_NK: (N, K), any floating dtype.
        grid: an affine grid whose group divides K.
        extremes: the least and the largest weight of each group, float32 (N, G), where they are known already.
        errors: a faster way to compute what a search compares.

    Returns:
        Scales (and zeros or offsets) of shape (N, G). An all-zero group has scale 1.
    """
    weight_NK = weight_NK.detach()
    if extremes is None:
        w_NGg = weight_NK.float().unflatten(1, (-1, group_size(grid, weight_NK.shape[1])))
        extremes = w_NGg.amin(-1), w_NGg.amax(-1)
    kind, plain = grid.two_level, grid
    if kind is not None:
        plain = Grid(grid.bits, grid.group, grid.zero, "float32", grid.range)
    if plain.range in ("minmax", "paper"):
        found = _full_range(*extremes, plain, 1.0)
    else:
        found = _search_range(weight_NK, *extremes, plain, errors or _errors)
    return found if kind is None else _on_two_levels(found, grid, kind, extremes[0] == extremes[1])


def _on_two_levels(found: Range, grid: Grid, kind: TwoLevel, constant_NG: Tensor) -> Range:
    """The nearest range that two levels hold; where an offset moves, the scale makes up for it at the other end."""
    j, (scale, _, offset) = SUPER // kind.group, found
    if offset is not None:
        held = nearest(offset, kind.offsets, j)
        scale, offset = scale + (offset - held) / grid.top, held
    # The scale of 1 that a group of zeros has would rule its super-block.
    flat = (constant_NG & (found.scale_NG == 1)).unflatten(1, (-1, j))
    scale = torch.where((flat & ~flat.all(-1, keepdim=True)).flatten(1), 0, scale)
    return Range(nearest(scale, kind.scales, j), None, offset)


def _full_range(low: Tensor, high: Tensor, grid: Grid, shrink: float) -> Range:
    if grid.zero == "symmetric":
        if grid.range == "paper":
            scale = torch.maximum(high, -low) / max(grid.center - 1, 1)
        else:
            # The signed extreme maps to code 0, the end of the range that reaches furthest.
            scale = torch.where(high > -low, high, low) / -grid.center
        return Range(_nonzero(scale * shrink, grid), None, None)
    low, high = low.clamp(max=0) * shrink, high.clamp(min=0) * shrink
    if grid.zero == "integer":
        scale = _nonzero((high - low) / grid.top, grid)
        return Range(scale, (-low / scale).round().clamp(max=grid.top), None)
    offset = stored(low, grid.scale_dtype)
    return Range(_nonzero((high - offset) / grid.top, grid), None, offset)


def _nonzero(scale: Tensor, grid: Grid) -> Tensor:
    """Scales as stored: 1 for an all-zero group, and never rounded to zero, since levels divide by them."""
    rounded = stored(scale, grid.scale_dtype)
    least = torch.full_like(scale, 2.0**-24).copysign(scale)
    return torch.where(scale == 0, torch.ones_like(scale), torch.where(rounded == 0, least, rounded))


def _search_range(weight_NK: Tensor, low: Tensor, high: Tensor, grid: Grid, errors: Errors) -> Range:
    """For each group, the shrunken range with the least sum of |w - w_hat|^p; some rows at a time, for memory's sake."""
    rows = weight_NK.shape[0] if weight_NK.is_meta else max(1, _SEARCHED // weight_NK.shape[1])
    parts = zip(weight_NK.split(rows), low.split(rows), high.split(rows), strict=True)
    columns = zip(*(_search_rows(*part, grid, errors) for part in parts), strict=True)
    return Range(*(None if c[0] is None else torch.cat(c) for c in columns))  # type: ignore[arg-type]


def _search_rows(weight_NK: Tensor, low: Tensor, high: Tensor, grid: Grid, errors: Errors) -> Range:
    p, w_NK = float(grid.range.removeprefix("lp")), weight_NK.float()
    best = _full_range(low, high, grid, 1.0)
    least = torch.full_like(best.scale_NG, torch.inf)
    for i in range(_CANDIDATES):
        tried = _full_range(low, high, grid, 1.0 - i / _CANDIDATES)
        error = errors(w_NK, tried, grid, p)
        better = error < least
        least = torch.where(better, error, least)
        best = Range(
            *(None if a is None else torch.where(better, a, b) for a, b in zip(tried, best, strict=True))  # type: ignore[arg-type]
        )
    return best


def _errors(w_NK: Tensor, tried: Range, grid: Grid, p: float) -> Tensor:
    codes = round_clamp(to_levels(w_NK, tried, grid), grid.top)
    distance = (from_codes(codes, tried, grid) - w_NK).abs()
    return distance.pow(p).unflatten(1, (tried.scale_NG.shape[1], -1)).sum(-1)


# ---- weights <-> levels <-> codes ---------------------------------------------------------------------------------


def to_levels(weight_NK: Tensor, range_: Range, grid: Grid) -> Tensor:
    """Levels u = W / s + z, or (W - o) / s, neither rounded nor clamped; float32 of shape (N, K).

    Differentiable in the weight and in every tensor of the range.
    """
    return opaque.levels_of(weight_NK, *range_, grid.center)


def from_codes(codes_NK: Tensor, range_: Range, grid: Grid, dtype: torch.dtype = torch.float32) -> Tensor:
    """Weights of codes: s * (q - z), or s * q + o. The only dequantization in the library.

    Args:
        codes_NK: codes as floats (any float dtype exact on integers up to 255) or uint8, shape (N, K).
        range_: scales and zeros, shape (N, G), exact in the grid's storage dtype.
        grid: the affine grid, for its width and storage dtype; the kind of zero is that of the range.
        dtype: dtype of the result.

    Returns:
        (N, K) of `dtype`, computed in float32 and rounded once. Differentiable in codes, scale and offset.
    """
    scale, groups = range_.scale_NG.unsqueeze(-1), range_.scale_NG.shape[1]
    if range_.offset_NG is not None:
        q_NGg = codes_NK.to(torch.promote_types(scale.dtype, torch.float32)).unflatten(1, (groups, -1))
        # In place, and not `addcmul`, which is slow where it broadcasts; the two roundings are also those of GGUF.
        w_NGg = q_NGg * scale
        return w_NGg.add_(range_.offset_NG.unsqueeze(-1)).flatten(1).to(dtype)
    # q - z has at most 9 bits and a bfloat16 scale 8: for a bfloat16 result, bfloat16 arithmetic (which rounds the exact
    # product once) gives the same bits as float32 followed by a cast, in half the memory traffic.
    narrow = dtype == torch.bfloat16 and grid.storage == torch.bfloat16
    work = torch.bfloat16 if narrow else torch.promote_types(range_.scale_NG.dtype, torch.float32)
    zero = grid.center if range_.zero_NG is None else range_.zero_NG.to(work).unsqueeze(-1)
    q_NGg = codes_NK.to(work).unflatten(1, (groups, -1))
    return ((q_NGg - zero) * scale.to(work)).flatten(1).to(dtype)
