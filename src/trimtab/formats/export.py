"""From a model to a directory in some format: checked first, then written from its codes, then reported.

    check     names, shapes and grids against the format's declaration: before anything is loaded
    write     a model in memory; what the format cannot hold is refused, or with `allow_lossy` changed (`lossy`)
    export    the same for a saved model, with the perplexity that a lossy export costs

`export.json` in the written folder says what was done: exact (the served matrices are the trained ones, in the model's
dtype), algebraic (an adapter was added to a dense matrix and rounded once) or lossy, with the relative weight error.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.devices import CPU
from trimtab.errors import UserError
from trimtab.evaluation.perplexity import perplexity
from trimtab.formats import get, writer
from trimtab.formats.card import card
from trimtab.formats.declaration import DENSE, Form, Format, Layer, Refusal, Writing, widened
from trimtab.formats.directory import check_replaceable, replacing
from trimtab.formats.file_size import SHARD_BYTES, parse_bytes
from trimtab.formats.lossy import Change, make_room
from trimtab.formats.manifest import MANIFEST, add, entries, write_json
from trimtab.formats.refusals import refusals, rounded_by_engines
from trimtab.formats.written import layers_of, planned
from trimtab.layers.linear import QuantLinear
from trimtab.models.load import load
from trimtab.models.origin import check_not_read_from
from trimtab.models.sources import ModelSource, open_source, resolve
from trimtab.models.targets import Target
from trimtab.models.transformers_bridge import compute_dtype, quant_layers
from trimtab.outputs import output
from trimtab.recipe import inputs, recipe, texts
from trimtab.recipe.texts import windows_of

_log = logging.getLogger("trimtab")

Kind = Literal["exact", "algebraic", "lossy"]


@dataclass(frozen=True)
class Report:
    """What an export did."""

    format: str
    out: str
    kind: Kind
    relative_error: float
    """Frobenius error of all matrices together over their norm; 0 for exact."""
    changed: list[str]
    """Layers that were rounded again."""
    dense: list[str]
    """Quantized layers that were written as float matrices."""
    perplexity: dict[str, float]
    """Of the model and of what was exported in its place, where the export is lossy and held-out data is known."""
    disk_bytes: int
    unmeasured: str = ""
    """Why a lossy export was not measured, where it was not."""


def check_exports(of: recipe.Recipe, targets: Sequence[Target], config: Any) -> None:
    """Raise a `UserError` for the first layer, or the model's config, that one of a recipe's formats cannot hold."""
    for name in of.export:
        format_ = get(name)
        format_.require_config(config)
        found = refusals(format_, planned(targets, of.method, of.merge, format_, of.activations, of.kv), of.dtype)
        if found:
            raise UserError(f"export: {name}: {found[0]}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to export."""

    engine: str | None = None
    """The one engine that must run the result; None for any that reads the format."""
    allow_lossy: bool = False
    """Round what the format does not hold to the nearest that it does, instead of refusing."""
    overwrite: bool = False
    """Replace an earlier export."""
    max_shard_size: str | int = SHARD_BYTES
    """Size of a safetensors file, for example `5GB`."""


def _require_none(name: str, found: Sequence[Refusal], layers: Sequence[Layer], options: Options) -> None:
    """Raise a `UserError` if anything is refused, unless it may be changed."""
    if not found or options.allow_lossy:
        return
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    mendable = all(r.layer in {layer.name for layer in layers} for r in found)
    lossy = "; --allow-lossy rounds to the nearest that it holds" if mendable else ""
    raise UserError(f"export: {name}: {found[0]}{lossy}{more}")


