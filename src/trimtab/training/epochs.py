"""How many steps an epoch takes: known once the rows are packed into sequences.

sequences        rows packed as TRL will pack them: as many as rows without packing, fewer with it
steps an epoch   their batches of micro_batch, and of these as many to a step as batch_tokens holds; the last may be smaller
"""

import math

from trimtab.data.rows import quiet
from trimtab.recipe.recipe import Recipe
from trimtab.training.labelled import Labelled, packing_of


def sequences_of(recipe: Recipe, given: Labelled) -> int:
    """Sequences of one epoch."""
    assert recipe.data is not None
    packing = packing_of(recipe, given.rows)
    if packing == "none":
        return len(given.sequences)
    from trl import pack_dataset

    with quiet():
        return len(pack_dataset(given.sequences.shuffle(seed=recipe.train.seed), recipe.data.block_tokens, packing))


def steps_of_epoch(recipe: Recipe, sequences: int) -> int:
    """Optimizer steps in which every sequence is seen once."""
    assert recipe.data is not None
    micro = recipe.train.micro_batch
    accumulated = max(1, recipe.train.batch_tokens // (micro * recipe.data.block_tokens))
    return math.ceil(math.ceil(sequences / micro) / accumulated)


def resolved(recipe: Recipe, sequences: int) -> Recipe:
    """The recipe with a number of steps in place of epochs."""
    if recipe.train.epochs is None:
        return recipe
    steps = max(1, math.ceil(recipe.train.epochs * steps_of_epoch(recipe, sequences)))
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": steps, "epochs": None})})
