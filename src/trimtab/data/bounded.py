"""Chat templates with a bound on time and size: a template is a program that comes with the model, and runs for every row.

jinja2's sandbox keeps a template from what is not its own (transformers renders in it), but lets it loop for hours and fill
the memory with one expression. `bounded` is a block in which transformers compiles templates with these bounds, by what
jinja2 offers for that:

    every step of a loop, call and filter    looks at the clock: `SECONDS` for one rendering
    every text, list, number that is made    is at most `TEXT` characters, `VALUES` values or `DIGITS` long, and is measured
                                             before it is made: `'x' * 10**10` is never computed
    all that is made together                at most `WHOLE`

Loops, literals and `~` cannot be looked into, so they pass through a filter whose name no template can write. What a
template fails with, these bounds among it, leaves the block as `Unrendered`, in one line.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, lru_cache, partial, wraps
from typing import TYPE_CHECKING, Any

from trimtab.reading import FAILS, MOST_OF_A_TEMPLATE, words_of

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes

SECONDS = 10.0
TEXT, VALUES, DIGITS = 2**26, 2**20, 4000
WHOLE = 2**29
"""Characters and values."""
_EACH, _MADE, _JOINED = "each of", "made of", "joined of"
_WIDE = re.compile(r"\d{5}")
_PRINTED = ("tojson", "pprint", "indent")
_MOST_INDENT = 64
_SLOW = ("wordwrap", "urlize", "striptags", "title", "xmlattr", "truncate", "filesizeformat")
"""Filters that search a text, and no chat template has use for."""


class Unrendered(Exception):
    """A template has failed, or was ended."""


class Budget:
    """What is left to one rendering."""

    def __init__(self) -> None:
        self.end, self.left = time.monotonic() + SECONDS, WHOLE

    def step(self) -> None:
        """Look at the clock."""
        if time.monotonic() > self.end:
            raise _refused(f"takes longer than {SECONDS:g} seconds")

    def take(self, size: int, most: int) -> None:
        """Let something of this size be made."""
        self.left -= size
        if size > most or self.left < 0:
            raise _refused("makes texts or lists that are too large")

    def admit(self, value: Any) -> Any:
        """Let a value be, after a look at its size."""
        if isinstance(value, str | bytes):
            self.take(len(value), TEXT)
        elif isinstance(value, int):
            self.take(value.bit_length() // 3, DIGITS)
        elif isinstance(value, list | tuple | set | dict):
            self.take(_values_in(value), VALUES)
        return value


_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)


def _now() -> Budget:
    return _budget.get() or Budget()


def _refused(why: str) -> Exception:
    from jinja2.exceptions import SecurityError

    return SecurityError(f"it {why}")


def _values_in(value: Any) -> int:
    """Values in a value, each as often as it would be printed; counted no further than needed."""
    count, level = 0, [value]
    while level and count <= VALUES:
        outer = level.pop()
        count += 1 + (len(outer) // 256 if isinstance(outer, str) else 0)
        if isinstance(outer, dict):
            level += outer.values()
        elif isinstance(outer, list | tuple | set):
            level += outer
    return count


# ---- what templates do ----------------------------------------------------------------------------------------------


def _operator(plain: Callable[..., Any], context: Any, operator: str, left: Any, right: Any) -> Any:
    """`+`, `*`, `**` and `%`, looked at before they are computed."""
    now = _now()
    now.step()
    if isinstance(left, int) and isinstance(right, int):
        bits, power = left.bit_length(), operator == "**"
        now.take((bits * max(0, right) if power else bits + right.bit_length()) // 3, DIGITS)
    elif operator == "*":
        many, times = (left, right) if isinstance(right, int) else (right, left)
        if isinstance(many, str | bytes) and isinstance(times, int):
            now.take(len(many) * times, TEXT)
        elif isinstance(many, list | tuple) and isinstance(times, int):
            now.take(_values_in(many) * times, VALUES)
    elif operator == "%" and isinstance(left, str):
        _check_width(left, right)
    elif operator == "+" and isinstance(left, str) and isinstance(right, str):
        now.take(len(left) + len(right), TEXT)
    return now.admit(plain(context, operator, left, right))


def _check_width(text: str, values: Any) -> None:
    """A format may ask for any width, in itself or by a value."""
    _now().admit(values)
    several = values if isinstance(values, tuple) else (values,)
    if _WIDE.search(text) or ("*" in text and any(isinstance(v, int) and abs(v) > 9999 for v in several)):
        raise _refused("formats text that is too wide")


def _call(plain: Callable[..., Any], context: Any, called: Any, *args: Any, **kwargs: Any) -> Any:
    """A function, a method of a text, a macro or a loop that calls itself."""
    from jinja2.runtime import LoopContext

    now, name = _now(), getattr(called, "__name__", "")
    own = getattr(getattr(called, "__wrapped__", called), "__self__", None)  # the sandbox wraps a text's `format`
    now.step()
    now.admit([*args, *kwargs.values()])
    if isinstance(own, str):
        _before(name, own, args, kwargs)
    elif name == "strftime_now":
        _check_width(" ".join(map(str, args)), ())
    if isinstance(called, LoopContext) and args:
        args = (_each(args[0], MOST_OF_A_TEMPLATE), *args[1:])
    found = plain(context, called, *args, **kwargs)
    return now.admit(found)


def _before(name: str, own: Any, args: Iterable[Any], kwargs: Mapping[str, Any]) -> None:
    """Look at what a filter, or a method of a text, works on: at most its size times the largest argument comes out."""
    given = [*args, *kwargs.values()]
    numbers = [abs(a) for a in given if isinstance(a, int)]
    texts = [len(a) for a in given if isinstance(a, str)]
    texts += [len(text) for a in given if isinstance(a, dict) for text in a.values() if isinstance(text, str)]
    size = len(own) if isinstance(own, str | bytes | list | tuple | dict | range) else 1
    if (size + 1) * max([1, *numbers, *texts]) > 4 * TEXT or (name in _PRINTED and max([0, *numbers]) > _MOST_INDENT):
        raise _refused(f"makes too much of {name}")
    if isinstance(own, str) and name in ("format", "format_map"):
        _check_width(own, tuple(given))
        if "{" in own and any(isinstance(a, int | str) and _WIDE.search(str(a)) for a in given):
            raise _refused("formats text that may be too wide")  # `{:{}}` takes its width from a value
    if name in _SLOW and size > 10_000:
        raise _refused(f"makes {name} of a text that is too long")
    if name == "round" and max([0, *numbers]) > DIGITS:
        raise _refused("rounds to too many digits")


def _filtered(name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that is looked at before and behind."""
    skipped = int(hasattr(plain, "jinja_pass_arg"))  # the context, or what else it is given first

    @wraps(plain)
    def looked_at(*args: Any, **kwargs: Any) -> Any:
        now = _now()
        now.step()
        for value in args[skipped:]:
            now.admit(value)
        _before(name, args[skipped] if len(args) > skipped else None, args[skipped + 1 :], kwargs)
        return now.admit(plain(*args, **kwargs))

    return looked_at


