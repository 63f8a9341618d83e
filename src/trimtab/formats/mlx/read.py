"""MLX checkpoints as bases, code for code: the affine mode, of any width and group, embeddings and head among them.

The tensors are those of `write`: w = scales c + biases, which is a grid with a real zero. MLX rounds that in the dtype of
the scales once more than is done here.

Legend: N out features, K in features.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.mlx.write import WIDTHS
from trimtab.layers.weights import AffineWeight
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import SCALE_DTYPES, Form, PackedSource, Packing
from trimtab.quant.grid import Grid, Range
from trimtab.quant.int32_packing import unpack_int32


class MlxPacking(Packing):
    """Codes dense in words along K; a width and group for each layer that has its own."""

    written_as = "mlx"
    marker = "scales"
    needed = ("weight", "biases")

    def settings_of(self, layer: str) -> Mapping[str, Any]:
        """The layer's own, or the model's."""
        own = self.settings.get(layer)
        return own if isinstance(own, Mapping) else self.settings

    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """From the settings, which say how many codes the words hold."""
        settings = self.settings_of(layer)
        bits, group, mode = int(settings["bits"]), int(settings["group_size"]), str(settings.get("mode", "affine"))
        if mode != "affine" or bits not in WIDTHS:
            known = ", ".join(map(str, WIDTHS))
            raise UserError(f"{bits} bits in MLX's mode {mode}; affine codes of {known} bits are read")
        (n, words), scales, kind = headers["weight"].shape, headers["scales"], headers["scales"].kind
        k = words * 32 // bits
        if scales.shape != (n, k // group) or headers["biases"].shape != scales.shape or k * bits != words * 32:
            raise UserError(f"{bits}-bit codes in {n} x {words} words do not go with scales of {scales.shape}")
        if kind not in SCALE_DTYPES or headers["biases"].kind != kind or headers["weight"].kind != "U32":
            raise UserError(f"codes, scales and biases are {headers['weight'].kind}, {kind}, {headers['biases'].kind}")
        return Form((n, k), Grid(bits, group, "real", SCALE_DTYPES[kind]))

    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> AffineWeight:
        """Codes, scales and biases as they stand."""
        assert isinstance(form.grid, Grid)
        codes_NK = unpack_int32(tensors["weight"].view(torch.int32), form.grid.bits, form.shape[1])
        range_ = Range(tensors["scales"].float(), None, tensors["biases"].float())
        return AffineWeight.of_stored(codes_NK, range_, form.grid)


def opened(path: Path) -> PackedSource:
    """The source of a folder with `quantization` in its config."""
    return PackedSource(path, MlxPacking)
