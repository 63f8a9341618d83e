"""The docstrings of what is public: every parameter is explained, every function and class has an example, and the examples
call what there is."""

import inspect
import re
from typing import Any

import pytest

import trimtab as tt
from test_readme import called, missing

FUNCTIONS = {name: getattr(tt, name) for name in tt.__all__ if inspect.isfunction(getattr(tt, name))}
WITH_EXAMPLES = {name: getattr(tt, name) for name in tt.__all__ if name != "methods"}


def explained(function: Any) -> list[str]:
    """The parameters that a docstring's Args name."""
    text = inspect.getdoc(function) or ""
    part = re.search(r"^Args:\n(.*?)(?=^\w|\Z)", text, re.MULTILINE | re.DOTALL)
    return re.findall(r"^    (\w+): ", part[1], re.MULTILINE) if part else []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_is_explained(name: str) -> None:
    given = list(inspect.signature(FUNCTIONS[name]).parameters)
    assert explained(FUNCTIONS[name]) == given


@pytest.mark.parametrize("name", WITH_EXAMPLES)
def test_every_example_calls_what_there_is(name: str) -> None:
    lines = re.findall(r"^\s*(?:>>>|\.\.\.) (.*)", inspect.getdoc(WITH_EXAMPLES[name]) or "", re.MULTILINE)
    source = "\n".join(lines)
    assert [said for use in called(source) if (said := missing(*use))] == []
    assert re.search(rf"\btt\.{name}\b", source)
