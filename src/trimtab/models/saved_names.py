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
from transformers.core_model_loading import PrefixChange, WeightConverter, revert_weight_conversion

from trimtab.errors import UserError
from trimtab.layers.experts import Holding, QuantExperts, names, stacks


class Piece(NamedTuple):
    """Rows of one matrix that a checkpoint holds as a layer of its own."""

    layer: str
    rows: slice


class SavedNames:
    """The names of a model's family, whatever the file said that the model was read from.

    A prefix is the file's own, and no name here has it. What transformers makes several tensors of while it reads (qkv)
    stays in these: it reads them as well, and some may be layers of ours and others not.

    Args:
        model: of transformers, its experts open or not.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        rules = get_model_conversion_mapping(model, add_legacy=False)
        self._rules = [rule for rule in rules if not isinstance(rule, PrefixChange) and not _parts(rule)]

    def tensors(self, own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names, as `save_pretrained` writes them if the model was made from its config alone."""
        stand_in: Any = _Saving(self._model, self._rules, own)
        found: dict[str, Tensor] = revert_weight_conversion(stand_in, own)
        return found

    def layer(self, name: str, rows: int) -> list[Piece]:
        """The layers that the family's checkpoints hold a linear layer in: one, or one for each of its parts.

        Args:
            name: in the model.
            rows: N.

        Raises:
            UserError: where rows of it lie in another order there.
        """
        found = self.tensors({f"{name}.weight": torch.arange(rows).view(rows, 1)})
        pieces = [_piece(saved, held, rows) for saved, held in found.items()]
        if None in pieces:
            raise UserError(
                f"{name}: checkpoints of its family hold its rows in another order, as which nothing here is written; "
                f"keep to native, or to float with a rule: {{match: '*.{name.rpartition('.')[2]}', grid: null}}"
            )
        return sorted((p[1] for p in pieces if p is not None), key=lambda piece: piece.rows.start)

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
            piece = _piece(saved, held, rows)
            if piece is None:
                return []
            found[piece[0]].append(piece[1])
        found = [sorted(each, key=lambda piece: piece.rows.start) for each in found]
        for each in found:
            assert sum(p.rows.stop - p.rows.start for p in each) == rows, (
                f"{owner}: rows of {name} are lost while saving"
            )
        return found


def _parts(rule: Any) -> bool:
    """Whether a rule makes several tensors of one."""
    return isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1


class _Saving:
    """A model while it is asked how it is saved, without the stacks of experts that are open in it.

    Args:
        model: of transformers.
        rules: how its family's tensors are renamed and converted.
        own: what is saved, for a conversion that asks for the shape of a parameter.
    """

    def __init__(self, model: Any, rules: list[Any], own: dict[str, Tensor]) -> None:
        self._model, self._weight_conversions, self._own = model, rules, own

    def get_parameter(self, name: str) -> Tensor:
        """What is saved under this name, or a parameter of the model."""
        found: Tensor = self._own[name] if name in self._own else self._model.get_parameter(name)
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _piece(saved: str, numbers: Tensor, rows: int) -> tuple[int, Piece] | None:
    """Which matrix a saved tensor is of and which rows of it, by the numbers of all rows; None for no plain part of one."""
    first, last = int(numbers.flatten()[0]), int(numbers.flatten()[-1])
    plain = torch.equal(numbers.flatten(), torch.arange(first, last + 1))
    if numbers.dim() != 2 or not saved.endswith(".weight") or not plain or last // rows != first // rows:
        return None
    return first // rows, Piece(saved.removesuffix(".weight"), slice(first % rows, last % rows + 1))


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
