"""How far what is trained moves in an optimizer step, and the parameter groups that say so to an optimizer of Adam's kind.

Adam moves every number by about its learning rate, however large its gradient is. A rate is therefore a length in the unit
of the number that it moves, and one number serves every width, rank and layer only as a share of what that layer calls far:

    step      u = s max(1, (2^b - 1) / 15)       one step of the grid; above 4 bits, one of 4 bits: finer codes need less
                                                 repair, and a weight that learns goes as far as at 4 bits
              NF4: absmax 2 / 15 on average; a weight in float: a third of its root mean square
    deltas    (alpha / r) B A, whose A starts at a spread of a = 1 / sqrt(3 C), C = K / p: when every entry of B moves by d
              against its gradient, those of B A move by d a sqrt(R (1 + 2/pi R / C)) (the second term is what R signs
              have in common). So B's rate is  share u / gain  divided by that, and A, of size a, has  10 share a
              Where both start fitted (LoftQ), times the share of the base's error that the start has left: what is
              there already need not be found, and moving it as far undoes it
    M         share u / gain
    master    share u
    s         share_s u 2 / (2^b - 1)            when s moves by ds, the ends of the range move by (2^b - 1) / 2 ds
    o         share_s u

with s the mean of the layer's (a rate for each group gave the same losses, see docs/log.md). Levels are in steps already,
so u is divided by s there. The shares of `default` come from a study, docs/rates.md.

Legend: R inner rank, K in features, p pool, C columns of A, s scale, o offset, b bits.
"""

from collections.abc import Iterator
from math import exp2, log2, pi, sqrt
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.layers.adapter import Adapter, Kind
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight, Weight
from trimtab.quant import codebook

Parametrization = Literal["relative", "paper"]


class Rates(NamedTuple):
    """Learning rates: shares where relative, Adam's own otherwise."""

    delta: float
    """Of deltas and master weights."""
    scale: float
    """Of scales and offsets."""


_AT_100 = {
    "output": Rates(0.005, 0.018),
    "offset": Rates(0.010, 0.018),
    "blocks": Rates(0.015, 0.018),
    "levels": Rates(0.005, 0.018),
    "scales": Rates(0.005, 0.022),
    "master": Rates(0.004, 0.018),
}
"""Shares for 100 steps, by `Kind`."""
_FEWEST = 30
"""Steps below which shares no longer grow: what so few steps have no warm-up for, leaps."""
_RUINED = 2
"""Bits, at most, of what rounding ruins: its levels have far to go however many steps there are, so shares do not fall."""
_A = 10.0
"""How much faster A moves than levels do, each in its own unit: A of LoRA starts random, and has to turn."""
_WIDTH = 15
"""Steps of 4 bits."""
_LEAST_LEFT = 0.05
"""Of a fitted start's error: one that leaves none can learn, too."""
_APART = 4
"""Lengths are rounded to powers of 2^(1/4), so that layers share groups: each costs an optimizer a pass of its own."""


def default(kind: Kind, steps: int, bits: int | None = None) -> Rates:
    """The shares of a run: they fall with the square root of its length, but not on grids of 2 bits.

    Args:
        kind: of the adapter.
        steps: optimizer steps.
        bits: of the grid; None for more than 2, or for float weights.
    """
    ruined = bits is not None and bits <= _RUINED
    factor = sqrt(100 / (_FEWEST if ruined else max(steps, _FEWEST)))
    return Rates(*(rate * factor for rate in _AT_100[kind]))


