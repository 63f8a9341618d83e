"""Benchmarks are run rarely: their imports are held by tests, so that a renamed module is found when it is renamed.

Nothing is measured here. Every import of trimtab and of another benchmark is read from the source, wherever it stands, and
looked up; imports among benchmarks go in no circle. Each rule is a function from source text to offences, and the last
section shows that it does fail.
"""

import ast
import importlib
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PATH_LINE = "sys.path.insert(0, str(Path(__file__).parents[{}]))"
"""Before the imports of other benchmarks in whatever is run as a script."""

Imports = list[tuple[str, str | None]]
"""(module, name), also those inside functions; the name is None for `import module`."""


@cache
def sources() -> dict[str, str]:
    """Source text by full name."""
    files = sorted((ROOT / "benchmarks").rglob("*.py"))
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f.read_text() for f in files}


# ---- rules ----------------------------------------------------------------------------------------------------------


def imports(text: str, package: str) -> Imports:
    """What is imported from a package."""
    found: Imports = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            found += [(node.module or "", alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
    return [(module, name) for module, name in found if module.split(".")[0] == package]


def missing(text: str) -> list[str]:
    """Imports from trimtab that find nothing."""
    offences = []
    for module, name in imports(text, "trimtab"):
        try:
            found = importlib.import_module(module)
            if name is not None and not hasattr(found, name):
                importlib.import_module(f"{module}.{name}")
        except ModuleNotFoundError as error:
            if not (error.name or "").startswith("trimtab"):
                raise
            offences.append(f"{module}: {name}" if error.name != module else module)
    return offences


def defined(text: str) -> set[str]:
    """Names that a module binds at its top."""
    found: set[str] = set()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return found


def lost(texts: dict[str, str]) -> list[str]:
    """Imports of benchmarks from one another that find nothing; a name is imported from where it is defined."""
    folders = {name.rpartition(".")[0] for name in texts}
    return [
        f"{user}: {module}.{name}"
        for user, text in texts.items()
        for module, name in imports(text, "benchmarks")
        if name is None
        or not (f"{module}.{name}" in texts if module in folders else name in defined(texts.get(module, "")))
    ]


def circles(texts: dict[str, str]) -> list[list[str]]:
    """Modules that import one another in a circle, however indirectly."""
    users = {
        user: {f"{m}.{n}" if f"{m}.{n}" in texts else m for m, n in imports(text, "benchmarks")} & texts.keys()
        for user, text in texts.items()
    }
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(module: str, way: list[str]) -> None:
        if module in way:
            found.append([*way[way.index(module) :], module])
        elif module not in finished:
            for used in sorted(users[module]):
                visit(used, [*way, module])
            finished.add(module)

    for module in users:
        visit(module, [])
    return found


def not_runnable(name: str, text: str) -> str | None:
    """A script that imports another without the line that makes it found, or that no longer begins at its end."""
    scripts = 'if __name__ == "__main__":' in text
    line = PATH_LINE.format(name.count("."))
    if scripts and imports(text, "benchmarks") and line not in text:
        return f"{name}: lacks {line}"
    return None


# ---- the tree -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sources())
def test_what_a_benchmark_imports_is_there(name: str) -> None:
    text = sources()[name]
    compile(text, name, "exec")
    assert missing(text) == []
    assert not_runnable(name, text) is None


def test_benchmarks_find_one_another_and_go_in_no_circle() -> None:
    assert len(sources()) > 25
    assert lost(sources()) == []
    assert circles(sources()) == []


def test_a_script_that_imports_others_runs_as_it_is_typed(tmp_path: Path) -> None:
    """From any folder; `rows` and others have the folder's own names, which must not stand in for libraries."""
    script = ROOT / "benchmarks" / "quality" / "quality.py"
    done = subprocess.run([sys.executable, str(script), "--help"], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "--minutes" in done.stdout


# ---- the rules fail -------------------------------------------------------------------------------------------------


def test_missing_names_are_found() -> None:
    assert missing("def f():\n    from trimtab.memory.training import trim") == ["trimtab.memory.training"]
    assert missing("from trimtab.models.load import skeleton, load") == ["trimtab.models.load: skeleton"]
    assert missing("from trimtab.kernels import heap\nimport trimtab\nimport torch") == []


def test_lost_and_circular_imports_are_found() -> None:
    texts = {
        "benchmarks.a.one": "from benchmarks.a import two",
        "benchmarks.a.two": "def f():\n    from benchmarks.b.three import LIMIT, gone",
        "benchmarks.b.three": "from benchmarks.a.one import main\nLIMIT: int = 3",
    }
    assert lost(texts) == ["benchmarks.a.two: benchmarks.b.three.gone", "benchmarks.b.three: benchmarks.a.one.main"]
    assert circles(texts) == [["benchmarks.a.one", "benchmarks.a.two", "benchmarks.b.three", "benchmarks.a.one"]]
    assert circles(texts | {"benchmarks.b.three": ""}) == []


def test_a_script_without_its_path_line_is_found() -> None:
    text = 'from benchmarks.files import RESULTS\nif __name__ == "__main__":\n    main()\n'
    assert not_runnable("benchmarks.a.one", text) is not None
    assert not_runnable("benchmarks.a.one", PATH_LINE.format(2) + "\n" + text) is None
    assert not_runnable("benchmarks.a.one", text.partition("\n")[0]) is None


def test_the_chart_is_of_these_results() -> None:
    from benchmarks.quality import chart

    assert chart.OUT.read_text(encoding="utf-8") == chart.svg()
    assert [label for label, _, value, _ in chart.bars() if value > 60] == [
        "QLoRA, merged and rounded again", "rounded, not tuned",
    ]  # fmt: skip
