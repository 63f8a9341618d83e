"""The memory that a recipe's training takes, before anything is loaded: `memory.plan` with all that a recipe asks for."""

from typing import TYPE_CHECKING

from trimtab import memory, teacher
from trimtab.recipe import Recipe
from trimtab.rules import Rule

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def plan(recipe: Recipe, model: "PreTrainedModel", rules: list[Rule] | None = None) -> memory.Plan:
    """Predict the peak of a recipe's training: its teacher, rounded activations and cache, and accumulation included.

    Args:
        recipe: whose method, data, training, distillation and simulations count.
        model: laid out on the meta device (`loading.skeleton`); it is prepared in place.
        rules: in place of the recipe's.
    """
    train, block_tokens = recipe.train, recipe.data.block_tokens if recipe.data else 1024
    return memory.plan(
        model,
        recipe.method,
        recipe.rules if rules is None else rules,
        micro_batch=train.micro_batch,
        block_tokens=block_tokens,
        dtype=recipe.dtype,
        checkpointing=train.activation_checkpointing,
        micro_batches=max(train.batch_tokens // (train.micro_batch * block_tokens), 1),
        moment_bytes=train.moment_bytes,
        teaching=teacher.needs(recipe),
        activations=recipe.activations,
        kv=recipe.kv,
    )
