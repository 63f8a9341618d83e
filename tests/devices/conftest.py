"""A model and its text, by themselves."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def model(given: Path) -> Path:
    """A directory."""
    return given / "model"


@pytest.fixture(scope="module")
def text(given: Path) -> Path:
    """Rows of text."""
    return given / "data.jsonl"
