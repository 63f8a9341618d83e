"""The table of reaches into other libraries (tools/upgrades.py) is whole, true, and what docs/upgrades.md shows."""

import ast
from functools import cache

import pytest

import upgrades
from upgrades import ELSEWHERE, PAGE, REACHES, ROOT, Reach


@cache
def sources() -> dict[str, str]:
    """Source text by path relative to the package."""
    found = sorted(upgrades.PACKAGE.rglob("*.py"))
    return {path.relative_to(upgrades.PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in found}


def defined(source: str) -> set[str]:
    """Functions, classes and assigned names of a file, those in classes behind the class's name."""
    found: set[str] = set()

    def walk(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                walk(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found.update(prefix + name.id for t in targets for name in ast.walk(t) if isinstance(name, ast.Name))

    walk(ast.parse(source).body, "")
    return found


def untrue(reach: Reach, files: dict[str, str]) -> list[str]:
    """What an entry says of the source that is not so."""
    wrong = []
    for where in reach.where:
        file, _, symbol = where.partition("::")
        if file not in files:
            wrong.append(f"{reach.what}: no file {file}")
        elif symbol not in defined(files[file]):
            wrong.append(f"{reach.what}: no {symbol} in {file}")
    text = "\n".join(files.get(where.partition("::")[0], "") for where in reach.where)
    return wrong + [f"{reach.what}: {name} does not stand there" for name in reach.names if name not in text]


def unbounded(reaches: tuple[Reach, ...], known: dict[str, tuple[str, str]]) -> list[str]:
    """Libraries that are reached into and installed in any version, however new."""
    names = dict.fromkeys(reach.library for reach in reaches if reach.library not in ELSEWHERE)
    return [name for name in names if "<" not in known.get(name, ("", ""))[0]]


def test_the_page_is_what_the_table_makes() -> None:
    made = upgrades.page(REACHES)
    assert PAGE.read_text(encoding="utf-8") == made, "run: python tools/upgrades.py --write"


@pytest.mark.parametrize("reach", REACHES, ids=lambda reach: f"{reach.library}-{reach.where[0]}")
def test_an_entry_is_true(reach: Reach) -> None:
    assert not untrue(reach, sources())
    file, _, name = reach.test.partition("::")
    assert (ROOT / file).is_file(), file
    assert name in defined((ROOT / file).read_text(encoding="utf-8")), reach.test


def test_nothing_private_is_used_that_is_not_entered() -> None:
    assert not upgrades.unregistered(sources(), REACHES)


def test_what_is_reached_into_has_an_upper_bound() -> None:
    assert not unbounded(REACHES, upgrades.requirements())


def test_tested_versions_are_within_bounds() -> None:
    """No bound shuts out what `make setup` installs."""
    tested = upgrades.pins("constraints.txt")
    for name, (bounds, _) in upgrades.requirements().items():
        number = tuple(map(int, tested[upgrades.plain(name)].split(".")[:3]))
        for bound in filter(None, bounds.split(",")):
            limit = tuple(map(int, bound.lstrip("<>=").split(".")))
            assert number < limit if bound.startswith("<") else number >= limit, f"{name}{bounds}"


def test_libraries_elsewhere_are_pinned_where_it_says() -> None:
    for library, (_, file) in ELSEWHERE.items():
        assert library in {reach.library for reach in REACHES}
        assert (ROOT / file).is_file()
    assert not ELSEWHERE.keys() & upgrades.requirements().keys()


# ---- the rules can fail ------------------------------------------------------------------------------------------------

ENTRY = Reach("torch", "a storage's address", "it is one", ("a.py::f",), "tests/test_upgrades.py::sources", ("_cdata",))


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("def f(x):\n    return x._cdata", ["_cdata"]),
        ("def f(x):\n    x._flag = 1", ["_flag"]),
        ("def f(x):\n    return x.y()._destroy()", ["_destroy"]),
        ("def f(x):\n    return getattr(x, '_flag', None)", ["_flag"]),
        ("class C(Base):\n    def f(self):\n        return self._metrics['a']", ["_metrics"]),
        ("class C(Base):\n    def f(self):\n        self._count += 1", ["_count"]),
        ("import torch._dynamo.config", ["_dynamo"]),
        ("def f():\n    from torch.utils import _pytree", ["_pytree"]),
        ("import gguf\ngguf.GGUFReader = None", ["GGUFReader"]),
        ("from torch import nn\nnn.Module.register_parameter = f", ["register_parameter"]),
        ("def _parameters(): ...\ndef f(m):\n    return m._parameters", ["_parameters"]),
        ("class C:\n    def _own(self): ...\ndef f(c):\n    return c._own()", []),
        ("class C:\n    _field: int\n    def f(self, other):\n        return other._field", []),
        ("class C:\n    def __init__(self):\n        self._a, self._b = 1, 2\ndef f(c):\n    return c._b", []),
        ("from trimtab.quant.grid import _private\nimport trimtab.kernels._x", []),
        ("from . import _private", []),
        ("def f(x):\n    return x.__dict__, x._asdict(), x.public", []),
        ("from __future__ import annotations", []),
    ],
)
def test_rule_private(source: str, names: list[str]) -> None:
    assert [name for _, _, name in upgrades.private_reaches({"a.py": source})] == names


def test_rule_unregistered() -> None:
    source = {"a.py": "def f(x):\n    return x._cdata"}
    assert not upgrades.unregistered(source, [ENTRY])
    assert upgrades.unregistered(source, [])[0].startswith("a.py:2: _cdata is not a part of")
    assert upgrades.unregistered({"b.py": source["a.py"]}, [ENTRY]), "an entry speaks of its own files only"


def test_rule_untrue() -> None:
    source = {"a.py": "def f(x):\n    return x._cdata"}
    assert not untrue(ENTRY, source)
    assert untrue(ENTRY, {}) == [
        "a storage's address: no file a.py",
        "a storage's address: _cdata does not stand there",
    ]
    assert untrue(ENTRY, {"a.py": "def g(x):\n    return x._cdata"}) == ["a storage's address: no f in a.py"]
    assert defined("class C:\n    x: int\n    def f(self): ...\na, B = 1, 2") == {"C", "C.x", "C.f", "a", "B"}


def test_rule_bounds() -> None:
    assert not unbounded((ENTRY,), {"torch": (">=2.11,<2.15", "")})
    assert unbounded((ENTRY,), {"torch": (">=2.11", "")}) == ["torch"]
    assert unbounded((ENTRY,), {}) == ["torch"]


def test_newest_requirements_have_no_bounds() -> None:
    known = {"torch": (">=2,<3", ""), "trl": (">=1,<2", ""), "triton": ("<4", "sys_platform == 'linux'")}
    assert upgrades.newest_requirements(known) == ["trl", "triton; sys_platform == 'linux'"]
    asked = upgrades.newest_requirements(upgrades.requirements())
    assert {"transformers", "trl", "optuna", "pytest"} <= set(asked)
    assert not [line for line in asked if set("<>") & set(line)]


REPORT = """<testsuites><testsuite>
<testcase classname="tests.a.test_b" name="test_good[x]"/>
<testcase classname="tests.a.test_b" name="test_bad[x]"/>
<testcase classname="tests.a.test_b" name="test_bad[y]"><failure message="it broke">at length</failure></testcase>
<testcase classname="tests.a.test_b" name="test_bad[z]"><skipped message="no"/></testcase>
<testcase classname="tests.a.test_b" name="test_error"><error message="no fixture"/></testcase>
<testcase classname="tests.a.test_b" name="test_left_out"><skipped message="no GPU"/></testcase>
<testcase classname="" name="tests.a.test_c"><error message="collection failure">no module</error></testcase>
</testsuite></testsuites>"""


def test_a_report_is_told_by_reach() -> None:
    found = upgrades.outcomes(REPORT)
    tests = {"good": "passed", "bad": "failed", "error": "failed", "left_out": "skipped", "never_ran": "failed"}
    for name, outcome in tests.items():
        entry = Reach("torch", "", "", (), f"tests/a/test_b.py::test_{name}")
        assert upgrades.verdict(entry, found)[0] == outcome, name
    assert upgrades.verdict(Reach("torch", "", "", (), "tests/a/test_b.py::test_bad"), found)[1] == "it broke"
    assert upgrades.verdict(Reach("torch", "", "", (), "tests/a/test_c.py::test_any"), found) == (
        "failed",
        "collection failure",
    )
