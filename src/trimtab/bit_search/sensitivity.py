"""What each choice costs by itself: the additive prior of the search.

`exact`: the divergence of the model's predictions with one unit u rounded to the grid of choice c, all else in float,

    cost[u, c] = mean over tokens of KL( p_float || p_u,c )

A unit in layer l changes nothing before l, so its passes start from the float hidden states that enter l; layers are gone
through in order and only one layer's inputs are kept. With n layers an evaluation takes (n - l) / n of a pass, and
all of them about `choices x units / 2`. `passes` says how many, since a search must be charged for them.

`fisher`: the second-order estimate of the same quantity, with the diagonal of the Fisher matrix,

    cost[u, c] = 1/2 sum_i dW_i^2 F_i        F_i = mean over windows of (dL_window/dW_i)^2 / tokens in a window
    L_window   = - sum over tokens t of log p(y_t)                        y_t drawn from p itself, the model's prediction

from one backward pass for each window and one quantization for each choice. Labels are drawn, not read from the text: the
second derivative of KL is the Fisher matrix, whose mean is over the model's own labels. With those of the text (the
"empirical" Fisher) gradients of a window's tokens add up instead of cancelling, the more so the worse the model predicts.
Rounding errors of many weights have signs of their own, so off-diagonal terms are left out.

Legend: W windows, L tokens in each, D hidden size, U units, C choices.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.bit_search.space import Unit
from trimtab.devices import double
from trimtab.layers import weights
from trimtab.models.decoder import blocks, final_norm
from trimtab.models.head import Head, require_after_head
from trimtab.recipe.rules import Placement
from trimtab.training.divergence import chunks
from trimtab.training.loss import chunked_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sensitivity:
    """Costs of choices, and what it took to find them."""

    cost_UC: np.ndarray
    """Nats a token, float64 (units, choices)."""
    passes: float
    """Forward passes over the calibration windows, or what takes as long (a backward pass counts as two)."""


@dataclass
class Stream:
    """One micro-batch on its way through the float decoder."""

    hidden: Tensor
    """What enters the current layer (windows, L, D)."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    """What else each layer is called with: positions, masks."""
    last: Tensor
    """What leaves the last layer of the float model."""

    def through(self, layers: Sequence[nn.Module], first: int, hidden: Tensor) -> Tensor:
        """Hidden states after these layers, of which the first has number `first`."""
        for layer, (args, kwargs) in zip(layers, self.calls[first:], strict=False):
            out = layer(hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden


@torch.no_grad()
def exact(
    model: "PreTrainedModel",
    units: Sequence[Unit],
    placements: Sequence[Placement],
    windows_WL: Tensor,
    micro_batch: int = 1,
) -> Sensitivity:
    """KL to the float model with one unit quantized.

    Args:
        model: in float; left as it is.
        units: whose layers lie in one decoder layer each.
        placements: choices; what is not a grid costs nothing.
        windows_WL: int64 calibration windows.
        micro_batch: windows in one pass.
    """
    layers = list(blocks(model))
    numbers = {name: i for i, layer in enumerate(layers) for name in _names_in(model, layer)}
    cost, passes = np.zeros((len(units), len(placements))), 2.0
    was_training = model.training
    model.eval()
    streams = [float_pass(model, some) for some in windows_WL.split(micro_batch)]
    for number, layer in enumerate(layers):
        for u, unit in enumerate(units):
            if numbers[unit.layers[0]] != number:
                continue
            for c, grid in enumerate(placements):
                if grid is None or grid == "float":
                    continue
                with on_grids(model, dict.fromkeys(unit.layers, grid)):
                    moved = (s.through(layers[number:], number, s.hidden) for s in streams)
                    total = sum(divergence(model, s.last, m) for s, m in zip(streams, moved, strict=True))
                cost[u, c] = total / windows_WL.numel()
                passes += 1 - number / len(layers)
        for stream in streams:
            stream.hidden = stream.through([layer], number, stream.hidden)
    model.train(was_training)
    return Sensitivity(cost, passes)


def _names_in(model: nn.Module, layer: nn.Module) -> list[str]:
    inside = {id(m) for m in layer.modules()}
    return [name for name, m in model.named_modules() if id(m) in inside]


def float_pass(model: "PreTrainedModel", ids_BL: Tensor) -> Stream:
    """One float pass that notes what every layer is called with."""
    layers = blocks(model)
    calls, first, last = [], list[Tensor](), list[Tensor]()

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rest = dict(kwargs)
        hidden = args[0] if args else rest.pop("hidden_states")
        if not first:
            first.append(hidden)
        calls.append((args[1:], rest))

    def after(_: nn.Module, __: Any, output: Any) -> None:
        last.append(output[0] if isinstance(output, tuple) else output)

    with ExitStack() as hooks:
        for layer in layers:
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
        hooks.callback(layers[-1].register_forward_hook(after).remove)
        model.base_model(input_ids=ids_BL.to(next(model.parameters()).device), use_cache=False)
    return Stream(first[0], calls, last[0])


def divergence(
    model: "PreTrainedModel",
    float_BLD: Tensor,
    moved_BLD: Tensor,
    heads: tuple[Tensor, Tensor] | None = None,
    *,
    normed: bool = False,
) -> float:
    """Sum over tokens of KL(p_float || p_moved), from what leaves the last layer; a window's logits at a time.

    Args:
        model: its norm and head follow.
        float_BLD: of the float model.
        moved_BLD: of the other.
        heads: weights (vocabulary, D) of the two heads where they differ.
        normed: whether they are what enters the head, behind the norm.
    """
    norm = nn.Identity() if normed else final_norm(model)
    head, after = model.get_output_embeddings(), require_after_head(model)
    weights_ = heads or (head.weight, head.weight)
    total = 0.0
    for pair in zip(float_BLD, moved_BLD, strict=True):
        logits = (Head(w, head.bias, after).logits(norm(h)) for h, w in zip(pair, weights_, strict=True))
        p, q = (F.log_softmax(x, -1) for x in logits)
        total += F.kl_div(q, p, reduction="sum", log_target=True).item()
    return total


@contextmanager
def on_grids(model: nn.Module, grids: Mapping[str, Any]) -> Iterator[None]:
    """These layers on their grids, for a while."""
    with ExitStack() as stack:
        for name, grid in grids.items():
            weight: Any = model.get_submodule(name).weight
            stack.callback(setattr, weight, "data", weight.data)
            weight.data = on_grid(weight.data, grid)
        yield


def on_grid(weight_NK: Tensor, grid: Any) -> Tensor:
    """The weight rounded to a grid, in its own dtype."""
    return weights.quantize(weight_NK, grid).dequantize(weight_NK.dtype)


def fisher(
    model: "PreTrainedModel",
    units: Sequence[Unit],
    placements: Sequence[Placement],
    windows_WL: Tensor,
    *,
    seed: int = 0,
) -> Sensitivity:
    """Second-order estimate of the KL to the float model, from squared gradients; arguments as of `exact`.

    `seed` is that of the labels. Squared gradients are kept in float32: as much memory again as the units' weights in
    that dtype.
    """
    linears: dict[str, Any] = {name: model.get_submodule(name) for unit in units for name in unit.layers}
    squares = {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in linears.items()}
    wanted, was_training = {p: p.requires_grad for p in model.parameters()}, model.training
    model.requires_grad_(False).eval()
    with ExitStack() as stack:
        for p, value in wanted.items():
            stack.callback(p.requires_grad_, value)
        stack.callback(model.train, was_training)
        for name, linear in linears.items():
            linear.weight.requires_grad_(True)
            stack.callback(linear.weight.register_post_accumulate_grad_hook(_squarer(squares[name])).remove)
        draw = torch.Generator().manual_seed(seed)
        for ids_L in windows_WL.to(next(model.parameters()).device):
            hidden = model.base_model(input_ids=ids_L[None], use_cache=False).last_hidden_state[0, :-1]
            head = Head.of(model, hidden.dtype)
            labels = drawn(head, hidden.detach(), draw)
            chunked_cross_entropy(hidden, head, labels).backward()
    cost, count = np.zeros((len(units), len(placements))), len(windows_WL) * (windows_WL.shape[1] - 1)
    for u, unit in enumerate(units):
        for name in unit.layers:
            weight = linears[name].weight.detach()
            for c, grid in enumerate(placements):
                if grid is not None and grid != "float":
                    moved = (on_grid(weight, grid) - weight).float()
                    cost[u, c] += 0.5 * double(moved.square() * squares[name]).sum().item() / count
    return Sensitivity(cost, 3.0)


def drawn(head: Head, hidden_TD: Tensor, draw: torch.Generator) -> Tensor:
    """A label (T,) for every place, from what the model predicts there."""
    found = []
    for chunk in chunks(len(hidden_TD)):
        p = head.logits(hidden_TD[chunk]).softmax(-1).cpu()
        found.append(torch.multinomial(p, 1, generator=draw).squeeze(1))
    return torch.cat(found).to(hidden_TD.device)


def _squarer(total: Tensor) -> Any:
    def add(p: nn.Parameter) -> None:
        assert p.grad is not None
        total.addcmul_(p.grad.float(), p.grad.float())
        p.grad = None

    return add
