"""AWQ checkpoints as bases, code for code: the `gemm` packing, 4 bits.

    qweight   int32 (K, N / 8)    eight codes of a row of W^T in a word, in the order 0 2 4 6 1 3 5 7 from the lowest bits
    qzeros    int32 (G, N / 8)    zeros in the same order, as they are
    scales    float16 (G, N)

    W[n, k] = scales[g, n] * (q - z)

Legend: N out features, K in features, G groups in a row.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.gptq.read import group_of
from trimtab.layers.weights import AffineWeight
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import SCALE_DTYPES, Form, PackedSource, Packing
from trimtab.quant.grid import Grid, Range

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight codes has the lowest bits of a word, which the next, and so on."""
BITS, A_WORD = 4, 8


class AwqPacking(Packing):
    """Eight codes of one input's outputs in a word."""

    written_as = "awq"
    marker = "qweight"
    needed = ("qzeros", "scales")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        super().__init__(settings)
        bits, version = settings.get("bits", settings.get("w_bit", BITS)), str(settings.get("version", "gemm"))
        if bits != BITS or version.lower() != "gemm":
            raise UserError(f"quantization_config: AWQ of {bits} bits packed for {version!r}; 4 bits, gemm is read")

    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """From the shapes of codes and scales."""
        (k, words), (groups, n) = headers["qweight"].shape, headers["scales"].shape
        group = group_of(self.settings_of(layer), k, groups)
        if words * A_WORD != n or group is None:
            raise UserError(f"4-bit codes of {k} x {words * A_WORD} do not go with scales of {groups} x {n}")
        if headers["scales"].kind not in SCALE_DTYPES:
            raise UserError(f"scales are stored as {headers['scales'].kind}; float16 is what the format has")
        scale_dtype = SCALE_DTYPES[headers["scales"].kind]
        return Form((n, k), Grid(BITS, None if group < 1 else group, "integer", scale_dtype))

    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> AffineWeight:
        """Codes, zeros and scales as they stand."""
        assert isinstance(form.grid, Grid)
        codes_NK, zero_NG = _unpacked(tensors["qweight"]).T, _unpacked(tensors["qzeros"]).T
        range_ = Range(tensors["scales"].T.contiguous().float(), zero_NG.contiguous().float(), None)
        return AffineWeight.of_stored(codes_NK.contiguous(), range_, form.grid)


def _unpacked(words_RW: Tensor) -> Tensor:
    """uint8 (R, 8 W) of words (R, W)."""
    found = torch.empty(*words_RW.shape, A_WORD, dtype=torch.uint8)
    for i, column in enumerate(ORDER):
        found[..., column] = ((words_RW >> (BITS * i)) & 0xF).to(torch.uint8)
    return found.flatten(1)


def opened(path: Path) -> PackedSource:
    """The source of a folder that says `quant_method: awq`."""
    return PackedSource(path, AwqPacking)
