"""compressed-tensors: what vLLM and transformers read, packed by that package's own function. Weights alone are
`pack-quantized`:

    weight_packed       int32 (N, ceil(K b / 32)): codes less 2^(b-1), dense in words (64 codes of 3 bits are 6 words)
    weight_scale        (N, G) in the model's dtype; G = 1 per channel
    weight_zero_point   int32 (ceil(N b / 32), G), packed along N, integer zeros only
    weight_shape        int64 (N, K)

Layers that read rounded inputs (W4A8, W8A8) are `int-quantized`, whose name for a layer says how its inputs are rounded:

    weight              int8 (N, K): codes less 2^(b-1), a byte each whatever b is
    weight_scale        as above
    weight_zero_point   int8 (N, G), integer zeros only
    input_scale         float32 (1,), static ranges only; input_zero_point int8 (1,) with them if asymmetric

MXFP4 is `mxfp4-pack-quantized`, in which weights are read in float arithmetic and so are ours, too:

    weight_packed       uint8 (N, K / 2): two e2m1 codes a byte, the first in its low half
    weight_scale        uint8 (N, G): exponents of powers of two, see `quant.mxfp4`

A reader computes (q - z) * s in the dtype of s: differences of codes have at most 8 bits, so the subtraction is exact and
the product is rounded once, which are the bits of our own `dequantize`. One config group stands for each distinct grid;
its targets are the names of its layers, and all other linear layers are in `ignore`. Embeddings and heads are dense: no
engine that reads this format runs them from codes.

What rounds inputs as we do, read from the engines' code and checked on a CPU: transformers (compressed-tensors' own
forward) all but dynamic symmetric ranges, where it divides by 127.5 instead of 127, and in the dtype of the input, so to
the bit in float32 only; vLLM on a CPU dynamic asymmetric ones of 8 bits, for W8A8 and
W4A8. Its W4A8 kernel (torch's `_dyn_quant_matmul_4bit`) does that whatever the file says; for symmetric W8A8 on a
processor with AMX it takes a kernel that ignores static ranges and stops in float16. So the rest is refused.
No GPU kernel of vLLM 0.32 takes int-quantized W4A8.

If transformers makes several tensors of one while it reads a family (qkv, say), it does not read that family in this
format at all: it would have to divide scales and packed words, too. If it makes one tensor of several (the convolutions of
q, k and v), it looks for codes of each and drops those in float: the one is written, under the model's own name, and so are
experts that are all in float. In Llama 4 it looks for experts as matrices, and continues without them. It unpacks experts
while it stacks them, all of a model by one scheme, the first of the config; those in float, or `int-quantized`, it drops.
vLLM reads those of a block as one.

transformers 5.23 lays layers with integer zeros out in a wrong shape unless the config says `dequantize`, and with that it
takes every layer for one of the first group: so it reads integer zeros only where all layers share a grid.

3-bit codes are packed with gaps by compressed-tensors before 0.18 and densely since: readers before it would load
nonsense, so the word count is checked here. This is the only file that imports compressed_tensors.

Legend: N out features, K in features, G groups in a row, b bits.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.compressed_tensors.unread import unread
from trimtab.formats.declaration import DENSE, Engine, Form, Format, Layer, Refusal, Rounded, Writing
from trimtab.formats.dense.write import add_dense
from trimtab.formats.directory import Shards, write_surroundings
from trimtab.formats.files import Files, Held
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.models.opening import owner_of, owners_of_experts
from trimtab.quant import mxfp4
from trimtab.quant.activations import ActivationQuantizer, Activations
from trimtab.quant.grid import CodebookGrid, Grid, Range


def packed(codes_NK: Tensor, range_: Range, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """One layer's tensors, by the names that follow the layer's own.

    Args:
        codes_NK: uint8 codes (N, K).
        range_: scales and integer zeros, (N, G).
        grid: symmetric or with integer zeros.
        dtype: the model's; every scale is exact in it.
    """
    pack_to_int32 = _package().compressors.pack_quantized.helpers.pack_to_int32
    found = integers(codes_NK, range_, grid, dtype)
    n, k = codes_NK.shape
    words = pack_to_int32(found.pop("weight"), grid.bits)
    assert words.shape == (n, -(-k * grid.bits // 32)), f"{grid.bits}-bit codes take {words.shape[1]} words a row"
    if "weight_zero_point" in found:
        found["weight_zero_point"] = pack_to_int32(found["weight_zero_point"], grid.bits, packed_dim=0)
    return found | {"weight_packed": words, "weight_shape": torch.tensor([n, k])}


def unpacked(words: Tensor, bits: int, shape: tuple[int, int], packed_dim: int) -> Tensor:
    """Signed codes, int8 of this shape, of words that lie along a dimension: the package's own inverse of `packed`."""
    unpack = _package().compressors.pack_quantized.helpers.unpack_from_int32
    found: Tensor = unpack(words, bits, torch.Size(shape), packed_dim=packed_dim)
    return found


