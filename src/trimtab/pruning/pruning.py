"""Structured pruning of a model in memory: how much, by which importance, and what came out.

    score every structure -> choose uniform widths -> each layer keeps its own most important structures -> cut

All in place, a layer at a time: nothing is ever there twice but one weight.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.file_size import float_bytes
from trimtab.memory import process
from trimtab.pruning import depth
from trimtab.pruning.importance import Importance, loss_without, score
from trimtab.pruning.structures import Layout, Widths, cut, decoder_layers, layout
from trimtab.pruning.widths import choose, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Options:
    """How much to remove, exactly one of `ratio`, `target_bytes` and `layers`, and by what measure."""

    ratio: float | None = None
    """Share of the parameters to remove, at least: 0.2 is 20 %."""
    target_bytes: int | None = None
    """Largest size of the model's safetensors in its dtype, embeddings included, in bytes."""
    layers: int | None = None
    """Drop this many whole layers."""
    what: Literal["widths", "layers"] = "widths"
    """What a ratio or byte target is reached by: narrower layers, or fewer."""
    importance: Importance = "taylor"
    """Of structures: taylor (needs calibration text), magnitude or random. Layers go by block influence."""
    count_embeddings: bool = False
    """Whether the ratio is one of all parameters; else of those outside the input embedding and an untied head."""
    multiple_of: int = 64
    """MLP widths are a multiple of this, and inputs of o where heads go: the largest quantization group to be used."""
    keep: tuple[int, ...] = ()
    """Layers that are never dropped and whose importance alone decides the widths; negative numbers count from the end."""
    seed: int = 0
    """Of random importance."""

    @property
    def reads_text(self) -> bool:
        """Whether calibration text is needed."""
        return self.importance == "taylor" or self.what == "layers" or self.layers is not None

    def __post_init__(self) -> None:
        if sum(v is not None for v in (self.ratio, self.target_bytes, self.layers)) != 1:
            raise UserError("prune: give exactly one of a ratio, a size in bytes and a number of layers to drop")
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise UserError(f"prune: ratio {self.ratio} is not between 0 and 1; 0.3 removes 30 %")
        if self.layers is not None and self.layers < 1:
            raise UserError(f"prune: cannot drop {self.layers} layers; give at least 1")
        for name, value, known in (
            ("what", self.what, ("widths", "layers")),
            ("importance", self.importance, ("taylor", "magnitude", "random")),
        ):
            if value not in known:
                raise UserError(f"prune: {name} {value!r} is none of {', '.join(known)}")
        if self.multiple_of < 1:
            raise UserError(f"prune: multiple_of {self.multiple_of} is not a positive number")


@dataclass(frozen=True)
class Pruned:
    """What was removed."""

    parameters_before: int
    parameters: int
    widths_before: Widths
    widths: Widths
    layers_before: int
    layers: int
    kept_groups: tuple[tuple[int, ...], ...]
    """KV groups of the original that each remaining layer has."""
    dropped_layers: tuple[int, ...]
    seconds: float
    peak_bytes: int
    """Largest resident memory of the process while pruning, the model included."""

    def lines(self) -> list[str]:
        """For people."""
        share = 1 - self.parameters / self.parameters_before
        return [
            f"parameters   {self.parameters_before:,} -> {self.parameters:,} ({share:.1%} removed)",
            f"layers       {self.layers_before} -> {self.layers}"
            + (f" (without {', '.join(map(str, self.dropped_layers))})" if self.dropped_layers else ""),
            f"KV groups    {self.widths_before.groups} -> {self.widths.groups} in each layer",
            f"MLP channels {self.widths_before.channels} -> {self.widths.channels} in each layer",
        ]


