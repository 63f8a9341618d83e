"""The teacher of a distilled run: the float model, in memory beside the student, or on disk before the student exists.

    bfloat16   the float model itself: two bytes a weight for as long as training lasts
    int8       its linear layers and embedding rounded to 8 bits per channel (our own RTN): half of that
    cached     none: `teacher_cache` asks it once for its likeliest tokens, and it is gone before the student is loaded

A teacher in memory gives its hidden states; `divergence` turns them into logits chunk by chunk, beside the student's.
It runs before the student does, so that its activations are gone when the student's are made.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.errors import UserError
from trimtab.methods.rtn import Rtn
from trimtab.models.head import Head
from trimtab.models.load import load, load_float
from trimtab.models.replaceable import layers_of
from trimtab.models.sources import ModelSource, open_source
from trimtab.quant.grid import Grid
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule
from trimtab.training.batches import COUNTED, counted_of
from trimtab.training.divergence import FullTargets

_INT8 = Grid(bits=8, group=None)


def load_teacher(recipe: Recipe, source: ModelSource | None = None) -> PreTrainedModel:
    """The teacher that a recipe asks for, frozen, on the recipe's device.

    Args:
        recipe: with a `distill` block.
        source: an already opened source of its model, to save parsing it again.

    Raises:
        UserError: where the recipe's model is not a float model.
    """
    opened = source or open_source(recipe.model.path)
    check_teacher(recipe, opened)
    path, kind = recipe.model.path, kind_of(recipe)
    if kind == "int8":
        options: dict[str, Any] = {"dtype": recipe.dtype, "device": recipe.device, "source": opened}
        model, _ = load(path, Rtn(), int8_rules(opened.layout()), **options, quiet=True)
        return model
    dtype = torch.bfloat16 if kind == "bfloat16" else recipe.dtype
    model = load_float(path, dtype=dtype, device=recipe.device, source=opened)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def check_teacher(recipe: Recipe, source: ModelSource) -> None:
    """Raise a `UserError` where there is no float model to learn from."""
    if recipe.distill is not None and source.prepared:
        raise UserError(
            f"distill: {recipe.model.path} was saved by trimtab, so there is no float model to learn from; "
            "start from the float model, or leave the block out"
        )


def kind_of(recipe: Recipe) -> str:
    """bfloat16, int8 or cached."""
    assert recipe.distill is not None
    return recipe.distill.teacher


def int8_rules(skeleton: PreTrainedModel) -> list[Rule]:
    """8 bits everywhere: an embedding and a head of its own have to be named."""
    layers = layers_of(skeleton).offered
    return [
        *(Rule(name, _INT8) for name, (kind, _) in layers.items() if kind in ("embedding", "head")),
        Rule("*", _INT8),
    ]


class LiveTeacher:
    """A teacher in memory.

    Args:
        model: frozen, on the student's device.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()

    @torch.no_grad()
    def targets(self, batch: dict[str, Any]) -> FullTargets:
        """What it says of the tokens whose label counts.

        Args:
            batch: what the model's forward takes, and int64 `labels` in step with the tokens; -100 does not count.
        """
        inputs = {k: v for k, v in batch.items() if k not in ("labels", COUNTED)} | {"use_cache": False}
        counted = counted_of(batch)
        if not Head.fits(self.model):
            logits = self.model(**inputs).logits
            return FullTargets(logits[:, :-1].flatten(0, 1)[counted], None)
        hidden = self.model.base_model(**inputs).last_hidden_state
        states = hidden[:, :-1].flatten(0, 1)[counted]
        return FullTargets(states, lambda: Head.of(self.model, states.dtype))
