"""What happens while a model trains, beside its steps: held-out loss, the best model, a stop by Ctrl-C.

during = During(recipe, tokenizer, vocabulary, held_out, say)
if during.over(last): ...                      a finished training that is asked to continue
with during.watching(trainer): trainer.train() with `during.callbacks` among the trainer's
during.end(model, trainer.state)               the best model; `Interrupted` after a Ctrl-C
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerState

from trimtab.recipe.recipe import Recipe
from trimtab.training.best import Evaluations, KeepsTheBest
from trimtab.training.checkpoints import state_of, step_of
from trimtab.training.held_out import HeldOut
from trimtab.training.held_out import held_out as held_out_of
from trimtab.training.interrupt import EndsAfterTheStep


class During:
    """Watches one training.

    Args:
        recipe: `train` and `data` are read.
        tokenizer: the model's.
        vocabulary: rows of the model's embedding.
        held_out: what to measure on where `train.evaluate_steps` is set; None reads it.
        say: told what happens.
    """

    def __init__(
        self, recipe: Recipe, tokenizer: Any, vocabulary: int, held_out: HeldOut | None, say: Callable[[str], None]
    ) -> None:
        self._steps, self._ends = recipe.train.steps, EndsAfterTheStep(say)
        self._keeps: KeepsTheBest | None = None
        if recipe.train.evaluate_steps is not None:
            given = held_out or held_out_of(recipe, tokenizer, None, vocabulary)
            self._keeps = KeepsTheBest(recipe, given, say, lambda: self._ends.agreed)

    @property
    def callbacks(self) -> list[TrainerCallback]:
        """In the order in which they are to be called."""
        return [self._ends, *([] if self._keeps is None else [self._keeps])]

    def over(self, last: Path | None) -> bool:
        """Whether a checkpoint is of a training that has nothing left to do."""
        if last is None or step_of(last) == self._steps:
            return last is not None
        return self._keeps is not None and bool(self._keeps.exhausted(state_of(last)))

    def end_of(self, model: PreTrainedModel, last: Path) -> Evaluations | None:
        """As `end`, of a training that is over."""
        return self.end(model, state_of(last))

    @contextmanager
    def watching(self, trainer: Any) -> Iterator[None]:
        """Around the training."""
        if self._keeps is not None:
            self._keeps.trainer = trainer
        with self._ends:
            yield

    def end(self, model: PreTrainedModel, state: TrainerState) -> Evaluations | None:
        """Give the model what was best; what was measured, or None if nothing was.

        Raises:
            Interrupted: if training was ended by Ctrl-C.
        """
        self._ends.check(state.global_step, self._steps)
        return None if self._keeps is None else self._keeps.restore(model, state)
