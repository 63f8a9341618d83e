"""Which layers of a model become ours, on which grid: decided from names and shapes, before a weight is touched.

So it runs on a meta-device model too: loading, the memory plan, the search and all checks share it.

Legend: N out features, K in features.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from trimtab.errors import UserError
from trimtab.layers.experts import Holding
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.methods.base import Method
from trimtab.methods.rtn import Rtn
from trimtab.models.opening import owner_of, owners_of_experts
from trimtab.models.origin import grids_of
from trimtab.models.replaceable import layers_of, linears_beside, refuse, refuse_model
from trimtab.models.saved_names import held_as
from trimtab.quant.grid import AnyGrid, group_size
from trimtab.recipe.rules import Kind, Placement, Rule, ranks, resolve

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Target:
    """A layer that will be ours."""

    name: str
    kind: Kind
    shape: tuple[int, int]
    """(N, K); (vocabulary, K) for an embedding."""
    grid: AnyGrid | None
    """None keeps its weight in float, under an adapter."""
    bias: bool
    rank: int | None = None
    """Of its adapter, where that is not the method's."""
    expert: Holding = ""
    """How the family's checkpoints hold it, where it is an expert's matrix."""
    experts: int = 0
    """How many matrices the experts of its block have, where it is one of them."""
    beside: frozenset[str] = frozenset()
    """Last parts of the names of its owner's linear layers, its own among them."""
    transposed: bool = False
    """Whether its family keeps its matrix as (K, N)."""
    untrained: str = ""
    """Why the method cannot train on the grid that the layer keeps; it stays as it is then, without an adapter."""

    def method(self, method: Method) -> Method:
        """The method as it is on this layer."""
        if self.untrained:
            return Rtn()
        if self.rank is None:
            return method
        if not hasattr(method, "rank"):
            raise UserError(f"rules: {method.name} has no rank; leave `rank` out, or use a method that has one")
        return replace(method, rank=self.rank)  # type: ignore[call-arg]

    def trainable(self, method: Method) -> int:
        """Trainable parameters that the method puts on this layer."""
        return self.method(method).trainable(self.grid, self.shape) if self.kind in ("linear", "head") else 0


def targets(model: "PreTrainedModel", method: Method, rules: Sequence[Rule] | None) -> list[Target]:
    """The layers that become ours and their grids, embeddings first.

    Args:
        model: on any device, the meta device included; its layers are float, or ours from an earlier run.
        method: checked against every layer that it will train.
        rules: None for the method's default (for a model that is already quantized: the grids it has).

    Raises:
        UserError: naming the layer, for a grid or method that does not fit it, and if no layer is left.
    """
    found = placed_targets(model, method, rules)
    stuck = next((f"{t.name}: {t.untrained}" for t in found if t.untrained), None)
    if stuck is not None and not any(t.trainable(method) for t in found):
        raise UserError(stuck)
    if not found:
        stay = Counter(layers_of(model).left.values()).most_common()
        why = "".join(f"; {count} layers stay in float: {reason}" for reason, count in stay)
        raise UserError(f"rules: no layer of the model is left to quantize or train; give a layer a grid{why}")
    return found


def placed_targets(model: "PreTrainedModel", method: Method, rules: Sequence[Rule] | None) -> list[Target]:
    """`targets`, but for rules that may leave none."""
    refuse_model(model)
    layers, left = layers_of(model)
    kinds = {n: kind for n, (kind, _) in layers.items()}
    placed, own_ranks = resolve(kinds, rules, _default(method), left), ranks(kinds, rules)
    grids = grids_of(model)
    any_stored = any(isinstance(module, QuantLinear | QuantEmbedding) for _, module in layers.values())
    kept = set[str]()  # what has the grid that it had
    for name, (_, module) in layers.items():
        stored = isinstance(module, QuantLinear | QuantEmbedding)
        if placed[name] == "same" or (
            rules is None and (any_stored or grids.kept)
        ):  # a quantized model keeps what it has
            placed[name] = _as_stored(module) if stored else grids.by_name.get(f"{name}.weight")
            kept.add(name)
    found = []
    experts, held = owners_of_experts(model), held_as(model)
    for name, (kind, module) in layers.items():
        placement = placed[name]
        if kind == "tied":
            embedding = next((n for n, (k, _) in layers.items() if k == "embedding"), None)
            # It may be one that stays in float; and without rules nothing of either is changed once both are ours.
            follows = rules is not None or (grids.kept and not any_stored)
            placement = placed[embedding] if embedding is not None and follows else None
        if placement is None:
            continue
        grid = None if isinstance(placement, str) else placement
        rank = own_ranks.get(name) if kind in ("linear", "head") else None
        owner = owner_of(name)
        expert = held if owner in experts else ""
        beside = frozenset[str]() if expert else linears_beside(model, name)  # one that is not open has no owner yet
        target = Target(
            name,
            kind,
            _shape(module),
            grid,
            getattr(module, "bias", None) is not None,
            rank,
            beside=beside,
            expert=expert,
            experts=experts.get(owner, 0),
            transposed=getattr(module, "transposed", False),
        )
        found.append(_checked(target, module, method, name in kept))
    return sorted(found, key=lambda t: t.kind != "embedding")


def _default(method: Method) -> Placement:
    return "float" if method.grid is None else method.grid


def _as_stored(module: Any) -> Placement:
    if isinstance(module, QuantLinear) and module.tied:
        return None
    return "float" if module.base.grid is None else module.base.grid


def _shape(module: Any) -> tuple[int, int]:
    if isinstance(module, QuantLinear | QuantEmbedding):
        return module.base.shape
    return module.weight.shape[0], module.weight.shape[1]


def _checked(target: Target, module: nn.Module, method: Method, kept: bool) -> Target:
    """The target, left untrained where nobody asked for the grid that the method cannot train on."""
    if isinstance(module, QuantLinear) and module.adapter is not None:
        raise UserError(
            f"{target.name}: already has an adapter ({module.adapter.place} place); "
            "fold it first with `trimtab.fold(model, merge=True)`, then prepare the result"
        )
    refuse(target.name, module, loaded=False)
    try:
        if target.kind == "embedding" and target.grid is None:
            raise UserError("an embedding takes a grid or null; it has no adapter to keep in float")
        if target.grid is not None:
            group_size(target.grid, target.shape[1])
    except UserError as error:
        raise UserError(f"{target.name}: {error}") from None
    try:
        target.trainable(method)
    except UserError as error:
        if kept and target.grid is not None and target.rank is None:
            return replace(target, untrained=str(error))
        raise UserError(f"{target.name}: {error}") from None
    return target
