"""A page of docs/tutorials as a notebook: prose becomes text cells, snippets become cells that run.

    ```python      a code cell
    ```yaml        `%%writefile NAME`, where the first line is `# NAME`; else it is text
    ```            every line `trimtab ...` becomes `!trimtab ...`; a block without one is text

A block below the line `<!-- not run -->` stays text: it needs what a reader may lack (several GPUs, a server that stays).
`tests/test_tutorials.py` runs these very cells on tiny models. Only the standard library is imported.
"""

import json
import re
from dataclasses import dataclass

FENCE = re.compile(r"((?:<!-- not run -->\n)?)```(\w*)\n(.*?)```\n?", re.DOTALL)


@dataclass(frozen=True)
class Cell:
    """A cell of a notebook."""

    kind: str
    """markdown or code."""
    source: str


def cells(page: str) -> list[Cell]:
    """The cells of a page, in order."""
    found: list[Cell] = []
    end = 0
    for block in FENCE.finditer(page):
        found.append(Cell("markdown", page[end : block.start()].strip()))
        found.append(cell(language=block.group(2), body=block.group(3).rstrip(), shown=bool(block.group(1))))
        end = block.end()
    found.append(Cell("markdown", page[end:].strip()))
    return [c for c in found if c.source]


def cell(language: str, body: str, shown: bool) -> Cell:
    """The cell of one block; `shown` ones are not to be run."""
    first, _, rest = body.partition("\n")
    named = re.fullmatch(r"# ([\w.-]+\.ya?ml)\b.*", first)
    if language == "python" and not shown:
        return Cell("code", body)
    if language == "yaml" and named and not shown:
        return Cell("code", f"%%writefile {named.group(1)}\n{rest}")
    if not language and re.search(r"^trimtab ", body, re.MULTILINE) and not shown:
        lines = (line.split("  #")[0].rstrip() for line in body.splitlines())
        return Cell(
            "code", "\n".join(f"!{line}" if line.startswith("trimtab ") else f"# {line}" for line in lines if line)
        )
    return Cell("markdown", f"```{language}\n{body}\n```")


def notebook(page: str) -> str:
    """The text of a .ipynb file."""
    written = []
    for number, made in enumerate(cells(page)):
        one: dict[str, object] = {"cell_type": made.kind, "id": f"cell-{number}", "metadata": {}}
        one["source"] = made.source.splitlines(keepends=True)
        written.append(one | ({"execution_count": None, "outputs": []} if made.kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    about = {"cells": written, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(about, indent=1, ensure_ascii=False) + "\n"