def _each(values: Iterable[Any], text: int) -> Iterator[Any]:
    """What a loop goes through, a step each; `text` is what its body writes as it stands."""
    now = _now()
    for value in values:
        now.step()
        now.take(text, TEXT)
        yield value


def _joined(parts: list[Any]) -> str:
    """What `~` makes."""
    now = _now()
    texts = [str(now.admit(part)) for part in parts]
    now.take(sum(map(len, texts)), TEXT)
    return "".join(texts)


def _written(value: Any) -> Any:
    """What is put out."""
    return _now().admit(value)


# ---- compiling ------------------------------------------------------------------------------------------------------


def _watched(tree: nodes.Template, env: Environment) -> nodes.Template:
    """A template's tree, in which loops, literals and `~` go through our filters."""
    from jinja2 import nodes

    def through(name: str, value: Any, *args: nodes.Expr) -> nodes.Filter:
        return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)

    def rebuilt(node: nodes.Node) -> nodes.Node:
        for field, value in node.iter_fields():
            if isinstance(value, list):
                setattr(node, field, [rebuilt(item) if isinstance(item, nodes.Node) else item for item in value])
            elif isinstance(value, nodes.Node):
                setattr(node, field, rebuilt(value))
        if isinstance(node, nodes.For):
            text = sum(len(data.data) for data in node.find_all(nodes.TemplateData))
            node.iter = through(_EACH, node.iter, nodes.Const(text, lineno=node.lineno))
        elif isinstance(node, nodes.Concat):
            return through(_JOINED, nodes.List(node.nodes, lineno=node.lineno))
        elif isinstance(node, nodes.List | nodes.Dict) or (isinstance(node, nodes.Tuple) and node.ctx == "load"):
            return through(_MADE, node)
        return node

    rebuilt(tree)
    return tree.set_environment(env)  # type: ignore[return-value]


@lru_cache
def _compiled(text: str) -> Template:
    """In transformers' own environment, with its filters, functions and tags."""
    from jinja2 import Template

    if len(text) > MOST_OF_A_TEMPLATE:
        raise _refused(f"has {len(text):,} characters, where at most {MOST_OF_A_TEMPLATE:,} are read")
    env: Environment = _theirs()("").environment
    env.intercepted_binops = frozenset({"+", "*", "**", "%"})  # type: ignore[attr-defined]
    for name, ours in (("call_binop", _operator), ("call", _call)):
        setattr(env, name, partial(ours, getattr(env, name)))
    env.finalize = _written
    env.globals.pop("lipsum", None)
    env.filters |= {name: _filtered(name, plain) for name, plain in env.filters.items()}
    env.filters |= {_EACH: _each, _MADE: _written, _JOINED: _joined}
    tree = env.parse(text)
    code = env.compile(_watched(tree, env))
    return Template.from_code(env, code, env.make_globals(None))


@cache
def _theirs() -> Callable[[str], Template]:
    """transformers' function, past its cache: what it makes is changed."""
    from transformers.utils import chat_template_utils

    found: Any = chat_template_utils._compile_jinja_template
    made: Callable[[str], Template] = getattr(found, "__wrapped__", found)
    return made


@contextmanager
def bounded() -> Iterator[None]:
    """A block in which chat templates are rendered with bounds, one rendering at a time.

    Raises:
        Unrendered: with one line, for whatever a template fails with.
    """
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    _theirs()  # before it is replaced
    before, token = chat_template_utils._compile_jinja_template, _budget.set(Budget())
    chat_template_utils._compile_jinja_template = _compiled
    try:
        yield
    except (TemplateError, MemoryError, *FAILS) as error:
        words = " ".join(str(error).split())[:200] if isinstance(error, TemplateError) else words_of(error)
        raise Unrendered(words or type(error).__name__) from error
    finally:
        chat_template_utils._compile_jinja_template = before
        _budget.reset(token)