def write(
    model: PreTrainedModel,
    tokenizer: Any,
    name: str,
    out: Path,
    *,
    source: Path,
    options: Options = Options(),
    recipe_text: str | None = None,
    held_out: Tensor | str | None = None,
) -> Report:
    """Write a model in memory; with `allow_lossy` its refused layers are changed in place.

    Args:
        model: with our layers, folded (or with output adapters, for formats that take them).
        tokenizer: written beside it; None for none.
        name: of the format.
        out: directory, put in place only when whole.
        source: what the model was read from.
        options: engine, losses, replacing and shards.
        recipe_text: the resolved recipe, as YAML.
        held_out: tokens (W, L) that a lossy export is measured on, or why there are none.

    Raises:
        UserError: naming the first layer that the format cannot hold, the cause and the remedy.
    """
    largest = parse_bytes(options.max_shard_size, "max_shard_size")
    format_, dtype, layers = writer(name), compute_dtype(model), layers_of(model)
    format_.require_config(model.config, options.engine)
    refused = refusals(format_, layers, dtype, options.engine)
    _require_none(name, refused, layers, options)
    measured_on = held_out if refused and isinstance(held_out, Tensor) else None
    check_not_read_from(model, out)
    with replacing(out, "export", overwrite=options.overwrite) as folder:
        values = _measure("before", model, measured_on)
        merged = _merge_error(model) if format_.adapters == "merged" else (0.0, 0.0, 0)
        changes = _make_room(model, format_, layers, refused, dtype, options)
        layers = layers_of(model)
        forms = _forms(format_, layers, dtype)
        about: dict[str, Any] = {"dtype": dtype, "forms": forms, "source": source, "recipe": recipe_text}
        format_.write(folder, Writing(model=model, tokenizer=tokenizer, max_shard_bytes=largest, **about))
        values |= _measure("after", model, measured_on)
        squared, squares = _moved(model, changes, merged)
        report = Report(
            format=name,
            out=str(out),
            kind="lossy" if changes else "algebraic" if merged[2] else "exact",
            relative_error=math.sqrt(squared / squares) if squares else 0.0,
            changed=[change.layer.name for change in changes],
            dense=_dense(format_, layers, forms),
            perplexity=values,
            disk_bytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()),
            unmeasured=held_out if changes and isinstance(held_out, str) else "",
        )
        write_json(folder / "export.json", {k: v for k, v in asdict(report).items() if k != "out"})
        (folder / "README.md").write_text(card(folder, out.name, recipe_text) or "", encoding="utf-8")
    return report


def _make_room(
    model: PreTrainedModel,
    format_: Format,
    layers: Sequence[Layer],
    refused: Sequence[Refusal],
    dtype: torch.dtype,
    options: Options,
) -> list[Change]:
    """Change the refused layers; refuse after all if that did not help."""
    if not refused:
        return []
    # A weight rounded again would come without the inputs it was trained on.
    if any(layer.inputs or layer.kv for layer in layers):
        raise UserError(f"export: {format_.name}: {refused[0]} (--allow-lossy cannot fix this)")
    engine = format_.engine(options.engine) if options.engine else None
    names = {layer.name for layer in layers}
    changes = make_room(model, format_, layers, [r for r in refused if r.layer in names], dtype, engine)
    left = refusals(format_, layers_of(model), dtype, options.engine)
    if left:
        raise UserError(f"export: {format_.name}: {left[0]} (--allow-lossy cannot fix this)")
    return changes


def _measure(when: str, model: PreTrainedModel, windows_WL: Tensor | None) -> dict[str, float]:
    return {} if windows_WL is None else {when: perplexity(model, windows_WL)}


def _dense(format_: Format, layers: Sequence[Layer], forms: dict[str, Form]) -> list[str]:
    """Quantized layers that are written as float matrices."""
    return [x.name for x in layers if forms[x.name] is DENSE and x.grid is not None and not format_.everything]


def _forms(format_: Format, layers: Sequence[Layer], dtype: torch.dtype) -> dict[str, Form]:
    """The form of each layer; says which of them take more bits than the codes have, and whose scales engines round."""
    found = {}
    for layer in layers:
        form = format_.form(layer, dtype)
        assert not isinstance(form, Refusal), form
        found[layer.name] = form
    for line in (*widened(format_, layers, found, dtype), *rounded_by_engines(format_, layers, found, dtype)):
        _log.warning("export: %s: %s", format_.name, line)
    return found


def _merge_error(model: PreTrainedModel) -> tuple[float, float, int]:
    """Squared error and squares of matrices that adapters are added to, and how many there are."""
    squared, squares, count = 0.0, 0.0, 0
    for layer in quant_layers(model).values():
        adapter = getattr(layer, "adapter", None)
        if adapter is not None and not adapter.moves_weight:
            folded = adapter.fold(layer.base)
            norm = folded.weight.dequantize(torch.float32).square().sum().item()
            squared, squares, count = squared + folded.error**2 * norm, squares + norm, count + 1
    return squared, squares, count


