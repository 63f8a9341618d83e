"""Families of which transformers reads no folder in this format, asked of its own code and not of a list."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from trimtab.models.layout import auto_class
from trimtab.models.replaceable import layers_of

_ASKED: dict[tuple[type, ...], bool] = {}
"""Whether families initialise while they are read, by the classes of a config and of its parts: it is laid out to know."""


def unread(config: Any) -> Iterator[str]:
    """What transformers does to any part of a model while it reads, and cannot do to a folder of this format."""
    parts = list(_parts(config))
    for part in parts:
        if part.model_type == "llama4_text":
            yield "takes experts for matrices apart, and leaves them at random,"
        for rule in get_checkpoint_conversion_mapping(part.model_type) or ():
            if isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1:
                yield from (f"makes several tensors of {n}" for n in rule.source_patterns if n.endswith(".weight"))
    kinds = tuple(map(type, parts))
    if kinds not in _ASKED:
        _ASKED[kinds] = _initialises(config)
    if _ASKED[kinds]:
        yield "stops at matrices that are codes, since it initialises them,"


def _parts(config: Any) -> Iterator[Any]:
    """A config and all that are in it."""
    yield config
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PreTrainedConfig):
            yield from _parts(part)


def _initialises(config: Any) -> bool:
    """Whether a family's `_init_weights`, which transformers calls while it reads, asks layers for a `weight`.

    It is called here, on a model without data whose layers have none, as those of packed codes have none.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    if type(model)._init_weights is PreTrainedModel._init_weights:
        return False
    for kind, layer in layers_of(model).offered.values():
        if kind == "linear":
            del layer.weight
    try:
        model.initialize_weights()
    except AttributeError:
        return True
    return False
