"""The messages of every `UserError` in the source, as the list that ends docs/troubleshooting.md.

A message is read from the source without running it: what an f-string fills in is shown as `<name>`, or as an ellipsis
where the expression has no short name. Only the standard library is imported.
"""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "trimtab"
RAISED = {"UserError", "Diverged"}
TITLES = {
    "recipe": "Recipes",
    "data": "Training data",
    "models": "Loading and preparing models",
    "methods": "Methods",
    "quant": "Grids",
    "layers": "Layers and adapters",
    "training": "Training",
    "pipeline": "Runs and their outputs",
    "memory": "Planning",
    "formats": "Exports and saved folders",
    "evaluation": "Evaluation, chat and engines",
    "pages": "Reports",
    "pruning": "Pruning",
    "bit_search": "Searches",
    "kernels": "Kernels",
}
"""The headings, in order, of the rooms that have one of their own; messages of all other files stand under the last."""
ELSEWHERE = "Command line, devices, files and processes"


def short(expression: ast.expr) -> str:
    """What stands for a value that is filled in."""
    match expression:
        case ast.Name(name) | ast.Attribute(attr=name) | ast.Call(func=ast.Attribute(attr=name)):
            return f"<{name.strip('_')}>"
        case ast.Subscript(value=ast.Name(name)):
            return f"<{name}>"
    return "…"


def text_of(message: ast.expr) -> str | None:
    """A message with its values as placeholders; None where it was made elsewhere."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if not isinstance(message, ast.JoinedStr):
        return None
    parts = [
        str(part.value) if isinstance(part, ast.Constant) else short(part.value)  # type: ignore[attr-defined]
        for part in message.values
    ]
    return re.sub(r"\s+", " ", "".join(parts)).strip()


def messages(source: str) -> Iterator[str]:
    """The message of every error that a file raises, in the order of its lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in RAISED and node.args:
            said = text_of(node.args[0])
            if said and re.search(r"[a-z]{3}", re.sub(r"<\w+>", "", said)):
                yield said


def by_heading() -> dict[str, list[str]]:
    """Messages under the heading that they belong to, each once, in alphabetical order."""
    found: dict[str, set[str]] = defaultdict(set)
    for file in sorted(PACKAGE.rglob("*.py")):
        room = file.relative_to(PACKAGE).parts[0]
        found[TITLES.get(room, ELSEWHERE)].update(messages(file.read_text(encoding="utf-8")))
    return {title: sorted(found[title], key=sortable) for title in [*TITLES.values(), ELSEWHERE] if found[title]}


def sortable(message: str) -> str:
    """A message by its own words, whatever is filled in before them."""
    return re.sub(r"<\w+>|…|[^a-z ]", "", message.lower()).strip()


def markdown() -> str:
    """The list."""
    lines: list[str] = []
    for title, said in by_heading().items():
        lines += [f"### {title}", "", *(f"* ``{message}``" for message in said), ""]
    return "\n".join(lines)
