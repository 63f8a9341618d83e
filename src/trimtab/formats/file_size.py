"""Bytes of a model as it will be stored: exact, and before anything is loaded.

A native file is a header and tensors, and both follow from names, shapes, rules and method alone:

    8 bytes | {"__metadata__": {..}, "name": {"dtype": "U8", "shape": [..], "data_offsets": [a, b]}, ..} | tensors

Everything is additive over layers but two things: how many digits an offset has, which depends on what lies before it, and
the padding of the header to 8 bytes. So there are two numbers. `FileSize.file_bytes` is exact, to the byte, for one
configuration. `FileSize.parts` charges every offset the digits of the largest and the padding in full: its sum is an upper
bound, by a few bytes a tensor, in which a layer's share (`layer_bytes`) does not depend on any other layer. A search that
keeps that sum within a budget never writes a file that exceeds it.

What is counted is the model after folding, as `save` writes it: levels are codes again, moved zeros stay where zeros are,
kept adapters are there. What exceeds `SHARD_BYTES` is split over files, each with a frame of its own: `file_bytes` is then
that of the one file that would hold all, and the bound has a share of those frames in every tensor. Two files in a row are
larger than one may be, so n files hold more than (n - 1) / 2 times SHARD_BYTES: two frames for each SHARD_BYTES suffice.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trimtab.errors import UserError
from trimtab.formats.written import folded, of_target, plug
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.methods.base import Method
from trimtab.models.opening import leave_unmarked
from trimtab.models.prepare import prepare_meta
from trimtab.models.simulate import rounding
from trimtab.models.targets import Target
from trimtab.models.transformers_bridge import cast_floats, quant_layers
from trimtab.quant.activations import Activations
from trimtab.recipe.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# In the order in which safetensors writes them: the last first, and by name within each.
_DTYPES = {
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
_METADATA = {"format": "pt"}
SHARD_BYTES = 5 * 10**9
"""Most bytes of tensors in one file, unless asked otherwise."""
_OFFSET_DIGITS = 11
"""Digits of offsets below 100 GB, far beyond the largest file."""
_UNITS = {"": 1, "B": 1} | {p + "B": 1000**i for i, p in enumerate("kMGT", 1)}
_UNITS |= {"KB": 1000} | {p + "iB": 1024**i for i, p in enumerate("KMGT", 1)}


def parse_bytes(value: Any, where: str) -> int:
    """Bytes from a whole number or words like `90MiB`, `1.5 GB` (powers of 1024 with an i, of 1000 without).

    Raises:
        UserError: naming `where`.
    """
    text = str(value).strip()
    digits = text.rstrip("BKMGTki ")
    unit = text[len(digits) :].strip()
    try:
        count = float(digits) * _UNITS[unit]
    except (KeyError, ValueError):
        raise UserError(f"{where}: {value!r} is not a size; write 90MiB, 1.5GB or a number of bytes") from None
    if isinstance(value, bool) or not 1 <= count < 1 << 63:
        raise UserError(f"{where}: {value!r} is not a positive size")
    return int(count)


class Entry(NamedTuple):
    """A tensor of the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its data."""
        count = 1
        for n in self.shape:
            count *= n
        return count * self.dtype.itemsize

    def header(self, start: int, end: int) -> str:
        """What the header says of it, a comma included."""
        about = {"dtype": _DTYPES[self.dtype], "shape": list(self.shape), "data_offsets": [start, end]}
        return f"{json.dumps(self.name)}:{json.dumps(about, separators=(',', ':'))},"

    @property
    def bound(self) -> int:
        """Bytes of data and header, whatever else is in the file, and its share of further files' frames."""
        largest = 10**_OFFSET_DIGITS - 1
        frames = -(-2 * _frame_bytes() * self.nbytes // SHARD_BYTES)
        return self.nbytes + len(self.header(largest, largest).encode()) + frames


@dataclass(frozen=True)
class FileSize:
    """Bytes of a model's safetensors."""

    file_bytes: int
    """Of the file, exactly."""
    tensor_bytes: int
    """Of its tensors alone."""
    parts: dict[str, int]
    """An upper bound that adds up: by layer that rules speak of; under "" all else."""

    @property
    def bound(self) -> int:
        """The sum of the parts: at least `file_bytes`."""
        return sum(self.parts.values())


def file_size(
    model: "PreTrainedModel",
    method: Method,
    rules: Sequence[Rule] | None,
    *,
    dtype: torch.dtype,
    merge: bool = False,
    activations: Activations | None = None,
) -> FileSize:
    """What `run` will write for this configuration.

    Args:
        model: laid out on the meta device (`ModelSource.layout`); it is prepared in place.
        method: what trains it.
        rules: see `rules.resolve`.
        dtype: compute dtype, of what stays in float.
        merge: whether output adapters are merged into dense weights.
        activations: how inputs are rounded, or None; static ranges are stored.
    """
    cast_floats(model, dtype)
    prepare_meta(model, method, rules)
    for rounded in rounding(model).values():
        rounded.inputs = plug(activations)
    for name, layer in quant_layers(model).items():
        if isinstance(layer, QuantLinear):
            model.set_submodule(name, folded(layer, merge))
    leave_unmarked(model)
    ours = [n for n, layer in quant_layers(model).items() if isinstance(layer, QuantEmbedding) or not layer.tied]
    left_out = getattr(model, "all_tied_weights_keys", {})
    entries = [Entry(n, t.dtype, tuple(t.shape)) for n, t in model.state_dict().items() if n not in left_out]
    parts = dict.fromkeys(("", *ours), 0)
    for entry in entries:
        owner = next((n for n in _owners(entry.name) if n in parts), "")
        parts[owner] += entry.bound
    parts[""] += _frame_bytes()
    return FileSize(_file_bytes(entries), sum(e.nbytes for e in entries), parts)


def float_bytes(model: "PreTrainedModel") -> int:
    """An upper bound, by a few bytes a tensor, of the safetensors that `save_pretrained` makes of a float model."""
    left_out = getattr(model, "all_tied_weights_keys", {})
    entries = (Entry(n, t.dtype, tuple(t.shape)) for n, t in model.state_dict().items() if n not in left_out)
    return _frame_bytes() + sum(e.bound for e in entries)


def _owners(name: str) -> Iterable[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def layer_bytes(
    target: Target,
    method: Method,
    *,
    dtype: torch.dtype,
    merge: bool = False,
    activations: Activations | None = None,
) -> int:
    """The part of one layer on the grid that its target names: what `FileSize.parts` holds for it."""
    spare = len(json.dumps(target.name)) - len('""')
    layer = of_target(target, method, dtype=dtype, merge=merge, activations=activations)
    count, size = _tensors_and_bytes(layer)
    return size + count * spare


@cache
def _tensors_and_bytes(layer: torch.nn.Module) -> tuple[int, int]:
    """How many tensors a layer of `written.of_target` has, and their bytes under a name of no letters."""
    entries = [Entry(f".{n}", t.dtype, tuple(t.shape)) for n, t in layer.state_dict().items()]
    return len(entries), sum(e.bound for e in entries)


def _metadata() -> str:
    return '"__metadata__":' + json.dumps(_METADATA, separators=(",", ":")) + ","


def _frame_bytes() -> int:
    """The length, the braces, the metadata and the padding."""
    return 8 + len("{}") + len(_metadata()) + 7


def _file_bytes(entries: Iterable[Entry]) -> int:
    """Bytes of a safetensors file of these tensors."""
    order = list(_DTYPES)
    header, offset = "{" + _metadata(), 0
    for entry in sorted(entries, key=lambda e: (-order.index(e.dtype), e.name)):
        header += entry.header(offset, offset + entry.nbytes)
        offset += entry.nbytes
    length = len(header.encode())  # the last comma is the closing brace
    return 8 + -(-length // 8) * 8 + offset
