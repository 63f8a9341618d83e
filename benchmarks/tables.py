"""Pieces of the generated pages: tables, verdicts on aims, intervals."""

import statistics
from collections.abc import Callable, Mapping
from math import sqrt
from pathlib import Path
from typing import Any

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantile of Student's t for n values."""


def table(head: str, rows: list[list[str]]) -> list[str]:
    """A table; `head` separates its columns by bars."""
    columns = head.split("|")
    return [f"| {' | '.join(c.strip() for c in columns)} |", "|---" * len(columns) + "|"] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


def between_marks(page: Path, sections: Mapping[str, Callable[[Any], list[str]]], read: Mapping[str, Any]) -> str:
    """A page written by hand, with the tables between its marks made again.

    Args:
        page: its file.
        sections: what makes each table, by the name in its marks.
        read: numbers by the same names; a table without any stays as it is.
    """
    text = page.read_text(encoding="utf-8")
    for name in (name for name in sections if name in read):
        begin, end = (f"<!-- {word} {name}, made by benchmarks/report.py -->" for word in ("table", "end"))
        assert text.count(begin) == text.count(end) == 1, f"{page.name}: marks of {name}"
        head, _, rest = text.partition(begin)
        text = "\n".join([head + begin, "", *sections[name](read[name]), "", end + rest.partition(end)[2]])
    return text


def marked(shown: str, met: bool) -> str:
    """A number that an aim is held against: what misses the aim says so."""
    return shown if met else f"{shown}, missed"


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean."""
    n = len(values)
    return None if n < 2 else T95[n] * statistics.stdev(values) / sqrt(n)
