"""The tool that breaks code on purpose, on a toy: noticed, not noticed, not run, and what no test could tell."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import yaml

from mutation import c_breaks, python_breaks
from mutation.trial import breaks_of

TOY = '''"""A toy with 3 + 4 in its docstring."""

LIMIT = 3


def larger(a: int, b: int) -> int:
    return a if a > b else b


def cut(x: int) -> int:
    return min(x, LIMIT)


def half(x: float) -> float:
    return x / 2


def alone(x: int) -> int:
    return x + x
'''
TESTS = """from toy import cut, half, larger


def test_larger() -> None:
    assert larger(1, 2) == larger(2, 1) == 2


def test_cut() -> None:
    assert cut(5) == 3


def test_half_is_careless() -> None:
    assert half(0) == 0
"""
EQUIVALENTS = """
- path: toy.py
  source: return a if a > b else b
  change: a > b  ->  a >= b
  reason: the larger of equals is either.
"""


def test_a_toy(tmp_path: Path) -> None:
    (tmp_path / "toy.py").write_text(TOY)
    (tmp_path / "test_toy.py").write_text(TESTS)
    (tmp_path / "tests" / "mutation").mkdir(parents=True)
    (tmp_path / "tests" / "mutation" / "equivalents.yaml").write_text(EQUIVALENTS)
    tool = [
        sys.executable,
        str(Path(__file__).parents[1] / "mutate.py"),
        "--root",
        str(tmp_path),
        "--preload",
        "--only",
    ]
    options = {"capture_output": True, "text": True, "env": {**os.environ, "PYTHONPATH": str(tmp_path)}}
    first = subprocess.run([*tool, "toy.py", "--tests", "test_toy.py"], **options)  # type: ignore[call-overload]
    assert first.returncode == 1, first.stderr
    *_, counts = first.stdout.strip().splitlines()
    listed = first.stdout.partition("\n\n")[2]
    assert "toy.py:15: survived: x / 2  ->  x * 2\n    return x / 2" in listed
    assert "toy.py:19: unreached: x + x  ->  x - x" in listed
    assert not any(f"toy.py:{line}:" in listed for line in (1, 3, 6, 7, 11))
    # LIMIT both ways, which of two, min for max, and its argument alone; 2 both ways and / in half.
    assert counts == "10 breaks: 5 killed, 3 survived, 1 unreached, 1 equivalent", first.stdout
    # A test is written: only what was left is tried again.
    (tmp_path / "test_toy.py").write_text(TESTS + "\n\ndef test_half() -> None:\n    assert half(3) == 1.5\n")
    again = subprocess.run([*tool, "toy.py", "--tests", "test_toy.py", "--again"], **options)  # type: ignore[call-overload]
    assert "10 breaks: 8 killed, 1 unreached, 1 equivalent" in again.stdout, again.stdout + again.stderr


def test_every_equivalent_is_a_break_that_exists_and_has_a_reason() -> None:
    """An entry whose line was changed since is taken out, or what stands there now would be let pass unseen."""
    root = Path(__file__).parents[2]
    for entry in yaml.safe_load((Path(__file__).parent / "equivalents.yaml").read_text()):
        found = [(b.source, b.change, b.scope) for b in breaks_of(root / entry["path"])]
        source, change, scope = entry["source"], entry["change"], entry.get("scope")
        assert entry["reason"]
        assert any((s, c) == (source, change) and scope in (None, there) for s, c, there in found), entry


def test_what_is_only_said_is_left_alone() -> None:
    source = '''
def f(x: Literal[1, 2], *, of: int | None = None) -> int | float:
    """1 + 1"""
    assert x > 1, f"{x + 1}"
    if x > 2:
        raise UserError(f"{x - 1} is more than {2}")
    warnings.warn("3" + "4")
    pairs = zip(x, x, strict=True)
'''
    sites = python_breaks.sites(ast.parse(source))
    changes = [python_breaks.words(site, new) for site in sites for new in python_breaks.variants(site)]
    assert changes == ["never", "x > 2  ->  x >= 2", "2  ->  3", "2  ->  1"]


def test_a_c_file_is_broken_where_it_computes() -> None:
    source = (
        '#include <a.h>  // 1 < 2\n/* 3 + 4 */\nint f(int *x) {\n    puts("5 < 6");\n    return *x < 7 && x[0];\n}\n'
    )
    found = [(line, change) for line, change, _ in c_breaks.breaks(source)]
    assert found == [
        (5, "return *x <= 7 && x[0];"),
        (5, "return *x < 7 || x[0];"),
        (5, "return *x < 8 && x[0];"),
        (5, "return *x < 6 && x[0];"),
        (5, "return *x < 7 && x[1];"),
    ]
    assert all(made.count("\n") == source.count("\n") for _, _, made in c_breaks.breaks(source))
