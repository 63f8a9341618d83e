"""A start block by block: each decoder block is trained through its rounding to give what the float block gives.

    least  mean over tokens of |y_t - y*_t|^2 / |y*_t|^2        y* = block(x*),  y = rounded block(x)

x* is what the float blocks before it give, x what the rounded ones do. What is trained of a layer, all in its own units:

    c_NK   the weight in steps of the grid that it starts from, W / s0, or (W - o0) / s0
    l_NG   the logarithm of the scale in that scale, s = store(s0 exp(l))
    t_NG   steps that zero is moved by: z = clamp(ste_round(z0 + t)), or o = store(o0 + s0 t)

    u = c s0 / s + z        u = (c - (o - o0) / s0) s0 / s        W_hat = from_codes(clamp(ste_round(u), 0, 2^b - 1), s, z)

At c = W / s0, l = 0 and t = 0 these are the levels of round-to-nearest, to the bit. Three ways to train them:

    all      c, l and t by Adam: EfficientQAT's first phase (arXiv 2407.11062)
    scales   l and t alone by Adam; the weight is rounded again at every scale
    shift    c within half a step of where it was, and scales that only shrink, down to half, by the sign of their
             gradients: AutoRound's rounding (SignRound, arXiv 2309.05516)

Adam moves every number by about its rate, so rates in these units suit every layer: hundredths of a step for c.

The error is a share of each token's own square. In a plain mean the few tokens with massive activations are all there is:
in SmolLM2 nothing else was trained. It is measured over all windows after each pass through them, and what is kept is the
state that it was least in, the rounding to nearest among them: so no block is worse than where it started.

At any moment there are one block's float weights, c, gradients, moments and the best c; the hidden states of all windows
that go into a block, in float and rounded; and one layer's rounding: W_hat is made for a forward pass without a graph, its
gradient summed over a step's windows, and the graph of one layer after another made again for it.

Legend: W windows, L tokens in a window, D hidden size, N out features, K in features, G groups in a row.
"""

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call

from trimtab.errors import UserError
from trimtab.layers import weights
from trimtab.layers.weights import AffineWeight
from trimtab.models.calibrate import hidden_of
from trimtab.quant import fixed8
from trimtab.quant.grid import Grid, Range, from_codes, round_clamp, ste_round, to_levels
from trimtab.words import and_more

