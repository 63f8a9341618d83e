r"""A row's own keys to those of a form: `columns: {prompt: sentence, completion: label}`, or a text made of several.

    {prompt: sentence}                           the key `sentence` is what a form calls `prompt`
    {prompt: "Review: {sentence}\nMood:"}        a text with the values of keys in it

What is not a string there (a class, a number) is written out, so that a class can be an answer; what `label` names is not:
it says whether an answer is good.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

from trimtab.data.forms import KEYS
from trimtab.errors import UserError, nearest

_NAMED = re.compile(r"\{([^{}]+)\}")


def check_columns(columns: Mapping[str, str], key: str = "data.columns") -> None:
    """Raise a `UserError` for a key that no form reads."""
    for name in columns:
        if name not in KEYS:
            raise UserError(
                f"{key}: {name!r} is not a key of a row{nearest(name, list(KEYS))}; known are {', '.join(KEYS)}"
            )


def renamed(
    row: Mapping[str, Any], columns: Mapping[str, str], where: str, ignore: Iterable[str] = ()
) -> dict[str, Any]:
    """The row by the names of a form.

    Args:
        row: by its own keys.
        columns: of each key of a form the row's key, or a text with `{key}` in it.
        where: the words that say where the row stands.
        ignore: keys that belong to nothing.

    Raises:
        UserError: for a key that the row does not have, or would have twice.
    """
    found: dict[str, Any] = {}
    read: set[str] = set()
    for name, source in columns.items():
        names = _NAMED.findall(source) if source not in row else [source]
        for one in names or [source]:
            if one not in row:
                hint = nearest(one, list(row))
                raise UserError(f"{where}: has no {one!r}, which data.columns takes for {name!r}{hint}")
            read.add(one)
        if source in row:
            found[name] = row[source] if name == "label" else _written(row[source])
        else:
            found[name] = _NAMED.sub(lambda match: str(_written(row[match[1]])), source)
    ignored = set(ignore)
    for key, value in row.items():
        if key in read:
            continue
        if key in found and key not in ignored:
            raise UserError(
                f"{where}: data.columns makes {columns[key]!r} its {key!r}, but the row has a {key!r} of its own; name "
                "that in data.ignore"
            )
        found.setdefault(key, value)
    return found


def _written(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, int | float) else value