def prune(
    model: "PreTrainedModel", options: Options, windows_WL: Tensor | None = None, *, micro_batch: int = 1
) -> Pruned:
    """Prune a float model in place; its config follows, so that `save_pretrained` writes an ordinary checkpoint.

    Args:
        model: Llama, Mistral, Qwen2, Qwen3, SmolLM, Gemma or another model of their structure.
        options: what to remove.
        windows_WL: int64 calibration windows (W, L), for taylor and for dropping layers.
        micro_batch: windows in one pass.

    Raises:
        UserError: for a model of another structure, or where not so much can be removed.
    """
    process.reset_peak()
    started, about = time.perf_counter(), layout(model)
    for i in options.keep:
        if not -about.layers <= i < about.layers:
            raise UserError(f"prune: keep: there is no layer {i}; the model has {about.layers}, numbered from 0")
    keep = sorted({i % about.layers for i in options.keep})
    gone: list[int] = []
    groups = [tuple(range(about.widths.groups))] * about.layers
    if options.layers is not None or options.what == "layers":
        if windows_WL is None:
            raise UserError("prune: dropping layers needs calibration text to measure their influence; give data")
        count = options.layers or -(-_to_remove(model, about, options) // about.layer_parameters)
        gone = depth.least(about, depth.influence(model, windows_WL, micro_batch), count=count, keep=keep)
        depth.drop(model, gone)
        groups = groups[len(gone) :]
    else:
        groups = _narrow(model, about, options, windows_WL, keep, micro_batch)
    after = layout(model)
    return Pruned(
        parameters_before=about.parameters,
        parameters=after.parameters,
        widths_before=about.widths,
        widths=after.widths,
        layers_before=about.layers,
        layers=after.layers,
        kept_groups=tuple(groups),
        dropped_layers=tuple(gone),
        seconds=time.perf_counter() - started,
        peak_bytes=process.peak_bytes(),
    )


def _to_remove(model: "PreTrainedModel", about: Layout, options: Options) -> int:
    """Parameters to remove, at least."""
    if options.ratio is not None:
        counted = about.parameters - (0 if options.count_embeddings else about.embedding_parameters)
        return -int(-options.ratio * counted // 1)
    assert options.target_bytes is not None
    stored = float_bytes(model)
    itemsize = min(p.element_size() for p in decoder_layers(model).parameters())
    return max(-((options.target_bytes - stored) // itemsize), 0)


def _narrow(
    model: "PreTrainedModel",
    about: Layout,
    options: Options,
    windows_WL: Tensor | None,
    keep: Sequence[int],
    micro_batch: int,
) -> list[tuple[int, ...]]:
    """Cut every layer to the same widths; the KV groups that each keeps."""
    remove = _to_remove(model, about, options)
    # Whether it can be done at all is known before the first window is read.
    none = score(model, about, "random", None, options.seed)
    choose(model.config, about, none, "random", remove=remove, multiple_of=options.multiple_of, keep=keep)
    scores = score(model, about, options.importance, windows_WL, options.seed, micro_batch)

    def measured(widths: Widths) -> float:
        assert windows_WL is not None
        none = torch.zeros(0, dtype=torch.int64)
        gone = [
            (_least(s.groups, widths.groups), _least(s.channels, widths.channels))
            if not keep or i in keep
            else (none, none)
            for i, s in enumerate(scores)
        ]
        return loss_without(model, gone, about, windows_WL, micro_batch)

    widths = choose(
        model.config,
        about,
        scores,
        options.importance,
        remove=remove,
        multiple_of=options.multiple_of,
        keep=keep,
        measure=measured if windows_WL is not None and options.importance != "random" else None,
    )
    kept = []
    for layer, values in zip(decoder_layers(model), scores, strict=True):
        groups, channels = (_best(v, n) for v, n in zip(values, (widths.groups, widths.channels), strict=True))
        cut(layer, about, groups, channels)
        kept.append(tuple(groups.tolist()))
    described = describe(model.config, about, widths)
    for key in ("num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size"):
        setattr(model.config, key, getattr(described, key))
    return kept


def _least(values: Tensor, kept: int) -> Tensor:
    """Indices of all but the `kept` largest."""
    stays = torch.zeros(len(values), dtype=torch.bool)
    stays[_best(values, kept)] = True
    return torch.nonzero(~stays).flatten()


def _best(values: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ascending; of equals the first."""
    order = torch.sort(values, descending=True, stable=True).indices
    return order[:count].sort().values
