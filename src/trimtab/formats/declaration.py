"""What a format can hold and what an engine can run, declared once: the refusal and the capability table both read it.

A format is a list of *forms* it can write a quantized matrix in (bits, zeros, groups, dtype of the scales) and of the
kinds of layers that it writes as plain float matrices instead. The first form that takes a layer is the one written.
Dense is no loss: the matrix is the very one that the model computes with in its dtype, only larger.

    layer (name, kind, shape, grid)  --Format.form-->  Form | DENSE | Refusal(cause, remedy)

Nothing here touches a tensor, so a recipe is checked against every format it exports to before anything is loaded.

Legend: N out features, K in features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch

from trimtab.errors import UserError
from trimtab.layers.adapters import Adapter
from trimtab.layers.experts import Holding
from trimtab.models.architecture import FUSED, Feature
from trimtab.models.asked import features
from trimtab.quant.activations import Activations, KvCache
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, ScaleDtype, Zero
from trimtab.quant.two_level import TWO_LEVEL
from trimtab.recipe.rules import Kind

ALL_KINDS: tuple[Kind, ...] = ("linear", "head", "tied", "embedding")

_EXACT: dict[str, tuple[torch.dtype, ...]] = {
    "portable": (torch.bfloat16, torch.float16, torch.float32),
    "bfloat16": (torch.bfloat16, torch.float32),
    "float16": (torch.float16, torch.float32),
    "float32": (torch.float32,),
    **dict.fromkeys(TWO_LEVEL, (torch.float32,)),
}
"""Dtypes in which every stored scale is exact."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer as it will be written."""

    name: str
    kind: Kind
    shape: tuple[int, int]
    """(N, K); (vocabulary, K) for an embedding."""
    grid: AnyGrid | None
    """None for a float matrix."""
    adapter: type[Adapter] | None = None
    """Kind of an adapter that is still beside the weight when it is written."""
    inputs: Activations | None = None
    """How what it reads is rounded."""
    kv: KvCache | None = None
    """How the model rounds keys and values."""
    expert: Holding = ""
    """How the family's checkpoints hold it, where it is an expert's matrix."""
    experts: int = 0
    """How many matrices the experts of its block have, where it is one of them: of those in float nobody may be told."""
    beside: frozenset[str] = frozenset()
    """Last parts of the names of its owner's linear layers, its own among them."""
    transposed: bool = False
    """Whether its family keeps its matrix as (K, N), as transformers' Conv1D does."""

    @property
    def joined(self) -> tuple[str, ...]:
        """Last parts of the names of the layers that engines join with it, itself among them.

        Empty where a part is not there: the `up_proj` of a plain MLP has no gate beside it.
        """
        last = self.name.rpartition(".")[2]
        return next((parts for parts in FUSED if last in parts and self.beside.issuperset(parts)), ())


@dataclass(frozen=True, kw_only=True)
class Form:
    """One way in which a format writes a quantized matrix."""

    name: str
    """The format's own word for it, for example Q4_0."""
    bits: tuple[int, ...]
    zeros: tuple[Zero, ...]
    kinds: tuple[Kind, ...] = ("linear",)
    group_of: int = 1
    """A group (per channel: K) must be a multiple of this."""
    rows_of: int = 1
    """N must be a multiple of this."""
    channel: bool = True
    scales: Literal["model", "any"] | ScaleDtype = "model"
    """Dtype of scales and offsets in the file: the model's, the grid's own, or this one."""
    inputs: tuple[Activations | None, ...] = (None,)
    """Roundings of a layer's inputs that are written with it; None for inputs in float."""
    width: int | None = None
    """Bits that a code takes in the file; None for as many as it has."""
    table: str | None = None
    """The codebook that it holds, in place of affine grids."""


