"""A model as one GGUF file, from the stored codes: the matrices, the metadata, the tokenizer.

Two kinds of model are written. One that came from safetensors gets its metadata from its config (`families`) and its
tokenizer from a table (`vocabulary`). One that came from a GGUF file gets that file back: every field is copied, and every
tensor whose values are still those of the file is copied byte for byte, whatever type it has; the others, the tuned ones,
are written from their codes. So a file found in the wild, tuned with QA-HiRA, differs from the original in the minima of
its blocks and in nothing else.

Of a model that also sees or hears the language model is written, as llama.cpp wants it: towers and projector are in a file
of their own (mmproj), which is the base's, since they are not trained.

    codes        `blocks`: the smallest type that holds them, scales and zeros exact
    floats       matrices in their own dtype; norms and biases in float32, as llama.cpp wants them
    order        rows of q and k permuted for the families that llama.cpp rotates by neighbours: rows of blocks move whole

Tensors are made one at a time, as they are written. gguf is imported here, to write, and in `read`, to read.

Legend: N out features, K in features.
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.gguf import families, mixtures, settings
from trimtab.formats.gguf import vocabulary as vocabularies
from trimtab.formats.gguf.blocks import TYPES, block_type, require_exact, to_blocks, to_powers
from trimtab.formats.gguf.read import GgufSource
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight, Weight
from trimtab.models.architecture import Gguf, in_language_model, language_model, sees_or_hears
from trimtab.models.finite import require_finite
from trimtab.models.transformers_bridge import compute_dtype, quant_layers
from trimtab.models.transposed import is_transposed
from trimtab.quant.grid import AnyGrid, Grid, Range
from trimtab.quant.two_level import SUPER

_Kind: Any = gguf.GGMLQuantizationType
_Value: Any = gguf.GGUFValueType
_FLOATS = {torch.float32: _Kind.F32, torch.float16: _Kind.F16, torch.bfloat16: _Kind.BF16}
_FILE_TYPES = {
    _Kind.F32: gguf.LlamaFileType.ALL_F32,
    **{kind: gguf.LlamaFileType[f"MOSTLY_{kind.name}"] for kind in (_Kind.F16, _Kind.BF16)},
    **{_Kind[name]: gguf.LlamaFileType[f"MOSTLY_{name}"] for name in (*TYPES, "Q2_K", "Q6_K")},
    **{_Kind[name]: gguf.LlamaFileType[f"MOSTLY_{name}_S"] for name in ("Q3_K", "Q4_K", "Q5_K")},
}
Value = Weight | Tensor | mixtures.Stack
_SCALARS = {bool: _Value.BOOL, int: _Value.UINT32, float: _Value.FLOAT32, str: _Value.STRING}


@dataclass(frozen=True)
class _Entry:
    """A tensor that will be written."""

    name: str
    kind: Any
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def elements(self) -> int:
        return int(np.prod(self.shape))


def save(
    path: Path,
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    source: Path | None = None,
    dense: Collection[str] = (),
) -> None:
    """Write a model as a GGUF file.

    Args:
        path: the file.
        model: a folded (or only rounded) model with our layers.
        tokenizer: its tokenizer; not needed where the model came from a GGUF file.
        name: of the model, for the file's metadata.
        source: the GGUF file that the model came from, to copy from.
        dense: names of quantized layers that are written as float matrices.

    Raises:
        UserError: naming the layer that no type holds exactly, or what llama.cpp would read otherwise.
    """
    config = model.config.get_text_config()
    family = families.family(config)
    parameters = list(_parameters(model, dense))
    entries = list(_entries(parameters, config, family, compute_dtype(model), dense))
    fields = families.metadata(config, model.get_input_embeddings().num_embeddings)
    stops = vocabularies.end_tokens(model)
    if source is None:
        vocabulary = vocabularies.vocabulary(tokenizer, fields[f"{family.architecture}.vocab_size"], config, stops)
        names = frozenset(entry.name for entry in entries)
        factors = families.rope_factors(config)
        held = settings.Keys(family.architecture, {}, factors, names)
        _require_agreement(model, held, fields)
        writer = gguf.GGUFWriter(path, family.architecture)
        general = {"type": "model", "name": name, "file_type": _file_type(entries), "quantization_version": 2}
        fields = {f"general.{key}": value for key, value in general.items()} | fields | vocabulary.fields()
        for key, value in fields.items():
            _add_field(writer, key, value)
        if vocabulary.chat_template:
            writer.add_chat_template(vocabulary.chat_template)
    else:
        read = [(own, value) for own, value in parameters if not isinstance(value, mixtures.Stack)]
        assert len(read) == len(parameters), "no mixture is read from a GGUF file"
        opened, entries, changed = _from_source(source, read, entries)
        new = _renewed(opened.reader, fields)
        _require_agreement(model, opened.keys(), new)
        new |= vocabularies.more_ends(opened.reader.fields, stops)
        writer = gguf.GGUFWriter(path, family.architecture)
        _copy_fields(opened.reader, writer, new | ({"general.file_type": _file_type(entries)} if changed else {}))
    _write(writer, entries)


def _require_agreement(model: Any, held: settings.Keys, fields: dict[str, Any]) -> None:
    """Raise a `UserError` if llama.cpp would compute another model from a file of these keys, `fields` put over them."""
    inside = f"{held.architecture}."
    values = {**held.values, **{n.removeprefix(inside): v for n, v in fields.items() if n.startswith(inside)}}
    try:
        settings.require_agreement(language_model(model), settings.Keys(**{**held._asdict(), "values": values}))
    except UserError as error:
        raise UserError(f"GGUF: {error}: llama.cpp would compute another model") from error


class _Written(np.ndarray):
    """An array that Python writes into a file: numpy's own way does not notice where the end of it found no room."""

    def tofile(self, file: Any, *_: Any, **__: Any) -> None:
        """All of its bytes."""
        file.write(np.ascontiguousarray(self).view(np.ndarray).data.cast("B"))


