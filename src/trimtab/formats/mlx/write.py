"""MLX's affine layout, which mlx-lm runs on Apple's processors (and, slowly, on others).

    weight    uint32 (N, K w / 32)    codes of w bits, dense in a row's words, lowest bits first
    scales    (N, K / g)              in the model's dtype, groups g of 32, 64 or 128
    biases    (N, K / g)              the same

    W[n, k] = scales[n, k // g] * c + biases[n, k // g]

MLX knows codes of 2, 3, 4, 5, 6 and 8 bits. A layer goes code for code into the narrowest w that holds it, and biases are
exact: a symmetric grid and an integer zero become c = q - z + 2^(w-1) with the bias -2^(w-1) s, which is a shift of the
scale's exponent, where -z s would not fit into bfloat16. So an integer zero takes one more bit:

    symmetric, b bits    q - 2^(b-1)  in [-2^(b-1), 2^(b-1) - 1]     w >= b
    integer,   b bits    q - z        in [-(2^b - 1), 2^b - 1]       w >= b + 1
    real,      b bits    c = q, bias = the offset                    w >= b

A larger group, and a channel, repeat their scale. MLX computes s c + b in the dtype of s, so with one more rounding than
we do: the numbers of the file are the trained ones, and what MLX makes of them is its noise.

Every layer's width and group stand in `quantization` of config.json, embeddings and heads among them. mlx-lm takes rotary
frequencies from the keys that configs had before transformers 5 and falls back to its own where there are none, so they are
written, too. Nothing of MLX is imported. Which models it computes as transformers does is in their descriptions
(`models.architecture`), by what was tested (`tests/serving/test_mlx.py`); its Gemma 2 and Mistral have no sliding window.

Legend: N out features, K in features, G groups in a row.
"""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.declaration import ALL_KINDS, DENSE, Engine, Form, Format, Writing
from trimtab.formats.dense.write import add_dense
from trimtab.formats.directory import Shards, write_surroundings
from trimtab.formats.files import Files
from trimtab.formats.manifest import write_json
from trimtab.layers.weights import AffineWeight
from trimtab.models.architecture import FAMILIES, architecture_of
from trimtab.models.asked import features, rope, windowed
from trimtab.quant.grid import Grid, Range, Zero
from trimtab.quant.int32_packing import pack_int32

WIDTHS = (2, 3, 4, 5, 6, 8)
GROUPS = (128, 64, 32)
_ZEROS: tuple[Zero, ...] = ("symmetric", "integer", "real")


def width(bits: int, zero: Zero) -> int | None:
    """Bits of the narrowest codes that hold those of a grid; None if none do."""
    needed = bits + 1 if zero == "integer" else bits
    return next((w for w in WIDTHS if w >= needed), None)


