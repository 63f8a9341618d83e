"""Rules: which layer gets which grid.

    - {match: "model.embed_tokens", grid: {bits: 8, group: 32}}
    - {match: "model.layers.[01].*", grid: {bits: 8, group: 32}}      first match wins
    - {match: "*.down_proj", grid: null}                              stays an ordinary float layer, untouched
    - {match: "*.v_proj", grid: {kquant: q6_k}}                       a k-quant of GGUF
    - {match: "*", grid: {bits: 4, group: 64}}

Patterns are shell globs over module names. They stand for the projections of the language model; the embedding and the
head are touched only by a pattern that names them (whose last component is more than `*`), and a tied head follows its
embedding. `grid: float` keeps a layer's weight in float but lets the method train an adapter on it; `grid: same` keeps
the grid that a layer has in the file, and leaves alone what is float there. A pattern that matches
nothing is an error, and so is one that gives a grid to nothing but layers that stay in float (routers, vision towers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, Literal

from trimtab.errors import UserError, nearest
from trimtab.quant.grid import AnyGrid, CodebookGrid, Grid, k_quant

Placement = AnyGrid | Literal["float", "same"] | None
"""A grid, "float" (a float weight with an adapter), "same" (what the layer has), or None (an untouched layer)."""
Kind = Literal["linear", "head", "tied", "embedding"]
"""What a layer is: the output head apart from other linear layers, and apart from that a head tied to its embedding."""


@dataclass(frozen=True)
class Rule:
    """A pattern over module names and what it gives them."""

    match: str
    """Shell glob over module names."""
    grid: Placement
    """Grid of the layers it matches first."""
    rank: int | None = None
    """Rank of their adapters; null is the method's."""

    def names(self, module: str) -> bool:
        """Whether the pattern means this very kind of module: it matches, and its last component is not just `*`."""
        return fnmatchcase(module, self.match) and bool(self.match.rpartition(".")[2].strip("*"))


def parse_grid(value: Any, where: str) -> Placement:
    """A grid from a recipe's mapping, `null`, `float` or `same`; a `UserError` naming `where` otherwise."""
    if value is None or value in ("float", "same") or isinstance(value, Grid | CodebookGrid):
        return value
    if not isinstance(value, Mapping):
        raise UserError(f"{where}: {value!r} is not a grid; write {{bits: 4, group: 64}}, float, same or null")
    if "kquant" in value:
        return _k_quant(value, where)
    kind = CodebookGrid if "codebook" in value else Grid
    known = [f.name for f in fields(kind)]
    for key in value:
        if key not in known:
            raise UserError(f"{where}.{key}: unknown key{nearest(str(key), known)}; a grid has {', '.join(known)}")
    options = {key: None if key == "group" and v == "channel" else v for key, v in value.items()}
    for key, v in options.items():
        if key in ("bits", "group") and v is not None and (not isinstance(v, int) or isinstance(v, bool)):
            raise UserError(f"{where}.{key}: {v!r} is not a whole number")
        if key == "double_quant" and not isinstance(v, bool):
            raise UserError(f"{where}.{key}: {v!r} is neither true nor false")
    try:
        made: AnyGrid = kind(**options)  # type: ignore[arg-type]
        return made
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _k_quant(value: Mapping[Any, Any], where: str) -> Grid:
    other = [str(key) for key in value if key not in ("kquant", "range")]
    if other:
        raise UserError(f"{where}.{other[0]}: a k-quant has its own; write {{kquant: {value['kquant']}}}")
    try:
        return k_quant(value["kquant"], value.get("range", "minmax"))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def parse_rules(values: Sequence[Any] | None, where: str = "rules") -> list[Rule] | None:
    """Rules from a recipe's list of mappings; None stands for the method's default."""
    if values is None:
        return None
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise UserError(f"{where}: {values!r} is not a list; write `- {{match: '*', grid: {{bits: 4, group: 64}}}}`")
    rules = []
    for i, value in enumerate(values):
        place = f"{where}[{i}]"
        if isinstance(value, Rule):
            rules.append(value)
            continue
        if not isinstance(value, Mapping) or set(value) - {"rank"} != {"match", "grid"}:
            found = ", ".join(map(str, value)) if isinstance(value, Mapping) else repr(value)
            raise UserError(f"{place}: a rule has exactly the keys match and grid, not {found} (and may have a rank)")
        if not isinstance(value["match"], str):
            raise UserError(f"{place}.match: {value['match']!r} is not a pattern")
        rank = value.get("rank")
        if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
            raise UserError(f"{place}.rank: {rank!r} is not a positive whole number")
        rules.append(Rule(value["match"], parse_grid(value["grid"], f"{place}.grid"), rank))
    return rules


def resolve(
    layers: Mapping[str, Kind], rules: Sequence[Rule] | None, default: Placement, left: Mapping[str, str] | None = None
) -> dict[str, Placement]:
    """The placement of every layer.

    Args:
        layers: module name to kind, in the model's order.
        rules: first match wins; None gives `default` to every linear layer but the head.
        default: the method's own grid.
        left: layers that stay in float whatever the rules say, and why.

    Raises:
        UserError: for a rule that matches nothing or only layers that stay in float, or that gives a tied head a grid of
            its own.
    """
    if rules is None:
        return {name: default if kind == "linear" else None for name, kind in layers.items()}
    used, placed = set[int](), dict[str, Placement]()
    for name, kind in layers.items():
        i = _first(name, kind, rules)
        placed[name] = None if i is None else rules[i].grid
        if i is None:
            continue
        used.add(i)
        if kind == "tied" and rules[i].grid is not None:
            raise UserError(
                f"rules[{i}]: {name} is tied to the embedding and follows it; write `grid: null` or leave it out"
            )
    for i, rule in enumerate(rules):
        # A rule is only useless if nothing matches it at all: an earlier rule may well take what it matches.
        if i not in used and not any(fnmatchcase(name, rule.match) for name in layers):
            stays = next(
                (f"{name} ({why})" for name, why in (left or {}).items() if fnmatchcase(name, rule.match)), None
            )
            if stays is None:
                raise UserError(f"rules[{i}].match: {rule.match!r} matches no layer of the model{_hint(rule, layers)}")
            if rule.grid is not None:
                raise UserError(
                    f"rules[{i}].match: {rule.match!r} matches only layers that stay in float: {stays}; "
                    "leave the rule out, or write `grid: null`"
                )
    return placed


def _first(name: str, kind: Kind, rules: Sequence[Rule]) -> int | None:
    """The first rule for a layer. A head and an embedding belong to no catch-all pattern."""
    for i, rule in enumerate(rules):
        if fnmatchcase(name, rule.match) if kind == "linear" else rule.names(name):
            return i
    return None


def ranks(layers: Mapping[str, Kind], rules: Sequence[Rule] | None) -> dict[str, int]:
    """The rank of every layer whose rule names one."""
    found = {}
    for name, kind in layers.items():
        i = _first(name, kind, rules or ())
        rank = None if i is None or rules is None else rules[i].rank
        if rank is not None:
            found[name] = rank
    return found


def _hint(rule: Rule, layers: Mapping[str, Kind]) -> str:
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in layers))
    return nearest(rule.match.strip("*."), [*layers, *ends]) or f"; its layers are called {', '.join(ends)}"
