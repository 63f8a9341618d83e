"""Parts of a live model, found by its family's description: decoder blocks, the final norm, the embedding's scale.

    ids -> embedding (x scale) -> blocks, one after another -> final norm -> head -> (cap) -> logits

The base model is all but the head; the base model and the embeddings are found by transformers itself.
"""

from collections.abc import Iterable

from torch import nn

from trimtab.errors import UserError
from trimtab.models.architecture import architecture_of, base_of


def block_names(model: nn.Module) -> list[str]:
    """The names of the decoder blocks in the model, in their order."""
    found = blocks(model)
    name = next(name for name, module in model.named_modules() if module is found)
    return [f"{name}.{i}" for i in range(len(found))]


def blocks(model: nn.Module) -> nn.ModuleList:
    """The decoder blocks, as the list that the model keeps them in."""
    path = architecture_of(model).blocks
    if path is None:
        raise UserError(f"{type(model).__name__}: has no list of decoder blocks, to go through one after another")
    found = base_of(model).get_submodule(path)
    assert isinstance(found, nn.ModuleList)
    return found


def set_blocks(model: nn.Module, kept: Iterable[nn.Module]) -> None:
    """Give the model other decoder blocks, in place."""
    path = architecture_of(model).blocks
    assert path is not None
    base_of(model).set_submodule(path, nn.ModuleList(kept))


def final_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head."""
    family = architecture_of(model)
    if family.norm is None:
        raise UserError(
            f"the final norm of {family.model_type} models is not known; describe the family in models/architecture.py"
        )
    return base_of(model).get_submodule(family.norm)


def embedding_scale(model: nn.Module, embedding: nn.Module) -> float | None:
    """What the float embedding of the model multiplies its rows by; None if by nothing."""
    attribute = architecture_of(model).embedding_scale
    return None if attribute is None else getattr(embedding, attribute, None)
