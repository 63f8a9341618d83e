"""The methods: one file each, found by name.

rtn  lora  qlora  loftq  qa-lora  q-bara  qa-hira  qa-blora  peqa  lr-qat  qat
"""

from dataclasses import fields
from typing import Any

from trimtab.errors import UserError, nearest
from trimtab.methods.base import Method
from trimtab.methods.loftq import Loftq
from trimtab.methods.lora import Lora
from trimtab.methods.lr_qat import LrQat
from trimtab.methods.peqa import Peqa
from trimtab.methods.q_bara import QBara
from trimtab.methods.qa_blora import QaBlora
from trimtab.methods.qa_hira import QaHira
from trimtab.methods.qa_lora import QaLora
from trimtab.methods.qat import Qat
from trimtab.methods.qlora import Qlora
from trimtab.methods.rtn import Rtn

ALL: tuple[type[Method], ...] = (Rtn, Lora, Qlora, Loftq, QaLora, QBara, QaHira, QaBlora, Peqa, LrQat, Qat)
"""Every method, in the order of the tables."""

_BY_NAME = {name: method for method in ALL for name in (method.name, *method.aliases)}


def get(name: str) -> type[Method]:
    """The method of this name or alias; a `UserError` with the nearest name if there is none."""
    if name not in _BY_NAME:
        raise UserError(f"method.name: no method {name!r}{nearest(name, list(_BY_NAME))}; see `trimtab methods`")
    return _BY_NAME[name]


def make(name: str, **options: Any) -> Method:
    """A method by name with its options, each named as in a recipe.

    Raises:
        UserError: for an unknown name or option.
    """
    method = get(name)
    known = [f.name for f in fields(method)]
    for option in options:
        if option not in known:
            hint = nearest(option, known)
            raise UserError(f"method.{option}: {method.name} has no such option{hint}; it has {', '.join(known)}")
    return method(**options)


def table() -> list[tuple[str, str, str, str]]:
    """For people: names, default grid, summary and options of every method."""
    rows = []
    for method in ALL:
        options = ", ".join(f"{f.name}={f.default}" for f in fields(method))
        grid = "float" if method.grid is None else method.grid.describe()
        rows.append((", ".join((method.name, *method.aliases)), grid, method.summary, options))
    return rows


__all__ = [
    "ALL", "Loftq", "Lora", "LrQat", "Method", "Peqa", "QBara", "QaBlora", "QaHira", "QaLora", "Qat", "Qlora", "Rtn",
    "get", "make", "table",
]  # fmt: skip
