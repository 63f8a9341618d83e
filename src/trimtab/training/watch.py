"""A look at the loss after a tenth of the steps: a line if it does not fall, or leaps, with the rate to change."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import mean, median
from typing import Any, Literal

from transformers import TrainerCallback

from trimtab.recipe.recipe import Recipe

FEWEST = 9
"""Losses that say something: three at the beginning, three at the end."""
_LEAP = 0.5
"""Nats by which a loss has to rise to be called a leap, and three times what it changes by from step to step."""
_FAR = 2.0
"""Nats that are a leap, whatever the noise: a loss that has left tells nothing of it."""


def verdict(losses: Sequence[float]) -> Literal["still", "leaps"] | None:
    """Whether losses of successive steps have not fallen, or risen far; None where they fall.

    Args:
        losses: of at least `FEWEST` steps.
    """
    noise = median(abs(b - a) for a, b in pairwise(losses))
    risen = mean(losses[-(len(losses) // 3) :]) - losses[0]  # rates that are far too high show at once
    if risen > min(max(_LEAP, 3 * noise), _FAR):
        return "leaps"
    middle = (len(losses) - 1) / 2
    slope = sum((i - middle) * loss for i, loss in enumerate(losses))
    return "still" if slope >= 0 else None


def advice(recipe: Recipe, losses: Sequence[float]) -> str | None:
    """The line about these losses, or None."""
    found = verdict(losses)
    if found is None:
        return None
    rates, share = recipe.rates, recipe.parametrization == "relative"
    key, rate = ("lr_scale", rates.scale) if recipe.method.kind == "scales" else ("lr", rates.delta)
    better = 3 * rate if found == "still" else rate / 3
    third = len(losses) // 3
    began, ends = losses[0] if found == "leaps" else mean(losses[:third]), mean(losses[-third:])
    went = f"{began:.2f} to {ends:.2f} in {len(losses)} steps"
    change = f"train.{key}={better:.2g}" + (" train.parametrization=relative" if share else "")
    if found == "still":
        return f"the loss does not fall ({went}): if it stays so, try {change}; it is {rate:.2g} now"
    return f"the loss leaps ({went}): try {change}; it is {rate:.2g} now"


def lower(recipe: Recipe) -> str:
    """What to do about a loss that is not a number, as the beginning of a sentence."""
    if recipe.parametrization == "paper":
        return "Lower train.lr (or train.lr_scale)"
    lr, lr_scale = recipe.rates
    below = f"train.lr below {lr:.2g} (or train.lr_scale below {lr_scale:.2g})"
    return f"Set train.parametrization=relative and {below}"


class LossWatch(TrainerCallback):
    """Says so once, a tenth of the steps after the warm-up, in a run long enough to judge.

    Args:
        recipe: `train` is read.
        say: told the line.
    """

    def __init__(self, recipe: Recipe, say: Callable[[str], None]) -> None:
        self._recipe, self._say, self._losses = recipe, say, list[float]()
        block = recipe.train
        logged = max(round(block.warmup * block.steps) + -(-block.steps // 10), FEWEST * block.log_steps)
        self._at = logged if logged < block.steps else None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run that continues from a checkpoint has shown its beginning already."""
        if state.global_step:
            self._at = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A loss more."""
        if not logs or "loss" not in logs or self._at is None:
            return
        self._losses.append(float(logs["loss"]))
        if state.global_step < self._at:
            return
        if len(self._losses) >= FEWEST and (line := advice(self._recipe, self._losses)) is not None:
            self._say(line)
        self._at = None
