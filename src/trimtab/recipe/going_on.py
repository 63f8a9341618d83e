"""Whether a run may continue from a checkpoint: the recipe that wrote it and the recipe now, key by key.

Compared are the plain values of both, as they are saved, so nothing in a recipe is left out; what may differ is marked on
the fields (`changing`), and everything else is refused by its key and both values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import yaml
from pydantic import BaseModel

from trimtab.errors import UserError
from trimtab.recipe import inputs
from trimtab.recipe.changing import Change
from trimtab.recipe.recipe import Recipe

_NAMED = 3
"""Differences that a message shows; more are counted."""
_UNSET = object()


@dataclass(frozen=True)
class Difference:
    """A key with another value than it had."""

    key: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key} is {_shown(self.now)}, and was {_shown(self.before)}"


def check(before: Recipe, now: Recipe, checkpoint: str) -> None:
    """Refuse to continue from what another recipe, or the same one on other files, has trained.

    Args:
        before: of the checkpoint; with hashes of what it reads, as it was saved.
        now: the same of what is to continue.
        checkpoint: its name.

    Raises:
        UserError: naming each key that differs and may not, with both values; or the key whose files changed.
    """
    inputs.check_same_data(before, now, "--resume")
    found = [d for d in differences(before, now) if not _may(d, before, now)]
    if found:
        _check_stream(found, before, now, checkpoint)
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"--resume: {checkpoint} was trained by another recipe: {'; '.join(map(str, found[:_NAMED]))}{more}; set "
            f"{'it' if len(found) == 1 else 'them'} back, or start over (--overwrite)"
        )
    same = {k: v for k, v in (now.inputs or {}).items() if changeable(k) is None or changeable(k).content}  # type: ignore[union-attr]
    inputs.check_same(before.inputs or {}, same, "--resume")


def _check_stream(found: list[Difference], before: Recipe, now: Recipe, checkpoint: str) -> None:
    """Say of a stream's number of rows, which nobody has set, what it follows from."""
    taken = [d for d in found if d.key == "data.limit"]
    steps, wanted = before.train.steps, now.train.steps
    if before.data is None or not before.data.streaming or len(taken) != len(found) or steps == wanted:
        return
    was, is_ = taken[0].before, taken[0].now
    again = f"set data.limit={was} to see those again, " if wanted > steps else ""
    raise UserError(
        f"--resume: train.steps: {checkpoint} was trained on {was} rows, as many as {steps} steps take of the stream, and "
        f"{wanted} steps take {is_}, in another order; {again}set train.steps={steps}, or start over (--overwrite)"
    )


def differences(before: Recipe, now: Recipe) -> list[Difference]:
    """Keys whose values differ, each as deep as both have it; the hashes of files are no key."""
    one, other = (yaml.safe_load(recipe.model_copy(update={"inputs": None}).to_yaml()) for recipe in (before, now))
    return list(_differing(one, other, ""))


def _differing(one: Any, other: Any, key: str) -> Iterator[Difference]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for name in (*one, *(name for name in other if name not in one)):
            yield from _differing(one.get(name, _UNSET), other.get(name, _UNSET), f"{key}.{name}".lstrip("."))
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other) and _of_mappings(one, other):
        for i, (mine, theirs) in enumerate(zip(one, other, strict=True)):
            yield from _differing(mine, theirs, f"{key}.{i}")
    elif one != other or (type(one) is not type(other) and bool in (type(one), type(other))):
        yield Difference(key, one, other)


def _of_mappings(*lists: list[Any]) -> bool:
    return all(isinstance(entry, Mapping) for values in lists for entry in values)


def _may(difference: Difference, before: Recipe, now: Recipe) -> bool:
    change = changeable(difference.key)
    if change is None or not change.content:
        return change is not None
    named = difference.key.removesuffix(".path") if difference.key.startswith("data.path.") else difference.key
    was, is_ = ((recipe.inputs or {}).get(named) for recipe in (before, now))
    return was is not None and was == is_


def changeable(key: str) -> Change | None:
    """What the field of a dotted key says of itself; None where it may not change. Entries of lists count from 0."""
    block: Any = Recipe
    change: Change | None = None
    for part in key.split("."):
        if part.isdigit() and change is not None and not change.content:
            continue  # an entry of a list that may change as a whole
        if not part.isdigit():
            field = None if block is None else block.model_fields.get(part)
            if field is None:
                return None
            change = next((mark for mark in field.metadata if isinstance(mark, Change)), None)
            block = _block(field.annotation)
        elif block is None:
            return None
        else:
            change = None  # of an entry that has keys of its own
    return change


def _block(annotation: Any) -> type[BaseModel] | None:
    """The block that a field holds, alone or in a list or beside other types."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for option in get_args(annotation) if (found := _block(option)) is not None), None)


def _shown(value: Any) -> str:
    if value is _UNSET:
        return "not set"
    return "null" if value is None else f"{value!r}"
