"""GPTQ checkpoints as bases, code for code: both versions of the format, at 2, 3, 4 and 8 bits.

The tensors are those of `write`. The first version (`checkpoint_format: gptq`, of AutoGPTQ) stores zeros less one; of a
zero of 0 its files hold 2^b - 1, which some readers take for 2^b, so that is refused by name. `desc_act` groups inputs in
the order of their activations: where that is not the order in which they stand, no grid of ours holds it, and the layer
is refused.

Legend: N out features, K in features, G groups in a row, b bits.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.layers.weights import AffineWeight
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import SCALE_DTYPES, Form, PackedSource, Packing, require_in_order
from trimtab.quant.grid import Grid, Range
from trimtab.quant.int32_packing import unpack_int32


class GptqPacking(Packing):
    """Codes packed along K, zeros along N, one width and group for all layers."""

    written_as = "gptq"
    marker = "qweight"
    needed = ("qzeros", "scales")
    optional = ("g_idx",)

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        _bits(settings)
        version = str(settings.get("checkpoint_format", "gptq"))
        if version not in ("gptq", "gptq_v2"):
            raise UserError(f"quantization_config.checkpoint_format: {version!r} is neither gptq nor gptq_v2")
        self.zeros_less = 1 if version == "gptq" else 0

    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """From the shapes of codes and scales."""
        settings = self.settings_of(layer)
        (words, n), (groups, scales), bits = headers["qweight"].shape, headers["scales"].shape, _bits(settings)
        k = words * 32 // bits
        group = group_of(settings, k, groups)
        if scales != n or group is None or headers["scales"].kind not in SCALE_DTYPES:
            raise UserError(f"{bits}-bit codes of {k} x {n} do not go with scales of {groups} x {scales}")
        symmetric = bool(settings.get("sym", True))
        scale_dtype = SCALE_DTYPES[headers["scales"].kind]
        return Form((n, k), Grid(bits, None if group < 1 else group, _zero(symmetric), scale_dtype))

    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> AffineWeight:
        """Codes and scales as they stand; zeros with what the version leaves out."""
        assert isinstance(form.grid, Grid)
        (n, k), grid = form.shape, form.grid
        groups = tensors["scales"].shape[0]
        require_in_order(tensors.get("g_idx"), k, groups)
        codes_NK = unpack_int32(tensors["qweight"].T.contiguous(), grid.bits, k)
        zero_NG = unpack_int32(tensors["qzeros"], grid.bits, n).T.to(torch.int16) + self.zeros_less
        if int(zero_NG.max()) > grid.top:
            raise UserError(
                f"a stored zero of {grid.top} is 0 to some readers of the first version and {grid.top + 1} to others; "
                "take a checkpoint of gptq_v2"
            )
        if grid.zero == "symmetric" and not bool((zero_NG == grid.center).all()):
            raise UserError("quantization_config says sym, but its zeros are not all in the middle; it is damaged")
        zero = None if grid.zero == "symmetric" else zero_NG.contiguous().float()
        scale_NG = tensors["scales"].T.contiguous().float()
        return AffineWeight.of_stored(codes_NK, Range(scale_NG, zero, None), grid)


def _bits(settings: Mapping[str, Any]) -> int:
    bits = int(settings.get("bits", 0))
    if bits not in (2, 3, 4, 8):
        raise UserError(f"quantization_config.bits: {settings.get('bits')!r} is none of 2, 3, 4, 8")
    return bits


def group_of(settings: Mapping[str, Any], in_features: int, groups: int) -> int | None:
    """`group_size` of a model if so many groups make a row of it, -1 for one group a row; None where they do not."""
    said = int(settings.get("group_size", settings.get("q_group_size", -1)) or -1)
    if groups == 1 and said in (-1, in_features):
        return said
    return said if said > 0 and groups * said == in_features else None


def _zero(symmetric: bool) -> Any:
    return "symmetric" if symmetric else "integer"


def opened(path: Path) -> PackedSource:
    """The source of a folder that says `quant_method: gptq`."""
    return PackedSource(path, GptqPacking)