def integers(codes_NK: Tensor, range_: Range, grid: Grid, dtype: torch.dtype) -> dict[str, Tensor]:
    """The same with a byte for each code."""
    scale = range_.scale_NG.to(dtype)
    assert torch.equal(scale.float(), range_.scale_NG.float()), "the declaration let an inexact scale through"
    found = {"weight": _signed(codes_NK, grid), "weight_scale": scale}
    return found if range_.zero_NG is None else found | {"weight_zero_point": _signed(range_.zero_NG, grid)}


def _signed(codes: Tensor, grid: Grid) -> Tensor:
    return (codes.to(torch.int16) - grid.center).to(torch.int8)


def powers(codes_NK: Tensor, exponents_NG: Tensor) -> dict[str, Tensor]:
    """The tensors of a layer on the MXFP4 grid."""
    return {"weight_packed": mxfp4.to_blocks(codes_NK).flatten(1), "weight_scale": exponents_NG}


def measured(inputs: ActivationQuantizer) -> dict[str, Tensor]:
    """The tensors of a layer's rounded inputs: none for dynamic ranges."""
    found = {"input_scale": inputs.scale, "input_zero_point": inputs.zero}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


Scheme = tuple[Grid | CodebookGrid, Activations | None]
"""What the format tells layers apart by: the grid, and how inputs are rounded."""


def config(schemes: dict[Scheme, list[str]], ignore: list[str]) -> dict[str, Any]:
    """The `quantization_config`, checked by the package's own classes.

    Args:
        schemes: names of the layers of each scheme.
        ignore: names of the linear layers that stay float.
    """
    quantization = _package().quantization
    groups, forms = {}, []
    for i, ((grid, inputs), names) in enumerate(schemes.items()):
        arguments = quantization.QuantizationArgs(
            num_bits=grid.bits,
            type="int" if isinstance(grid, Grid) else "float",
            symmetric=isinstance(grid, CodebookGrid) or grid.zero == "symmetric",
            strategy="channel" if grid.group is None else "group",
            group_size=grid.group,
            **({} if isinstance(grid, Grid) else {"scale_dtype": torch.uint8}),
        )
        reads = None if inputs is None else _arguments(inputs)
        forms.append(POWERS if isinstance(grid, CodebookGrid) else PACKED if inputs is None else INTEGERS)
        groups[f"group_{i}"] = quantization.QuantizationScheme(
            targets=names, weights=arguments, input_activations=reads, format=forms[-1]
        )
    form = forms[0] if len(set(forms)) == 1 else "mixed-precision"
    made = quantization.QuantizationConfig(
        config_groups=groups, format=form, quantization_status="compressed", ignore=ignore
    )
    values: dict[str, Any] = made.model_dump(mode="json", exclude_none=True)
    if form == PACKED and any(isinstance(grid, Grid) and grid.zero != "symmetric" for grid, _ in schemes):
        values["dequantize"] = True  # read by transformers only
    return values


