"""Checkpoints that bitsandbytes has quantized to NF4 or FP4, as bases, code for code, double quantization included.

    weight                 uint8 (N K / 2, 1): two codes of the flattened matrix in a byte, the first in the high bits
    weight.absmax          float32, one for each block of the flattened matrix; or uint8, doubly quantized:
    weight.nested_absmax   float32, one for 256 of these
    weight.quant_map       float32 (16,): the table, in the order of its codes
    weight.quant_state.bitsandbytes__nf4   a JSON text: shape, blocksize, nested_blocksize, nested_offset

Blocks that run over a row's end are no groups of ours, and are refused.

Legend: N out features, K in features, g block size, G = K / g blocks in a row.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers.weights import CodebookWeight
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import Form, PackedSource, Packing
from trimtab.quant import codebook, packing
from trimtab.quant.grid import CodebookGrid


class NormalFloatPacking(Packing):
    """One table for all layers, NF4 or FP4."""

    needed = ("weight", "weight.absmax", "weight.quant_map")
    optional = ("weight.nested_absmax", "weight.nested_quant_map")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        if not settings.get("load_in_4bit", settings.get("_load_in_4bit")):
            raise UserError(
                "quantization_config: bitsandbytes in 8 bits is not read; take NF4 or FP4, or the float model"
            )
        self.kind = str(settings.get("bnb_4bit_quant_type", "fp4"))
        if self.kind not in ("nf4", "fp4"):
            raise UserError(f"quantization_config.bnb_4bit_quant_type: {self.kind!r} is neither nf4 nor fp4")
        self.marker = f"weight.quant_state.bitsandbytes__{self.kind}"
        self.described = (self.marker, "weight.quant_map", "weight.nested_quant_map")

    def _of(self, small: Mapping[str, Tensor]) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(bytes(small[self.marker].tolist()))
            return {
                **values,
                "shape": (int(values["shape"][0]), int(values["shape"][1])),
                "blocksize": int(values["blocksize"]),
            }
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise UserError(f"its quant_state is none of bitsandbytes ({error!r}); fetch it again") from error

    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """From the state that stands beside the codes."""
        state = self._of(small)
        (n, k), block = state["shape"], state["blocksize"]
        double = "nested_blocksize" in state
        if k % block:
            raise UserError(f"blocks of {block} run over the ends of rows of {k}; start from the float model")
        if headers["weight"].shape[0] * 2 != n * k or headers["weight.absmax"].shape[0] * block != n * k:
            raise UserError(f"its codes or absmax are not those of {n} x {k} in blocks of {block}; fetch it again")
        if double and state["nested_blocksize"] != codebook.DOUBLE_BLOCK:
            raise UserError(f"absmax in blocks of {state['nested_blocksize']}; {codebook.DOUBLE_BLOCK} are read")
        if double and not torch.equal(small["weight.nested_quant_map"].float(), codebook.dynamic_map()):
            raise UserError("its map of absmax is not the dynamic one of bitsandbytes; start from the float model")
        kind: Any = self.kind
        return Form((n, k), CodebookGrid(kind, block, double))

    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> CodebookWeight:
        """Their codes, by our numbers of the same values."""
        assert isinstance(form.grid, CodebookGrid)
        (n, k), state = form.shape, self._of(tensors)
        packed, values = tensors["weight"].flatten(), codebook.table(form.grid)
        ours = torch.tensor([_number(float(v), values) for v in tensors["weight.quant_map"]], dtype=torch.uint8)
        codes_NK = ours[torch.stack([packed >> 4, packed & 0xF], 1).flatten().long()].view(n, k)
        absmax_NG = tensors["weight.absmax"].view(n, -1)
        kept: tuple[Tensor, ...] = (absmax_NG,)
        if form.grid.double_quant:
            mean = torch.tensor([float(state["nested_offset"])], dtype=torch.float32)
            kept = (absmax_NG, tensors["weight.nested_absmax"].float(), mean)
        return CodebookWeight(packing.pack(codes_NK, 4), kept, form.grid, k)


def _number(value: float, values: Tensor) -> int:
    """Which of our table's values this is."""
    found = int((values - value).abs().argmin())
    if float(values[found]) != value:
        raise UserError(f"its table holds {value}, which is not a value of the format; start from the float model")
    return found


def opened(path: Path) -> PackedSource:
    """The source of a folder that says `quant_method: bitsandbytes`."""
    return PackedSource(path, NormalFloatPacking)
