"""What share of a model's parameters is in how many bits, what stayed in float, and why: a line after `prepare` and `load`.

    92.1 % of 134 M parameters in 4 bits; float: embedding 7.2 % (no rule gives it a grid), norms and biases 0.7 %

A model whose experts or projections stay in float looks prepared, trains, and saves no memory. So the line is a warning
where less than `ENOUGH` of the parameters is quantized.
"""

import logging
from dataclasses import dataclass
from typing import Any

from torch import nn

from trimtab.layers.linear import QuantLinear
from trimtab.models.opening import owners_of_experts
from trimtab.models.prepared import quant_layers
from trimtab.models.replaceable import ELSEWHERE, ROUTER, is_router, layers_of, outside_of

ENOUGH = 0.9
"""Share of the parameters that is quantized below which the line is a warning."""

_log = logging.getLogger("trimtab")
_warned = set[str]()


@dataclass(frozen=True)
class Part:
    """Parameters that stayed in float for one reason."""

    what: str
    parameters: int
    why: str
    """Empty where it goes without saying."""


@dataclass(frozen=True)
class Shares:
    """Parameters of the model itself, those of adapters left out; what is tied counts once."""

    bits: dict[int, int]
    """Parameters by the bits of their codes."""
    floats: tuple[Part, ...]
    """The rest, largest first."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.bits.values()) + sum(part.parameters for part in self.floats)

    @property
    def low_bit(self) -> float:
        """The share that is quantized."""
        return sum(self.bits.values()) / max(self.total, 1)

    def line(self) -> str:
        """All of it in one line."""
        first, *more = sorted(self.bits.items(), key=lambda item: -item[1]) or [(0, 0)]
        size = f"{self.total / 1e6:.0f} M" if self.total >= 1e7 else f"{self.total:,}"
        said = f"{self._percent(first[1])} of {size} parameters in {f'{first[0]} bits' if first[0] else 'few bits'}"
        said += "".join(f", {self._percent(count)} in {bits}" for bits, count in more)
        parts = [f"{p.what} {self._percent(p.parameters)}{f' ({p.why})' if p.why else ''}" for p in self.floats]
        return said + (f"; float: {', '.join(parts)}" if parts else "")

    def _percent(self, count: int) -> str:
        return f"{100 * count / max(self.total, 1):.1f} %"


def shares(model: Any) -> Shares:
    """What is in how many bits in a model of transformers, prepared or not, loaded or on the meta device."""
    bits: dict[int, int] = {}
    floats: dict[tuple[str, str], int] = {}
    ours = quant_layers(model)
    seen = {id(p) for layer in ours.values() for p in layer.parameters()}
    for layer in ours.values():
        if isinstance(layer, QuantLinear) and layer.tied:
            continue
        count, grid = layer.base.shape[0] * layer.base.shape[1], layer.base.grid
        if grid is not None:
            bits[grid.bits] = bits.get(grid.bits, 0) + count
        else:
            key = ("layers", "under their adapters")
            floats[key] = floats.get(key, 0) + count
    reasons = _reasons(model)
    for name, p in model.named_parameters():
        if id(p) not in seen:
            seen.add(id(p))
            key = reasons(name.rpartition(".")[0], p)
            floats[key] = floats.get(key, 0) + p.numel()
    for layer in ours.values():
        if isinstance(layer, QuantLinear) and layer.bias is not None:
            floats[_SMALL] = floats.get(_SMALL, 0) + layer.bias.numel()
    parts = sorted((Part(what, count, why) for (what, why), count in floats.items()), key=lambda p: -p.parameters)
    return Shares(bits, tuple(parts))


_SMALL = ("norms and biases", "")


def _reasons(model: Any) -> Any:
    """A function from a parameter and the name of its module to what it is and why it is in float."""
    offered, left = layers_of(model)
    modules = dict(model.named_modules())
    outside, open_or_not = outside_of(model), owners_of_experts(model)

    def reason(owner: str, p: nn.Parameter) -> tuple[str, str]:
        if f"{owner}.".startswith(outside):
            return "other towers", ELSEWHERE
        if owner in left:
            return "layers", left[owner]
        if owner in offered:
            kind = offered[owner][0]
            what = {"linear": "layers", "tied": "embedding"}.get(kind, kind)
            return what, "no rule gives it a grid" if what != "layers" else "no rule gives them a grid"
        if p.dim() < 2:
            return _SMALL
        if owner in open_or_not:
            return "experts", "no rule gives them a grid"
        if "experts" in owner.split("."):
            return "experts", "fused into one tensor"
        if is_router(owner, modules):
            return "layers", ROUTER
        return "others", "no linear layers"

    return reason


def tell(model: Any) -> None:
    """Say it by the logger `trimtab`: below `ENOUGH` as a warning, once for each line."""
    found = shares(model)
    line = found.line()
    few = found.low_bit < ENOUGH and line not in _warned
    _log.log(logging.WARNING if few else logging.INFO, "%s", line)
    if few:
        _warned.add(line)