def _write(writer: gguf.GGUFWriter, entries: list[_Entry]) -> None:
    for entry in entries:
        floats = {_Kind.F32: np.float32, _Kind.F16: np.float16}.get(entry.kind)
        width, width_bytes = gguf.GGML_QUANT_SIZES[entry.kind]
        shape = entry.shape if floats else gguf.quant_shape_to_byte_shape(entry.shape, entry.kind)
        size = entry.elements // width * width_bytes
        writer.add_tensor_info(entry.name, shape, np.dtype(floats or np.uint8), size, entry.kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.make().view(_Written))
    finally:
        writer.close()


# ---- tensors -----------------------------------------------------------------------------------------------------


def _parameters(model: Any, dense: Collection[str]) -> Iterator[tuple[str, Value]]:
    """Every tensor of the language model, by its name where there is nothing else; a tied head is not repeated."""
    if not sees_or_hears(model):
        yield from _tensors(model, dense)
        return
    for name, value in _tensors(model, dense):
        inside = in_language_model(model, name)
        if inside is not None:
            yield inside, value


def _tensors(model: Any, dense: Collection[str]) -> Iterator[tuple[str, Value]]:
    ours, seen, dtype = quant_layers(model), set(), compute_dtype(model)
    mixed: list[str] = []
    for name, module in model.named_modules():
        if name.startswith(tuple(mixed)):
            continue
        stacked = list(mixtures.experts_in(name, module))
        if stacked:
            mixed.append(f"{name}.")
            yield from stacked
            continue
        layer = ours.get(name)
        if isinstance(layer, QuantLinear) and layer.adapter is not None:
            raise UserError(f"{name}: has an adapter, which GGUF does not hold; fold it, or merge it (`merge: true`)")
        if layer is not None and not (isinstance(layer, QuantLinear) and layer.tied):
            plain = name in dense or isinstance(layer.base, DenseWeight)
            yield f"{name}.weight", layer.base.dequantize(dtype) if plain else layer.base
        if any(name.startswith(f"{above}.base") for above in ours):
            continue
        kept = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, p in (module._parameters | kept).items():
            if p is not None and id(p) not in seen:
                seen.add(id(p))
                yield f"{name}.{key}", p.data.T if key == "weight" and is_transposed(module) else p.data


