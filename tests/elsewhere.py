"""Calls of functions in another process, which finds them by this file's name: there may be several files `conftest`."""

import traceback
from collections.abc import Callable
from typing import Any


def called(function: Callable[..., Any], *args: Any) -> tuple[Any, str]:
    """The value, or what went wrong: an exception of a module that only that process has cannot be sent."""
    try:
        return function(*args), ""
    except BaseException:  # noqa: BLE001
        return None, traceback.format_exc()


def value(returned: Any, wrong: str) -> Any:
    """What `called` returned, in the process that asked."""
    assert not wrong, wrong
    return returned
