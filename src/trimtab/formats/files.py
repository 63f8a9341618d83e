"""A model's tensors under the names that its files have: those of the model, and of a mixture those of its checkpoints.

a layer                       model.layers.0.self_attn.q_proj           the same
an expert's matrix            model.layers.0.mlp.experts.3.gate_up_proj, rows 0 to I        …experts.3.gate_proj
                                                                         rows I to 2 I       …experts.3.up_proj
experts of one tensor         model.layers.0.mlp.experts.{0 … E-1}.down_proj                …experts.down_proj
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.formats.directory import float_tensors
from trimtab.layers.experts import QuantExperts, names
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.models.replaceable import is_router
from trimtab.models.saved_names import Piece, SavedNames, has_experts
from trimtab.models.transformers_bridge import quant_layers
from trimtab.models.transposed import is_linear

Ours = QuantLinear | QuantEmbedding
_ALL = slice(None)


class Held(NamedTuple):
    """A layer of ours, or some rows of it, as a file holds it."""

    name: str
    """In the file."""
    of: str
    """In the model."""
    layer: Any
    rows: slice = _ALL

    @property
    def names(self) -> list[str]:
        """What readers call it: by the name in the file, or, where that is another and it is whole, by the model's own."""
        return [self.name] if self.name == self.of or self.rows != _ALL else [self.name, self.of]


class Stacked(NamedTuple):
    """Experts that a file holds in one tensor: (E, N, K), or (E, K, N) where the family transposes them."""

    name: str
    """In the model."""
    layers: list[QuantLinear]
    transposed: bool


class Files:
    """What is written of a model, under which names.

    Args:
        model: with layers of ours.
        joined: whether a weight that transformers makes of several tensors of a checkpoint is written as the one that it
            is: where it expects codes, it joins neither floats nor codes.
    """

    def __init__(self, model: Any, *, joined: bool = False) -> None:
        self._model, self._ours, self._joined = model, quant_layers(model), joined
        self._saved = SavedNames(model) if has_experts(model) else None
        self._stacked: list[Stacked] = []
        self._pieces: dict[int, list[Piece]] = {}
        """Of the layers that are experts; none of those that are stacked."""
        if self._saved is not None:
            self._look_at_experts(self._saved)

    def _look_at_experts(self, saved: SavedNames) -> None:
        for owner, experts in self._model.named_modules():
            for own in names(experts) if isinstance(experts, QuantExperts) else ():
                layers = [getattr(experts[e], own) for e in range(experts.num_experts)]
                found = saved.pieces(owner, own, layers[0].out_features)
                self._pieces |= {id(layer): found[e] if found else [] for e, layer in enumerate(layers)}
                if not found:
                    self._stacked.append(Stacked(f"{owner}.{own}", layers, experts.is_transposed))

    def floats(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor that belongs to none of our layers, in `dtype` where floating, ties left out."""
        for name, tensor in float_tensors(self._model, self._ours, dtype):
            yield from self._named(name, tensor)

    def layers(self) -> Iterator[Held]:
        """Our layers, but for experts of which a file holds all in one tensor."""
        for name, layer in self._ours.items():
            expert = self._pieces.get(id(layer))
            pieces = self._layer(name, layer.base.shape[0]) if expert is None else expert
            yield from (Held(piece.layer, name, layer, piece.rows) for piece in pieces)

    def linear_in_float(self) -> list[str]:
        """Linear layers that are none of ours, and routers, which engines take for such."""
        modules = dict(self._model.named_modules())
        routers = (
            n
            for n in modules
            if self._saved is not None and is_router(n, modules) and "weight" in modules[n]._parameters
        )
        found = dict.fromkeys([*(n for n, m in modules.items() if is_linear(m)), *routers])
        weights = {f"{name}.weight": modules[name]._parameters["weight"] for name in found}
        saved = [n for name, weight in weights.items() for n, _ in self._named(name, weight.detach())]
        return [name.removesuffix(".weight") for name in saved]

    def stacks(self, matrix: Callable[[QuantLinear], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Tensors that hold all experts of a block, made of the matrix (N, K) of each; their biases follow them."""
        for name, layers, transposed in self._stacked:
            stack_ENK = torch.stack([matrix(layer) for layer in layers])
            yield from self._named(name, stack_ENK.transpose(1, 2) if transposed else stack_ENK)
            biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
            if biases:
                yield from self._named(f"{name}_bias", torch.stack(biases).to(stack_ENK.dtype))

    def _layer(self, name: str, rows: int) -> list[Piece]:
        found = [Piece(name, _ALL)] if self._saved is None else self._saved.layer(name, rows)
        if len(found) > 1:
            return [Piece(name, _ALL)] if self._joined else found
        return [Piece(found[0].layer, _ALL)]

    def _named(self, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        found = {name: tensor} if self._saved is None else self._saved.tensors({name: tensor})
        whole = self._joined and len(found) > 1
        yield from [(name, tensor)] if whole else found.items()