def _entries(
    parameters: Sequence[tuple[str, Value]], config: Any, family: Gguf, dtype: torch.dtype, dense: Collection[str]
) -> Iterator[_Entry]:
    architecture = next(a for a, name in gguf.MODEL_ARCH_NAMES.items() if name == family.architecture)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    factors = families.rope_factors(config)
    for divided, divisors in factors.items():
        yield _float_entry(divided, divisors)
    for hf_name, value in parameters:
        name = names.get_name(families.asked(hf_name), try_suffixes=(".weight", ".bias"))
        if name is None:
            raise UserError(f"{hf_name}: llama.cpp's {family.architecture} has no tensor for it")
        order = families.placed(config, hf_name, tuple(value.shape))
        if isinstance(value, mixtures.Stack):
            yield _stack_entry(name, value, dtype, dense)
        elif isinstance(value, Tensor):
            yield _float_entry(name, order.of(families.values(family, hf_name, value)))
        else:
            yield _block_entry(hf_name, name, value, order)


def _stack_entry(name: str, stack: mixtures.Stack, dtype: torch.dtype, dense: Collection[str]) -> _Entry:
    order, entries = families.Placed(stack.order(), None), list[_Entry]()
    for own, layer in stack.layers:
        if isinstance(layer, QuantLinear) and layer.adapter is not None:
            raise UserError(f"{own}: has an adapter, which GGUF does not hold; fold it, or merge it (`merge: true`)")
        held = mixtures.matrix_of(layer, dtype, own in dense)
        entry = _float_entry(own, order.of(held)) if isinstance(held, Tensor) else _block_entry(own, name, held, order)
        entries.append(entry)
        if entries[-1].kind != entries[0].kind:
            raise UserError(
                f"{own}: is {entries[-1].kind.name} beside experts of {entries[0].kind.name}, which share a "
                "tensor in GGUF; give all experts of a block one grid"
            )
    return _Entry(name, entries[0].kind, stack.shape, lambda: np.stack([entry.make() for entry in entries]))


def _float_entry(name: str, value: Tensor) -> _Entry:
    require_finite(value, name)

    def make() -> np.ndarray:
        plain = value.detach().contiguous().cpu()
        return plain.view(torch.uint8).numpy() if plain.dtype == torch.bfloat16 else plain.numpy()

    return _Entry(name, _FLOATS[value.dtype], tuple(value.shape), make)


def _block_entry(hf_name: str, name: str, weight: Weight, order: families.Placed) -> _Entry:
    grid = weight.grid
    assert grid is not None
    try:
        kind = block_type(grid, weight.shape[1])
        if isinstance(weight, AffineWeight):
            require_exact(weight.range(), weight.grid)
        groups = None if order.columns is None else _groups(order.columns, grid)
    except UserError as error:
        raise UserError(f"{hf_name.removesuffix('.weight')}: {error}") from None

    def make() -> np.ndarray:
        assert isinstance(weight, AffineWeight | CodebookWeight), "no other weight is on a grid"
        device = weight.codes.device
        rows, columns, scales = (None if t is None else t.to(device) for t in (*order, groups))
        codes = weight.integer_codes(rows)
        codes = codes if columns is None else codes[:, columns]
        if isinstance(weight, CodebookWeight):
            return to_powers(codes, _moved(weight.absmax, rows, scales)).cpu().numpy()
        range_ = Range(*(None if t is None else _moved(t, rows, scales) for t in weight.range()))  # type: ignore[arg-type]
        return to_blocks(codes, range_, weight.grid)[1].cpu().numpy()

    return _Entry(name, _Kind[kind.name], weight.shape, make)


def _moved(of_groups: Tensor, rows: Tensor | None, groups: Tensor | None) -> Tensor:
    """A number for each group, in the order of rows and of groups."""
    of_groups = of_groups if rows is None else of_groups[rows]
    return of_groups if groups is None else of_groups[:, groups]


