"""Pieces of the generated pages: tables, verdicts on aims, intervals."""

import statistics
from math import sqrt

T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Two-sided 95 % quantile of Student's t for n values."""


def table(head: str, rows: list[list[str]]) -> list[str]:
    """A table; `head` separates its columns by bars."""
    columns = head.split("|")
    return [f"| {' | '.join(c.strip() for c in columns)} |", "|---" * len(columns) + "|"] + [
        f"| {' | '.join(row)} |" for row in rows
    ]


def marked(shown: str, met: bool) -> str:
    """A number that an aim is held against: what misses the aim says so."""
    return shown if met else f"{shown}, missed"


def interval(values: list[float]) -> float | None:
    """Half the width of the 95 % interval of the mean."""
    n = len(values)
    return None if n < 2 else T95[n] * statistics.stdev(values) / sqrt(n)