def packed(codes_NK: Tensor, range_: Range, grid: Grid, dtype: torch.dtype) -> tuple[dict[str, Tensor], int, int]:
    """One layer's tensors by the names that follow the layer's own, the width of its codes, and its group.

    Args:
        codes_NK: uint8 codes (N, K), K a multiple of 32.
        range_: scales and zeros or offsets, (N, G), exact in `dtype`.
        grid: the affine grid.
        dtype: the model's.
    """
    wide = width(grid.bits, grid.zero)
    assert wide is not None, "the declaration let a grid through that no width holds"
    scale, center = range_.scale_NG.to(dtype), 1 << (wide - 1)
    assert torch.equal(scale.float(), range_.scale_NG.float()), "the declaration let an inexact scale through"
    k = codes_NK.shape[1]
    size = k // scale.shape[1]
    group = next(g for g in GROUPS if size % g == 0)
    if range_.offset_NG is not None:
        bias = range_.offset_NG.to(dtype)
        assert torch.equal(bias.float(), range_.offset_NG.float()), "the declaration let an inexact offset through"
    else:
        zero = grid.center if range_.zero_NG is None else range_.zero_NG.repeat_interleave(size, 1).to(torch.int16)
        codes_NK, bias = codes_NK.to(torch.int16) - zero + center, -center * scale
    made = {
        "weight": pack_int32(codes_NK, wide).view(torch.uint32),
        "scales": scale.repeat_interleave(size // group, 1),
        "biases": bias.repeat_interleave(size // group, 1),
    }
    return made, wide, group


def config_keys(config: Any) -> dict[str, Any]:
    """What mlx-lm reads of a model's config under another name than transformers writes.

    Raises:
        UserError: for a model that mlx-lm would compute otherwise, or that was not compared with it.
    """
    family = architecture_of(config).mlx
    if family is None:
        tested = ", ".join(name for name, family in FAMILIES.items() if family.mlx is not None)
        raise UserError(
            f"export: mlx: model type {config.model_type!r} was not compared with mlx-lm; tested are {tested}"
        )
    parameters = rope(config)
    for feature, words in features(config):
        if feature not in family.computes and feature != "windows":
            raise UserError(f"export: mlx: {config.model_type} with {words}, which mlx-lm leaves out; export to gguf")
    if family.periodic:
        assert parameters.windowed is not None, "layers with a window have rotary embeddings of their own"
        kinds = list(config.layer_types)
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else 0
        full = {i for i, kind in enumerate(kinds, start=1) if kind == "full_attention"}
        if not every or full != set(range(every, len(kinds) + 1, every)):
            raise UserError(f"export: mlx: layer_types {kinds} have no period with one full layer, as mlx-lm wants")
        local = {"sliding_window_pattern": every, "rope_local_base_freq": parameters.windowed["rope_theta"]}
        return local | _rope(parameters.full)
    if any(windowed(config)):
        raise UserError(
            f"export: mlx: {config.model_type} with a sliding window, which mlx-lm leaves out; export to gguf"
        )
    return _rope(parameters.full)


def _rope(full: dict[str, Any]) -> dict[str, Any]:
    return {"rope_theta": full["rope_theta"], "rope_scaling": None if full["rope_type"] == "default" else dict(full)}


def _forms() -> tuple[Form, ...]:
    """A form for each width and zero."""
    held = {(w, zero): tuple(b for b in range(1, 9) if width(b, zero) == w) for w in WIDTHS for zero in _ZEROS}
    return tuple(
        Form(name=f"{w} bits", width=w, bits=bits, zeros=(zero,), kinds=ALL_KINDS, group_of=GROUPS[-1])
        for (w, zero), bits in held.items()
        if bits
    )


class Mlx(Format):
    """Codes for mlx-lm, embeddings and head among them."""

    name = "mlx"
    summary = "packed codes with scales and biases, for MLX on Apple's processors"
    forms = _forms()
    engines = (Engine(name="mlx", bits=tuple(range(1, 9)), zeros=_ZEROS),)

    def require_config(self, config: Any, engine: str | None = None) -> None:
        """Raise a `UserError` for a model that mlx-lm would compute otherwise, or that was not compared with it."""
        config_keys(config)

    def write(self, folder: Path, writing: Writing) -> None:
        """Packed codes where a form took the layer, float matrices elsewhere."""
        keys = config_keys(writing.model.config)
        files = Files(writing.model)
        shards = Shards(folder, writing.max_shard_bytes)
        for name, tensor in files.floats(writing.dtype):
            shards.add(name, tensor)
        layers: dict[str, dict[str, Any]] = {}
        for held in files.layers():
            name, layer = held.of, held.layer
            if writing.forms[name] is DENSE or getattr(layer, "tied", False):
                add_dense(shards, held, writing.dtype)
                continue
            assert isinstance(layer.base, AffineWeight)
            parts, bits, group = packed(layer.base.integer_codes(), layer.base.range(), layer.base.grid, writing.dtype)
            for part, tensor in parts.items():
                shards.add(f"{name}.{part}", tensor)
            layers[name] = {"bits": bits, "group_size": group, "mode": "affine"}
            bias = getattr(layer, "bias", None)
            if bias is not None:
                shards.add(f"{name}.bias", bias.to(writing.dtype))
        shards.close()
        # Under both names, as mlx-lm does: by the second one other readers see that the weights are packed.
        made = {**next(iter(layers.values())), **layers} if layers else None
        write_surroundings(folder, writing.model, writing.tokenizer, writing.dtype, made)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        write_json(folder / "config.json", config | keys | ({} if made is None else {"quantization": made}))
