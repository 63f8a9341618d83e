"""Where results and pages lie, and how results are kept line by line."""

import json
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DOCS = Path(__file__).parents[1] / "docs"


def read(file: Path) -> list[dict[str, Any]]:
    """The lines of a file; none where it is not there yet."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def add(file: Path, values: dict[str, Any]) -> None:
    """One more line."""
    with file.open("a") as lines:
        lines.write(json.dumps(values) + "\n")


def put(file: Path, rows: list[dict[str, Any]]) -> None:
    """These lines, in place of what stands there."""
    file.write_text("".join(json.dumps(values) + "\n" for values in rows))


def say(text: str) -> None:
    """Print with the time."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