DENSE = Form(name="dense", bits=(), zeros=(), kinds=ALL_KINDS)
"""A plain float matrix in the model's dtype."""


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """What an engine runs of layers whose inputs are rounded."""

    inputs: tuple[Activations, ...]
    """Roundings that it does as `activations` does."""
    bits: tuple[int, ...]
    zeros: tuple[Zero, ...]
    groups: tuple[int | None, ...] | None = None
    """As of `Engine`."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """What an engine runs of a format: bits, zeros and groups of layers with inputs in float, and `rounded` ones."""

    name: str
    bits: tuple[int, ...]
    zeros: tuple[Zero, ...]
    groups: tuple[int | None, ...] | None = None
    """Group sizes it has kernels for, None among them for per channel; None alone for any."""
    alone: tuple[Zero, ...] = ()
    """Zeros that it runs only where all quantized layers share one grid."""
    fuses: bool = False
    """Whether it joins layers of one block (`architecture.FUSED`), which must then be of one form."""
    casts_scales: bool = False
    """Whether it rounds the scales of the file to the dtype that the model computes in."""
    rounded: tuple[Rounded, ...] = ()
    kv: tuple[str, ...] = ("float",)
    """Dtypes of the KV cache."""
    tables: tuple[str, ...] = ()
    """Codebooks that it runs of those that the format holds."""
    experts: tuple[Zero, ...] = ("symmetric", "integer", "real")
    """Zeros that packed experts of a mixture may have."""
    lacks: frozenset[Feature] = frozenset()
    """What a config may ask for that it leaves out or takes for something else."""


class Refusal(NamedTuple):
    """Why a layer cannot be written."""

    layer: str
    cause: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.layer}: {self.cause}; {self.remedy}"


@dataclass(frozen=True, kw_only=True)
class Writing:
    """A model that a format can hold, on its way to disk."""

    model: Any
    """A `PreTrainedModel` whose quantized layers are `QuantLinear` and `QuantEmbedding`."""
    tokenizer: Any
    dtype: torch.dtype
    """What the model computes in, and dtype of everything that is written in float."""
    forms: dict[str, Form]
    """Form of each of our layers, by name."""
    max_shard_bytes: int
    source: Path
    """What the model was read from, or the directory of the run."""
    recipe: str | None = None
    """YAML text of the resolved recipe."""


class Format(ABC):
    """A format that models are written in: what it can hold, who reads it, and the writer."""

    name: ClassVar[str]
    summary: ClassVar[str]
    """One line for `trimtab formats`."""
    forms: ClassVar[tuple[Form, ...]]
    dense: ClassVar[tuple[Kind, ...]] = ("embedding", "tied", "head")
    """Kinds of layers that are written as float matrices where no form takes them."""
    everything: ClassVar[bool] = False
    """Whether it holds whatever trimtab can store."""
    adapters: ClassVar[Literal["no", "merged", "kept"]] = "no"
    """What becomes of an output adapter: refused, added to a dense matrix, or written as an adapter."""
    experts: ClassVar[tuple[Holding, ...]] = ()
    """Holdings of experts that it is written in, beside models without any."""
    transposed: ClassVar[bool] = False
    """Whether it holds layers of which the family keeps the matrix transposed, and its readers run them."""
    engines: ClassVar[tuple[Engine, ...]]
    whole: ClassVar[bool] = True
    """Whether it holds all of a model that also sees or hears; else its language model."""
    library: ClassVar[str | None] = None
    """What an extra brings for its writer, if it needs that."""

    @abstractmethod
    def write(self, folder: Path, writing: Writing) -> None:
        """Write the whole model into an empty folder. Every layer has been checked: nothing here can be lossy."""

    def form(self, layer: Layer, dtype: torch.dtype) -> Form | Refusal:
        """The form that holds this layer of a model computing in `dtype`, or why none does."""
        if self.everything:
            return DENSE
        forms = [form for form in self.forms if layer.kind in form.kinds and layer.inputs in form.inputs]
        rounds = [f"{layer.inputs.describe()} inputs"] if layer.inputs is not None and not forms else []
        rounds += [] if layer.kv is None else [f"a KV cache of {layer.kv.bits} bits"]
        if rounds:
            cause = f"is trained with {' and '.join(rounds)}, which {self.name} would leave unrounded"
            return Refusal(layer.name, cause, "leave `activations` and `kv` out of the recipe, or keep to native")
        if layer.grid is None and layer.adapter is None and layer.inputs is None:
            return DENSE
        refused = self.adapter_refusal(layer)
        if refused is not None:
            return refused
        for form in (form for form in forms if (form.table is None) == isinstance(layer.grid, Grid)):
            if _mismatch([form], layer, dtype, self.name) is None:
                return form
        if layer.kind in self.dense and layer.inputs is None:
            return DENSE
        found = _mismatch(forms, layer, dtype, self.name)
        assert found is not None
        return found

    def adapter_refusal(self, layer: Layer) -> Refusal | None:
        """Why the layer's adapter cannot go into this format."""
        if layer.adapter is None or (not layer.adapter.moves_weight and self.adapters != "no"):
            return None
        if layer.adapter.moves_weight:
            cause = f"is not folded yet ({layer.adapter.place} place)"
            return Refusal(layer.name, cause, "fold it with `trimtab.fold(model)` and save it again")
        cause = f"keeps an adapter beside its weight, which {self.name} does not hold"
        return Refusal(
            layer.name, cause, "export to peft, or merge it: `merge: true` in the recipe, or export to dense"
        )

    def model_refusal(self, layers: Sequence[Layer], engine: str | None) -> Refusal | None:
        """Why a model of these layers cannot be written, or not for this engine, although each layer could be."""
        return None

    def require_config(self, config: Any, engine: str | None = None) -> None:
        """Raise a `UserError` if no reader (or not this engine) computes a model of this config as it was trained."""
        chosen = [self.engine(engine)] if engine else self.engines
        for feature, words in features(config.get_text_config()):
            if chosen and all(feature in x.lacks for x in chosen):
                raise UserError(
                    f"export: {self.name}: {words}, which {in_words(x.name for x in chosen)} would compute otherwise; "
                    "export for another engine, or to another format"
                )

    def engine(self, name: str) -> Engine:
        """The engine of this name; a `UserError` naming those that read the format if it is not among them."""
        for engine in self.engines:
            if engine.name == name:
                return engine
        known = ", ".join(e.name for e in self.engines)
        raise UserError(f"engine {name!r} does not read {self.name}; {known or 'no engine'} does")


