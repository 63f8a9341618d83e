"""YAML as it is read here: the values that JSON has, and no more of them than stand in the text.

An alias stands for all that its anchor holds, so nine lines of YAML can mean a thousand million values: what copies or
prints them does not come back. Aliases are counted as what they stand for, none may hold itself, and what is deeper than a
recipe ever is, or has an integer of thousands of digits, is not a recipe.
"""

from typing import Any, NamedTuple

import yaml

from trimtab.errors import UserError

MOST_BYTES = 4 * 2**20
_MOST_VALUES = 1_000_000
_DEEPEST = 64


class _Extent(NamedTuple):
    """Of a node with all that it stands for."""

    values: int
    levels: int


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which measures what it makes."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._extents: dict[int, _Extent] = {}
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """A node of the text; an alias is the node of its anchor."""
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, f"more than {_DEEPEST} levels in one another", mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if alias and id(node) not in self._extents:
            raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", mark)
        if not alias:
            below = [] if isinstance(node, yaml.ScalarNode) else node.value
            parts = [self._extents[id(p)] for pair in below for p in (pair if isinstance(pair, tuple) else (pair,))]
            whole = 1 + sum(part.values for part in parts), 1 + max((part.levels for part in parts), default=0)
            self._extents[id(node)] = _Extent(*whole)
        extent = self._extents[id(node)]
        if extent.values > _MOST_VALUES or self._depth + extent.levels > _DEEPEST:
            raise yaml.composer.ComposerError(None, None, "aliases that stand for too many values", mark)
        return node


def load(text: str | bytes, where: str) -> Any:
    """What a YAML text says.

    Raises:
        UserError: naming `where`, and the line that is wrong.
    """
    if len(text) > MOST_BYTES:
        raise UserError(f"{where}: has {len(text):,} bytes, where at most {MOST_BYTES:,} are read")
    try:
        return yaml.load(text, _Loader)  # a safe loader
    except (yaml.YAMLError, ValueError) as error:  # a number or a date that is none is a ValueError
        raise UserError(f"{where}: not valid YAML: {' '.join(str(error).split())}") from None
    except (TypeError, AttributeError) as error:  # how PyYAML fails on a value that its tag is not meant for
        raise UserError(f"{where}: not valid YAML: a value does not fit its tag ({error})") from None
