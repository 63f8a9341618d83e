"""A layer as it will be written, worked out in one place: what a format is asked about and what a file is charged for.

    names, shapes, a method    of_target    a layer laid out without data, after folding    describe    Layer
    a model                                 its layers as they stand                        describe    Layer

A recipe is checked against its formats, and a search against its budget, before anything is loaded. Both look at the very
layer that will be there then: `of_target` builds it as `prepare` does and folds it as `fold` does, on the meta device.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from trimtab.formats.declaration import Format, Layer
from trimtab.layers import specs, weights
from trimtab.layers.experts import Holding
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.methods.base import Method
from trimtab.models.kv_cache import current
from trimtab.models.opening import owner_of, owners_of_experts
from trimtab.models.replaceable import linears_beside
from trimtab.models.saved_names import held_as
from trimtab.models.targets import Target
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.activations import ActivationQuantizer, Activations, KvCache, from_spec
from trimtab.recipe.rules import Kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ours = QuantLinear | QuantEmbedding


def of_target(
    target: Target,
    method: Method,
    *,
    dtype: torch.dtype = torch.bfloat16,
    merge: bool = False,
    activations: Activations | None = None,
    fold: bool = True,
) -> Ours:
    """The layer that a target will be, laid out without data; layers that differ only in name are one.

    Args:
        target: from `targets`.
        method: what trains it.
        dtype: compute dtype, of what stays in float.
        merge: whether output adapters are merged into dense weights.
        activations: how inputs are rounded, or None.
        fold: False leaves it as it is trained.
    """
    alike = replace(target, name="", rank=None, beside=frozenset(), experts=0)
    return _of_target(alike, target.method(method), dtype, merge, activations, fold)


@cache
def _of_target(
    target: Target, method: Method, dtype: torch.dtype, merge: bool, activations: Activations | None, fold: bool
) -> Ours:
    with torch.device("meta"):
        source = torch.empty(target.shape, dtype=dtype)
        if target.kind in ("embedding", "tied"):
            assert target.grid is not None
            base = weights.quantize(source, target.grid)
            return QuantEmbedding(base, dtype) if target.kind == "embedding" else QuantLinear(base, tied=True)
        bias = torch.empty(target.shape[0], dtype=dtype) if target.bias else None
        rounds = target.kind == "linear" and target.grid is not None
        layer = QuantLinear(*method.build(source, target.grid), bias, inputs=plug(activations) if rounds else None)
    found = folded(layer, merge) if fold else layer
    found.transposed = target.transposed
    return found


def plug(activations: Activations | None) -> ActivationQuantizer | None:
    """What rounds a layer's inputs, without data."""
    if activations is None:
        return None
    with torch.device("meta"):
        return from_spec(asdict(activations))


def folded(layer: QuantLinear, merge: bool) -> QuantLinear:
    """A layer after `prepare.fold`, without data; the layer itself where folding leaves it as it is."""
    if layer.adapter is None or layer.adapter.stays(merge):
        return layer
    with torch.device("meta"):
        base = specs.from_spec(layer.adapter.folded(layer.base.spec()))
    return QuantLinear(base, None, layer.bias, inputs=layer.inputs)


def describe(
    name: str,
    kind: Kind,
    layer: Ours,
    kv: KvCache | None,
    beside: frozenset[str],
    expert: Holding = "",
    experts: int = 0,
) -> Layer:
    """What a format is told of a layer."""
    adapter, inputs = getattr(layer, "adapter", None), getattr(layer, "inputs", None)
    return Layer(
        name=name,
        kind=kind,
        shape=layer.base.shape,
        grid=layer.base.grid,
        adapter=None if adapter is None else type(adapter),
        inputs=None if inputs is None else inputs.kind,
        kv=kv,
        expert=expert,
        experts=experts,
        beside=beside,
        transposed=getattr(layer, "transposed", False),
    )


def layers_of(model: "PreTrainedModel") -> list[Layer]:
    """The quantized layers of a model as they stand, on any device."""
    head, kv = model.get_output_embeddings(), current(model)

    def kind(layer: Ours) -> Kind:
        if isinstance(layer, QuantEmbedding):
            return "embedding"
        return "tied" if layer.tied else "head" if layer is head else "linear"

    experts, held = owners_of_experts(model), held_as(model)
    found = []
    for name, layer in quant_layers(model).items():
        owner = owner_of(name)
        expert = held if owner in experts else ""
        beside = linears_beside(model, name)
        found.append(describe(name, kind(layer), layer, kv, beside, expert, experts.get(owner, 0)))
    return found


def planned(
    targets: Sequence[Target],
    method: Method,
    merge: bool,
    format_: Format,
    activations: Activations | None = None,
    kv: KvCache | None = None,
) -> list[Layer]:
    """The layers that a recipe will hand to a format, from names and shapes.

    A format that keeps adapters is written before they are folded, unless they act in codes: those it never takes.
    """
    fold = format_.adapters != "kept" or method.adapter is None or method.adapter.acts_in_codes
    options: dict[str, Any] = {"merge": merge, "activations": activations, "fold": fold}
    return [
        describe(t.name, t.kind, of_target(t, method, **options), kv, t.beside, t.expert, t.experts) for t in targets
    ]