def _moved(model: PreTrainedModel, changes: Sequence[Change], merged: tuple[float, float, int]) -> tuple[float, float]:
    """Squared error and squares over all quantized matrices of the model."""
    if not changes:
        return merged[0], merged[1]
    names = {change.layer.name for change in changes}
    squares = sum(change.squares for change in changes)
    for name, layer in quant_layers(model).items():
        if name not in names and isinstance(layer, QuantLinear) and not layer.tied:
            squares += layer.base.dequantize(torch.float32).square().sum().item()
    return sum(change.squared_error for change in changes) + merged[0], squares


def export(
    directory: str, name: str, out: Path | None = None, options: Options = Options(), device: torch.device = CPU
) -> Report:
    """Export a model that trimtab saved, to `DIR/<format>` unless `out` names another directory.

    `same` is the format that its base came in. It is packed, and what it costs measured, on `device`.

    Raises:
        UserError: if the directory holds no such model, or as `write` does; before any tensor is read.
    """
    folder, opened = Path(directory), open_source(directory)
    if not opened.prepared:
        raise UserError(
            f"{directory}: was not saved by trimtab; run a recipe with `method: rtn` on it, then export that"
        )
    if name == "same":
        name = same(_base(directory))
    format_ = writer(name)
    laid_out = opened.layout()
    format_.require_config(laid_out.config, options.engine)
    layers = layers_of(laid_out)
    found = refusals(format_, layers, compute_dtype(laid_out), options.engine)
    _require_none(name, found, layers, options)
    saved, target = folder / "recipe.yaml", output(out or folder / name, "--out")
    if saved.is_file():  # an export may lie beside that recipe, and in place of nothing that it names
        inputs.check_apart(recipe.read(saved), (target,), but=("the recipe",), remedy="name another --out")
    check_replaceable(target, "export", options.overwrite)
    model, tokenizer = load(directory, dtype=compute_dtype(laid_out), device=device, quiet=True)
    report = write(
        model,
        tokenizer,
        name,
        target,
        source=folder,
        options=options,
        recipe_text=saved.read_text(encoding="utf-8") if saved.is_file() else None,
        held_out=_held_out_blocks(folder, tokenizer) if found else None,
    )
    if target.parent == folder.resolve():
        add(folder, (f"{target.name}/{file}" for file in (MANIFEST, *entries(target))))
    return report


def same(base: ModelSource) -> str:
    """The format that an opened base goes back in; a line says so where its files call themselves something else.

    Raises:
        UserError: if none that is written holds it, with what does.
    """
    if base.came_in is None:
        raise UserError(
            f"export: same: {base.path} is in a format that is read and not written ({base.by}): {base.instead}; name one"
        )
    if base.by is not None and base.by != base.came_in:
        _log.warning("export: same: %s is written as %s, whose codes, scales and zeros it has", base.by, base.came_in)
    return base.came_in


def _base(directory: str) -> ModelSource:
    """The base of a saved model, over any number of runs."""
    path, seen = directory, set[str]()
    while path not in seen:
        seen.add(path)
        source = open_source(path)
        if not source.prepared:
            return source
        saved = resolve(path) / "recipe.yaml"
        if not saved.is_file():
            break
        path = recipe.read(saved).model.path
    raise UserError(f"export: same: no recipe beside {path} says what it was made from; name a format")


def _held_out_blocks(folder: Path, tokenizer: Any) -> Tensor | str:
    """The held-out tokens (W, L) that a saved model's recipe names, or why there are none: an export needs them not."""
    try:
        block = inputs.held_out(folder)
        rows = None if block is None else texts.held_out(block)
        if block is None or rows is None:
            return "the model's recipe names no held-out data (data.eval_path, data.holdout)"
        if tokenizer is None:
            return "the model was saved without a tokenizer"
        return windows_of(block, rows, tokenizer)
    except UserError as error:
        return str(error)
