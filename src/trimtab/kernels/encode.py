"""Weights to stored codes in one pass, for loading; C on the CPU, None where the caller's torch composition must serve.

The values are those of `grid.set_range`, `grid.to_levels`, `codebook.to_codebook` and `packing.pack`, bit for bit; only
the sums that a range search compares differ in their last bits, which decides between ranges as good as each other.

Legend: N out features, K in features, G groups in a row.
"""

import torch
from torch import Tensor

from trimtab.kernels import cpu
from trimtab.quant import packing
from trimtab.quant.codebook import table
from trimtab.quant.grid import CodebookGrid, Grid, Range, group_size, set_range


def fits(weight_NK: Tensor) -> bool:
    """Whether there are kernels for this weight."""
    known = weight_NK.dtype in (torch.bfloat16, torch.float32) and weight_NK.is_contiguous()
    return known and type(weight_NK) is Tensor and cpu.serves(weight_NK)


def extremes(weight_NK: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """The least and the largest weight of each group: float32 (N, G) each."""
    low, high = (torch.empty(weight_NK.shape[0], groups) for _ in range(2))
    cpu.extremes(weight_NK, low, high)
    return low, high


def ranges(weight_NK: Tensor, grid: Grid) -> Range:
    """`grid.set_range`, a range search included."""
    groups = weight_NK.shape[1] // group_size(grid, weight_NK.shape[1])
    return set_range(weight_NK, grid, extremes(weight_NK, groups), _errors)


def _errors(w_NK: Tensor, tried: Range, grid: Grid, p: float) -> Tensor:
    out = torch.empty_like(tried.scale_NG)
    cpu.range_errors(out, w_NK, *tried, grid.center, grid.bits, p)
    return out


def codes(weight_NK: Tensor, range_: Range, grid: Grid, fixed: bool) -> Tensor:
    """Packed codes of the nearest values, or with `fixed` the levels in 8 bits: uint8 (N, bytes)."""
    n, k = weight_NK.shape
    out = torch.empty(n, k if fixed else packing.row_bytes(grid.bits, k), dtype=torch.uint8)
    cpu.encode(weight_NK, out, *range_, grid.center, grid.bits, fixed)
    return out


def table_codes(weight_NK: Tensor, grid: CodebookGrid, groups: int) -> tuple[Tensor, Tensor]:
    """Packed codes of the nearest table entries, uint8 (N, bytes), and float32 absmax (N, G)."""
    n, k = weight_NK.shape
    values = table(grid)
    out, absmax = torch.empty(n, packing.row_bytes(grid.bits, k), dtype=torch.uint8), torch.empty(n, groups)
    cpu.encode_table(weight_NK, out, absmax, (values[1:] + values[:-1]) / 2, grid.bits)
    return out, absmax