_log = logging.getLogger("trimtab")
Trains = Literal["all", "scales", "shift"]
_LEAST = math.log(0.5)
"""Of the logarithm that `shift` may shrink a scale by."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Blockwise:
    """A start of any method that trains each decoder block through its rounding, and the calibration set for it.

    Examples:
        >>> model, tokenizer = tt.load(name, tt.methods.LrQat(rank=32), rules, start=tt.Blockwise(tokens=windows))
    """

    tokens: Tensor
    """Calibration windows, int64 (W, L)."""
    trains: Trains = "all"
    """all (weights, scales and zeros), scales (and zeros), or shift (weights by at most half a step)."""
    steps: int = 128
    """Updates of each block; 0 rounds to nearest."""
    windows: int = 2
    """Calibration windows in an update."""
    lr: float | None = None
    """Rate of weights and zeros, in steps of the grid; None is 0.01, 0.02 for scales, and 1 / steps for shift."""
    lr_scale: float | None = None
    """Rate of scales, as a share of their size; None is the same."""
    seed: int = 0
    """Seed of the order of windows."""
    kept: Path | None = None
    """Folder for the results of blocks, so that none is trained twice; None keeps none."""
    on_disk: bool = False
    """Whether hidden states of all windows are kept in (nameless) files, not in memory."""
    say: Callable[[str], None] | None = None
    """Called with a line after each block."""

    def __post_init__(self) -> None:
        if self.tokens.dim() != 2 or not self.tokens.numel() or self.tokens.dtype != torch.int64:
            found = f"{self.tokens.dtype} of shape {tuple(self.tokens.shape)}"
            raise UserError(f"block tokens: {found}; calibration windows are int64 (windows, length)")
        if self.trains not in get_args(Trains):
            raise UserError(f"block trains: {self.trains!r} is none of {', '.join(get_args(Trains))}")
        for name, least in (("steps", 0), ("windows", 1)):
            if getattr(self, name) < least:
                raise UserError(f"block {name}: {getattr(self, name)} is below {least}")
        for name in ("lr", "lr_scale"):
            if (rate := getattr(self, name)) is not None and rate <= 0:
                raise UserError(f"block {name}: {rate} is not a positive number")

    @property
    def rates(self) -> tuple[float, float]:
        """Of weights and zeros, and of scales."""
        own = {"all": 0.01, "scales": 0.02, "shift": 1 / max(self.steps, 1)}[self.trains]
        return self.lr or own, self.lr_scale or own


class Errors(NamedTuple):
    """Of a block, over all windows."""

    before: float
    """Of round-to-nearest."""
    after: float


class Rounding:
    """One layer on its way from float to codes.

    Args:
        weight_NK: float.
        grid: affine.
        trains: which parameters want gradients.
    """

    def __init__(self, weight_NK: Tensor, grid: Grid, trains: Trains) -> None:
        base = weights.quantize(weight_NK, grid)
        assert isinstance(base, AffineWeight)
        self.base, self.start, self._shift = base, base.range(), trains == "shift"
        scale, zero, offset = self.start
        self.c = to_levels(weight_NK.float(), Range(scale, torch.zeros_like(scale), offset), grid)
        self.first = self.c.clone() if self._shift else None
        self.log_scale, self.moved = torch.zeros_like(scale), torch.zeros_like(scale)
        self.trained = {"log_scale": self.log_scale}
        if zero is not None or offset is not None:
            self.trained["moved"] = self.moved
        if trains != "scales":
            self.trained["c"] = self.c
        for tensor in self.trained.values():
            tensor.requires_grad_()
        self.reached = False
        """Whether any token came to the layer while it was trained."""

    def range(self) -> Range:
        """Scales and zeros as the file will hold them, straight through."""
        scale, zero, offset = self.start
        s = self.base.stored_scale(scale * self.log_scale.exp())
        if zero is not None:
            return Range(s, ste_round(zero + self.moved).clamp(0, self.base.grid.top), None)
        return Range(s, None, None if offset is None else self.base.stored_offset(offset + scale * self.moved))

    def weight(self, dtype: torch.dtype) -> Tensor:
        """W_hat (N, K), differentiable in what is trained."""
        range_, grid = self.range(), self.base.grid
        codes = round_clamp(levels(self.c, self.start, range_, grid), grid.top)
        return from_codes(codes, range_, grid).to(dtype)

    @torch.no_grad()
    def keep_within(self) -> None:
        """Bring `shift`'s parameters back to where they may go."""
        if self.first is not None:
            torch.clamp(self.c, self.first - 0.5, self.first + 0.5, out=self.c)
            self.log_scale.clamp_(_LEAST, 0.0)

    @torch.no_grad()
    def stored(self) -> AffineWeight:
        """The levels in float, on the grid that they were trained for."""
        range_, grid = self.range(), self.base.grid
        u = levels(self.c, self.start, range_, grid).clamp_(0, grid.top)
        return AffineWeight.of_levels(fixed8.fine(u), range_, grid, "fp32")


def levels(c_NK: Tensor, start: Range, range_: Range, grid: Grid) -> Tensor:
    """Levels u (N, K), neither rounded nor clamped.

    Args:
        c_NK: the weight in steps of `start`, without its zero.
        start: scales and zeros (N, G) that c was made by.
        range_: those that it is to be rounded with.
        grid: for the zero of a symmetric one.
    """
    c = c_NK.unflatten(1, (start.scale_NG.shape[1], -1))
    ratio = (range_.scale_NG / start.scale_NG).unsqueeze(-1)
    if range_.offset_NG is not None:
        assert start.offset_NG is not None
        moved = (range_.offset_NG - start.offset_NG) / start.scale_NG
        return ((c - moved.unsqueeze(-1)) / ratio).flatten(1)
    zero: Any = grid.center if range_.zero_NG is None else range_.zero_NG.unsqueeze(-1)
    return (c / ratio + zero).flatten(1)


