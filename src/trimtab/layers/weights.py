"""How a frozen weight is stored: dense, affine codes, or codebook codes.

Each kind is a module whose tensors are all `Parameter(requires_grad=False)`, never buffers (FSDP2 shards parameters
only), and gives back its (N, K) matrix by `dequantize`. A kind is described by a small JSON `spec`, from which
`from_spec` builds the same module without data, so that a saved model can be laid out before its tensors are read.

An affine weight can also hold more than its codes. `fixed8` (see there) keeps each level in 8 bits with a fraction, `int`
drops the fraction, `bf16` and `fp32` keep u - z (u - 2^(b-1) with a real zero) in floats, for ablations.

Whatever is read of a stored tensor is read after `intact`: a cast behind the model's back is named, not computed with.

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from trimtab.kernels import cpu, dequantize, encode, workspace
from trimtab.kernels.arguments import rows_of
from trimtab.kernels.dequantize import Levels
from trimtab.layers import intact
from trimtab.quant import codebook, fixed8, packing
from trimtab.quant.grid import (
    AnyGrid,
    CodebookGrid,
    Grid,
    Range,
    from_codes,
    group_size,
    round_clamp,
    set_range,
    to_levels,
)

Storage = Literal["int", "fixed8", "bf16", "fp32"]
Spec = dict[str, Any]


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(packing.owned(tensor), requires_grad=False)


class Weight(nn.Module, ABC):
    """A stored (N, K) matrix."""

    def __init__(self, shape: tuple[int, int]) -> None:
        super().__init__()
        self.shape = shape
        self._kept: intact.Kept = {}

    def intact(self) -> Self:
        """This weight; a `UserError` that names the tensor if one is no longer as it was stored."""
        whose = f"{type(self).__name__} of {self.shape[0]} x {self.shape[1]}"
        intact.stored(whose, self._kept, self)
        return self

    @property
    @abstractmethod
    def grid(self) -> AnyGrid | None:
        """The grid that the values lie on; None for a dense weight."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype, *, rows: Tensor | None = None, reuse: bool = False) -> Tensor:
        """The matrix (N, K), or the given rows of it, rounded once to `dtype`.

        With `reuse` the result may lie in memory that the next such call overwrites (see `kernels.workspace`).
        """

    @abstractmethod
    def spec(self) -> Spec:
        """What `from_spec` needs to lay this weight out without data."""

    def product_of_few(self, x_TK: Tensor) -> Tensor | None:
        """x W^T (T, N) of a few rows without ever writing W, summed in float32; None where there is no such way."""
        on_gpu = dequantize.on_gpu(x_TK)
        if x_TK.dtype == torch.float64 or not (on_gpu or cpu.serves(x_TK)):
            return None
        shape = x_TK.shape[0], self.shape[0]
        if on_gpu:  # where each further operator has a price of its own
            y = torch.empty(shape, dtype=x_TK.dtype, device=x_TK.device)
            return y if self._multiply(y, x_TK) else None
        y = torch.empty(shape)
        x = x_TK if x_TK.dtype == torch.bfloat16 else x_TK.float()
        return y.to(x_TK.dtype) if self._multiply(y, x) else None

    def _multiply(self, y: Tensor, x_TK: Tensor) -> bool:
        """Fill y (T, N) with x W^T, if this kind can; dtypes are those of the operator."""
        return False

    def result(self, dtype: torch.dtype, rows: Tensor | None, reuse: bool) -> Tensor:
        """Memory for what `dequantize` returns."""
        shape = (self.shape[0] if rows is None else rows.numel(), self.shape[1])
        device = next(self.parameters()).device
        return (
            workspace.take("weight", shape, dtype, device) if reuse else torch.empty(shape, dtype=dtype, device=device)
        )

    def stored_bytes(self) -> int:
        """Bytes of all tensors as kept in memory and on disk."""
        return sum(p.numel() * p.element_size() for p in self.parameters())


class DenseWeight(Weight):
    """A weight kept as floats: the base of 16-bit LoRA."""

    def __init__(self, weight_NK: Tensor) -> None:
        super().__init__((weight_NK.shape[0], weight_NK.shape[1]))
        self.weight = _frozen(weight_NK)

    @property
    def grid(self) -> None:
        """A dense weight is on no grid."""
        return None

    def dequantize(self, dtype: torch.dtype, *, rows: Tensor | None = None, reuse: bool = False) -> Tensor:
        """The matrix itself, cast to `dtype`."""
        return rows_of(intact.floating("weight", self.weight, self.shape), rows).to(dtype)

    def spec(self) -> Spec:
        """Kind, shape and dtype."""
        return {"kind": "dense", "shape": list(self.shape), "dtype": str(self.weight.dtype).removeprefix("torch.")}


