"""GPTQ (arXiv 2210.17323): rounding that makes up for itself, column after column, in the columns still to come.

    least ||X W^T - X W_hat^T||^2 = tr( (W - W_hat) H (W - W_hat)^T ),      H = X^T X from calibration inputs X

Columns are rounded in order. Once column j is fixed, the others move to the least-squares answer to its error, which with
the upper triangular U of H^-1 = U^T U is one row of numbers for all rows of W:

    e_j = (w_j - w_hat_j) / U[j, j]          w_k -= e_j U[j, k]  for k > j

GPTQ stands before a method and knows nothing of it: it gives a stored weight on the method's own grid, which
`methods.base.base_weight` then takes code for code. An affine weight comes as levels in float: those at the moment each
column was rounded, so that a method which keeps fractions (LR-QAT's Phi, full QAT's master) starts from the
error-compensated weight, and every method from the same codes.

Scales: with columns in their own order each group's range is set from the compensated weight when its first column is
reached, as in the paper's code; on two levels, those of a super-block together, since they share a number. With
`act_order` groups are not met one after another, so all ranges are set beforehand, from the weight as it was ("static
groups"); so are doubly quantized absmax, which depend on one another.

The road not taken: inverting H and factoring the inverse. U is also the inverse of the R in H = R R^T, one Cholesky
factorisation of H with its axes reversed and one triangular solve.

Legend: N out features, K in features, g group size, G = K / g groups in a row, W windows, L their length.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from trimtab.devices import double
from trimtab.errors import UserError
from trimtab.kernels import encode
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.quant import codebook, fixed8, packing
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, Range, from_codes, group_size, set_range, to_levels
from trimtab.quant.two_level import SUPER


@dataclass(frozen=True, kw_only=True, eq=False)
class Gptq:
    """GPTQ as the start of any method, and the calibration set of it.

    Examples:
        >>> model, tokenizer = tt.load(name, tt.methods.LrQat(rank=32), rules, start=tt.Gptq(tokens=windows))
    """

    tokens: Tensor
    """Calibration windows, int64 (W, L)."""
    damping: float = 0.01
    """Added to H's diagonal, as a share of its mean."""
    act_order: bool = False
    """Round columns in the order of H's diagonal, largest first."""
    block: int = 128
    """Columns whose errors are carried to the later ones at once; changes nothing but speed."""

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or not self.tokens.numel() or self.tokens.dtype != torch.int64:
            found = f"{self.tokens.dtype} of shape {tuple(self.tokens.shape)}"
            raise UserError(f"gptq tokens: {found}; calibration windows are int64 (windows, length)")
        if self.damping < 0:
            raise UserError(f"gptq damping: {self.damping} is negative; 0.01 is usual")
        if self.block < 1:
            raise UserError(f"gptq block: {self.block} is not a positive number; 128 is usual")


