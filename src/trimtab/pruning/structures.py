"""The coupled structures of a Llama-like decoder: what can be taken out so that an ordinary, smaller model is left.

    a KV group   its query heads' rows of q, its head's rows of k and v (and their biases), its columns of o
    a channel    its rows of gate and up, its column of down

    attention = sum over groups  o[:, group] attend(q[group], k[group], v[group])
    mlp       = sum over channels down[:, c] act(gate[c] x) (up[c] x)

Both are sums over structures, so taking some out equals, to the digit, setting their columns of o and down to zero. A group
is the unit because `num_attention_heads / num_key_value_heads` must stay whole. Norms of q and k (Qwen3, Gemma 3) are
shared by all heads and stay. Whatever else has parameters in these blocks is refused by name: it may be coupled too.

Road not taken: tracing the graph for dependencies (LLM-Pruner's way). It finds these very structures, and needs a
dependency and a forward pass to do so; shapes and the config say it all.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.models.architecture import IN_WORDS, Architecture, Attention, Mlp, architecture_of
from trimtab.models.decoder import blocks

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Widths:
    """What every decoder layer has of each structure."""

    groups: int
    """KV groups: key-value heads, each with its query heads."""
    channels: int
    """MLP channels."""


@dataclass(frozen=True)
class Layout:
    """A model's decoder, as far as pruning needs to know it."""

    family: Architecture
    layers: int
    widths: Widths
    heads_per_group: int
    head_dim: int
    group_parameters: int
    """Parameters that go with one KV group of one layer."""
    channel_parameters: int
    """Parameters that go with one MLP channel of one layer."""
    layer_parameters: int
    """Parameters of one whole decoder layer."""
    parameters: int
    """All parameters of the model, tied ones once."""
    embedding_parameters: int
    """Of these, the input embedding's and an untied head's."""


def decoder_layers(model: "PreTrainedModel") -> nn.ModuleList:
    """The decoder layers."""
    if architecture_of(model).blocks != "layers" or model.config.get_text_config() is not model.config:
        raise UserError(
            f"prune: {type(model).__name__} is not a plain decoder with `model.layers`; give a Llama-like model"
        )
    return blocks(model)


def attention(layer: nn.Module, family: Architecture) -> Attention[Any]:
    """The linear layers of a decoder layer's attention."""
    block = _block(layer, family.attention)
    return Attention(*(getattr(block, part) for part in family.attention))


def mlp(layer: nn.Module, family: Architecture) -> Mlp[Any]:
    """The linear layers of a decoder layer's MLP."""
    block = _block(layer, family.mlp)
    return Mlp(*(getattr(block, part) for part in family.mlp))


def _block(layer: nn.Module, parts: tuple[str, ...]) -> nn.Module:
    for _, module in layer.named_children():
        if all(isinstance(getattr(module, part, None), nn.Linear) for part in parts):
            return module
    raise UserError(
        f"prune: {type(layer).__name__} has no block with float layers {', '.join(parts)}; known are {IN_WORDS} in "
        "float (prune first, quantize after)"
    )


def layout(model: "PreTrainedModel") -> Layout:
    """Read and check the structures of a model.

    Raises:
        UserError: for a model whose blocks hold something that pruning does not know.
    """
    layers, config, family = decoder_layers(model), model.config, architecture_of(model)
    first = layers[0]
    block, feed = attention(first, family), mlp(first, family)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    channels, head_dim = feed.gate.out_features, block.keys.out_features // groups
    for number, layer in enumerate(layers):
        _check(f"layer {number}", layer, family, (heads, groups, head_dim, channels, config.hidden_size))
    numbers = {p: p.numel() for p in model.parameters()}
    ends = {p for m in (model.get_input_embeddings(), model.get_output_embeddings()) for p in m.parameters()}
    return Layout(
        family=family,
        layers=len(layers),
        widths=Widths(groups, channels),
        heads_per_group=heads // groups,
        head_dim=head_dim,
        group_parameters=_coupled(block, block.output) // groups,
        channel_parameters=_coupled(feed, feed.down) // channels,
        layer_parameters=sum(p.numel() for p in first.parameters()),
        parameters=sum(numbers.values()),
        embedding_parameters=sum(numbers[p] for p in ends),
    )