def _arguments(inputs: Activations) -> Any:
    """`input_activations` of a scheme."""
    dynamic = inputs.mode == "dynamic"
    return _package().quantization.QuantizationArgs(
        num_bits=inputs.bits,
        type="int",
        symmetric=inputs.symmetric,
        strategy="token" if dynamic else "tensor",
        dynamic=dynamic,
    )


_EXPERTS = "the model's experts"
PACKED = "pack-quantized"
INTEGERS = "int-quantized"
POWERS = "mxfp4-pack-quantized"
KINDS = tuple(
    Activations(bits, symmetric, mode)
    for bits in (8, 4)
    for mode in ("dynamic", "static")
    for symmetric in (False, True)
)
_DYNAMIC, _STATIC = (tuple(k for k in KINDS if k.bits == 8 and k.mode == mode) for mode in ("dynamic", "static"))
_AS_PACKAGE = tuple(k for k in KINDS if k.mode == "static" or not k.symmetric)
"""Those that compressed-tensors itself rounds as we do."""
_W8A8 = Rounded(inputs=(*_DYNAMIC, *_STATIC), bits=(8,), zeros=("symmetric",), groups=(None,))


def _package() -> Any:
    import compressed_tensors
    import compressed_tensors.compressors.pack_quantized.helpers
    import compressed_tensors.quantization

    return compressed_tensors


class CompressedTensors(Format):
    """Codes for vLLM and transformers."""

    name = "compressed-tensors"
    library = "compressed_tensors"
    experts = ("alone",)
    summary = "packed codes with group or channel scales, for vLLM and transformers"
    forms = (
        Form(name=PACKED, bits=(2, 3, 4, 8), zeros=("symmetric", "integer")),
        Form(name=INTEGERS, width=8, bits=(2, 3, 4, 8), zeros=("symmetric", "integer"), inputs=KINDS),
        Form(name=POWERS, bits=(), zeros=(), table="mxfp4"),
    )
    engines = (
        Engine(
            name="transformers",
            experts=("symmetric",),
            bits=(2, 3, 4, 8),
            zeros=("symmetric", "integer"),
            alone=("integer",),
            tables=("mxfp4",),
            rounded=(Rounded(inputs=_AS_PACKAGE, bits=(2, 3, 4, 8), zeros=("symmetric", "integer")),),
        ),
        Engine(
            name="vllm",
            experts=("symmetric",),
            lacks=frozenset({"implied heads"}),
            bits=(4, 8),
            zeros=("symmetric", "integer"),
            groups=(None, 32, 64, 128),
            fuses=True,
            rounded=(_W8A8,),
        ),
        Engine(
            name="vllm-cpu",
            experts=(),
            lacks=frozenset({"implied heads"}),
            bits=(4,),
            zeros=("symmetric", "integer"),
            fuses=True,
            rounded=(
                Rounded(inputs=_DYNAMIC[:1], bits=(8,), zeros=("symmetric",), groups=(None,)),
                Rounded(inputs=_DYNAMIC[:1], bits=(4,), zeros=("symmetric",)),
            ),
        ),
    )

    def model_refusal(self, layers: Sequence[Layer], engine: str | None) -> Refusal | None:
        """Experts that an engine would take for others than they are."""
        experts = [layer for layer in layers if layer.expert]
        if not experts or all(layer.grid is None for layer in layers):
            return None
        remedy = "give all experts one grid, or export to dense"
        blocks: dict[str, list[Layer]] = {}
        for layer in experts:
            blocks.setdefault(owner_of(layer.name), []).append(layer)
        for block in blocks.values():
            if any(layer.grid is None for layer in block) or len(block) < block[0].experts:
                cause = f"{block[0].name} is beside some in float, and no engine reads such a block"
                return Refusal(_EXPERTS, cause, remedy)
        if engine not in (None, "transformers"):
            each = (_unlike(block, f"{engine} reads those of a block as one kind", remedy) for block in blocks.values())
            return next(filter(None, each), None)
        remedy += ", or with --engine vllm, where it was not tried"
        rounded = next((layer for layer in experts if layer.inputs is not None), None)
        if rounded is not None:
            cause = f"{rounded.name} has rounded inputs, with which transformers leaves them at random in {self.name}"
            return Refusal(_EXPERTS, cause, remedy)
        return _unlike(experts, "transformers reads those of a model as one kind", remedy)

    def require_config(self, config: Any, engine: str | None = None) -> None:
        """Raise a `UserError` too for a family that transformers does not read in this format, unless for vLLM."""
        super().require_config(config, engine)
        why = next(unread(config), None) if engine in (None, "transformers") else None
        if why is not None:
            raise UserError(
                f"export: {self.name}: transformers {why} in a {config.model_type} model; export to dense, or with "
                "--engine vllm, where it was not tried"
            )

    def write(self, folder: Path, writing: Writing) -> None:
        """Packed codes where a form took the layer, float matrices elsewhere."""
        files = Files(writing.model, joined=True)
        shards = Shards(folder, writing.max_shard_bytes)
        for name, tensor in files.floats(writing.dtype):
            shards.add(name, tensor)
        schemes: dict[Scheme, list[str]] = {}
        experts, of_experts = owners_of_experts(writing.model), set[Scheme]()
        ignore = files.linear_in_float()
        for held in files.layers():
            if writing.forms[held.of] is DENSE:
                add_dense(shards, held, writing.dtype)
                ignore += held.names if isinstance(held.layer, QuantLinear) else []
                continue
            name, layer = held.name, held.layer
            scheme, parts = _layer(held, writing.dtype)
            schemes.setdefault(scheme, []).extend(held.names)
            if owner_of(held.of) in experts:
                of_experts.add(scheme)
            for part, tensor in parts.items():
                shards.add(f"{name}.{part}", tensor)
            if layer.bias is not None:
                shards.add(f"{name}.bias", layer.bias[held.rows].to(writing.dtype))
        shards.close()
        in_order = dict(sorted(schemes.items(), key=lambda item: item[0] not in of_experts))  # as transformers reads
        made = config(in_order, ignore) if schemes else None
        write_surroundings(folder, writing.model, writing.tokenizer, writing.dtype, made)


