"""Codebooks: the NormalFloat, FP4 and MXFP4 tables, nearest-entry coding, and how absmax are stored.

    w = absmax_NG * table[q]        q in [0, 2^b - 1]

The tables and the double quantization are those of QLoRA and bitsandbytes, so codes and values agree with it to the bit.
Double quantization stores each absmax, less their mean, as 8 bits of a *dynamic* map (a sign, an exponent in unary,
and a linear fraction in the bits that are left), scaled by the largest magnitude in each block of 256. MXFP4's absmax are
powers of two, stored as their exponents, and its table reaches to 6 (see `mxfp4`).

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

from trimtab.quant import mxfp4
from trimtab.quant.grid import CodebookGrid, group_size

DOUBLE_BLOCK = 256
"""Absmax values that share a scale in double quantization."""

# bitsandbytes' own constants.
_NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip
_FP4_POSITIVE = [0.005208333333333333, 1 / 6, 0.25, 1 / 3, 0.5, 2 / 3, 1.0]


def _normal_float(bits: int) -> list[float]:
    """QLoRA's NormalFloat: quantiles of the normal distribution with an exact zero, scaled to [-1, 1]."""
    half, edge = 1 << (bits - 1), 0.9677083

    def quantiles(n: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(edge, 0.5, n, dtype=torch.float64)[:-1])

    values = torch.cat([quantiles(half + 1), torch.zeros(1, dtype=torch.float64), -quantiles(half)]).sort().values
    return [float(v) for v in values / values.max()]


def _dynamic_map() -> list[float]:
    """The 256 ascending values of the signed dynamic 8-bit map."""
    values = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        for value in ((edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (exponent - 6)).tolist():  # a float32 product, as theirs
            values += [value, -value]
    return sorted(values)


_VALUES = {
    "nf4": _NF4,
    "nf3": _normal_float(3),
    "nf2": _normal_float(2),
    "fp4": [-v for v in reversed(_FP4_POSITIVE)] + [0.0, *_FP4_POSITIVE],
    "mxfp4": list(mxfp4.VALUES),
    "dynamic": _dynamic_map(),
}
_VALUES["fp4 of every code"] = [*_VALUES["fp4"], 0.0]
_VALUES["mxfp4 of every code"] = [*_VALUES["mxfp4"], -0.0]

_tensors: dict[tuple[str, torch.device], Tensor] = {}


def _tensor(name: str, device: torch.device | str) -> Tensor:
    """The dynamic map or a table, made once for each device (but again where tensors are fake or being traced)."""

    def make() -> Tensor:
        return torch.tensor(_VALUES[name], dtype=torch.float32, device=device)

    if torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return make()
    key = name, torch.device(device)
    if key not in _tensors:
        with torch.inference_mode(False):
            _tensors[key] = make()
    return _tensors[key]


def table(grid: CodebookGrid, device: torch.device | str = "cpu") -> Tensor:
    """The ascending float32 values of the codebook; code q stands for entry q. Not to be written to."""
    return _tensor(grid.codebook, device)


def entries(grid: CodebookGrid, device: torch.device | str = "cpu") -> Tensor:
    """The same with an entry for each of the 2^b codes, as kernels read it: FP4 has one value less, and 0 or -0 there."""
    every = f"{grid.codebook} of every code"
    return _tensor(every if every in _VALUES else grid.codebook, device)


def nearest(x: Tensor, values: Tensor) -> Tensor:
    """The index of the nearest of ascending `values`, uint8."""
    return torch.bucketize(x.contiguous(), (values[1:] + values[:-1]) / 2).to(torch.uint8)


def to_codebook(weight_NK: Tensor, grid: CodebookGrid) -> tuple[Tensor, Tensor]:
    """Nearest table entries of a weight (N, K).

    Returns:
        uint8 codes (N, K) and float32 absmax (N, G). An all-zero group has the code of zero, and absmax 0 or the least.
    """
    w_NGg = weight_NK.detach().float().unflatten(1, (-1, group_size(grid, weight_NK.shape[1])))
    absmax_NG = scale_of(w_NGg.abs().amax(-1), grid)
    inverse = torch.where(absmax_NG > 0, 1.0 / absmax_NG, torch.zeros_like(absmax_NG)).unsqueeze(-1)
    return nearest(w_NGg * inverse, table(grid, weight_NK.device)).flatten(1), absmax_NG


def scale_of(absmax_NG: Tensor, grid: CodebookGrid) -> Tensor:
    """What the table is multiplied by in groups of these largest magnitudes, float32 of any shape."""
    return mxfp4.scales(mxfp4.exponents(absmax_NG)) if grid.powers else absmax_NG


def as_kept(absmax_NG: Tensor, grid: CodebookGrid) -> tuple[Tensor, ...]:
    """What is stored of scales (N, G) on this grid: float32, exponents in uint8, or the triple of `compress_absmax`."""
    if grid.powers:
        return (mxfp4.exponents_of(absmax_NG),)
    return compress_absmax(absmax_NG) if grid.double_quant else (absmax_NG,)


def from_codebook(codes_NK: Tensor, absmax_NG: Tensor, table: Tensor, offset_NG: Tensor | None = None) -> Tensor:
    """absmax * table[q] (+ offset), float32 of shape (N, K): the reference of `kernels.dequantize.codebook`."""
    values = torch.index_select(table, 0, codes_NK.flatten().int())
    w_NGg = values.view(*absmax_NG.shape, codes_NK.shape[1] // absmax_NG.shape[1]).mul_(absmax_NG.unsqueeze(-1))
    if offset_NG is not None:
        w_NGg += offset_NG.unsqueeze(-1)
    return w_NGg.view(codes_NK.shape)


def compress_absmax(absmax_NG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization.

    Returns:
        uint8 codes (N, G), float32 scales (ceil(N * G / 256),), and the float32 mean as shape (1,).
    """
    mean = absmax_NG.mean().view(1)
    centred = (absmax_NG - mean).flatten()
    padded = torch.nn.functional.pad(centred, (0, -centred.numel() % DOUBLE_BLOCK)).view(-1, DOUBLE_BLOCK)
    scale = padded.abs().amax(1)
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale)).unsqueeze(1)
    codes = nearest(padded * inverse, dynamic_map(absmax_NG.device)).flatten()[: centred.numel()]
    return codes.view_as(absmax_NG), scale, mean


def dynamic_map(device: torch.device | str = "cpu") -> Tensor:
    """The 256 ascending float32 values of the map that double quantization rounds to. Not to be written to."""
    return _tensor("dynamic", device)


def expand_absmax(codes_NG: Tensor, scale: Tensor, mean: Tensor) -> Tensor:
    """The inverse of `compress_absmax`: float32 absmax (N, G)."""
    flat = torch.index_select(dynamic_map(codes_NG.device), 0, codes_NG.flatten().int())
    return (flat * scale.repeat_interleave(DOUBLE_BLOCK)[: flat.numel()] + mean).view(codes_NG.shape)
