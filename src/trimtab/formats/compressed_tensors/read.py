"""compressed-tensors checkpoints as bases, code for code: `pack-quantized` and `int-quantized`, of any groups, and
`mxfp4-pack-quantized`.

Layers of `float-quantized` are read as `fp8` reads them.

The tensors are those of `write`; a layer's width follows from how many words its codes take, so config groups, whose
patterns say which layer has which, need not be matched. Codes are unpacked by the package's own function, for which
`write` asks it.

Legend: N out features, K in features, G groups in a row, b bits.
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.compressed_tensors.write import INTEGERS, PACKED, POWERS, unpacked
from trimtab.formats.fp8 import read as fp8
from trimtab.layers.weights import AffineWeight, CodebookWeight, Weight
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import SCALE_DTYPES, Form, PackedSource, Packing, require_in_order
from trimtab.quant import mxfp4
from trimtab.quant.grid import CodebookGrid, Grid, Range

_FORMATS = (*(PACKED, INTEGERS, POWERS), "float-quantized", "mixed-precision")


class CompressedPacking(Packing):
    """Codes along K in words, or a byte each."""

    written_as = "compressed-tensors"
    marker = "weight_scale"
    optional = (
        "weight_packed", "weight", "weight_zero_point", "weight_shape", "weight_g_idx", "input_scale", "input_zero_point",
    )  # fmt: skip
    described = ("weight_shape",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        groups = dict(settings.get("config_groups") or {}).values()
        for form in {str(settings.get("format")), *(str(g["format"]) for g in groups if g.get("format"))}:
            if form not in _FORMATS:
                raise UserError(
                    f"quantization_config.format: {form!r} is read by nothing here; {', '.join(_FORMATS[:4])} are"
                )
        blocks = [dict(group.get("weights") or {}).get("block_structure") for group in groups]
        self.block: list[int] | None = next((list(block) for block in blocks if block), None)
        if any(group.get("input_activations") for group in groups):
            warnings.warn(
                "the model's inputs were rounded where it was served, which its config alone says: the weights are "
                "read, and inputs are as `activations` of the recipe says",
                stacklevel=2,
            )

    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """From the shapes of words, scales and zeros."""
        scale = headers["weight_scale"]
        if "weight" in headers and headers["weight"].kind == fp8.KIND:
            return Form(fp8.shape_of(headers["weight"], scale, self.block), None)
        if "weight_packed" in headers and headers["weight_packed"].kind == "U8":
            return _of_powers(headers["weight_packed"], scale)
        if "weight_packed" in headers:
            if "weight_shape" not in headers:
                raise UserError("has packed codes but no weight_shape; fetch it again")
            n, k = (int(size) for size in small["weight_shape"].tolist())
            words = headers["weight_packed"].shape
            widths = [bits for bits in range(1, 9) if words == (n, -(-k * bits // 32))]
        elif "weight" in headers and headers["weight"].kind == "I8":
            (n, k), widths = headers["weight"].shape, [8]
        else:
            kind = headers["weight"].kind if "weight" in headers else "nothing"
            raise UserError(f"has a scale beside a weight of {kind}; packed codes or I8 are read")
        if len(widths) != 1:
            raise UserError(f"its codes take {words} words, which is not a width of {n} x {k} codes here")
        if scale.kind not in SCALE_DTYPES or len(scale.shape) != 2 or scale.shape[0] != n or k % scale.shape[1]:
            raise UserError(f"scales are {scale.kind} of {scale.shape}, which do not go with {n} x {k} codes")
        zero: Any = "integer" if "weight_zero_point" in headers else "symmetric"
        group = None if scale.shape[1] == 1 else k // scale.shape[1]
        scale_dtype = SCALE_DTYPES[scale.kind]
        return Form((n, k), Grid(widths[0], group, zero, scale_dtype))

    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> Weight | Tensor:
        """Codes, scales and zeros as they stand; floats of 8 bits times their scales."""
        if isinstance(form.grid, CodebookGrid):
            exponents_NG = tensors["weight_scale"]
            blocks = tensors["weight_packed"].view(*exponents_NG.shape, -1)
            return CodebookWeight.of_powers(mxfp4.from_blocks(blocks), exponents_NG)
        if form.grid is None:
            return fp8.dequantized(tensors["weight"], tensors["weight_scale"], self.block)
        assert isinstance(form.grid, Grid)
        (n, k), grid = form.shape, form.grid
        groups = tensors["weight_scale"].shape[1]
        require_in_order(tensors.get("weight_g_idx"), k, groups)
        packed, zero_NG = "weight_packed" in tensors, tensors.get("weight_zero_point")
        codes_NK = unpacked(tensors["weight_packed"], grid.bits, (n, k), 1) if packed else tensors["weight"]
        if zero_NG is not None:
            zero_NG = unpacked(zero_NG, grid.bits, (n, groups), 0) if packed else zero_NG
            zero_NG = (zero_NG.to(torch.int16) + grid.center).float()
        codes_NK = (codes_NK.to(torch.int16) + grid.center).to(torch.uint8)
        range_ = Range(tensors["weight_scale"].float(), zero_NG, None)
        return AffineWeight.of_stored(codes_NK, range_, grid)


def _of_powers(packed: Stored, scale: Stored) -> Form:
    """The form of bytes of two four-bit floats, under exponents."""
    n, k = packed.shape[0], 2 * packed.shape[-1]
    if len(packed.shape) != 2 or k % mxfp4.BLOCK or (scale.kind, scale.shape) != ("U8", (n, k // mxfp4.BLOCK)):
        raise UserError(
            f"scales are {scale.kind} of {scale.shape}, which are not exponents of {n} x {k} codes of MXFP4"
        )
    return Form((n, k), CodebookGrid("mxfp4", mxfp4.BLOCK))


def opened(path: Path) -> PackedSource:
    """The source of a folder that says `quant_method: compressed-tensors`."""
    return PackedSource(path, CompressedPacking)
