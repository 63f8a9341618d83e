"""The structure of src/trimtab, held by tests: sizes, one-way imports, what `import trimtab` costs, the public surface.

Every rule is a pure function from source text to a list of offences, so that the last section can show, on a few lines
of source each, that the rule does fail. The tests proper apply the rules to the real tree and expect no offence.
"""

import ast
import importlib
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "trimtab"

# ---------------------------------------------------------------------------------------------------------------------
# The rules' tables. A new module or library is placed here first.

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py"}

# Lowest first. A room imports from itself and from rooms below it, never upwards and never in a circle.
# `trimtab` is the package's own __init__: only the command line may import it.
ROOMS = (
    "errors", "ending", "faults", "surroundings", "outputs", "disk", "reading", "extras", "devices", "words", "ranks",
    "processes", "quant", "kernels", "data", "layers", "methods", "recipe", "models",
    "evaluation", "formats", "pages", "training", "memory", "pruning", "bit_search", "pipeline", "api", "report",
    "trimtab", "cli", "__main__",
)  # fmt: skip
LEVEL = {room: level for level, room in enumerate(ROOMS)}

# Files of methods/ that are no method, so that methods may import them.
NO_METHODS = {"trimtab.methods", "trimtab.methods.base"}

# Free to import anywhere: what the library is made of. Any other library serves one purpose and has one room.
FREE_LIBRARIES = {"torch", "transformers", "safetensors", "numpy"}
SINGLE_PURPOSE_LIBRARIES = (
    "accelerate",
    "bitsandbytes",
    "compressed_tensors",
    "datasets",
    "gguf",
    "llama_cpp",
    "lm_eval",
    "matplotlib",
    "mlx",
    "mlx_lm",
    "optuna",
    "peft",
    "pydantic",
    "ray",
    "rich",
    "triton",
    "trl",
    "typer",
    "vl_convert",
    "vllm",
    "yaml",
)
# Not to be loaded by `import trimtab`, unless torch, transformers or safetensors does it by itself.
HEAVY_LIBRARIES = {*SINGLE_PURPOSE_LIBRARIES, "pandas", "pyarrow", "scipy", "sklearn"}
MAX_IMPORT_SECONDS = 1.0

