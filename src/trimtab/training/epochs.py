"""How many steps an epoch takes: known once the rows are packed into sequences.

sequences        rows packed as TRL will pack them: as many as rows without packing, fewer with it
steps an epoch   their batches of micro_batch, and of these as many to a step as batch_tokens holds; the last may be smaller
"""

import math

from trimtab import processes
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

    # As TRL does, so that of many rows its packing is found again.
    rows = given.sequences.select_columns(["input_ids", "labels"])
    with quiet():
        return len(pack_dataset(rows.shuffle(seed=recipe.train.seed), recipe.data.block_tokens, packing))


def steps_of_epoch(recipe: Recipe, sequences: int) -> int:
    """Optimizer steps in which every sequence is seen once."""
    assert recipe.data is not None
    micro = recipe.train.micro_batch * processes.count()
    accumulated = max(1, recipe.train.batch_tokens // (micro * recipe.data.block_tokens))
    return math.ceil(math.ceil(sequences / micro) / accumulated)


def steps_of(recipe: Recipe, sequences: int) -> int:
    """Optimizer steps of the whole training."""
    if recipe.train.epochs is None:
        return recipe.train.steps
    return max(1, math.ceil(recipe.train.epochs * steps_of_epoch(recipe, sequences)))
