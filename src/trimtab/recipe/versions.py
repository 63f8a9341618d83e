"""The form of recipes has a version of its own, so that a file that was written once can be read by every later trimtab.

A recipe without `version` is of version 1. When a key is renamed or changes its meaning, `VERSION` grows by one and
`MIGRATIONS` by a function that turns the values of the version before into those of the new one; a key that is added needs
neither. RELEASING.md says how long a key is kept.
"""

from collections.abc import Callable, Mapping
from typing import Any

from trimtab.errors import UserError

VERSION = 1
"""The version that is written and that the fields of `recipe.fields` describe."""
MIGRATIONS: tuple[Callable[[dict[str, Any]], dict[str, Any]], ...] = ()
"""Entry n - 1 turns the values of version n into those of version n + 1."""


def migrated(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values of a recipe of any version, as this version writes them.

    Args:
        values: as YAML gives them.
        where: the file, for messages.

    Raises:
        UserError: for a version that this trimtab does not know.
    """
    found = values.get("version", 1)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{where}: version: {found!r} is not a version; leave it out, or write {VERSION}")
    if found > VERSION:
        raise UserError(
            f"{where}: version: this trimtab reads recipes up to version {VERSION}, not {found}; install a newer trimtab"
        )
    made = dict(values)
    for migrate in MIGRATIONS[found - 1 :]:
        made = migrate(made)
    return made | {"version": VERSION}
