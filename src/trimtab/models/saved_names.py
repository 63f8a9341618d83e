"""Under which names a family's checkpoints hold what a model of transformers holds: `save_pretrained`'s, tensor by tensor.

transformers renames much while it reads and saves, and makes stacks of experts that most checkpoints hold one by one
(`conversion`). Engines that read checkpoints know the names of the files. Which rows of which expert are in which tensor
is not said anywhere in words: the numbers of the rows are sent through transformers' own conversion, and found again.

Legend: E experts, N out features.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from trimtab.layers.experts import Holding, QuantExperts, names, stacks


def has_experts(model: Any) -> bool:
    """Whether experts of it are ours."""
    return any(isinstance(module, QuantExperts) for module in model.modules())


def as_saved(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model, by its names, as `save_pretrained` writes them if the model was made from its config alone."""
    used = vars(model).pop("_weight_conversions", None)
    try:
        found: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    finally:
        if used is not None:
            model._weight_conversions = used
    return found


def saved_layer(model: Any, name: str) -> str:
    """The name of a linear layer in the family's checkpoints."""
    (found,) = as_saved(model, {f"{name}.weight": torch.empty(0)})
    return found.removesuffix(".weight")


class Piece(NamedTuple):
    """Rows of one matrix of one expert that a checkpoint holds as a layer of its own."""

    layer: str
    rows: slice


def pieces(model: Any, owner: str, name: str, rows: int) -> list[list[Piece]]:
    """For each expert, the layers that checkpoints hold its matrix in; [] where they hold all experts in one tensor.

    Args:
        model: with experts that are open.
        owner: the experts' name in it.
        name: of their stack.
        rows: N.
    """
    experts: QuantExperts = model.get_submodule(owner)
    count = experts.num_experts
    numbers_EN1 = torch.arange(count * rows).view(count, rows, 1)
    stack = numbers_EN1.transpose(1, 2) if experts.is_transposed else numbers_EN1
    found: list[list[Piece]] = [[] for _ in range(count)]
    for saved, held in as_saved(model, {f"{owner}.{name}": stack.contiguous()}).items():
        first, last = int(held.flatten()[0]), int(held.flatten()[-1])
        expert, plain = first // rows, torch.equal(held.flatten(), torch.arange(first, last + 1))
        if held.dim() != 2 or not saved.endswith(".weight") or not plain or last // rows != expert:
            return []
        found[expert].append(Piece(saved.removesuffix(".weight"), slice(first % rows, last % rows + 1)))
    return [sorted(each, key=lambda piece: piece.rows.start) for each in found]


def holding(model: Any) -> Holding:
    """How the family's checkpoints hold experts, open or not: each by itself, in stacks, or none at all."""
    for owner, module in model.named_modules():
        if isinstance(module, QuantExperts) or stacks(module):
            return "alone" if all(pieces(model, owner, name, 2) for name in names(module)) else "stack"
    return ""
