"""How a frozen weight is stored: dense, affine codes, or codebook codes.

Each kind is a module whose tensors are all `Parameter(requires_grad=False)`, never buffers (FSDP2 shards parameters
only), and gives back its (N, K) matrix by `dequantize`. A kind is described by a small JSON `spec`, from which
`from_spec` builds the same module without data, so that a saved model can be laid out before its tensors are read.

Scales and offsets on two levels (`quant.two_level`) are stored as integers beside a float16 number a super-block.

An affine weight can also hold more than its codes. `fixed8` (see there) keeps each level in 8 bits with a fraction, `int`
drops the fraction, `bf16` and `fp32` keep u - z (u - 2^(b-1) with a real zero) in floats, for ablations.

Whatever is read of a stored tensor is read after `intact`: a cast behind the model's back is named, not computed with.

Legend: N out features, K in features, g group size, G = K / g groups in a row.
"""

import copy
from dataclasses import asdict
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.kernels import dequantize, encode
from trimtab.kernels.arguments import rows_of
from trimtab.kernels.dequantize import Levels
from trimtab.layers import intact
from trimtab.layers.weight import DenseWeight, Spec, Weight, frozen
from trimtab.quant import codebook, fixed8, mxfp4, packing, two_level
from trimtab.quant.grid import (
    AnyGrid,
    CodebookGrid,
    Grid,
    Range,
    from_codes,
    group_size,
    round_clamp,
    set_range,
    stored,
    to_levels,
)

Storage = Literal["int", "fixed8", "bf16", "fp32"]