class AffineWeight(Weight):
    """Codes (or levels) on an affine grid, with the scales and zeros of each group.

    Args:
        codes: packed uint8 (N, bytes) for `int`, uint8 (N, K) for `fixed8`, floats (N, K) for `bf16` and `fp32`.
        range_: scales and zeros (N, G); stored in the grid's storage dtype, integer zeros as uint8.
        grid: the affine grid.
        in_features: K.
        storage: what `codes` holds.
    """

    def __init__(self, codes: Tensor, range_: Range, grid: Grid, in_features: int, storage: Storage = "int") -> None:
        super().__init__((codes.shape[0], in_features))
        self._grid, self.storage = grid, storage
        self.codes = _frozen(codes)
        self.scale = _frozen(range_.scale_NG.to(grid.storage))
        self.zero = None if range_.zero_NG is None else _frozen(range_.zero_NG.to(torch.uint8))
        self.offset = None if range_.offset_NG is None else _frozen(range_.offset_NG.to(grid.storage))
        self._kept = intact.kept(self)

    @property
    def grid(self) -> Grid:
        """The affine grid."""
        return self._grid

    @classmethod
    def quantize(cls, weight_NK: Tensor, grid: Grid, storage: Storage = "int") -> "AffineWeight":
        """Round a weight to the nearest codes (or store its levels) in the range that the grid's rule chooses."""
        if grid.bits == 8 and storage == "fixed8":
            storage = "int"  # no bits are left for a fraction
        if storage in ("int", "fixed8") and encode.fits(weight_NK):
            range_ = encode.ranges(weight_NK, grid)
            codes = encode.codes(weight_NK, range_, grid, storage == "fixed8")
            return cls(codes, range_, grid, weight_NK.shape[1], storage)
        pieces = []
        for rows in weight_NK.detach().split(_rows_at_once(weight_NK)):
            range_ = set_range(rows, grid)
            levels = to_levels(rows.float(), range_, grid).clamp_(0, grid.top)
            pieces.append(cls.of_levels(levels, range_, grid, storage))
        if len(pieces) == 1:
            return pieces[0]
        columns = zip(*(p.range() for p in pieces), strict=True)
        range_ = Range(*(None if t[0] is None else torch.cat(t) for t in columns))  # type: ignore[arg-type]
        return cls(torch.cat([p.codes for p in pieces]), range_, grid, weight_NK.shape[1], pieces[0].storage)

    @classmethod
    def of_levels(cls, levels_NK: Tensor, range_: Range, grid: Grid, storage: Storage = "int") -> "AffineWeight":
        """Store levels, clamped to the code range. Rounding what is stored gives the codes that levels round to."""
        in_features = levels_NK.shape[1]
        if storage == "fixed8" and grid.bits == 8:
            storage = "int"
        if storage == "int":
            codes = packing.pack(levels_NK.round().to(torch.uint8), grid.bits)
        elif storage == "fixed8":
            codes = fixed8.write(levels_NK, grid.bits)
        else:
            centred = levels_NK - _center(range_, grid, in_features)
            codes = centred.to(torch.bfloat16 if storage == "bf16" else torch.float32)
        return cls(codes, range_, grid, in_features, storage)

    @classmethod
    def of_stored(cls, codes_NK: Tensor, range_: Range, grid: Grid) -> "AffineWeight":
        """Codes, uint8 (N, K), scales and zeros as somebody else's file holds them.

        A group of one value may have scale 0 there, by which levels cannot be divided: the code of zero stands for it, on
        a scale of 1.
        """
        scale, zero, offset = range_
        flat = scale == 0
        if flat.any():
            at_zero = torch.full_like(scale, 0 if offset is not None else grid.center) if zero is None else zero
            codes = codes_NK.unflatten(1, (scale.shape[1], -1))
            codes_NK = torch.where(flat[..., None], at_zero.to(torch.uint8)[..., None], codes).flatten(1)
            scale = torch.where(flat, torch.ones_like(scale).copysign(scale), scale)
        return cls(packing.pack(codes_NK, grid.bits), Range(scale, zero, offset), grid, codes_NK.shape[1])

    def kept_as(self, storage: Storage) -> "AffineWeight":
        """The same codes with levels in float brought into `storage`; a weight of integers has none and stays as it is."""
        if self.packed or storage == self.storage:
            return self
        return AffineWeight.of_levels(self.levels(), self.range(), self.grid, storage)

    def range(self) -> Range:
        """Scales and zeros (N, G) as float32."""
        self.intact()
        zero, offset = (None if p is None else p.float() for p in (self.zero, self.offset))
        return Range(self.scale.float(), zero, offset)

    def _kept_range(self) -> Range:
        """The same in the dtypes they are stored in, where the kernels read those."""
        if self.scale.dtype == torch.float16 and self.scale.device.type == "cpu":
            return self.range()
        return Range(self.scale, self.zero, self.offset)

    def levels(self, rows: Tensor | None = None) -> Tensor:
        """Levels in [0, 2^b - 1] as this storage remembers them: fresh float32 of shape (N, K)."""
        kept = rows_of(self.intact().codes, rows)
        if self.storage == "int":
            codes = packing.unpack(kept, self.grid.bits, self.shape[1])
            return codes.float()
        if self.storage == "fixed8":
            return fixed8.read(kept, self.grid.bits)
        return kept.float() + _center(self.range(), self.grid, self.shape[1], rows)

    def integer_codes(self, rows: Tensor | None = None) -> Tensor:
        """The b-bit codes: uint8 of shape (N, K)."""
        if self.storage == "int":
            return packing.unpack(rows_of(self.intact().codes, rows), self.grid.bits, self.shape[1])
        return round_clamp(self.levels(rows), self.grid.top).to(torch.uint8)

    def dequantize(
        self, dtype: torch.dtype, *, rows: Tensor | None = None, reuse: bool = False, range_: Range | None = None
    ) -> Tensor:
        """s * (q - z), or s * q + o; with `range_` (of all rows) in place of the stored scales and zeros if given."""
        if self.storage == "int":
            out = self.intact().result(dtype, rows, reuse)
            dequantize.affine(out, self.codes, rows, *(range_ or self._kept_range()), self.grid.bits, self.grid.center)
            return out
        if self.storage == "fixed8" and rows is None:
            out = self.result(dtype, None, reuse)
            dequantize.levels(out, *self.described(range_ or self.range()))
            return out
        codes = self.integer_codes(rows)
        range_ = Range(*(None if t is None else rows_of(t, rows) for t in range_ or self.range()))  # type: ignore[arg-type]
        return from_codes(codes, range_, self.grid, dtype)

    def _multiply(self, y: Tensor, x_TK: Tensor) -> bool:
        if self.storage == "int":
            dequantize.affine_product(
                y, x_TK, self.intact().codes, *self._kept_range(), self.grid.bits, self.grid.center
            )
        return self.storage == "int"

    @property
    def packed(self) -> bool:
        """Whether codes or levels are integers, as the kernels read them."""
        return self.storage in ("int", "fixed8")

    def described(
        self, range_: Range, factors: tuple[Tensor, Tensor] | None = None, gain: float = 1.0, narrow: bool = False
    ) -> Levels:
        """These levels, moved by gain * B A if `factors` (A, B) are given, as the kernels take them (see `Levels`)."""
        a, b = factors or (None, None)
        fixed, grid = self.storage == "fixed8", self.grid
        return Levels(self.intact().codes, grid.bits, fixed, a, b, gain, *range_, grid.center, narrow)

    def with_codes(self, codes_NK: Tensor, range_: Range) -> "AffineWeight":
        """A weight of these plain codes, uint8 (N, K), with these scales and zeros."""
        return AffineWeight(packing.pack(codes_NK, self.grid.bits), range_, self.grid, self.shape[1])

    def spec(self) -> Spec:
        """Kind, shape, grid and storage."""
        self.intact()
        return {"kind": "affine", "shape": list(self.shape), "grid": asdict(self.grid), "storage": self.storage}