def _unlike(experts: Sequence[Layer], reads: str, remedy: str) -> Refusal | None:
    """The first expert that is of another kind than the first of them."""

    def kind(layer: Layer) -> str:
        grid = "in float" if layer.grid is None else f"on {layer.grid.describe()}"
        return grid if layer.inputs is None else f"{grid} with {layer.inputs.describe()} inputs"

    first = experts[0]
    other = next((layer for layer in experts if kind(layer) != kind(first)), None)
    if other is None:
        return None
    return Refusal(_EXPERTS, f"{other.name} is {kind(other)} and {first.name} {kind(first)}, and {reads}", remedy)


def _layer(held: Held, dtype: torch.dtype) -> tuple[Scheme, dict[str, Tensor]]:
    """What tells a layer from others, and its tensors but for the bias."""
    base, inputs, codes_NK = held.layer.base, held.layer.inputs, held.layer.base.integer_codes()[held.rows]
    if isinstance(base, CodebookWeight):
        return (base.grid, None), powers(codes_NK, base.absmax[held.rows])
    assert isinstance(base, AffineWeight)
    scheme = _plain(base.grid), None if inputs is None else inputs.kind
    made = (packed if inputs is None else integers)(codes_NK, base.range().of(held.rows), base.grid, dtype)
    return scheme, made if inputs is None else made | measured(inputs)


def _plain(grid: Grid) -> Grid:
    """What the format tells apart."""
    return Grid(grid.bits, grid.group, grid.zero)