class AffineWeight(Weight):
    """Codes (or levels) on an affine grid, with the scales and zeros of each group.

    Args:
        codes: packed uint8 (N, bytes) for `int`, uint8 (N, K) for `fixed8`, floats (N, K) for `bf16` and `fp32`.
        range_: scales and zeros (N, G), exact in the grid's storage dtype; integer zeros are stored as uint8.
        grid: the affine grid.
        in_features: K.
        storage: what `codes` holds.
    """

    def __init__(self, codes: Tensor, range_: Range, grid: Grid, in_features: int, storage: Storage = "int") -> None:
        super().__init__((codes.shape[0], in_features))
        self._grid, self.storage = grid, storage
        self.codes = frozen(codes)
        self.zero = None if range_.zero_NG is None else frozen(range_.zero_NG.to(torch.uint8))
        kind, offset_NG = grid.two_level, range_.offset_NG
        if kind is None:
            self.scale = frozen(range_.scale_NG.to(grid.storage))
            self.offset = None if offset_NG is None else frozen(offset_NG.to(grid.storage))
            self.super_scale = self.super_offset = None
        else:
            self.super_scale, self.scale = _split(range_.scale_NG, kind.scales, kind)
            none = None, None
            self.super_offset, self.offset = none if offset_NG is None else _split(offset_NG, kind.offsets, kind)
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
        flat, kind = scale == 0, grid.two_level
        if flat.any():
            at_zero = torch.full_like(scale, 0 if offset is not None else grid.center) if zero is None else zero
            codes = codes_NK.unflatten(1, (scale.shape[1], -1))
            codes_NK = torch.where(flat[..., None], at_zero.to(torch.uint8)[..., None], codes).flatten(1)
            if kind is None:
                scale = torch.where(flat, torch.ones_like(scale).copysign(scale), scale)
            else:
                scale = two_level.without_zeros(scale, kind.scales, two_level.SUPER // kind.group)
        return cls(packing.pack(codes_NK, grid.bits), Range(scale, zero, offset), grid, codes_NK.shape[1])

    def kept_as(self, storage: Storage) -> "AffineWeight":
        """The same codes with levels in float brought into `storage`; a weight of integers has none and stays as it is."""
        if self.packed or storage == self.storage:
            return self
        return AffineWeight.of_levels(self.levels(), self.range(), self.grid, storage)

    def range(self, rows: Tensor | None = None) -> Range:
        """Scales and zeros (N, G), or the given rows of them, as float32."""
        self.intact()
        zero = None if self.zero is None else rows_of(self.zero, rows).float()
        scale, offset = self._scales(), self._offsets()
        return Range(_plain(scale, rows), zero, None if offset is None else _plain(offset, rows))

    def _scales(self) -> Tensor | two_level.Split:
        return self.scale if self.super_scale is None else two_level.Split(self.super_scale, self.scale)

    def _offsets(self) -> Tensor | two_level.Split | None:
        split = self.super_offset is not None and self.offset is not None
        return two_level.Split(self.super_offset, self.offset) if split else self.offset  # type: ignore[arg-type]

    def _kept_range(self) -> Range:
        """The same in the dtypes they are stored in, where the kernels read those."""
        if self.super_scale is not None or (self.scale.dtype == torch.float16 and self.scale.device.type == "cpu"):
            return self.range()
        return Range(self.scale, self.zero, self.offset)

    def stored_scale(self, scale_NG: Tensor) -> Tensor:
        """Scales trained from these, float32 (N, G), as the file will hold them, straight through."""
        return self._as_stored(scale_NG, self._scales(), 0)

    def stored_offset(self, offset_NG: Tensor) -> Tensor:
        """Real offsets trained from these, float32 (N, G), as the file will hold them, straight through."""
        kept = self._offsets()
        assert kept is not None
        return self._as_stored(offset_NG, kept, 1)

    def _as_stored(self, x_NG: Tensor, kept: Tensor | two_level.Split, which: int) -> Tensor:
        if isinstance(kept, Tensor):
            return stored(x_NG, self.grid.scale_dtype)
        kind = self.grid.two_level
        assert kind is not None
        return two_level.stored(x_NG, kept, (kind.scales, kind.offsets)[which])

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
            if rows is not None and self.super_scale is not None and range_ is None:  # not all products for a few rows
                codes, few = rows_of(self.codes, rows), self.range(rows)
                dequantize.affine(out, codes, None, *few, self.grid.bits, self.grid.center)
                return out
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
        absmax: what `codebook.as_kept` makes of the scale of each group.
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
        self.codes = frozen(codes)
        self.absmax = frozen(absmax[0])
        self.absmax_scale = frozen(absmax[1]) if grid.double_quant else None
        self.absmax_mean = frozen(absmax[2]) if grid.double_quant else None
        self.offset = None if offset_NG is None else frozen(offset_NG)
        self._kept = intact.kept(self)

    @property
    def grid(self) -> CodebookGrid:
        """The codebook grid."""
        return self._grid

    @classmethod
    def quantize(cls, weight_NK: Tensor, grid: CodebookGrid) -> "CodebookWeight":
        """The nearest table entries."""
        if encode.fits(weight_NK) and not grid.powers:
            groups = weight_NK.shape[1] // group_size(grid, weight_NK.shape[1])
            packed, absmax = encode.table_codes(weight_NK, grid, groups)
            return cls(packed, codebook.as_kept(absmax, grid), grid, weight_NK.shape[1])
        pieces = [codebook.to_codebook(rows, grid) for rows in weight_NK.detach().split(_rows_at_once(weight_NK))]
        codes, absmax = (torch.cat(parts) for parts in zip(*pieces, strict=True))
        return cls(packing.pack(codes, grid.bits), codebook.as_kept(absmax, grid), grid, weight_NK.shape[1])

    @classmethod
    def of_powers(cls, codes_NK: Tensor, exponents_NG: Tensor) -> "CodebookWeight":
        """On the MXFP4 grid: our codes and the exponents, uint8, of somebody else's file."""
        if (exponents_NG == mxfp4.NAN).any():
            raise UserError(f"a scale's exponent is {mxfp4.NAN}, which stands for no number; fetch the file again")
        grid = CodebookGrid("mxfp4", mxfp4.BLOCK)
        return cls(packing.pack(codes_NK, grid.bits), (exponents_NG,), grid, codes_NK.shape[1])

    def integer_codes(self, rows: Tensor | None = None) -> Tensor:
        """The codes: uint8 of shape (N, K)."""
        return packing.unpack(rows_of(self.intact().codes, rows), self.grid.bits, self.shape[1])

    def read_absmax(self) -> Tensor:
        """The absmax of each group, or the power of two in its place: float32 (N, G)."""
        self.intact()
        if self.grid.powers:
            return mxfp4.scales(self.absmax)
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
        kept = mxfp4.scales(self.absmax) if self.grid.powers else self.absmax
        absmax = (kept, map_, self.absmax_scale, self.absmax_mean)
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


def _plain(kept: Tensor | two_level.Split, rows: Tensor | None) -> Tensor:
    """Stored numbers, or the given rows of them, as float32."""
    if isinstance(kept, Tensor):
        return rows_of(kept, rows).float()
    return two_level.Split(*(rows_of(t, rows) for t in kept)).product()


def _split(x_NG: Tensor, limits: tuple[int, int], kind: two_level.TwoLevel) -> tuple[nn.Parameter, nn.Parameter]:
    super_, integer = two_level.split(x_NG.float(), limits, two_level.SUPER // kind.group)
    return frozen(super_), frozen(integer)


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
    if weight_NK.is_meta:  # a plan asks for those of hundreds of equal layers, and a copy takes a fiftieth of the time
        return copy.deepcopy(_laid_out(weight_NK.shape, weight_NK.dtype, grid, storage))
    return _quantize(weight_NK, grid, storage)


@lru_cache
def _laid_out(shape: torch.Size, dtype: torch.dtype, grid: AnyGrid, storage: Storage) -> AffineWeight | CodebookWeight:
    return _quantize(torch.empty(shape, dtype=dtype, device="meta"), grid, storage)


def _quantize(weight_NK: Tensor, grid: AnyGrid, storage: Storage) -> AffineWeight | CodebookWeight:
    if isinstance(grid, CodebookGrid):
        return CodebookWeight.quantize(weight_NK, grid)
    return AffineWeight.quantize(weight_NK, grid, storage)


__all__ = ["AffineWeight", "CodebookWeight", "DenseWeight", "Spec", "Storage", "Weight", "quantize"]