PUBLIC_NAMES = [
    "Activations", "Blockwise", "CodebookGrid", "Gptq", "Grid", "KvCache", "Recipe", "UserError",
    "chat", "compare", "evaluate", "export", "fold", "gather", "harness", "load", "methods", "overview", "param_groups",
    "parity", "plan", "prepare", "prune", "push", "reference", "run", "save", "search", "shard", "simulate", "tune",
    "verify", "write_report",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------------------------------
# Reading the tree.


@cache
def sources() -> dict[str, str]:
    """Source text by path relative to the package."""
    return {path.relative_to(PACKAGE).as_posix(): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def module_name(file: str) -> str:
    """`formats/export.py` -> `trimtab.formats.export`."""
    parts = ["trimtab", *Path(file).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def unit(module: str) -> str:
    """The room that a module of this package belongs to."""
    return "trimtab" if module == "trimtab" else module.split(".")[1]


def imports(source: str, file: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, full module name) of every import, wherever it stands; `known` tells submodules from other names."""
    package = module_name(file) if file.endswith("__init__.py") else module_name(file).rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")
                base = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                yield node.lineno, submodule if submodule in known else base
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__"} and node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def ours(tree: dict[str, str]) -> Iterator[tuple[str, int, str, str]]:
    """(file, line, importing module, imported module) of every import of this package by itself."""
    known = {module_name(file) for file in tree}
    for file, source in tree.items():
        for line, imported in imports(source, file, known):
            if imported.partition(".")[0] == "trimtab" and imported != module_name(file):
                yield file, line, module_name(file), imported


# ---------------------------------------------------------------------------------------------------------------------
# The rules.


def oversized(source: str, file: str) -> list[str]:
    lines = len(source.splitlines())
    offences = [f"{file}: {lines} lines, over {MAX_FILE_LINES}"] if lines > MAX_FILE_LINES else []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                offences.append(f"{file}:{node.lineno}: {node.name} has {length} lines, over {MAX_FUNCTION_LINES}")
    return offences


def misnamed(files: list[str]) -> list[str]:
    return [f"{file}: says nothing about what it holds" for file in files if Path(file).name in FORBIDDEN_NAMES]


def same_names(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def unplaced(files: list[str]) -> list[str]:
    units = {unit(module_name(file)) for file in files}
    return [f"{name}: in no room of ROOMS; place it" for name in sorted(units - LEVEL.keys())]


def upward(tree: dict[str, str]) -> list[str]:
    return [
        f"{file}:{line}: {unit(importer)} imports {imported}, which is above it"
        for file, line, importer, imported in ours(tree)
        if LEVEL.get(unit(imported), -1) > LEVEL.get(unit(importer), len(ROOMS))
    ]


def circles(tree: dict[str, str]) -> list[str]:
    graph: dict[str, set[str]] = defaultdict(set)
    for _, _, importer, imported in ours(tree):
        if unit(importer) != unit(imported):
            graph[unit(importer)].add(unit(imported))

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = graph.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        return seen

    return [f"{name}: imports itself in a circle" for name in sorted(graph) if name in reach(name)]


def methods_importing_methods(tree: dict[str, str]) -> list[str]:
    return [
        f"{file}:{line}: a method imports {imported}; what two methods share belongs below methods/"
        for file, line, importer, imported in ours(tree)
        if importer not in NO_METHODS and imported not in NO_METHODS
        if unit(importer) == unit(imported) == "methods"
    ]


def writers_importing_train(tree: dict[str, str]) -> list[str]:
    return [
        f"{file}:{line}: {unit(importer)} imports {imported}"
        for file, line, importer, imported in ours(tree)
        if unit(importer) in {"formats", "evaluation"} and unit(imported) == "training"
    ]


def third_parties(tree: dict[str, str]) -> dict[str, set[str]]:
    """Files by the single-purpose library that they import."""
    files: dict[str, set[str]] = defaultdict(set)
    for file, source in tree.items():
        for _, imported in imports(source, file, set()):
            library = imported.partition(".")[0]
            if library not in {*sys.stdlib_module_names, *FREE_LIBRARIES, "trimtab"}:
                files[library].add(file)
    return files


def spread(tree: dict[str, str], library: str) -> list[str]:
    rooms = {unit(module_name(file)) for file in third_parties(tree)[library]}
    return [f"{library} is imported in {sorted(rooms)}: give it one room"] if len(rooms) > 1 else []


def undocumented(source: str, file: str) -> list[str]:
    module = ast.parse(source)
    offences = [] if ast.get_docstring(module) else [f"{file}: no module docstring"]
    for node in module.body:
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not node.name.startswith("_") and not ast.get_docstring(node):
            offences.append(f"{file}:{node.lineno}: {node.name} has no docstring")
    return offences


def blind_excepts(source: str, file: str) -> list[str]:
    offences = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {ast.unparse(kind).removeprefix("builtins.") if kind else "everything" for kind in caught}
            blind = sorted(names & {"everything", "Exception", "BaseException"})
            offences += [f"{file}:{node.lineno}: catches {name}; name what can go wrong" for name in blind]
    return offences


def prints(source: str, file: str) -> list[str]:
    if unit(module_name(file)) in {"cli", "__main__"}:
        return []
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [f"{file}:{c.lineno}: prints; only cli does" for c in calls if getattr(c.func, "id", "") == "print"]


# ---------------------------------------------------------------------------------------------------------------------
# The tests proper.

each_file = pytest.mark.parametrize("file", sources())


@each_file
def test_sizes(file: str) -> None:
    assert not oversized(sources()[file], file)


def test_file_names() -> None:
    assert not misnamed(list(sources()))


def test_names_of_test_files() -> None:
    """pytest imports a test file by its bare name: two of one name are one module, and the second is not collected."""
    assert not same_names(path.name for path in Path(__file__).parent.rglob("test_*.py"))


def test_every_module_has_a_level() -> None:
    assert not unplaced(list(sources()))


def test_imports_go_one_way() -> None:
    assert not upward(sources())


def test_no_circles() -> None:
    assert not circles(sources())


def test_methods_stand_alone() -> None:
    assert not methods_importing_methods(sources())


def test_writers_do_not_train() -> None:
    assert not writers_importing_train(sources())


@pytest.mark.parametrize("library", sorted({*SINGLE_PURPOSE_LIBRARIES, *third_parties(sources())}))
def test_library_has_one_room(library: str) -> None:
    assert not spread(sources(), library)


@each_file
def test_docstrings(file: str) -> None:
    assert not undocumented(sources()[file], file)


@each_file
def test_no_blind_except(file: str) -> None:
    assert not blind_excepts(sources()[file], file)


@each_file
def test_no_print(file: str) -> None:
    assert not prints(sources()[file], file)


def test_public_names() -> None:
    trimtab = importlib.import_module("trimtab")
    assert sorted(trimtab.__all__) == PUBLIC_NAMES
    assert not [name for name in trimtab.__all__ if getattr(trimtab, name, None) is None]


def test_the_picture_is_of_these_imports() -> None:
    """docs/imports.svg; `python tools/import_graph.py` makes it again."""
    script = PACKAGE.parents[1] / "tools" / "import_graph.py"
    assert subprocess.run([sys.executable, str(script), "--check"], check=False).returncode == 0


PROBE = """
import contextlib, importlib, json, sys, time
import torch, transformers, safetensors
start = time.perf_counter()
{statement}
print(json.dumps([time.perf_counter() - start, sorted(sys.modules)]))
"""
# A lazy module may put names into sys.modules that are no modules of their own; those are passed over.
IMPORT_EACH = """
for name in {names}:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
"""


def probe(statement: str) -> tuple[float, set[str]]:
    """Runs it in a fresh process after torch, transformers and safetensors: (its seconds, all modules then loaded)."""
    command = [sys.executable, "-c", PROBE.format(statement=statement)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    seconds, modules = json.loads(result.stdout.splitlines()[-1])
    return seconds, set(modules)


@pytest.fixture(scope="module")
def import_probes() -> list[tuple[float, set[str]]]:
    return [probe("import trimtab") for _ in range(3)]


def test_import_is_light(import_probes: list[tuple[float, set[str]]]) -> None:
    """Heavy libraries that the same modules of torch, transformers and safetensors load by themselves do not count."""
    _, modules = import_probes[0]
    heavy = modules & HEAVY_LIBRARIES
    if heavy:
        needed = sorted(module for module in modules if module.partition(".")[0] in FREE_LIBRARIES)
        heavy -= probe(IMPORT_EACH.format(names=needed))[1]
    assert not heavy


def test_import_is_quick(import_probes: list[tuple[float, set[str]]]) -> None:
    """Over what torch, transformers and safetensors cost; the best of three."""
    assert min(seconds for seconds, _ in import_probes) < MAX_IMPORT_SECONDS


# ---------------------------------------------------------------------------------------------------------------------
# The rules can fail.


def test_rule_sizes() -> None:
    assert not oversized("x = 1\n" * MAX_FILE_LINES, "a.py")
    assert oversized("x = 1\n" * (MAX_FILE_LINES + 1), "a.py")
    body = "    x = 1\n"
    assert not oversized("def f():\n" + body * (MAX_FUNCTION_LINES - 1), "a.py")
    assert oversized("def f():\n" + body * MAX_FUNCTION_LINES, "a.py")
    assert oversized("class C:\n    async def f(self):\n" + ("    " + body) * MAX_FUNCTION_LINES, "a.py")


def test_rule_file_names() -> None:
    assert misnamed(["errors.py", "formats/utils.py"]) == ["formats/utils.py: says nothing about what it holds"]


def test_rule_names_of_test_files() -> None:
    assert same_names(["test_a.py", "test_b.py", "test_a.py"]) == ["test_a.py"]


def test_rule_levels() -> None:
    assert not unplaced(["__init__.py", "errors.py", "methods/__init__.py", "formats/gguf/write.py", "cli.py"])
    assert unplaced(["errors.py", "more/new.py"]) == ["more: in no room of ROOMS; place it"]


@pytest.mark.parametrize(
    ("file", "source", "allowed"),
    [
        ("layers/weights.py", "from trimtab.quant.grid import Grid", True),
        ("layers/weights.py", "from trimtab.quant import grid", True),
        ("layers/weights.py", "from trimtab.layers.linear import QuantLinear", True),
        ("quant/grid.py", "from trimtab.errors import UserError", True),
        ("formats/gguf/write.py", "from ..native import write\nfrom ...layers.weights import AffineWeight", True),
        ("cli.py", "import trimtab", True),
        ("quant/grid.py", "from trimtab.layers.weights import AffineWeight", False),
        ("quant/grid.py", "import trimtab.layers.weights as w", False),
        ("quant/grid.py", "from trimtab.layers import weights", False),
        ("quant/grid.py", "from ..layers import weights", False),
        ("methods/lora.py", "from ..recipe.recipe import Recipe", False),
        ("quant/grid.py", "def f():\n    from trimtab.layers.linear import QuantLinear", False),
        ("quant/grid.py", "if TYPE_CHECKING:\n    from trimtab.layers.linear import QuantLinear", False),
        ("quant/grid.py", "import importlib\nimportlib.import_module('trimtab.layers.linear')", False),
        ("errors.py", "from trimtab.quant.grid import Grid", False),
        ("formats/gguf/write.py", "from trimtab.bit_search import front", False),
        ("report/terminal.py", "from trimtab import __version__", False),
        ("__init__.py", "from trimtab.cli import main", False),
    ],
)
def test_rule_one_way(file: str, source: str, allowed: bool) -> None:
    names = ("layers/weights.py", "quant/grid.py", "errors.py", "layers/linear.py", "recipe/recipe.py")
    rest = dict.fromkeys((*names, "formats/native/write.py"), "")
    assert (upward({**rest, file: source}) == []) is allowed


def test_rule_circles() -> None:
    there, back = "from trimtab.models.load import fold", "def f():\n    from trimtab.recipe.rules import Rule"
    inside = {"formats/a.py": "from trimtab.formats.b import x", "formats/b.py": "from trimtab.formats.a import y"}
    assert not circles({"recipe/rules.py": there, "models/load.py": "", **inside})
    assert len(circles({"recipe/rules.py": there, "models/load.py": back})) == 2


def test_rule_methods() -> None:
    registry = "from trimtab.methods import base, lora, rtn"
    rest = {"methods/__init__.py": registry, "methods/base.py": "", "methods/rtn.py": ""}
    assert not methods_importing_methods({**rest, "methods/lora.py": "from trimtab.methods.base import Method"})
    assert methods_importing_methods({**rest, "methods/lora.py": "from trimtab.methods.rtn import RTN"})
    assert methods_importing_methods({**rest, "methods/lora.py": "from . import rtn"})


def test_rule_writers() -> None:
    trainer = {"training/trainer.py": "import trimtab.data"}
    assert not writers_importing_train({"formats/a.py": "from trimtab.data import x", **trainer})
    assert writers_importing_train({"evaluation/a.py": "def f():\n    from trimtab.training import trainer", **trainer})


def test_rule_third_parties() -> None:
    tree = {
        "training/a.py": "import trl.trainer",
        "data/rows.py": "import torch, json, trimtab",
        "cli.py": "import rich",
    }
    assert not spread(tree, "trl")
    assert not spread({**tree, "training/b.py": "def f():\n    from trl import x"}, "trl")
    assert spread({**tree, "formats/a.py": "def f():\n    from trl import x"}, "trl")
    assert third_parties(tree) == {"trl": {"training/a.py"}, "rich": {"cli.py"}}


def test_rule_docstrings() -> None:
    assert not undocumented('"""M."""\ndef f():\n    """F."""\ndef _g(): pass\nclass C:\n    """C."""', "a.py")
    assert len(undocumented("def f(): pass\nclass C: pass\nasync def g(): pass", "a.py")) == 4


@pytest.mark.parametrize("caught", ["", " Exception", " (OSError, BaseException) as e", " builtins.Exception"])
def test_rule_blind_except(caught: str) -> None:
    assert blind_excepts(f"try:\n    f()\nexcept{caught}:\n    raise", "a.py")
    assert not blind_excepts("try:\n    f()\nexcept (OSError, ValueError):\n    raise", "a.py")


def test_rule_print() -> None:
    assert prints("def f():\n    print(1)", "report/a.py")
    assert not prints("print(1)", "cli.py")
    assert not prints("console.print(1)", "report/a.py")


def test_rule_light_import() -> None:
    seconds, modules = probe("import time, yaml, rich; time.sleep(0.2)")
    assert seconds >= 0.2
    assert {"yaml", "rich"} <= modules & HEAVY_LIBRARIES
    with pytest.raises(subprocess.CalledProcessError):
        probe("import no_such_module")
