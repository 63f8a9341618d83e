"""`report.html` of a folder: which page it has, made of its files, and written where the extra is installed."""

import os
from collections.abc import Callable
from pathlib import Path

from trimtab.disk import replace_text
from trimtab.errors import UserError
from trimtab.formats.manifest import add
from trimtab.pages import compare_page, run_page, search_page, vega
from trimtab.pages.html import Page

FILE = "report.html"
_MADE_OF = ("metrics.json", "compare.json", "search.json")
"""Files that say what a folder is."""


def page(folder: Path, name: str | None = None) -> Page:
    """The page of a folder that trimtab wrote, by what its files say that it is.

    Raises:
        UserError: if it is none of a run, a search or a comparison.
    """
    name = name or folder.resolve().name
    if (folder / "metrics.json").is_file():
        return run_page.page(folder, name)
    if (folder / "compare.json").is_file():
        return compare_page.page(folder, name)
    if (folder / "search.json").is_file():
        return search_page.page(folder, name)
    raise UserError(f"{folder}: holds no run, search or comparison, of which trimtab makes a report")


def make(folder: Path, say: Callable[[str], None], *, name: str | None = None) -> None:
    """Write `report.html` into a folder that is being made; where the extra is missing, one line says how to get it.

    Args:
        folder: whose other files are whole.
        say: told what is to be known.
        name: of what it is a report; None for the folder's name.
    """
    if vega.lacking():
        say("no report.html: its charts need pip install 'trimtab[report]'; then `trimtab report DIR` writes it")
        return
    replace_text(folder / FILE, page(folder, name).html(vega.script()))


def write_report(path: str | os.PathLike[str]) -> Path:
    """Write `report.html` of a folder again, with the exports and checks made since.

    Args:
        path: the folder of a run, a search or a comparison.

    Returns:
        The path of the page.

    Raises:
        UserError: if the folder is of no run, search or comparison, or the extra `report` is not installed.

    Examples:
        >>> tt.write_report("runs/small")
    """
    folder = Path(path)
    stages = [folder, folder / "model", folder / "search"]  # of a run with stages: its model, else its search
    home = next((f for f in stages if any((f / file).is_file() for file in _MADE_OF)), folder)
    made = page(home, folder.resolve().name)
    replace_text(home / FILE, made.html(vega.script()))
    add(home, (FILE,))
    return home / FILE
