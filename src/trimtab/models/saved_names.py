"""Under which names a family's checkpoints hold what a model of transformers holds: `save_pretrained`'s, tensor by tensor.

transformers renames much while it reads and saves, and makes stacks of experts that most checkpoints hold one by one
(`conversion`). Engines that read checkpoints know the names of the files. Which rows of which expert are in which tensor
is not said anywhere in words: the numbers of the rows are sent through transformers' own conversion, and found again.

Legend: E experts, N out features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, revert_weight_conversion

from trimtab.layers.experts import Holding, QuantExperts, names, stacks


class Piece(NamedTuple):
    """Rows of one matrix of one expert that a checkpoint holds as a layer of its own."""

    layer: str
    rows: slice


class SavedNames:
    """The names of a model's family, whatever the file said that the model was read from.

    Args:
        model: of transformers, its experts open or not.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        rules = get_model_conversion_mapping(model, add_legacy=False)
        self._rules = [rule for rule in rules if not isinstance(rule, PrefixChange)]  # a prefix is the file's own

    def tensors(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names, as `save_pretrained` writes them if the model was made from its config alone."""
        about, key = vars(self._model), "_weight_conversions"
        kept = {key: about[key]} if key in about else {}
        about[key] = self._rules
        try:
            found: dict[str, Tensor] = revert_weight_conversion(self._model, own)
        finally:
            del about[key]
            about.update(kept)
        return found

    def layer(self, name: str) -> str:
        """The name of a linear layer in the family's checkpoints."""
        (found,) = self.tensors({f"{name}.weight": torch.empty(0)})
        return found.removesuffix(".weight")

    def pieces(self, owner: str, name: str, rows: int) -> list[list[Piece]]:
        """For each expert, the layers that checkpoints hold its matrix in; [] where they hold all experts in one tensor.

        Args:
            owner: the experts' name in the model.
            name: of their stack.
            rows: N.
        """
        experts: QuantExperts = self._model.get_submodule(owner)
        count = experts.num_experts
        numbers_EN1 = torch.arange(count * rows).view(count, rows, 1)
        stack = numbers_EN1.transpose(1, 2) if experts.is_transposed else numbers_EN1
        found: list[list[Piece]] = [[] for _ in range(count)]
        for saved, held in self.tensors({f"{owner}.{name}": stack.contiguous()}).items():
            first, last = int(held.flatten()[0]), int(held.flatten()[-1])
            expert, plain = first // rows, torch.equal(held.flatten(), torch.arange(first, last + 1))
            if held.dim() != 2 or not saved.endswith(".weight") or not plain or last // rows != expert:
                return []
            found[expert].append(Piece(saved.removesuffix(".weight"), slice(first % rows, last % rows + 1)))
        found = [sorted(each, key=lambda piece: piece.rows.start) for each in found]
        for each in found:
            assert sum(p.rows.stop - p.rows.start for p in each) == rows, (
                f"{owner}: rows of {name} are lost while saving"
            )
        return found


def has_experts(model: Any) -> bool:
    """Whether experts of it are ours."""
    return any(isinstance(module, QuantExperts) for module in model.modules())


def held_as(model: Any) -> Holding:
    """How the family's checkpoints hold experts, open or not: each by itself, in stacks, or none at all."""
    for owner, module in model.named_modules():
        if isinstance(module, QuantExperts) or stacks(module):
            saved = SavedNames(model)
            return "alone" if all(saved.pieces(owner, name, 2) for name in names(module)) else "stack"
    return ""