def _coupled(block: Iterable[nn.Linear], outgoing: nn.Linear) -> int:
    """Parameters of a block that go with one or another of its structures: all but the bias of what leads out of them."""
    numbers = sum(p.numel() for linear in block for p in linear.parameters())
    return numbers - (0 if outgoing.bias is None else outgoing.bias.numel())


def _check(where: str, layer: nn.Module, family: Architecture, sizes: tuple[int, int, int, int, int]) -> None:
    heads, groups, head_dim, channels, hidden = sizes
    block, feed = _block(layer, family.attention), _block(layer, family.mlp)
    wide, narrow, channel = (heads * head_dim, hidden), (groups * head_dim, hidden), (channels, hidden)
    wanted = dict(zip(family.attention, (wide, narrow, narrow, wide[::-1]), strict=True))
    wanted |= dict(zip(family.mlp, (channel, channel, channel[::-1]), strict=True))
    for owner, parts in ((block, family.attention), (feed, family.mlp)):
        for name, parameter in owner.named_parameters():
            part = name.split(".")[0]
            if part in parts:
                found = tuple(parameter.shape)
                if name.endswith("weight") and found != wanted[part]:
                    raise UserError(f"prune: {where}: {name} is {found}, the config and layer 0 say {wanted[part]}")
            elif tuple(parameter.shape) != (head_dim,) or owner is feed:
                raise UserError(
                    f"prune: {where}: {name} {tuple(parameter.shape)} is unknown and may belong to heads or channels; "
                    f"known are {IN_WORDS}"
                )


def rows_of(groups: Tensor, size: int) -> Tensor:
    """Indices of the rows of these groups, `size` rows each."""
    return (groups[:, None] * size + torch.arange(size)).flatten()


@torch.no_grad()
def cut(layer: nn.Module, about: Layout, groups: Tensor, channels: Tensor) -> None:
    """Leave one layer only these KV groups and MLP channels (ascending indices), in place."""
    block, feed = attention(layer, about.family), mlp(layer, about.family)
    queries, keys = rows_of(groups, about.heads_per_group * about.head_dim), rows_of(groups, about.head_dim)
    if len(groups) < about.widths.groups:
        for linear, rows in ((block.queries, queries), (block.keys, keys), (block.values, keys)):
            _keep_rows(linear, rows)
        _keep_columns(block.output, queries)
    if len(channels) < about.widths.channels:
        for linear in (feed.gate, feed.up):
            _keep_rows(linear, channels)
        _keep_columns(feed.down, channels)
    # Some blocks remember their widths; what they compute follows the weights.
    counts = {"num_heads": len(groups) * about.heads_per_group, "num_key_value_heads": len(groups)}
    widths = {"intermediate_size": len(channels)}
    for parts, values in ((about.family.attention, counts), (about.family.mlp, widths)):
        owner = _block(layer, parts)
        for name, value in values.items():
            if hasattr(owner, name):
                setattr(owner, name, value)


def _keep_rows(linear: nn.Linear, rows: Tensor) -> None:
    rows = rows.to(linear.weight.device)
    linear.weight = nn.Parameter(linear.weight[rows].clone(), linear.weight.requires_grad)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias[rows].clone(), linear.bias.requires_grad)
    linear.out_features = len(rows)


def _keep_columns(linear: nn.Linear, columns: Tensor) -> None:
    weight = linear.weight[:, columns.to(linear.weight.device)].contiguous()
    linear.weight = nn.Parameter(weight, linear.weight.requires_grad)
    linear.in_features = len(columns)
