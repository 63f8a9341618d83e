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
from trimtab.memory.training import LOGITS_CHUNK_TOKENS, Teaching, prepare_meta
from trimtab.methods.rtn import Rtn
from trimtab.models import load as loading
from trimtab.models import transformers_bridge as hf
from trimtab.quant.grid import Grid
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule
from trimtab.training.divergence import FullTargets, Head
from trimtab.training.loss import IGNORED, scales_logits

_INT8 = Grid(bits=8, group=None)


def load(recipe: Recipe, source: loading.ModelSource | None = None) -> PreTrainedModel:
    """The teacher that a recipe asks for, frozen.

    Args:
        recipe: with a `distill` block.
        source: an already opened source of its model, to save parsing it again.

    Raises:
        UserError: where the recipe's model is no float model.
    """
    check(recipe, source)
    path, kind = recipe.model.path, _kind(recipe)
    if kind == "int8":
        model, _ = loading.load(path, Rtn(), _int8_rules(loading.skeleton(path)[1]), dtype=recipe.dtype, source=source)
        return model
    dtype = torch.bfloat16 if kind == "bfloat16" else recipe.dtype
    model = loading.load_float(path, dtype=dtype, source=source)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def check(recipe: Recipe, source: loading.ModelSource | None) -> None:
    """Raise a `UserError` where there is no float model to learn from."""
    if recipe.distill is not None and source is None and loading.open_source(recipe.model.path) is None:
        raise UserError(
            f"distill: {recipe.model.path} was saved by trimtab, so there is no float model to learn from; "
            "start from the float model, or leave the block out"
        )


def _kind(recipe: Recipe) -> str:
    assert recipe.distill is not None
    return recipe.distill.teacher


def _int8_rules(skeleton: PreTrainedModel) -> list[Rule]:
    """8 bits everywhere: an embedding has to be named."""
    embedding = skeleton.get_input_embeddings()
    name = next(name for name, module in skeleton.named_modules() if module is embedding)
    return [Rule(name, _INT8), Rule("*", _INT8)]


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
        inputs = {k: v for k, v in batch.items() if k != "labels"} | {"use_cache": False}
        counted = batch["labels"][:, 1:].flatten() != IGNORED
        if scales_logits(self.model.config):
            logits = self.model(**inputs).logits
            return FullTargets(logits[:, :-1].flatten(0, 1)[counted], None)
        hidden = self.model.base_model(**inputs).last_hidden_state
        states = hidden[:, :-1].flatten(0, 1)[counted]
        return FullTargets(states, lambda: Head.of(self.model, states.dtype))


def needs(recipe: Recipe) -> Teaching:
    """What the teacher adds to a run's memory plan; none without a `distill` block."""
    if recipe.distill is None or not recipe.train.steps:
        return Teaching()
    assert recipe.data is not None, "the recipe was checked to have data"
    kind, model = _kind(recipe), loading.skeleton(recipe.model.path)[1]
    dtype = torch.bfloat16 if kind == "bfloat16" else recipe.dtype
    hf.cast_floats(model, dtype)
    text, tokens = model.config.get_text_config(), recipe.train.micro_batch * recipe.data.block_tokens
    head = text.vocab_size * text.hidden_size * dtype.itemsize
    if kind == "int8":
        prepare_meta(model, Rtn(), _int8_rules(model))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    chunk, states = min(tokens, LOGITS_CHUNK_TOKENS) * text.vocab_size * 4, tokens * text.hidden_size * dtype.itemsize
    if kind != "cached":
        # Of a chunk log p and p are there beside the student's logits and log q.
        return Teaching(resident=size, at_loss=states + 2 * chunk + (head if kind == "int8" else 0))
    kept = tokens * (6 * recipe.distill.top_k + 2)
    # While the cache is made: logits, log p and one more; or one layer's widest activations.
    layer = 4 * tokens * max(text.hidden_size, getattr(text, "intermediate_size", 0)) * dtype.itemsize
    return Teaching(at_loss=kept + chunk, before=size + 2 * states + max(3 * chunk, layer))