def error(y: Tensor, wanted: Tensor) -> Tensor:
    """The mean over tokens of |y_t - y*_t|^2 / |y*_t|^2, float32.

    Args:
        y: hidden states (..., D).
        wanted: y*, of the same shape.
    """
    wanted = wanted.float()
    return ((y.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp_min(1e-30)).mean()


class Task(NamedTuple):
    """A block that is to give what it gives in float."""

    block: nn.Module
    """In float."""
    roundings: Mapping[str, Rounding]
    """By the layers' names in the block."""
    inputs: Tensor
    """x of all windows (W, L, D), wherever they lie."""
    wanted: Tensor
    """y* of each."""
    call: dict[str, Any]
    """What the block is called with besides."""
    number: int
    """Of the block, for the order of windows."""


def train(task: Task, how: Blockwise) -> Errors:
    """Train the roundings of a block by steps and rates; they are left as they were best."""
    block, roundings, inputs, wanted, call, number = task
    trained = [p for r in roundings.values() for p in r.trained.values()]
    device = trained[0].device

    def pair(i: int) -> tuple[Tensor, Tensor]:
        return inputs[i : i + 1].to(device), wanted[i : i + 1].to(device)

    first = least = _measured(block, roundings, map(pair, range(len(inputs))), call)
    best = [p.detach().clone() for p in trained]
    optimizer, schedule = _optimizer(roundings, how)
    order, draw = list[int](), torch.Generator().manual_seed((how.seed << 16) + number)
    for step in range(how.steps):
        if len(order) < how.windows:
            order += torch.randperm(len(inputs), generator=draw).tolist()
        some, order = order[: how.windows], order[how.windows :]
        gradients(block, roundings, [pair(i) for i in some], call)
        if how.trains == "shift":
            for p in trained:
                assert p.grad is not None
                p.grad.sign_()
        optimizer.step()
        schedule.step()
        for r in roundings.values():
            r.keep_within()
        if len(order) < how.windows or step == how.steps - 1:
            now = _measured(block, roundings, map(pair, range(len(inputs))), call)
            if now < least:
                least = now
                best = [kept.copy_(p.detach()) for kept, p in zip(best, trained, strict=True)]
    for kept, p in zip(best, trained, strict=True):
        p.detach().copy_(kept)
        p.grad = None
    unseen = [name for name, r in roundings.items() if not r.reached]
    if unseen and how.steps:
        _log.warning("block %d: no calibration token reached %s: rounded to nearest", number + 1, and_more(unseen))
    return Errors(first, least)


@torch.no_grad()
def _measured(
    block: nn.Module, roundings: Mapping[str, Rounding], pairs: Iterable[tuple[Tensor, Tensor]], call: dict[str, Any]
) -> float:
    """The mean error over windows (x, y*)."""
    made: dict[str, Tensor] | None = None
    found = []
    for x, y in pairs:
        made = made or _made(roundings, x.dtype)
        found.append(error(_run(block, made, x, call), y).item())
    return sum(found) / len(found)


def gradients(
    block: nn.Module, roundings: Mapping[str, Rounding], pairs: Sequence[tuple[Tensor, Tensor]], call: dict[str, Any]
) -> None:
    """Put into `grad` of all that is trained the gradient of the mean error over some windows (x, y*)."""
    made = _made(roundings, pairs[0][0].dtype)
    leaves = [w.requires_grad_() for w in made.values()]
    sums: list[Tensor] | None = None
    with torch.enable_grad():
        for x, y in pairs:
            loss = error(_run(block, made, x, call), y) / len(pairs)
            # An expert that no token of the window chose is in no graph.
            found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            sums = list(found) if sums is None else [a.add_(b) for a, b in zip(sums, found, strict=True)]
        assert sums is not None
        for r, grad in zip(roundings.values(), sums, strict=True):
            r.reached = r.reached or bool(grad.any())
            wanted = list(r.trained.values())
            for p, g in zip(wanted, torch.autograd.grad(r.weight(grad.dtype), wanted, grad), strict=True):
                p.grad = g


@torch.no_grad()
def _made(roundings: Mapping[str, Rounding], dtype: torch.dtype) -> dict[str, Tensor]:
    return {f"{name}.weight": r.weight(dtype) for name, r in roundings.items()}


def _run(block: nn.Module, made: dict[str, Tensor], x: Tensor, call: dict[str, Any]) -> Tensor:
    """What a block gives with other weights in place of its own."""
    return hidden_of(functional_call(block, made, (x,), call))


def _optimizer(
    roundings: Mapping[str, Rounding], how: Blockwise
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Adam with half a cosine; by signs, a straight line down."""
    signed, (lr, lr_scale) = how.trains == "shift", how.rates
    groups: list[dict[str, Any]] = [
        {"params": [p for r in roundings.values() for name, p in r.trained.items() if name != "log_scale"], "lr": lr},
        {"params": [r.log_scale for r in roundings.values()], "lr": lr_scale},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer: torch.optim.Optimizer = torch.optim.SGD(groups) if signed else torch.optim.Adam(groups)

    def share(step: int) -> float:
        done = step / max(how.steps, 1)
        return 1 - done if signed else (1 + math.cos(math.pi * done)) / 2

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, share)
