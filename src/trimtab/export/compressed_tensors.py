"""compressed-tensors, `pack-quantized`: what vLLM and transformers read, packed by that package's own function.

    weight_packed       int32 (N, ceil(K b / 32)): codes less 2^(b-1), dense in words (64 codes of 3 bits are 6 words)
    weight_scale        (N, G) in the model's dtype; G = 1 per channel
    weight_zero_point   int32 (ceil(N b / 32), G), packed along N, integer zeros only
    weight_shape        int64 (N, K)

A reader computes (q - z) * s in the dtype of s: differences of codes have at most 8 bits, so the subtraction is exact and
the product is rounded once, which are the bits of our own `dequantize`. One config group stands for each distinct grid;
its targets are the names of its layers, and all other linear layers are in `ignore`. Embeddings and heads are dense: no
engine that reads this format runs them from codes.

transformers 5.23 lays layers with integer zeros out in a wrong shape unless the config says `dequantize`, and with that it
takes every layer for one of the first group: so it reads integer zeros only where all layers share a grid.

3-bit codes are packed with gaps by compressed-tensors before 0.18 and densely since: readers before it would load
nonsense, so the word count is checked here. This is the only file that imports compressed_tensors.

Legend: N out features, K in features, G groups in a row, b bits.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab import hf
from trimtab.errors import UserError
from trimtab.export.declaration import DENSE, Engine, Form, Format, Writing
from trimtab.export.dense import add_dense
from trimtab.export.directory import Shards, float_tensors, write_surroundings
from trimtab.grid import Grid, Range
from trimtab.linear import QuantLinear
from trimtab.weights import AffineWeight


def packed(codes_NK: Tensor, range_: Range, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer's tensors, by the names that follow the layer's own.

    Args:
        codes_NK: uint8 codes (N, K).
        range_: scales and integer zeros, (N, G).
        grid: symmetric or with integer zeros.
        dtype: the model's; every scale is exact in it.
    """
    pack_to_int32 = _package().compressors.pack_quantized.helpers.pack_to_int32
    n, k = codes_NK.shape
    signed = (codes_NK.to(torch.int16) - grid.center).to(torch.int8)
    words = pack_to_int32(signed, grid.bits)
    assert words.shape == (n, -(-k * grid.bits // 32)), f"{grid.bits}-bit codes take {words.shape[1]} words a row"
    scale = range_.scale_NG.to(dtype)
    assert torch.equal(scale.float(), range_.scale_NG.float()), "the declaration let an inexact scale through"
    found = {"weight_packed": words, "weight_scale": scale, "weight_shape": torch.tensor([n, k])}
    if range_.zero_NG is not None:
        zero = (range_.zero_NG.to(torch.int16) - grid.center).to(torch.int8)
        found["weight_zero_point"] = pack_to_int32(zero, grid.bits, packed_dim=0)
    return found


def config(schemes: dict[Grid, list[str]], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config`, checked by the package's own classes.

    Args:
        schemes: names of the layers on each grid.
        ignore: names of the linear layers that stay float.
    """
    quantization = _package().quantization
    groups = {}
    for i, (grid, names) in enumerate(schemes.items()):
        arguments = quantization.QuantizationArgs(
            num_bits=grid.bits,
            type="int",
            symmetric=grid.zero == "symmetric",
            strategy="channel" if grid.group is None else "group",
            group_size=grid.group,
        )
        groups[f"group_{i}"] = quantization.QuantizationScheme(targets=names, weights=arguments, format=PACKED)
    made = quantization.QuantizationConfig(
        config_groups=groups, format=PACKED, quantization_status="compressed", ignore=ignore
    )
    values: dict[str, Any] = made.model_dump(mode="json", exclude_none=True)
    if any(grid.zero != "symmetric" for grid in schemes):
        values["dequantize"] = True  # read by transformers only
    return values


PACKED = "pack-quantized"


def _package() -> Any:
    try:
        import compressed_tensors
        import compressed_tensors.compressors.pack_quantized.helpers
        import compressed_tensors.quantization
    except ImportError as error:
        raise UserError(f"export: compressed-tensors: not installed ({error}); pip install 'trimtab[serve]'") from None
    return compressed_tensors


class CompressedTensors(Format):
    """Codes for vLLM and transformers."""

    name = "compressed-tensors"
    summary = "packed codes with group or channel scales, for vLLM and transformers"
    forms = (Form(name=PACKED, bits=(2, 3, 4, 8), zeros=("symmetric", "integer")),)
    engines = (
        Engine(name="transformers", bits=(2, 3, 4, 8), zeros=("symmetric", "integer"), alone=("integer",)),
        Engine(name="vllm", bits=(4, 8), zeros=("symmetric", "integer"), groups=(None, 32, 64, 128), fuses=True),
        Engine(name="vllm-cpu", bits=(4,), zeros=("symmetric", "integer"), fuses=True),
    )

    def write(self, folder: Path, writing: Writing) -> None:
        """Packed codes where a form took the layer, float matrices elsewhere."""
        ours = hf.quant_layers(writing.model)
        shards = Shards(folder, writing.max_shard_bytes)
        for name, tensor in float_tensors(writing.model, ours, writing.dtype):
            shards.add(name, tensor)
        schemes: dict[Grid, list[str]] = {}
        for name, layer in ours.items():
            if writing.forms[name] is DENSE:
                add_dense(shards, name, layer, writing.dtype)
                continue
            base = layer.base
            assert isinstance(base, AffineWeight)
            assert isinstance(layer, QuantLinear)
            schemes.setdefault(_scheme(base.grid), []).append(name)
            for part, tensor in packed(base.integer_codes(), base.range(), base.grid, writing.dtype).items():
                shards.add(f"{name}.{part}", tensor)
            if layer.bias is not None:
                shards.add(f"{name}.bias", layer.bias.to(writing.dtype))
        shards.close()
        quantized = {name for names in schemes.values() for name in names}
        ignore = [name for name in _linear_names(writing.model) if name not in quantized]
        made = config(schemes, ignore) if schemes else None
        write_surroundings(folder, writing.model, writing.tokenizer, writing.dtype, made)


def _scheme(grid: Grid) -> Grid:
    """What the format tells apart."""
    return Grid(grid.bits, grid.group, grid.zero)


def _linear_names(model: nn.Module) -> Iterator[str]:
    return (n for n, m in model.named_modules() if isinstance(m, nn.Linear | QuantLinear))
