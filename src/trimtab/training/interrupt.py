"""Ctrl-C while a model trains: the step that runs is finished, a checkpoint is written, and only then all ends.

A KeyboardInterrupt in the middle of a step would leave gradients half summed and an optimizer half stepped; what could be
kept is then the last checkpoint, up to `save_steps` steps old. A second Ctrl-C is an ordinary one, for whoever cannot wait.
"""

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from transformers import TrainerCallback


class Interrupted(KeyboardInterrupt):
    """Training was ended by Ctrl-C after a whole step, whose checkpoint is written."""


class EndsAfterTheStep(TrainerCallback):
    """Ends training when Ctrl-C was pressed; in a `with` block, around the training alone.

    Only the main thread is told of signals, and whoever has a handler of their own keeps it.

    Args:
        say: told that the running step is finished first.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told = say, False
        self.asked = False
        """Whether Ctrl-C was pressed."""

    def __enter__(self) -> "EndsAfterTheStep":
        main = threading.current_thread() is threading.main_thread()
        self._ours = main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if self._ours:
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def _ask(self, *_: Any) -> None:
        # Nothing may be printed here: the program may be in the middle of printing.
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def _tell(self, step: int) -> None:
        if self.asked and not self._told:
            self._told = True
            self._say(f"Ctrl-C: finishing step {step}, then saving; once more to stop at once")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch of a longer step is done."""
        self._tell(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done: save it and stop, if that was asked."""
        self._tell(state.global_step)
        if self.asked:
            control.should_save = control.should_training_stop = True

    def check(self, step: int, steps: int) -> None:
        """Raise `Interrupted` if training was ended by Ctrl-C."""
        if self.asked:
            raise Interrupted(f"stopped after step {step} of {steps}")
