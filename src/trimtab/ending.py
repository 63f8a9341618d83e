"""Being asked to end: Ctrl-C (SIGINT), and SIGTERM, which schedulers, containers and `kill` send, alike.

Python makes a KeyboardInterrupt of the one and dies of the other, with children and half-written folders left behind. The
command line, whose process it is, makes an exception of both, so that what cleans up after the one does after the other;
`training.interrupt` takes both over while a model trains, to finish a step. A library that is imported changes nothing.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


_came: list[int] = []
"""Signals that were heard, in order."""


@contextmanager
def listening() -> Iterator[None]:
    """Raise `Terminated` in the main thread at SIGTERM while the block runs, unless somebody else listens to it."""
    _came.clear()
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def held() -> Iterator[None]:
    """Put off what comes while the block runs, in the main thread, until it has run; a second one is not put off.

    Around the loading of libraries: some of their compiled parts swallow an exception that comes while they load others,
    and what is half loaded cannot be loaded again.
    """
    theirs = (signal.default_int_handler, terminate)
    main = threading.current_thread() is threading.main_thread()
    found = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    before: dict[int, Any] = {number: handler for number, handler in found.items() if handler in theirs}
    came: list[int] = []

    def leave() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, _: Any) -> None:
        came.append(number)
        leave()

    for number in before:
        signal.signal(number, note)
    try:
        yield
    finally:
        leave()
        for number in came:
            before[number](number, None)


def terminate(number: int, _: Any) -> None:
    """The handler."""
    heard(number)
    raise Terminated


def heard(number: int) -> None:
    """A signal came whose handler is another one."""
    _came.append(number)


def status() -> int:
    """The exit status of a command that was asked to end: 128 and the number of the signal, 130 for Ctrl-C."""
    return 128 + (_came[-1] if _came else signal.SIGINT)


def name(number: int) -> str:
    """Of a signal, for people."""
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
