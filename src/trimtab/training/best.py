"""Held-out loss every so many steps: the best model is kept, and training ends when it has not improved for a while.

What is measured is logged as `eval_loss`, where transformers' loggers and its state look for it, so a resumed run knows
what was measured before. The trainable tensors of the lowest loss lie in `checkpoints/best`; the model before the first
step is one of those compared, since training may do nothing but harm.

A run that continues from a checkpoint keeps the best model from before, even of steps after that checkpoint: the loss was
measured on that very model.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback

from trimtab import processes
from trimtab.formats.directory import replacing
from trimtab.recipe.recipe import Recipe
from trimtab.training.checkpoints import CHECKPOINT, load_trainable, what_is_wrong, whole
from trimtab.training.held_out import HeldOut

FOLDER = "best"
_LOSS = "eval_loss"


@dataclass(frozen=True)
class Evaluations:
    """What was measured while a model trained."""

    steps: list[int]
    """After which steps; 0 is before the first."""
    losses: list[float]
    """Held-out loss after each, in nats a token."""
    best_step: int
    """The step whose model was kept."""
    best_loss: float
    stopped_early: bool


class KeepsTheBest(TrainerCallback):
    """Measures held-out loss, keeps the best model, and ends training where the recipe says so.

    Args:
        recipe: `train.evaluate_steps`, `train.early_stop` and the output are read.
        given: what is measured on.
        say: told of what is measured before the first step, and what ended training.
        ending: whether training is about to end for another reason, and the measurement can wait.
    """

    def __init__(
        self, recipe: Recipe, given: HeldOut, say: Callable[[str], None], ending: Callable[[], bool] = lambda: False
    ) -> None:
        assert recipe.train.evaluate_steps is not None, "nothing is measured else"
        assert recipe.data is not None, "the recipe was checked to have data"
        self._steps, self._every, self._patience = (
            recipe.train.steps,
            recipe.train.evaluate_steps,
            recipe.train.early_stop,
        )
        self._given, self._say, self._ending = given, say, ending
        self._folder = recipe.out / "checkpoints" / FOLDER
        self._tokens_at_once = recipe.train.micro_batch * recipe.data.block_tokens
        self.trainer: Any = None
        """The trainer that calls; set before it trains."""
        self._of = given.digest()
        self._pass_over_damage()
        self._since = int((self._about() or {}).get("since", 0))

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where nothing was measured at this step yet."""
        if state.global_step == 0 and args.should_save:
            shutil.rmtree(self._folder, ignore_errors=True)  # of an earlier training
        # Or what is there was measured on another text: then it is compared with no more.
        fresh = processes.first(lambda: self.best() is None)
        if fresh:
            self._since = state.global_step
        if fresh or (state.global_step % self._every == 0 and state.global_step not in self._measured(state)):
            loss = self._measure(state)
            self._say(f"held-out loss {loss:.3f} after step {state.global_step}, on {self._given.tokens:,} tokens")

    def _pass_over_damage(self) -> None:
        """Begin the comparison again where the model that was kept is not what was written."""

        def look() -> str:
            why = what_is_wrong(self._folder, (CHECKPOINT,)) if self._folder.is_dir() else ""
            if why:
                shutil.rmtree(self._folder)
            return why

        if why := processes.first(look):
            self._say(f"{self._folder}: is damaged and passed over: {why}; models are compared from here on")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every so many steps, and after the last."""
        last = state.global_step >= state.max_steps
        if not last and (state.global_step % self._every or self._ending()):
            return
        self._measure(state)
        control.should_log = True  # the step itself is logged, too; logging one thing took the mark away
        if not last and (why := self.exhausted(state)):
            self._say(why)
            control.should_save = control.should_training_stop = True

    def _measure(self, state: Any) -> float:
        model: PreTrainedModel = self.trainer.model
        mine = self._given.loss(model, self._tokens_at_once)
        # Of one process: what all do next hangs on it, and theirs may differ in the last bits.
        loss, before = processes.first(lambda: (mine, self.best()))
        was = model.training
        model.eval()  # so that the trainer takes it for a measurement
        self.trainer.log({_LOSS: loss})
        model.train(was)
        if before is None or loss < before[1]:
            self._keep(model, state.global_step, loss)
        processes.barrier()  # all look at what is kept
        return loss

    def _keep(self, model: PreTrainedModel, step: int, loss: float) -> None:
        """Write the best model so far in place of the one before, in one move: a finished run may share those files."""
        tensors = whole(model)
        if not self.trainer.args.should_save:
            return
        with replacing(self._folder, "checkpoint", overwrite=True) as staging:
            save_file(tensors, staging / CHECKPOINT, self._record(step, loss))

    def _record(self, step: int, loss: float) -> dict[str, str]:
        return {"step": str(step), _LOSS: repr(loss), "of": self._of, "since": str(self._since)}

    def _about(self) -> dict[str, str] | None:
        """What is written of the model that was kept, if one was, and measured on this very text."""
        if not (self._folder / CHECKPOINT).is_file():
            return None
        with safe_open(self._folder / CHECKPOINT, framework="pt") as file:
            about: dict[str, str] = file.metadata()
        return about if about.get("of") == self._of else None

    def best(self) -> tuple[int, float] | None:
        """Step and loss of the best model so far, if one was kept."""
        about = self._about()
        return None if about is None else (int(about["step"]), float(about[_LOSS]))

    def exhausted(self, state: Any) -> str:
        """Why training is to end, if it has run for too long without a better model; else nothing."""
        best = self.best()
        if self._patience is None or best is None:
            return ""
        since = [step for step in self._measured(state) if step > best[0]]
        if len(since) < self._patience:
            return ""
        times = "evaluation" if len(since) == 1 else f"{len(since)} evaluations"
        return (
            f"stopping after step {since[-1]}: in {times} the held-out loss has not fallen below {best[1]:.3f}, that of "
            f"step {best[0]} (train.early_stop: {self._patience})"
        )

    def restore(self, model: PreTrainedModel, state: Any) -> Evaluations | None:
        """Give the model the trainable tensors that were best; what was measured, or None if nothing was."""
        best, measured = processes.first(self.best), self._measured(state)
        if best is None:
            return None
        if best != (state.global_step, measured.get(state.global_step)):  # a step may be reached twice, by other rates
            now = measured.get(state.global_step, inf)
            after = "" if now == inf else f"; after step {state.global_step} it was {now:.3f}"
            self._say(f"the model of step {best[0]} is kept: its held-out loss, {best[1]:.3f}, is the lowest{after}")
            load_trainable(model, self._folder)
        return Evaluations([*measured], [*measured.values()], *best, state.global_step < self._steps)

    def _measured(self, state: Any) -> dict[int, float]:
        """Held-out losses by step, of this text."""
        return {e["step"]: e[_LOSS] for e in state.log_history if _LOSS in e and e["step"] >= self._since}