class _Affine:
    """Rounds columns to an affine grid."""

    def __init__(self, weight_NK: Tensor, grid: Grid, ahead: bool) -> None:
        self.grid = grid
        dtype = "float32" if grid.two_level is not None else grid.scale_dtype
        self.column = Grid(grid.bits, None, grid.zero, dtype)
        self.ranges: list[Range] = []
        if ahead:
            self.meet(weight_NK)

    def meet(self, weight_NK: Tensor) -> None:
        """Set the ranges of the next groups."""
        parts = [() if t is None else t.split(1, 1) for t in _ranges(weight_NK.contiguous(), self.grid)]
        self.ranges += [Range(*(p[i] if p else None for p in parts)) for i in range(len(parts[0]))]  # type: ignore[arg-type]

    def round(self, w_N1: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Levels, clamped to the code range, and the values of the codes they round to."""
        levels = to_levels(w_N1, self.ranges[group], self.column).clamp_(0, self.grid.top)
        return levels, from_codes(levels.round(), self.ranges[group], self.column)

    def stored(self, levels_NK: Tensor) -> AffineWeight:
        """Levels in float, on the side that each was rounded to."""
        columns = zip(*self.ranges, strict=True)
        range_ = Range(*(None if t[0] is None else torch.cat(t, 1) for t in columns))  # type: ignore[arg-type]
        return AffineWeight.of_levels(fixed8.fine(levels_NK), range_, self.grid, "fp32")


class _Codebook:
    """Rounds columns to the entries of a table."""

    def __init__(self, weight_NK: Tensor, grid: CodebookGrid, ahead: bool) -> None:
        self.grid, self.table = grid, codebook.table(grid, weight_NK.device)
        self.absmax: list[Tensor] = []
        self.kept: tuple[Tensor, ...] | None = None
        if ahead:
            _, absmax = codebook.to_codebook(weight_NK, grid)
            if grid.double_quant:
                self.kept = codebook.compress_absmax(absmax)
                absmax = codebook.expand_absmax(*self.kept)
            self.absmax = list(absmax.split(1, 1))

    def meet(self, weight_Ng: Tensor) -> None:
        """Set the absmax of the next group."""
        self.absmax.append(codebook.scale_of(weight_Ng.abs().amax(1, keepdim=True), self.grid))

    def round(self, w_N1: Tensor, group: int) -> tuple[Tensor, Tensor]:
        """Codes, and their values."""
        absmax = self.absmax[group]
        codes = codebook.nearest(torch.where(absmax > 0, w_N1 / absmax, torch.zeros_like(w_N1)), self.table)
        return codes.float(), codebook.from_codebook(codes, absmax, self.table)

    def stored(self, codes_NK: Tensor) -> CodebookWeight:
        """Packed codes with their absmax."""
        kept = self.kept or codebook.as_kept(torch.cat(self.absmax, 1), self.grid)
        packed = packing.pack(codes_NK.to(torch.uint8), self.grid.bits)
        return CodebookWeight(packed, kept, self.grid, codes_NK.shape[1])


@torch.no_grad()
def quantize(weight_NK: Tensor, hessian_KK: Tensor, grid: AnyGrid, options: Gptq) -> AffineWeight | CodebookWeight:
    """Round one layer.

    Args:
        weight_NK: float (N, K).
        hessian_KK: X^T X of the layer's inputs, or any multiple of it.
        grid: any grid whose group divides K.
        options: damping, order and block.

    Returns:
        A weight on the grid; an affine one stores its levels as `fp32` (see the module's docstring).

    Raises:
        UserError: where H is zero, or singular in spite of the damping.
    """
    columns, group = weight_NK.shape[1], group_size(grid, weight_NK.shape[1])
    order = hessian_KK.diagonal().argsort(descending=True, stable=True) if options.act_order else None
    ahead = options.act_order or (isinstance(grid, CodebookGrid) and grid.double_quant)
    weight = weight_NK.float()
    rounder = _Affine(weight, grid, ahead) if isinstance(grid, Grid) else _Codebook(weight, grid, ahead)
    u_KK = _upper(hessian_KK, order, options.damping)
    w_KN = (weight.T if order is None else weight.T[order]).clone(memory_format=torch.contiguous_format)
    groups = [i // group for i in (range(columns) if order is None else order.tolist())]
    kept_KN = torch.empty_like(w_KN)
    met = SUPER if isinstance(grid, Grid) and grid.two_level is not None else group
    for start, stop in _chunks(columns, met, options.block):
        errors = torch.empty_like(w_KN[start:stop])
        for j in range(start, stop):
            if not ahead and j % met == 0:
                rounder.meet(w_KN[j : j + met].T)
            kept, value = rounder.round(w_KN[j].unsqueeze(1), groups[j])
            kept_KN[j] = kept.squeeze(1)
            errors[j - start] = (w_KN[j] - value.squeeze(1)) / u_KK[j, j]
            w_KN[j + 1 : stop].addr_(u_KK[j, j + 1 : stop], errors[j - start], alpha=-1)
        w_KN[stop:].addmm_(u_KK[start:stop, stop:].T, errors, alpha=-1)
    if order is not None:
        kept_KN = torch.empty_like(kept_KN).index_copy_(0, order, kept_KN)
    return rounder.stored(kept_KN.T.contiguous())


def _ranges(weight_NK: Tensor, grid: Grid) -> Range:
    return encode.ranges(weight_NK, grid) if encode.fits(weight_NK) else set_range(weight_NK, grid)


def _chunks(columns: int, group: int, block: int) -> Iterator[tuple[int, int]]:
    """Ranges of about `block` columns that hold whole groups or lie in one, so that a group is met up to date."""
    width = block // group * group or block
    span = max(width, group)
    for first in range(0, columns, span):
        last = min(first + span, columns)
        for start in range(first, last, width):
            yield start, min(start + width, last)


def _upper(hessian_KK: Tensor, order: Tensor | None, damping: float) -> Tensor:
    """The upper triangular U of H^-1 = U^T U, float32."""
    h = hessian_KK if order is None else hessian_KK[order][:, order]
    mean = double(h.diagonal()).mean()
    if not mean > 0:
        raise UserError("gptq: no calibration input other than zero reaches this layer; use `start: rtn`")
    reversed_ = double(h.flip(0, 1))
    reversed_.diagonal().add_(damping * mean)
    lower, failed = torch.linalg.cholesky_ex(reversed_)
    del reversed_  # of K x K in float64 there are never more than three: at K = 11008 each is 1 GB
    if failed:
        raise UserError(
            f"gptq: the Hessian of its inputs is singular at damping {damping}; calibrate on more tokens, or raise it"
        )
    upper = torch.linalg.solve_triangular(lower, torch.eye(len(h), dtype=lower.dtype, device=lower.device), upper=False)
    del lower
    return upper.float().flip(0, 1).to(hessian_KK.device)
