"""Why a model cannot be written in a format, or not so that an engine runs it: asked of what both declare.

A layer is refused where no form takes it, a model where an engine that runs its layers one by one joins unlike ones.
"""

from collections.abc import Mapping, Sequence

import torch

from trimtab.formats.declaration import DENSE, Engine, Form, Format, Layer, Refusal, Rounded, exact_in, in_words
from trimtab.quant.activations import Activations
from trimtab.quant.grid import CodebookGrid, Grid


def refusals(format_: Format, layers: Sequence[Layer], dtype: torch.dtype, engine: str | None = None) -> list[Refusal]:
    """Why these layers cannot be written, first layer first; empty if they can, and an engine runs the result.

    Args:
        format_: where to.
        layers: the quantized layers of a model, and those that keep an adapter.
        dtype: what the model computes in.
        engine: the one engine that has to run the result; None for any that reads the format.
    """
    strange = next((x for x in layers if x.expert and x.expert not in format_.experts), None)
    if strange is not None and not format_.everything:
        cause = f"{strange.name} is one, and {format_.name} holds none"
        if format_.experts:
            cause += " of a family whose checkpoints keep all of them in one tensor"
        return [
            Refusal("the model's experts", cause, "export to dense or to another engine's format, or keep to native")
        ]
    turned = next((x for x in layers if x.transposed and x.grid is not None), None)
    if turned is not None and not (format_.transposed or format_.everything):
        cause = f"{turned.name} is one, and {format_.name} is read into layers of nn.Linear alone"
        return [Refusal("the model's Conv1D layers", cause, "export to dense or gptq, or keep to native")]
    found = [f for layer in layers if isinstance(f := format_.form(layer, dtype), Refusal)]
    whole = format_.model_refusal(layers, engine)
    found += [] if whole is None else [whole]
    if found or format_.everything:
        return found
    chosen = [format_.engine(engine)] if engine else list(format_.engines)
    objections = {e.name: not_run(e, format_, layers, dtype) for e in chosen}
    if all(objections.values()):
        return next(iter(objections.values()))
    # An engine that would run all else is not to be lost over layers that it joins.
    fusing = [e.name for e in chosen if e.fuses and not objections[e.name]]
    return _unlike_in_fusion(format_, layers, dtype, fusing) if fusing else []


def not_run(engine: Engine, format_: Format, layers: Sequence[Layer], dtype: torch.dtype) -> list[Refusal]:
    """Why an engine does not run layers that the format holds."""
    held = [x for x in layers if x.grid is not None and format_.form(x, dtype) is not DENSE]
    packed = [x for x in held if isinstance(x.grid, Grid)]
    found = [
        Refusal(x.name, f"is on {x.grid.describe()}, which {engine.name} was not tried with", "name another --engine")
        for x in held
        if isinstance(x.grid, CodebookGrid) and x.grid.codebook not in engine.tables
    ]
    for expert in (x for x in held if x.expert):
        zero = expert.grid.zero if isinstance(expert.grid, Grid) else "symmetric"
        if zero not in engine.experts:
            cause = f"is a packed expert with a zero that is {zero}, which {engine.name} does not run"
            some = f"use `zero: {in_words(engine.experts)}`" if engine.experts else "name another --engine"
            found.append(Refusal(expert.name, cause, f"{some}, or export to dense"))
            break
    for layer in packed:
        grid = layer.grid
        assert isinstance(grid, Grid)
        alone = layer.inputs is None and grid.zero in engine.alone
        objection = _objection(engine, layer.inputs, grid)
        if objection is None and alone and len({x.grid and x.grid.describe() for x in packed}) > 1:
            cause = f"has a zero that is {grid.zero} in a model of several grids"
            objection = cause, "give all layers one grid, or other zeros"
        if objection is None and engine.casts_scales and not exact_in(grid, dtype):
            name = str(dtype).removeprefix("torch.")
            cause = f"has {grid.scale_dtype} scales in a model that computes in {name}"
            objection = cause, f"compute in {grid.scale_dtype} (`model.dtype`), or use `scale_dtype: portable`"
        if objection is not None:
            cause, remedy = objection
            cause = f"{cause}, which {engine.name} does not run in {format_.name}"
            found.append(Refusal(layer.name, cause, f"{remedy}; see `trimtab formats` for what engines run"))
    return found


