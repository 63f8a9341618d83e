"""GPTQ v2: the layout that gptqmodel and, through it, transformers read, and vLLM where zeros are symmetric.

    qweight   int32 (ceil(K b / 32), N)   codes packed along K, lowest bits first; three bits run over word ends
    qzeros    int32 (G, ceil(N b / 32))   zeros packed along N, as they are (the first version stored them less one)
    scales    float16 (G, N)
    g_idx     int32 (K,)                  group of each input, here in order

    W[n, k] = scales[g, n] * (q - z)      symmetric: z = 2^(b-1)

All layers share one width and group (with `dynamic` rules gptqmodel could mix; we do not write them). Real zeros do not
fit, and scales are float16: portable and float16 ones are exact. (vLLM holds scales in the dtype that it computes in: where
that is bfloat16, portable ones alone are served as they were trained.) Codes of a Conv1D lie as of any layer.

`stored`, `one_grid` and `write_layers` serve AWQ too, whose files differ in the order of codes in words, and in the config.

Legend: N out features, K in features, G groups in a row, b bits.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.formats.declaration import DENSE, Engine, Form, Format, Layer, Refusal, Writing
from trimtab.formats.dense.write import add_dense
from trimtab.formats.directory import Shards, write_surroundings
from trimtab.formats.files import Files
from trimtab.formats.manifest import write_json
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight
from trimtab.quant.grid import Grid, Range
from trimtab.quant.int32_packing import pack_int32


def packed(codes_NK: Tensor, range_: Range, grid: Grid) -> dict[str, Tensor]:
    """One layer's tensors, by the names that follow the layer's own.

    Args:
        codes_NK: uint8 codes (N, K).
        range_: scales and integer zeros, (N, G); scales are exact in float16.
        grid: symmetric or with integer zeros.
    """
    k, (scale_GN, zero_GN) = codes_NK.shape[1], stored(range_, grid)
    return {
        "qweight": pack_int32(codes_NK, grid.bits).T.contiguous(),
        "qzeros": pack_int32(zero_GN, grid.bits),
        "scales": scale_GN,
        "g_idx": torch.arange(k, dtype=torch.int32) // (k // scale_GN.shape[0]),
    }


def stored(range_: Range, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scales, float16 (G, N), and zeros, uint8 (G, N), of a layer: those of a symmetric grid are all in the middle.

    Args:
        range_: scales and integer zeros, (N, G); scales are exact in float16.
        grid: symmetric or with integer zeros.
    """
    scale = range_.scale_NG.to(torch.float16)
    assert torch.equal(scale.float(), range_.scale_NG.float()), "the declaration let an inexact scale through"
    zero = torch.full_like(range_.scale_NG, grid.center) if range_.zero_NG is None else range_.zero_NG
    return scale.T.contiguous(), zero.T.to(torch.uint8)


def one_grid(layers: Sequence[Layer], name: str) -> Refusal | None:
    """Why layers do not go into a format of one width and group: they differ in it, or none is on an affine grid.

    Args:
        layers: of the model, as they will be written.
        name: of the format.
    """
    linear = [layer for layer in layers if layer.kind == "linear" and isinstance(layer.grid, Grid)]
    if not linear:
        return Refusal("the model", "has no linear layer on an affine grid", "export to dense")
    for layer in linear[1:]:
        a, b = linear[0].grid, layer.grid
        assert isinstance(a, Grid)
        assert isinstance(b, Grid)
        if (a.bits, a.group) != (b.bits, b.group):
            cause = f"is {b.describe()} beside {a.describe()} of {linear[0].name}; {name} holds one width and group"
            return Refusal(layer.name, cause, "give all layers one, or export to compressed-tensors")
    return None


def write_layers(
    folder: Path, writing: Writing, pack: Callable[[Tensor, Range, Grid], dict[str, Tensor]]
) -> tuple[list[Grid], list[str]]:
    """Write a model's tensors: packed where a form took the layer, float matrices elsewhere.

    Args:
        folder: where to.
        writing: the model.
        pack: codes (N, K), scales and zeros, and a grid, to one layer's tensors.

    Returns:
        The grids of the packed layers, and the names of the linear layers that are float, the head's left out.
    """
    files = Files(writing.model)
    shards = Shards(folder, writing.max_shard_bytes)
    for name, tensor in files.floats(writing.dtype):
        shards.add(name, tensor)
    grids, skipped = list[Grid](), files.linear_in_float()
    for held in files.layers():
        layer, base = held.layer, held.layer.base
        if writing.forms[held.of] is DENSE:
            add_dense(shards, held, writing.dtype)
            skipped += held.names if isinstance(layer, QuantLinear) else []
            continue
        assert isinstance(base, AffineWeight)
        grids.append(base.grid)
        for part, tensor in pack(base.integer_codes()[held.rows], base.range().of(held.rows), base.grid).items():
            shards.add(f"{held.name}.{part}", tensor)
        if layer.bias is not None:
            shards.add(f"{held.name}.bias", layer.bias[held.rows].to(writing.dtype))
    shards.close()
    return grids, [name for name in skipped if not name.endswith("lm_head")]


class Gptq(Format):
    """One grid for all layers, float16 scales."""

    name = "gptq"
    summary = "GPTQ v2: one grid for all layers, for gptqmodel, transformers with it, and vLLM"
    forms = (Form(name="gptq_v2", bits=(2, 3, 4, 8), zeros=("symmetric", "integer"), scales="float16"),)
    transposed = True
    engines = (
        Engine(name="gptqmodel", bits=(2, 3, 4, 8), zeros=("symmetric", "integer")),
        Engine(
            name="vllm",
            bits=(4, 8),
            zeros=("symmetric",),
            groups=(None, 32, 64, 128),
            fuses=True,
            casts_scales=True,
            lacks=frozenset({"implied heads"}),
        ),
        Engine(
            name="vllm-cpu",
            bits=(4,),
            zeros=("symmetric",),
            fuses=True,
            casts_scales=True,
            lacks=frozenset({"implied heads"}),
        ),
    )

    def model_refusal(self, layers: Sequence[Layer], engine: str | None) -> Refusal | None:
        """One width and group for the whole model."""
        return one_grid(layers, self.name)

    def write(self, folder: Path, writing: Writing) -> None:
        """Packed codes where a form took the layer, float matrices elsewhere."""
        grids, skipped = write_layers(folder, writing, packed)
        made = config(grids[0], all(grid.zero == "symmetric" for grid in grids), skipped)
        write_json(folder / "quantize_config.json", made)
        write_surroundings(folder, writing.model, writing.tokenizer, writing.dtype, made)


def config(grid: Grid, symmetric: bool, skipped: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of a model on this grid, whose `skipped` linear layers are float."""
    return {
        "quant_method": "gptq",
        "checkpoint_format": "gptq_v2",
        "bits": grid.bits,
        "group_size": grid.group or -1,
        "sym": symmetric,
        "desc_act": False,
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {f"-:^{re.escape(name)}$": {} for name in skipped},
    }
