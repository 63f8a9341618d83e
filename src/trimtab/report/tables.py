"""How a table of text fits a terminal: no word is ever cut, on 80 columns or on fewer.

Each column is at least as wide as its longest word, and gets a share of the room that is left by what it would like. Where
even the words do not fit, every row becomes a paragraph of its own.
"""

from collections.abc import Sequence

Row = Sequence[str]
_GAP = 2
"""Columns between two columns."""


def widths(header: Row, rows: Sequence[Row], room: int) -> list[int] | None:
    """The width of each column, or None where the words do not fit.

    Args:
        header: of the columns.
        rows: of the table; their first column is not broken.
        room: columns of the terminal.
    """
    columns = list(zip(*[header, *rows], strict=True))
    wanted = [max(len(cell) for cell in column) for column in columns]
    least = [max((len(word) for cell in column for word in cell.split()), default=0) for column in columns]
    least[0] = wanted[0]
    left = room - _GAP * len(columns) - sum(least)
    if left < 0:
        return None
    wishes = [w - m for w, m in zip(wanted, least, strict=True)]
    if sum(wishes) <= left:
        return wanted
    return [m + left * wish // sum(wishes) for m, wish in zip(least, wishes, strict=True)]


def paragraphs(header: Row, rows: Sequence[Row]) -> list[str]:
    """Every row as a line of its own, to be wrapped; rows that begin with nothing belong to the one above."""
    found = []
    for row in rows:
        said = [f"{name} {cell}".strip() for name, cell in zip(header[1:], row[1:], strict=True) if cell]
        found.append(f"{row[0] or ' '} {'; '.join(said)}".rstrip())
    return found
