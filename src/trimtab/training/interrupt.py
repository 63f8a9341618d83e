"""Ctrl-C, or SIGTERM, while a model trains: the step that runs is finished and saved, and only then all ends.

A KeyboardInterrupt in the middle of a step would leave gradients half summed and an optimizer half stepped; what could be
kept is then the last checkpoint, up to `save_steps` steps old. A second one is an ordinary one, for a user who cannot wait.
"""

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any

from transformers import TrainerCallback

from trimtab import ending, processes


class Interrupted(KeyboardInterrupt):
    """Training was ended by a signal after a whole step, whose checkpoint is written."""


class EndsAfterTheStep(TrainerCallback):
    """Ends training when Ctrl-C was pressed, or SIGTERM came; in a `with` block, around the training alone.

    Only the main thread is told of signals, and a caller's own handler is kept; of SIGTERM, what stands for
    none is the command line's (`ending`).

    Args:
        say: told that the running step is finished first.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say, self._told, self._by = say, False, int(signal.SIGINT)
        self._before: dict[int, Any] = {}
        self.asked = False
        """Whether a signal came; it may at any moment, to one process before another."""
        self.agreed = False
        """Whether all processes end, since one of them was asked to; the same in all."""

    def __enter__(self) -> "EndsAfterTheStep":
        main = threading.current_thread() is threading.main_thread()
        theirs = (signal.default_int_handler, ending.terminate)
        found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
        self._before = {number: handler for number, handler in found.items() if handler in theirs}
        for number in self._before:
            signal.signal(number, self._ask)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._leave()

    def _leave(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        # Nothing may be printed here: the program may be in the middle of printing.
        ending.heard(number)
        self.asked, self._by = True, number
        self._leave()

    def _tell(self, step: int) -> None:
        if self.asked and not self._told:
            self._told = True
            self._say(f"{ending.name(self._by)}: finishing step {step}, then saving; once more to stop at once")

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A micro-batch of a longer step is done."""
        self._tell(state.global_step + 1)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A step is done: save it and stop, if that was asked."""
        self._agree()
        self._tell(state.global_step)
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def _agree(self) -> None:
        """Every process has to come here."""
        self.agreed = processes.any_of(self.asked) or self.agreed
        self.asked = self.asked or self.agreed

    def check(self, step: int, steps: int) -> None:
        """Raise `Interrupted` if Ctrl-C was pressed, after the last step, too; every process has to ask."""
        self._agree()
        if self.agreed:
            raise Interrupted(f"stopped after step {step} of {steps}")
