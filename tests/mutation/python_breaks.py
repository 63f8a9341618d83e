"""Every small way to break a Python file: one node of its syntax tree changed at a time.

What is only said is left alone: docstrings, annotations, messages, what is raised (but whether it is), assertions.
"""

import ast
import copy
from collections.abc import Iterator
from dataclasses import dataclass

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd,
}  # fmt: skip
_PAIRS = (
    "floor ceil", "amin amax", "min max", "minimum maximum", "argmin argmax", "sum mean", "any all", "zeros ones",
    "zeros_like ones_like", "add_ sub_", "mul_ div_", "logical_or_ logical_and_", "logical_or logical_and",
)  # fmt: skip
_OTHER_NAME = {a: b for pair in _PAIRS for a, b in (pair.split(), reversed(pair.split()))} | {"round": "floor"}
_OTHER_DTYPE = {"float32": "bfloat16", "bfloat16": "float32", "float16": "bfloat16", "float64": "float32"}
_DROPPED_METHODS = {"detach", "clone", "round", "round_", "abs", "float", "t", "flatten", "contiguous"}
_DROPPED_FUNCTIONS = {"stored", "ste_round", "round_clamp", "abs", "float"}
_BOUNDED = {"clamp", "clamp_"}
_SYMMETRIC = {"min", "max", "minimum", "maximum", "promote_types", "isinstance", "zip", "equal", "getattr", "hasattr"}
_SAID = {"warn", "UserError", "nearest", "info", "debug", "warning", "cast", "field"}
_DROPPED_CONTEXTS = {"no_grad", "enable_grad", "inference_mode", "autocast"}
_UNTESTED_WORDS = {"extra_repr", "__repr__"}


@dataclass(frozen=True)
class Site:
    """A node that can be broken, and where it stands."""

    node: ast.AST
    scope: str
    """Qualified name of the function or class around it; empty at the top of a file."""
    span: tuple[int, int]
    """Lines that run when it does."""
    at_import: bool
    """Whether it runs when the file is imported: a constant, a default, the body of a class."""


def _name(node: ast.AST) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _span(node: ast.stmt) -> tuple[int, int]:
    """Lines of a statement; of a compound one, those of its head."""
    for head in ("test", "iter", "items"):
        part = getattr(node, head, None)
        if part is not None and hasattr(node, "body"):
            last = part[-1].context_expr if isinstance(part, list) else part
            return node.lineno, last.end_lineno
    return node.lineno, node.end_lineno or node.lineno


def _silent(node: ast.AST) -> bool:
    """Whether a node computes nothing: what is said, typed, imported or asserted."""
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
        return True
    said = node.value if isinstance(node, ast.Expr) else node
    if isinstance(node, ast.Expr) and isinstance(said, ast.Constant):
        return True
    if isinstance(said, ast.Call) and _name(said.func) in _SAID:
        return True
    if isinstance(node, ast.FunctionDef) and node.name in _UNTESTED_WORDS:
        return True
    if isinstance(node, ast.keyword) and node.arg == "strict":  # of `zip`: an assertion
        return True
    return isinstance(node, ast.Subscript) and _name(node.value) in ("Literal", "ClassVar")


def sites(tree: ast.Module) -> list[Site]:
    """All nodes that may be broken, in an order that depends on the source alone."""
    found: list[Site] = []

    def visit(node: ast.AST, scope: str, span: tuple[int, int], inside: bool) -> None:
        if _silent(node):
            return
        if isinstance(node, ast.stmt):
            span = _span(node)
        found.append(Site(node, scope, span, not inside))
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            scope = f"{scope}.{node.name}".removeprefix(".")
            for part in node.decorator_list:
                visit(part, scope, (node.lineno, node.end_lineno or 0), inside)
            if isinstance(node, ast.FunctionDef):
                for default in (*node.args.defaults, *node.args.kw_defaults):
                    if default is not None:
                        visit(default, scope, (node.lineno, node.end_lineno or 0), inside)
            for part in node.body:
                visit(part, scope, span, inside or isinstance(node, ast.FunctionDef))
            return
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "type_comment"):
                continue
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, ast.AST):
                    visit(part, scope, span, inside)

    for statement in tree.body:
        visit(statement, "", (0, 0), False)
    return found


def _with(node: ast.AST, **fields: object) -> ast.AST:
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def _renamed(node: ast.Attribute | ast.Name, name: str) -> ast.AST:
    return _with(node, **{"attr" if isinstance(node, ast.Attribute) else "id": name})