class CodebookWeight(Weight):
    """Codes of a table, with the absmax of each group (itself quantized or not) and perhaps an offset.

    Args:
        codes: packed uint8 (N, bytes).
        absmax: (N, G) float32, or with double quantization the triple of `codebook.compress_absmax`.
        grid: the codebook grid.
        in_features: K.
        offset_NG: float32 added after the table (QA-HiRA on NF4), or None.
    """

    def __init__(
        self, codes: Tensor, absmax: tuple[Tensor, ...], grid: CodebookGrid, in_features: int,
        offset_NG: Tensor | None = None,
    ) -> None:  # fmt: skip
        super().__init__((codes.shape[0], in_features))
        self._grid = grid
        self.codes = _frozen(codes)
        self.absmax = _frozen(absmax[0])
        self.absmax_scale = _frozen(absmax[1]) if grid.double_quant else None
        self.absmax_mean = _frozen(absmax[2]) if grid.double_quant else None
        self.offset = None if offset_NG is None else _frozen(offset_NG)
        self._kept = intact.kept(self)

    @property
    def grid(self) -> CodebookGrid:
        """The codebook grid."""
        return self._grid

    @classmethod
    def quantize(cls, weight_NK: Tensor, grid: CodebookGrid) -> "CodebookWeight":
        """The nearest table entries."""
        if encode.fits(weight_NK):
            groups = weight_NK.shape[1] // group_size(grid, weight_NK.shape[1])
            packed, absmax = encode.table_codes(weight_NK, grid, groups)
            kept = codebook.compress_absmax(absmax) if grid.double_quant else (absmax,)
            return cls(packed, kept, grid, weight_NK.shape[1])
        pieces = [codebook.to_codebook(rows, grid) for rows in weight_NK.detach().split(_rows_at_once(weight_NK))]
        codes, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        kept = codebook.compress_absmax(absmax) if grid.double_quant else (absmax,)
        return cls(packing.pack(codes, grid.bits), kept, grid, weight_NK.shape[1])

    def integer_codes(self, rows: Tensor | None = None) -> Tensor:
        """The codes: uint8 of shape (N, K)."""
        return packing.unpack(rows_of(self.intact().codes, rows), self.grid.bits, self.shape[1])

    def read_absmax(self) -> Tensor:
        """The absmax of each group: float32 (N, G)."""
        self.intact()
        if self.absmax_scale is None or self.absmax_mean is None:
            return self.absmax
        return codebook.expand_absmax(self.absmax, self.absmax_scale, self.absmax_mean)

    def dequantize(
        self, dtype: torch.dtype, *, rows: Tensor | None = None, reuse: bool = False, offset_NG: Tensor | None = None
    ) -> Tensor:
        """absmax * table[q] + offset; with `offset_NG` in place of the stored offset if given."""
        out = self.result(dtype, rows, reuse)
        dequantize.codebook(out, self.codes, rows, *self._about(self.offset if offset_NG is None else offset_NG))
        return out

    def _multiply(self, y: Tensor, x_TK: Tensor) -> bool:
        dequantize.codebook_product(y, x_TK, self.codes, *self._about(self.offset))
        return True

    def _about(self, offset_NG: Tensor | None) -> tuple[Tensor | int | None, ...]:
        """Everything but the codes, as the kernels take it."""
        device = self.intact().codes.device
        map_ = codebook.dynamic_map(device) if self.grid.double_quant else None
        absmax = (self.absmax, map_, self.absmax_scale, self.absmax_mean)
        return codebook.entries(self.grid, device), *absmax, offset_NG, self.grid.bits

    def with_offset(self, offset_NG: Tensor) -> "CodebookWeight":
        """The same codes and absmax with another offset."""
        self.intact()
        kept = [p for p in (self.absmax, self.absmax_scale, self.absmax_mean) if p is not None]
        return CodebookWeight(self.codes, tuple(kept), self.grid, self.shape[1], offset_NG)

    def spec(self) -> Spec:
        """Kind, shape, grid and whether there is an offset."""
        self.intact()
        grid, offset = asdict(self.grid), self.offset is not None
        return {"kind": "codebook", "shape": list(self.shape), "grid": grid, "offset": offset}


def _rows_at_once(weight_NK: Tensor) -> int:
    """Rows that are quantized together: float temporaries stay small beside a large embedding, and in the cache."""
    return weight_NK.shape[0] if weight_NK.is_meta else max(1, (1 << 22) // weight_NK.shape[1])


def _center(range_: Range, grid: Grid, in_features: int, rows: Tensor | None = None) -> Tensor | float:
    """What float storages subtract from u: z spread over its group, or the middle code where z is not an integer."""
    if range_.zero_NG is None:
        return grid.center
    zero = rows_of(range_.zero_NG, rows)
    return zero.repeat_interleave(in_features // zero.shape[1], 1)


def quantize(weight_NK: Tensor, grid: AnyGrid, storage: Storage = "int") -> AffineWeight | CodebookWeight:
    """Round a float weight to the nearest values of any grid."""
    if isinstance(grid, CodebookGrid):
        return CodebookWeight.quantize(weight_NK, grid)
    return AffineWeight.quantize(weight_NK, grid, storage)


__all__ = ["AffineWeight", "CodebookWeight", "DenseWeight", "Spec", "Storage", "Weight", "quantize"]