def param_groups(
    model: nn.Module,
    lr: float | None = None,
    lr_scale: float | None = None,
    *,
    steps: int = 100,
    parametrization: Parametrization = "relative",
    weight_decay: float = 0.0,
    scale_bits: int | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of everything that a prepared model trains, for Adam and its variants.

    Args:
        model: from `prepare` or `load`.
        lr: rate of deltas and master weights: the share of a step of the grid that a weight may move in an optimizer step;
            None is the default for `steps`. With `paper`, Adam's rate itself.
        lr_scale: rate of scales and offsets: the share of a step that they may move the ends of the range by, or Adam's.
        steps: optimizer steps to come, which decide the rates that are None.
        parametrization: `relative`, or `paper`: one absolute rate for all deltas, another for all scales.
        weight_decay: of deltas and master weights; scales have none.
        scale_bits: with `paper` and mixed widths, the width that lr_scale is meant for; others get it in proportion.

    Raises:
        UserError: if nothing is trained, or rates are missing that `paper` needs.

    Examples:
        >>> optimizer = torch.optim.AdamW(tt.param_groups(model, steps=300))
        >>> adam = (torch.optim.AdamW, {"params": tt.param_groups(model, steps=300)})
        >>> trainer = SFTTrainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=adam)
    """
    if parametrization == "paper" and (lr is None or lr_scale is None):
        raise UserError("param_groups: parametrization 'paper' has no rates of its own; give lr and lr_scale")
    found: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
    for parameter, is_scale, rate, length in _moved(model, lr, lr_scale, steps, parametrization, scale_bits):
        found.setdefault((is_scale, rate, length), []).append(parameter)
    if not found:
        raise UserError(
            "param_groups: the model trains nothing; prepare it with a method that does, before it is folded"
        )
    return [
        {"params": found[key], "lr": key[1] * key[2], "weight_decay": 0.0 if key[0] else weight_decay}
        for key in sorted(found, key=lambda key: (key[0], -key[2]))  # whatever the rates are: moments stay theirs
    ]


def _moved(
    model: nn.Module,
    lr: float | None,
    lr_scale: float | None,
    steps: int,
    parametrization: Parametrization,
    scale_bits: int | None,
) -> Iterator[tuple[nn.Parameter, bool, float, float]]:
    """(parameter, whether it is a scale or offset, rate, length of a rate of 1) of all that wants gradients."""
    relative, seen = parametrization == "relative", set[int]()
    for layer in model.modules():
        if not isinstance(layer, QuantLinear) or layer.adapter is None:
            continue
        given = default(layer.adapter.kind, steps, None if layer.base.grid is None else layer.base.grid.bits)
        rates = Rates(given.delta if lr is None else lr, given.scale if lr_scale is None else lr_scale)
        lengths = _lengths(layer.adapter, layer.base) if relative else _meant_for(scale_bits, layer.base)
        for name, parameter in layer.adapter.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                is_scale = name in ("scale", "offset")
                yield parameter, is_scale, rates.scale if is_scale else rates.delta, lengths.get(name, 1.0)
    for parameter in model.parameters():
        if parameter.requires_grad and id(parameter) not in seen:  # a norm, say, that somebody trains as well
            share = default("levels", steps).scale if lr_scale is None else lr_scale
            yield parameter, True, share, _rounded(_size(parameter)) if relative else 1.0


def _rounded(length: float) -> float:
    return exp2(round(_APART * log2(length)) / _APART)


def _meant_for(bits: int | None, base: Weight) -> dict[str, float]:
    """The largest weight of b bits moves by (2^b - 1) ds, so one absolute rate of scales suits one width only."""
    if bits is None or not isinstance(base, AffineWeight):
        return {}
    return {"scale": (2**bits - 1) / base.grid.top}


def _lengths(adapter: Adapter, base: Weight) -> dict[str, float]:
    """What each of an adapter's parameters is moved by at a share of 1."""
    return {name: _rounded(length) for name, length in _exact_lengths(adapter, base).items()}


def _exact_lengths(adapter: Adapter, base: Weight) -> dict[str, float]:
    step = _step(base)
    lengths = {"master": step, "offset": step}
    if isinstance(base, AffineWeight):
        lengths["scale"] = step * 2 / base.grid.top
    delta = adapter.delta
    if delta is None:
        return lengths
    far = step / (delta.shape.gain or 1.0)
    if adapter.acts_in_codes:
        assert isinstance(base, AffineWeight)
        far /= _mean(base.range().scale_NG)
    if delta.shape.rank is None:
        return lengths | {"delta.M": far}
    rank, columns = delta.shape.rank, delta.shape.in_features // delta.shape.pool
    spread = 1 / sqrt(3 * columns)
    moves = spread * sqrt(rank * (1 + 2 / pi * rank / columns))
    left = 1.0 if adapter.fitted is None else max(adapter.fitted[1], _LEAST_LEFT)
    return lengths | {"delta.B": left * far / moves, "delta.A": left * _A * spread}


def _step(base: Weight) -> float:
    """The mean distance between neighbouring values, but no finer than that of 4 bits, in units of weights."""
    if isinstance(base, AffineWeight):
        return _mean(base.range().scale_NG) * max(1.0, base.grid.top / _WIDTH)
    if isinstance(base, CodebookWeight):
        top = float(codebook.table(base.grid)[-1])
        return 2 * top * _mean(base.read_absmax()) / (2**base.grid.bits - 1)
    assert isinstance(base, DenseWeight)
    return _size(base.weight) / 3


def _mean(t: Tensor) -> float:
    return t.float().abs().mean().item() or 1.0


def _size(t: Tensor) -> float:
    """Root mean square; of what is zero, 1."""
    return t.float().square().mean().sqrt().item() or 1.0