def _of_call(node: ast.Call) -> Iterator[ast.AST]:
    name, args = _name(node.func), node.args
    if name in _OTHER_NAME and not (name == "round" and isinstance(node.func, ast.Name)):
        yield _with(node, func=_renamed(node.func, _OTHER_NAME[name]))
    if isinstance(node.func, ast.Attribute) and name in _DROPPED_METHODS and not args:
        yield node.func.value
    if isinstance(node.func, ast.Name) and name in _DROPPED_FUNCTIONS and args:
        yield args[0]
    if name in _BOUNDED and len(args) >= 2:
        yield _with(node, args=[*args[:-2], ast.Constant(None), args[-1]])
        yield _with(node, args=args[:-1])
    plain = not any(isinstance(a, ast.Starred | ast.Constant) for a in args[:2])
    if len(args) >= 2 and plain and name not in _SYMMETRIC:
        yield _with(node, args=[args[1], args[0], *args[2:]])


def _of_constant(node: ast.Constant) -> Iterator[ast.AST]:
    value = node.value
    if isinstance(value, bool):
        yield ast.Constant(not value)
    elif isinstance(value, int):
        yield ast.Constant(value + 1)
        if value >= 1:
            yield ast.Constant(value - 1)
    elif isinstance(value, float):
        yield ast.Constant(value * 2 if value else 1.0)


def _of_statement(node: ast.stmt) -> Iterator[ast.AST]:
    if isinstance(node, ast.If):
        guard = isinstance(node.body[-1], ast.Raise)
        yield _with(node, test=ast.Constant(False) if guard else ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.AugAssign):
        yield ast.Pass()
        if type(node.op) in _SWAPPED:
            yield _with(node, op=_SWAPPED[type(node.op)]())
    elif (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)) or (
        isinstance(node, ast.Assign) and not any(isinstance(t, ast.Name | ast.Tuple) for t in node.targets)
    ):
        yield ast.Pass()
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Call) and node.value.args:
        first = node.value.args[0]
        if not isinstance(first, ast.Starred | ast.Constant | ast.GeneratorExp):
            yield _with(node, value=first)
    elif isinstance(node, ast.With):
        if any(
            isinstance(i.context_expr, ast.Call) and _name(i.context_expr.func) in _DROPPED_CONTEXTS for i in node.items
        ):
            yield ast.If(ast.Constant(True), node.body, [])
    elif isinstance(node, ast.Break | ast.Continue):
        yield ast.Pass()


def variants(site: Site) -> list[ast.AST]:
    """What may stand in the place of a node."""
    node = site.node
    if isinstance(node, ast.stmt):
        return list(_of_statement(node))
    if isinstance(node, ast.Call):
        return list(_of_call(node))
    if isinstance(node, ast.Constant):
        return list(_of_constant(node))
    if isinstance(node, ast.Compare):
        swapped = [[_SWAPPED[type(o)]() if i == j else o for j, o in enumerate(node.ops)] for i in range(len(node.ops))]
        return [_with(node, ops=ops) for ops in swapped]
    if isinstance(node, ast.BoolOp):
        return [_with(node, op=_SWAPPED[type(node.op)]())]
    if isinstance(node, ast.BinOp) and type(node.op) in _SWAPPED:
        text = any(
            isinstance(s, ast.JoinedStr) or isinstance(getattr(s, "value", 0), str) for s in (node.left, node.right)
        )
        types = site.at_import and isinstance(node.op, ast.BitOr)
        return [] if text or types else [_with(node, op=_SWAPPED[type(node.op)]())]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        return [node.operand]
    if isinstance(node, ast.IfExp):
        return [_with(node, test=ast.UnaryOp(ast.Not(), node.test))]
    if isinstance(node, ast.comprehension):
        return [_with(node, ifs=[ast.UnaryOp(ast.Not(), test) for test in node.ifs])] if node.ifs else []
    if isinstance(node, ast.Attribute) and node.attr in _OTHER_DTYPE and _name(node.value) == "torch":
        return [_renamed(node, _OTHER_DTYPE[node.attr])]
    return []


def words(site: Site, new: ast.AST) -> str:
    """The change, as people and the list of equivalents name it."""
    if isinstance(new, ast.Pass):
        return "deleted"
    if isinstance(site.node, ast.If):
        return "never" if isinstance(new.test, ast.Constant) else "negated"  # type: ignore[attr-defined]
    if isinstance(site.node, ast.With):
        return "without its context"
    if isinstance(site.node, ast.comprehension):
        return "filter negated"
    return f"{ast.unparse(site.node)}  ->  {ast.unparse(ast.fix_missing_locations(copy.deepcopy(new)))}"


class _Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return ast.copy_location(self.new, self.old) if node is self.old else self.generic_visit(node)


def broken(source: str, site: int, variant: int) -> ast.Module:
    """The tree of a source with one node changed."""
    tree = ast.parse(source)
    at = sites(tree)[site]
    return ast.fix_missing_locations(_Replace(at.node, variants(at)[variant]).visit(tree))
