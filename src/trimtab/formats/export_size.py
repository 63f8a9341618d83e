"""Bytes that each format would take of a model, from names and shapes, or why it does not hold it.

    native                 as `file_size` bounds it
    compressed-tensors     b bits a code in words of 32, a scale and a packed zero for each group
    gptq                   the same with float16 scales, zeros always, and the group of each input
    awq                    as gptq, without the groups of inputs
    gguf                   blocks of 32 codes: w bits each, a float16 scale, and a float16 minimum where the type has one;
                           k-quants: blocks of 256, with integers for their groups besides
    mlx                    w bits a code, a scale and a bias for each group of at most 128
    dense, peft            matrices in the model's dtype; of peft, the factors too

Tensors are counted to the byte; of a file's header, its tokenizer and its config nothing is, but in native's bound.
"""

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch

from trimtab.errors import UserError
from trimtab.formats import ALL
from trimtab.formats.declaration import DENSE, Form, Format, Layer, Refusal
from trimtab.formats.file_size import layer_bytes
from trimtab.formats.gguf.blocks import POWERS, SUPER_TYPES, TYPES
from trimtab.formats.mlx.write import GROUPS, width
from trimtab.formats.refusals import refusals
from trimtab.formats.written import planned
from trimtab.methods.base import Method
from trimtab.models.architecture import in_language_model, sees_or_hears
from trimtab.models.targets import Target
from trimtab.quant.activations import Activations, KvCache
from trimtab.quant.grid import Grid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WORD = 32


def export_sizes(
    model: "PreTrainedModel",
    targets: Sequence[Target],
    method: Method,
    *,
    dtype: torch.dtype,
    merge: bool = False,
    activations: Activations | None = None,
    kv: KvCache | None = None,
    only: Collection[str] | None = None,
) -> dict[str, int | str]:
    """Bytes of a tuned model by format, or why the format does not hold it.

    Args:
        model: laid out on the meta device, not prepared.
        targets: its layers that become ours, from `targets`.
        method: what trains them.
        dtype: compute dtype, of what stays in float.
        merge: whether output adapters are merged into dense weights.
        activations: how inputs are rounded, or None.
        kv: how keys and values are rounded, or None.
        only: these formats; None for all.
    """
    found: dict[str, int | str] = {}
    for format_ in (f for f in ALL if only is None or f.name in only):
        refused = _refused(format_, planned(targets, method, merge, format_, activations, kv), model, dtype)
        if refused:
            found[format_.name] = refused
            continue
        about: dict[str, Any] = {"dtype": dtype, "merge": merge, "activations": activations}
        floats = _float_entries(model, targets, format_.whole)
        found[format_.name] = sum(layer_size(format_, t, method, **about) for t in targets) + floats * dtype.itemsize
    return found


def layer_size(
    format_: Format,
    target: Target,
    method: Method,
    *,
    dtype: torch.dtype,
    merge: bool = False,
    activations: Activations | None = None,
) -> int:
    """Bytes of one tuned layer in a format, without its bias.

    Raises:
        UserError: if the format does not hold it.
    """
    if format_.everything:
        return layer_bytes(target, method, dtype=dtype, merge=merge, activations=activations)
    (layer,) = planned([target], method, merge, format_, activations)
    if layer.kind == "tied":
        return 0
    form = format_.form(layer, dtype)
    if isinstance(form, Refusal):
        raise UserError(str(form))
    return _matrix(format_, layer, form, dtype) + (_factors(target, method) if format_.adapters == "kept" else 0)


def _refused(format_: Format, layers: Sequence[Layer], model: "PreTrainedModel", dtype: torch.dtype) -> str:
    try:
        format_.require_config(model.config)
    except UserError as error:
        return str(error).removeprefix(f"export: {format_.name}: ")
    return next((str(refusal) for refusal in refusals(format_, layers, dtype)), "")


def _float_entries(model: "PreTrainedModel", targets: Sequence[Target], whole: bool) -> int:
    """Parameters of all (or of the language model) that belongs to no layer of ours, and of the biases of those that do;
    ties counted once.
    """
    left_out = getattr(model, "all_tied_weights_keys", {})
    ours = {f"{target.name}.weight" for target in targets}
    parts = whole or not sees_or_hears(model)
    state = {n: t for n, t in model.state_dict().items() if parts or in_language_model(model, n) is not None}
    in_stacks = sum(t.shape[0] * t.shape[1] for t in targets if f"{t.name}.weight" not in state)
    return sum(t.numel() for n, t in state.items() if n not in ours and n not in left_out) - in_stacks


def _factors(target: Target, method: Method) -> int:
    """Bytes of a layer's update as an ordinary LoRA."""
    delta = target.method(method).delta(target.grid, target.shape) if target.kind in ("linear", "head") else None
    if delta is None:
        return 0
    n, k = target.shape
    rank = k // delta.pool if delta.rank is None else delta.rank
    itemsize: int = getattr(torch, delta.dtype).itemsize
    return rank * (n + k) * itemsize


def _matrix(format_: Format, layer: Layer, form: Form, dtype: torch.dtype) -> int:
    """Bytes of a layer's matrix in this form."""
    n, k = layer.shape
    if form is DENSE:
        return n * k * dtype.itemsize
    grid = layer.grid
    if form.table is not None:
        return n * (k // POWERS.weights) * POWERS.block_bytes  # in every format: 16 bytes of codes and an exponent
    assert isinstance(grid, Grid), "no form takes another"
    groups, zeros = k // (grid.group or k), grid.zero == "integer"
    if format_.name == "gguf":
        kind = (TYPES | SUPER_TYPES)[form.name]
        return n * (k // kind.weights) * kind.block_bytes
    if format_.name == "mlx":
        wide = width(grid.bits, grid.zero)
        assert wide is not None
        size = next(g for g in GROUPS if (grid.group or k) % g == 0)
        return n * _words(k * wide) + 2 * n * (k // size) * dtype.itemsize
    if format_.name in ("gptq", "awq"):
        codes = _words(k * grid.bits) * n + 4 * k if format_.name == "gptq" else _words(n * grid.bits) * k
        return codes + groups * (2 * n + _words(n * grid.bits))
    if form.width == 8:  # whole bytes, where inputs are rounded
        return n * k + n * groups * (dtype.itemsize + zeros)
    # Each layer has its shape beside it, and checkpoints that hold each expert by itself hold gate and up apart.
    layers = 2 if layer.expert == "alone" and layer.name.endswith(".gate_up_proj") else 1
    in_zeros = zeros * groups * layers * _words(n // layers * grid.bits)
    return n * _words(k * grid.bits) + n * groups * dtype.itemsize + in_zeros + 16 * layers


def _words(bits: int) -> int:
    """Bytes of so many bits in words of 32."""
    return -(-bits // _WORD) * 4
