"""How much a structure matters: first-order Taylor, magnitude, or a coin.

Taking a structure S out sets its outgoing weights (its columns of o or down) to zero. To first order the loss moves by

    dL(S) = - sum over w in S_out of w dL/dw  =  - sum over tokens t of x_t . dL/dx_t          x: what enters o or down

The two sides are equal since dL/dW = sum_t (dL/dy_t) x_t^T, so no gradient of a weight is ever formed: a tap on x, which
keeps x and adds up x . dL/dx in backward, is all. With each decoder layer recomputed in backward, memory is that of the
model, one layer's activations and one hidden state for each layer. The variant here:

    taylor(S) = mean over calibration windows of | sum over w in S_out of w dL_window/dw |

The absolute value is taken for each window, not after their sum: near a minimum the gradients of windows cancel, and what
is left of their sum is noise. The weights that lead *into* a structure are not counted. For up and v they repeat the same
sum (each is a factor of x); for gate, q and k they add the effect of a change of scale, which is not that of removal.

    magnitude(S) = sum over all w of S of w^2           random(S) = uniform in [0, 1)

Scores of one layer are comparable with each other, and over layers for `taylor` and `magnitude`.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trimtab.devices import double
from trimtab.errors import UserError
from trimtab.pruning.structures import Layout, attention, decoder_layers, mlp, rows_of
from trimtab.training.loss import summed_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Importance = Literal["taylor", "magnitude", "random"]


class Scores(NamedTuple):
    """Importance of the structures of one layer: float64, (groups,) and (channels,)."""

    groups: Tensor
    channels: Tensor


def score(
    model: "PreTrainedModel",
    about: Layout,
    kind: Importance,
    windows_WL: Tensor | None,
    seed: int,
    micro_batch: int = 1,
) -> list[Scores]:
    """Importance of every structure, layer by layer.

    Args:
        model: a float model.
        about: its layout.
        kind: see the module's docstring.
        windows_WL: int64 calibration windows (W, L), needed for taylor.
        seed: of random scores.
        micro_batch: windows in one pass.
    """
    if kind == "taylor":
        if windows_WL is None:
            raise UserError("prune: importance taylor needs calibration text; give data, or use magnitude")
        found = taylor(model, about, windows_WL, micro_batch)
        for number, (groups, channels) in enumerate(found):
            check_finite(torch.cat((groups, channels)), f"importance in layer {number}")
        return found
    if kind == "magnitude":
        return [_magnitude(layer, about) for layer in decoder_layers(model)]
    draw = torch.Generator().manual_seed(seed)
    sizes = about.widths.groups, about.widths.channels
    return [Scores(*(torch.rand(n, generator=draw, dtype=torch.float64) for n in sizes)) for _ in range(about.layers)]


def _zeros(about: Layout) -> Scores:
    return Scores(*(torch.zeros(n, dtype=torch.float64) for n in (about.widths.groups, about.widths.channels)))


class _Tap(torch.autograd.Function):
    """The identity, telling `add` of its input and of the gradient in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, add: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.add = add
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.add(ctx.saved_tensors[0], grad)
        return grad, None


def taylor(model: "PreTrainedModel", about: Layout, windows_WL: Tensor, micro_batch: int = 1) -> list[Scores]:
    """Mean over windows of |sum of w dL/dw| over each structure's outgoing weights."""
    found = [_zeros(about) for _ in range(about.layers)]
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(_input_gradients_only(model))
        for layer, scores in zip(decoder_layers(model), found, strict=True):
            ends = attention(layer, about.family).output, mlp(layer, about.family).down
            for linear, total in zip(ends, scores, strict=True):
                stack.callback(linear.register_forward_pre_hook(partial(_tap, total)).remove)
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
            stack.callback(layer.__dict__.pop, "forward")
        for some in windows_WL.split(micro_batch):
            ids_BL = some.to(device)
            summed_loss(model, ids_BL, input_ids=ids_BL, use_cache=False).backward()
    windows = len(windows_WL)
    return [Scores(groups / windows, channels / windows) for groups, channels in found]


def _tap(total: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    def add(x_BLK: Tensor, grad_BLK: Tensor) -> None:
        dtype = torch.promote_types(x_BLK.dtype, torch.float32)
        # Windows first, then the K inputs of this layer, structure by structure.
        sums_BS = double(torch.einsum("blk,blk->bk", x_BLK.to(dtype), grad_BLK.to(dtype)))
        total.add_(sums_BS.unflatten(1, (len(total), -1)).sum(2).abs().sum(0).cpu())

    return _Tap.apply(args[0], add), *args[1:]


@torch.no_grad()
def loss_without(
    model: "PreTrainedModel", gone: list[tuple[Tensor, Tensor]], about: Layout, windows_WL: Tensor, micro_batch: int = 1
) -> float:
    """Loss per token with structures taken out, measured: their inputs to o and down are set to zero, nothing is cut.

    Args:
        model: left as it is.
        gone: for each layer, the groups and the channels that are missing.
        about: its layout.
        windows_WL: int64 windows (W, L).
        micro_batch: windows in one pass.
    """
    device, training = next(model.parameters()).device, model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        model.eval()
        for layer, (groups, channels) in zip(decoder_layers(model), gone, strict=True):
            columns = rows_of(groups, about.heads_per_group * about.head_dim)
            ends = attention(layer, about.family).output, mlp(layer, about.family).down
            for linear, some in zip(ends, (columns, channels), strict=True):
                stack.callback(linear.register_forward_pre_hook(partial(_silence, some.to(device))).remove)
        total = 0.0
        for some in windows_WL.split(micro_batch):
            ids_BL = some.to(device)
            total += summed_loss(model, ids_BL, input_ids=ids_BL, use_cache=False).item()
    check_finite(torch.tensor(total), "the loss on the calibration text")
    return total / (len(windows_WL) * (windows_WL.shape[1] - 1))


def check_finite(values: Tensor, what: str) -> None:
    """Refuse to choose by what is not a number."""
    if not values.isfinite().all():
        raise UserError(
            f"prune: {what} is not finite: an activation or a gradient is too large for the model's dtype, or a weight "
            "is not a number; prune in bfloat16 or float32 (--dtype, in a recipe model.dtype)"
        )


def _silence(columns: Tensor, _: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return args[0].index_fill(-1, columns, 0), *args[1:]


@contextmanager
def _input_gradients_only(model: "PreTrainedModel") -> Iterator[None]:
    """Freeze all weights and let gradients begin at the embedding's output, for a while; in evaluation mode."""
    wanted, training = [p for p in model.parameters() if p.requires_grad], model.training

    def begin(_: nn.Module, __: Any, rows: Tensor) -> Tensor:
        return rows.requires_grad_()

    hook = model.get_input_embeddings().register_forward_hook(begin)
    model.requires_grad_(False).eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
        for p in wanted:
            p.requires_grad_(True)
        model.train(training)


@torch.no_grad()
def _magnitude(layer: nn.Module, about: Layout) -> Scores:
    block, feed = attention(layer, about.family), mlp(layer, about.family)
    groups, channels = found = _zeros(about)
    for total, into, out in (
        (groups, block[:-1], block.output),
        (channels, feed[:-1], feed.down),
    ):
        for linear in into:
            for p in (linear.weight, linear.bias):
                if p is not None:
                    total += double(p).square().view(len(total), -1).sum(1).cpu()
        total += double(out.weight).square().sum(0).view(len(total), -1).sum(1).cpu()
    return found
