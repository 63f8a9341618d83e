"""Marks on a recipe's fields: which a run may continue with another value of (`--resume`), and why.

    steps: Annotated[int, LENGTH] = 1000        may change
    path: Annotated[str, CONTENT]               may, as long as what lies there is what lay there
    rank: int = 16                              may not: what was trained by another rank is another model

A field that says nothing may not, so a new one is refused until somebody has thought about it. `going_on` compares.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Change:
    """That a field may change between a checkpoint and what continues from it."""

    why: str
    content: bool = False
    """Only its name: the files that it names hold what they held."""


RATE = Change("rates of the steps to come may be corrected")
LENGTH = Change("training may be made longer, or shorter")
HABIT = Change("how often something is logged or kept")
SPLIT = Change("how one batch is computed, not which")
PLACE = Change("where something lies")
AFTER = Change("what is done with the model that was trained")
MEASURED = Change("what was measured on other text is measured again")
CONTENT = Change("files may lie elsewhere, if they hold the same", content=True)