def _groups(columns: Tensor, grid: AnyGrid) -> Tensor | None:
    """The order of groups in which columns lie in the order asked for; None where one scale serves a whole row."""
    if grid.group is None:
        return None
    together = SUPER if isinstance(grid, Grid) and grid.two_level is not None else grid.group
    whole = columns.view(-1, together)
    if not torch.equal(whole, whole[:, :1] // together * together + torch.arange(together)):
        remedy = "give it a grid of smaller groups, 32 is one"
        raise UserError(
            f"its columns change places in a GGUF file, which would tear its groups of {together}; {remedy}"
        )
    return columns.view(-1, grid.group)[:, 0] // grid.group


# ---- a model that came from a GGUF file -----------------------------------------------------------------------------


def _from_source(
    path: Path, parameters: Sequence[tuple[str, Weight | Tensor]], ours: list[_Entry]
) -> tuple[GgufSource, list[_Entry], bool]:
    """The opened file, its tensors in its order, untouched ones as they are; and whether any type is another than there."""
    source = GgufSource(path)
    layout = source.layout()
    source.bind(layout)
    tensors = {t.name: t for t in source.reader.tensors}
    by_name = {e.name: e for e in ours}
    held = [(hf_name, value) for hf_name, value in parameters if source.name_of(hf_name) in tensors]
    untouched = _untouched(held, source)
    extra = tensors.keys() - {source.name_of(n) for n in layout.state_dict()}
    entries = []
    for name, tensor in tensors.items():
        if name in untouched or name in extra:
            by_name.pop(name, None)
            shape = tuple(int(n) for n in reversed(tensor.shape))
            entries.append(_Entry(name, tensor.tensor_type, shape, lambda data=tensor.data: np.asarray(data)))  # type: ignore[misc]
        elif name in by_name:
            entries.append(by_name.pop(name))
    entries += by_name.values()
    changed = any(e.name not in tensors or tensors[e.name].tensor_type != e.kind for e in entries)
    return source, entries, changed


def _untouched(parameters: Sequence[tuple[str, Weight | Tensor]], source: GgufSource) -> set[str | None]:
    """Names of the file's tensors whose values the model still has, in the dtype that it keeps them in."""
    found = set()
    for hf_name, value in parameters:
        device = next(value.parameters()).device if isinstance(value, Weight) else value.device
        kept = source.read(hf_name, device=device)
        theirs = kept.dequantize(torch.float32) if isinstance(kept, Weight) else kept
        ours = value.dequantize(torch.float32) if isinstance(value, Weight) else value
        if torch.equal(theirs.to(ours.dtype), ours):
            found.add(source.name_of(hf_name))
    return found


# ---- metadata ------------------------------------------------------------------------------------------------------


def _file_type(entries: list[_Entry]) -> int:
    """llama.cpp's name for the file as a whole: the type of most weights."""
    weights: Counter[Any] = Counter()
    for entry in entries:
        weights[entry.kind] += entry.elements
    return int(_FILE_TYPES.get(weights.most_common(1)[0][0], gguf.LlamaFileType.GUESSED))


def _add_field(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        writer.add_key_value(key, value, _SCALARS[type(value)])


def _fields(reader: gguf.GGUFReader) -> dict[str, Any]:
    return {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}


def _renewed(reader: gguf.GGUFReader, computed: dict[str, Any]) -> dict[str, Any]:
    """What the model's config says of its architecture, where it has other sizes than the file; else nothing."""
    fields = _fields(reader)
    resized = any(key in fields and not _same(fields[key].contents(), value) for key, value in computed.items())
    return dict(computed) if resized else {}


def _copy_fields(reader: gguf.GGUFReader, writer: gguf.GGUFWriter, new: dict[str, Any]) -> None:
    """Every field of a file as it stands there, but for those that are `new`."""
    fields, new = _fields(reader), dict(new)
    for name, field in fields.items():
        if name in new and not _same(field.contents(), new[name]):
            _add_field(writer, name, new.pop(name))
            continue
        new.pop(name, None)
        kind, of = field.types[0], field.types[-1] if field.types[0] == _Value.ARRAY else None
        if kind != _Value.ARRAY:
            value: Any = bytes(field.parts[-1]) if kind == _Value.STRING else field.contents()
        elif len(field.data) == 0:
            continue  # an empty array says nothing, and gguf cannot write one
        else:
            value = [bytes(field.parts[i]) for i in field.data] if of == _Value.STRING else field.contents()
        if name == "general.alignment":
            writer.data_alignment = value
        if name != "general.architecture":  # the writer has put it first, where every file has it
            writer.add_key_value(name, value, kind, of)
    for name, value in new.items():
        _add_field(writer, name, value)


def _same(a: Any, b: Any) -> bool:
    return bool(np.float32(a) == np.float32(b)) if isinstance(b, float) else bool(a == b)