def _mismatch(forms: Sequence[Form], layer: Layer, dtype: torch.dtype, name: str) -> Refusal | None:
    """None if one of the forms takes the layer, else the first property that none of those left has."""
    grid = layer.grid
    if isinstance(grid, CodebookGrid) and any(form.table == grid.codebook for form in forms):
        return None
    forms = [form for form in forms if form.table is None]
    if not isinstance(grid, Grid):
        cause = f"is on {'no grid' if grid is None else grid.describe()}, which {name} does not hold"
        return Refusal(layer.name, cause, "give it an affine grid (bits, group, zero) in `rules`, or export to dense")
    group = grid.group or layer.shape[1]
    tests: tuple[tuple[Any, str, str], ...] = (
        (lambda f: grid.bits in f.bits, f"has {grid.bits} bits", "bits"),
        (lambda f: grid.zero in f.zeros, f"has {grid.bits}-bit codes with a zero that is {grid.zero}", "zeros"),
        (lambda f: f.channel or grid.group is not None, "has one scale per channel", "channel"),
        (lambda f: group % f.group_of == 0, f"has groups of {group}", "group_of"),
        (lambda f: layer.shape[0] % f.rows_of == 0, f"has {layer.shape[0]} outputs", "rows_of"),
        (lambda f: _scales_fit(f, grid, dtype), f"has {grid.scale_dtype} scales", "scales"),
    )
    left = list(forms)
    for test, found, what in tests:
        kept = [form for form in left if test(form)]
        if not kept:
            more = _or_compute_in(left, grid) if what == "scales" else ""
            return Refusal(layer.name, f"{found}, which {name} does not hold", _remedy(left, what, dtype) + more)
        left = kept
    return None


def exact_in(grid: Grid, dtype: torch.dtype) -> bool:
    """Whether a grid's scales, as they are stored, are exact in a dtype."""
    return dtype in _EXACT[grid.scale_dtype]


def _scales_fit(form: Form, grid: Grid, dtype: torch.dtype) -> bool:
    return form.scales == "any" or _takes(form, grid.scale_dtype, dtype)


def _takes(form: Form, scale_dtype: str, dtype: torch.dtype) -> bool:
    """Whether scales of one of `ScaleDtype` are exact in a form that has a dtype for them, or two levels."""
    if form.scales in TWO_LEVEL:
        return form.scales == scale_dtype
    return (dtype if form.scales == "model" else torch.float16) in _EXACT[scale_dtype]


def _or_compute_in(forms: Sequence[Form], grid: Grid) -> str:
    """The model's dtype that would hold a grid's scales, where forms store them in that."""
    fits = any(form.scales == "model" for form in forms) and grid.two_level is None
    return f", or compute in {grid.scale_dtype} (`model.dtype`), which holds them" if fits else ""


def _remedy(forms: Sequence[Form], what: str, dtype: torch.dtype) -> str:
    if what == "bits":
        return f"use a grid of {in_words(sorted({b for f in forms for b in f.bits}))} bits"
    if what == "zeros":
        return f"use `zero: {in_words(dict.fromkeys(z for f in forms for z in f.zeros))}`"
    if what == "channel":
        return f"use a group that is a multiple of {min(f.group_of for f in forms)}"
    if what == "group_of":
        return f"use a group that is a multiple of {in_words(sorted({f.group_of for f in forms}))}"
    if what == "rows_of":
        return f"leave it in float with `grid: null` (a multiple of {in_words(sorted({f.rows_of for f in forms}))} is held)"
    fits = [name for name in _EXACT for f in forms if _takes(f, name, dtype)]
    return f"use `scale_dtype: {in_words(dict.fromkeys(fits))}`"


def widened(format_: Format, layers: Sequence[Layer], forms: dict[str, Form], dtype: torch.dtype) -> list[str]:
    """A line for each width of codes that the format stores in more bits, with both sizes; said before it writes."""
    counts: dict[tuple[int, int, str], int] = {}
    for layer in layers:
        form, grid = forms[layer.name], layer.grid
        wide = dtype.itemsize * 8 if form is DENSE else form.width
        if (
            grid is not None
            and wide is not None
            and wide > grid.bits
            and layer.kind != "tied"
            and not format_.everything
        ):
            key = grid.bits, wide, "matrices of floats" if form is DENSE else form.name
            counts[key] = counts.get(key, 0) + layer.shape[0] * layer.shape[1]
    return [
        f"{bits}-bit codes take {wide} bits each ({name}): "
        f"{count * wide / 8e6:.4g} MB instead of {count * bits / 8e6:.4g} MB"
        for (bits, wide, name), count in counts.items()
    ]


def in_words(items: Iterable[Any]) -> str:
    """`a, b or c`."""
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
