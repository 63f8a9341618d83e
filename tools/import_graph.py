"""The rooms of src/trimtab and the imports between them, as a picture: docs/imports.svg.

    python tools/import_graph.py            writes it
    python tools/import_graph.py --check    says whether it is what the code gives now

Rooms stand in the order that tests/test_structure.py holds, lowest at the top. An arc on the right runs from a room to each
room that it imports. What follows from others (a imports b, b imports c, so a stands below c) is drawn thin.
"""

import ast
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE, OUT = ROOT / "src" / "trimtab", ROOT / "docs" / "imports.svg"
ROW, LEFT, WIDTH = 34, 20, 130
COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#ff7f0e", "#7f7f7f")


def rooms() -> list[str]:
    """ROOMS of the structure test, read as text."""
    tree = ast.parse((ROOT / "tests" / "test_structure.py").read_text(encoding="utf-8"))
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "ROOMS":
            return list(ast.literal_eval(node.value))
    raise SystemExit("tests/test_structure.py has no ROOMS")


def imports() -> dict[str, dict[str, int]]:
    """Room -> rooms it imports, with the number of import statements."""
    found: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for file in sorted(PACKAGE.rglob("*.py")):
        path = file.relative_to(PACKAGE)
        room = path.parts[0].removesuffix(".py").replace("__init__", "trimtab")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "trimtab":
                names = [node.module] if "." in (node.module or "") else [f"trimtab.{a.name}" for a in node.names]
            for name in names:
                target = str(name).split(".")[1]
                if target != room:
                    found[room][target] += 1
    return found


def reach(graph: dict[str, dict[str, int]], start: str, skip: str) -> set[str]:
    """Rooms that are reached from a room without its own import of `skip`."""
    seen: set[str] = set()
    todo = [n for n in graph.get(start, {}) if n != skip]
    while todo:
        room = todo.pop()
        if room not in seen:
            seen.add(room)
            todo += graph.get(room, {})
    return seen


def svg() -> str:
    """The picture."""
    graph = imports()
    order = [r for r in rooms() if r in graph or any(r in targets for targets in graph.values())]
    y = {room: 24 + i * ROW for i, room in enumerate(order)}
    height, right = 24 + len(order) * ROW, LEFT + WIDTH
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{height}" viewBox="0 0 640 {height}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for i, (room, targets) in enumerate(sorted(graph.items(), key=lambda item: y.get(item[0], 0))):
        for target in sorted(targets, key=lambda t: y.get(t, 0)):
            if target not in y or room not in y:
                continue
            bow = right + 26 + 26 * abs(y[room] - y[target]) / ROW
            thin = target in reach(graph, room, target)
            style = f'stroke="{COLORS[i % len(COLORS)]}" stroke-width="{0.5 if thin else 1.8}"'
            lines.append(
                f'<path d="M {right} {y[room]} C {bow:.0f} {y[room]} {bow:.0f} {y[target]} {right + 4} {y[target]}" '
                f'fill="none" {style} opacity="{0.45 if thin else 0.95}"><title>{room} imports {target} '
                f"({targets[target]})</title></path>"
            )
    lines += [
        f'<rect x="{LEFT}" y="{y[room] - 12}" width="{WIDTH}" height="24" rx="5" fill="#f3f3f3" stroke="#555"/>'
        f'<text x="{LEFT + WIDTH / 2:.0f}" y="{y[room] + 4}" text-anchor="middle">{room}</text>'
        for room in order
    ]
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    if "--check" in sys.argv:
        raise SystemExit(0 if OUT.exists() and OUT.read_text(encoding="utf-8") == svg() else f"{OUT} is out of date")
    OUT.write_text(svg(), encoding="utf-8")