def rounded_by_engines(
    format_: Format, layers: Sequence[Layer], forms: Mapping[str, Form], dtype: torch.dtype
) -> list[str]:
    """A line where an engine rounds scales that the file holds exactly; said before it is written.

    Args:
        format_: what holds them.
        layers: the quantized layers of a model.
        forms: of each, by its name.
        dtype: what the model computes in.
    """
    engines = [e.name for e in format_.engines if e.casts_scales]
    grids = [x.grid for x in layers if isinstance(x.grid, Grid) and forms[x.name] is not DENSE] if engines else []
    kinds = dict.fromkeys(grid.scale_dtype for grid in grids if not exact_in(grid, dtype))
    if not kinds:
        return []
    computes, stored = str(dtype).removeprefix("torch."), in_words(kinds)
    return [
        f"its {stored} scales are exact in the file, and rounded by {in_words(engines)} to {computes}, in which the model "
        f"computes; for these engines, compute in {stored} (`model.dtype`)"
    ]


def _objection(engine: Engine, inputs: Activations | None, grid: Grid) -> tuple[str, str] | None:
    """The first property of a layer that an engine does not run, and what it runs instead; None if it runs the layer."""
    left: list[Engine | Rounded] = [engine]
    beside = ""
    if inputs is not None:
        left, beside = [r for r in engine.rounded if inputs in r.inputs], f" with {inputs.describe()} inputs"
        if not left:
            kinds = dict.fromkeys(i.describe() for r in engine.rounded for i in r.inputs)
            return f"has {inputs.describe()} inputs", f"use {in_words(kinds or ['inputs in float'])}"
    of_bits = [x for x in left if grid.bits in x.bits]
    if not of_bits:
        return f"has {grid.bits} bits{beside}", f"use {in_words(sorted({b for x in left for b in x.bits}))}"
    of_zero = [x for x in of_bits if grid.zero in x.zeros]
    if not of_zero:
        zeros = dict.fromkeys(z for x in of_bits for z in x.zeros)
        return f"has a zero that is {grid.zero}{beside}", f"use {in_words(zeros)}"
    if not any(x.groups is None or grid.group in x.groups for x in of_zero):
        groups = dict.fromkeys("per channel" if g is None else g for x in of_zero for g in x.groups or ())
        return f"is {grid.describe()}{beside}", f"use a group of {in_words(groups)}"
    return None


def _unlike_in_fusion(
    format_: Format, layers: Sequence[Layer], dtype: torch.dtype, engines: list[str]
) -> list[Refusal]:
    by_name = {layer.name: layer for layer in layers}
    groups = dict.fromkeys((layer.name.rpartition(".")[0], layer.joined) for layer in layers if layer.joined)
    found = []
    for parent, parts in groups:
        together = [by_name.get(f"{parent}.{part}") for part in parts]
        first = next(layer for layer in together if layer is not None)
        kinds = {_scheme(format_, layer, dtype) for layer in together}
        if len(kinds) > 1:
            each = ", ".join(f"{p} {_scheme(format_, x, dtype)}" for p, x in zip(parts, together, strict=True))
            remedy = "give them one grid in `rules`, or export with --engine for one that keeps them apart"
            cause = f"{in_words(engines)} joins {'/'.join(parts)}, which differ here ({each})"
            found.append(Refusal(first.name, cause, remedy))
    return found


def _scheme(format_: Format, layer: Layer | None, dtype: torch.dtype) -> str:
    """What must be equal in layers that are joined."""
    if layer is None or layer.grid is None or format_.form(layer, dtype) is DENSE:
        return "float"
    return layer.grid.describe() if layer.inputs is None else f"{layer.grid.describe()}, {layer.inputs.describe()}"
