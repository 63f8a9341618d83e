"""What every field of a recipe, grid and method means: `trimtab recipe --explain`, printed from their docstrings."""

import ast
import inspect
import json
import textwrap
from itertools import pairwise
from typing import Any

from trimtab import methods
from trimtab.methods.base import Method
from trimtab.quant.activations import Activations, KvCache
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe.fields import Block
from trimtab.recipe.recipe import Recipe

_DATACLASSES: dict[str, type] = {"activations": Activations, "kv": KvCache}
"""Blocks that are values of the library."""


def explanation() -> str:
    """Every field of a recipe, grid and method: its type, default and meaning, as commented YAML keys."""
    lines: list[str] = []
    for name, field in Recipe.model_fields.items():
        inner = _block(field.annotation)
        lines.append(f"{name}:" + ("" if inner else f" {_default(field)}"))
        told = [inner.__doc__ if inner else None, field.description]
        lines += [f"    # {text}" for text in told if text]
        for key, value in ({} if inner is None else inner.model_fields).items():
            lines += [f"  {key}: {_default(value)}", f"      # {value.description}"]
        lines += _documented(_DATACLASSES[name]) if name in _DATACLASSES else []
    lines += ["", "# a grid, in rules", *_documented(Grid), "", "# or a codebook grid", *_documented(CodebookGrid)]
    lines += ["", "# options of every method", *_documented(Method)]
    for method in methods.ALL:
        lines += ["", f"# and of {method.name}: {method.summary}", *_documented(method)]
    return "\n".join(lines) + "\n"


def _block(annotation: Any) -> type[Block] | None:
    """The block that a key holds, or may hold."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Block)), None)


def _default(field: Any) -> str:
    if field.is_required():
        return "(required)"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, Block):
        return "{}"
    return value if isinstance(value, str) else json.dumps(value)


def documented(cls: type) -> list[tuple[str, str, str]]:
    """Name, default (as written) and meaning of the fields that a dataclass itself declares.

    The meaning is the string that stands below a field in the source. A field without a default has an empty one.
    """
    tree = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = []
    for item, below in pairwise(tree.body):
        if not isinstance(item, ast.AnnAssign) or ast.unparse(item.annotation).startswith("ClassVar"):
            continue
        if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            default = "" if item.value is None else ast.unparse(item.value)
            found.append((ast.unparse(item.target), default, " ".join(str(below.value.value).split())))
    return found


def _documented(cls: type) -> list[str]:
    """Those fields as commented YAML keys."""
    return [
        line for name, default, said in documented(cls) for line in (f"  {name}: {default}".rstrip(), f"      # {said}")
    ]
