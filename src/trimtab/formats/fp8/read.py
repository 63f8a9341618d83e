"""Floats of 8 bits under scales (DeepSeek's and transformers' `fp8`) as bases: dequantized once.

    weight              float8_e4m3fn (N, K)
    weight_scale_inv    (N / bn, K / bk), the last blocks cut off where N or K ends; or one number

    W[n, k] = weight[n, k] * weight_scale_inv[n // bn, k // bk]        in float32

No grid here has such values, so a layer is a float matrix to everything that comes after. How inputs were rounded where the
model was served is left out.

Legend: N out features, K in features, bn x bk a block.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.models.checkpoint import Stored
from trimtab.models.packed import SCALE_DTYPES, Form, PackedSource, Packing

KIND = "F8_E4M3"
"""safetensors' name of the floats."""


class Fp8Packing(Packing):
    """A scale for each block of a weight, or one for all of it."""

    instead = "its floats of 8 bits are dequantized once, as they are read: dense holds them, others a grid of `rules`"
    marker = "weight_scale_inv"
    needed = ("weight",)
    optional = ("activation_scale", "input_scale")

    def form(self, layer: str, headers: Mapping[str, Stored], small: Mapping[str, Tensor]) -> Form:
        """A float matrix."""
        weight, scale = headers["weight"], headers["weight_scale_inv"]
        return Form(shape_of(weight, scale, self.block), None)

    def weight(self, tensors: Mapping[str, Tensor], form: Form) -> Tensor:
        """The product."""
        return dequantized(tensors["weight"], tensors["weight_scale_inv"], self.block)

    @property
    def block(self) -> Sequence[int] | None:
        """bn and bk, if the config says them."""
        said = self.settings.get("weight_block_size")
        return None if said is None else [int(size) for size in said]


def shape_of(weight: Stored, scale: Stored, block: Sequence[int] | None) -> tuple[int, int]:
    """(N, K) of headers that go together.

    Raises:
        UserError: where they do not.
    """
    if weight.kind != KIND or scale.kind not in SCALE_DTYPES:
        raise UserError(
            f"has a scale of {scale.kind} beside a weight of {weight.kind}; {KIND} with float scales is read"
        )
    n, k = weight.shape
    if scale.shape not in ((), (1,)):
        rows, columns = scale.shape
        bn, bk = _block(n, k, rows, columns, block)
        if (rows, columns) != (-(-n // bn), -(-k // bk)):
            raise UserError(f"scales of {rows} x {columns} do not go with {n} x {k} weights in blocks of {bn} x {bk}")
    return n, k


def _block(n: int, k: int, rows: int, columns: int, block: Sequence[int] | None) -> tuple[int, int]:
    """bn and bk: as they divide N and K, else as the config has them."""
    if (
        n % rows == 0
        and k % columns == 0
        and (block is None or (rows, columns) != (-(-n // block[0]), -(-k // block[1])))
    ):
        return n // rows, k // columns
    if block is None:
        raise UserError(
            f"scales of {rows} x {columns} do not divide {n} x {k} weights, and no block size is in the config"
        )
    return block[0], block[1]


def dequantized(weight_NK: Tensor, scale: Tensor, block: Sequence[int] | None) -> Tensor:
    """Weights times the scales of their blocks: float32 (N, K)."""
    wide = scale.float()
    if wide.numel() > 1:
        n, k = weight_NK.shape
        rows, columns = wide.shape
        bn, bk = _block(n, k, rows, columns, block)
        wide = wide.repeat_interleave(bn, 0)[:n].repeat_interleave(bk, 1)[:, :k]
    return weight_NK.to(torch.float32).mul_(wide)


def opened(path: Path) -> PackedSource:
    """The source of a folder that says `quant_method: fp8`."""
    return PackedSource(path, Fp8Packing)
