"""Families of which transformers reads no folder in this format, asked of its own code and not of a list."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightConverter

from trimtab.models.layout import auto_class
from trimtab.models.replaceable import layers_of


def unread(config: Any) -> Iterator[str]:
    """What transformers does to any part of a model while it reads, and cannot do to a folder of this format."""
    yield from _in_parts(config)
    if _initialises(config):
        yield "stops at matrices that are codes, since it initialises them,"


def _in_parts(config: Any) -> Iterator[str]:
    if config.model_type == "llama4_text":
        yield "takes experts for matrices apart, and leaves them at random,"
    for rule in get_checkpoint_conversion_mapping(config.model_type) or ():
        if isinstance(rule, WeightConverter) and len(rule.target_patterns) > 1:
            yield from (f"makes several tensors of {n}" for n in rule.source_patterns if n.endswith(".weight"))
    for part in config.sub_configs:
        if isinstance(getattr(config, part, None), PreTrainedConfig):
            yield from _in_parts(getattr(config, part))


def _initialises(config: Any) -> bool:
    """Whether a family's `_init_weights`, which transformers calls while it reads, asks layers for a `weight`.

    It is called here, on a model without data whose layers have none, as those of packed codes have none.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    if type(model)._init_weights is PreTrainedModel._init_weights:
        return False
    for kind_of_layer, layer in layers_of(model).offered.values():
        if kind_of_layer == "linear":
            del layer.weight
    try:
        model.initialize_weights()
    except AttributeError:
        return True
    return False
