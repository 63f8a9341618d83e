"""Sizes that layers of one model have each their own, as Gemma 4 has them and llama.cpp's files say them.

heads              of one dimension in layers that see a window (`..._swa`), of another in those that see all
keys and values    of other numbers of heads there (a list), or none in the last layers, which use those of earlier ones
MLP                twice as wide in those last layers (a list), where the config says so
rotary             proportional: a part of the frequencies, the others divided by so much that they turn nothing
"""

from typing import Any

import torch
from torch import Tensor

from trimtab.models.asked import rope, windowed

_NEVER = 1e30
"""What llama.cpp's converter divides a frequency by that is to be none."""


def of_kind(config: Any, kind: str, name: str) -> int:
    """A size in layers of one kind: `full_attention` or `sliding_attention`."""
    varies = name in (getattr(config, "per_layer_attributes", None) or ())
    return int(getattr(config.per_layer_config[kind] if varies else config, name))


def metadata(config: Any) -> dict[str, Any]:
    """The keys that say these sizes."""
    seen = windowed(config)
    d, local = (of_kind(config, kind, "head_dim") for kind in ("full_attention", "sliding_attention"))
    heads = [of_kind(config, kind, "num_key_value_heads") for kind in config.layer_types]
    first_shared = config.num_hidden_layers - config.num_kv_shared_layers
    wide = [1 + (config.use_double_wide_mlp and i >= first_shared) for i in range(config.num_hidden_layers)]
    widths = [config.intermediate_size * times for times in wide]
    return {
        "feed_forward_length": widths[0] if len(set(widths)) == 1 else widths,
        "attention.head_count_kv": heads[0] if len(set(heads)) == 1 else heads,
        "attention.key_length": d,
        "attention.value_length": d,
        "attention.key_length_swa": local,
        "attention.value_length_swa": local,
        "attention.shared_kv_layers": config.num_kv_shared_layers,
        "attention.sliding_window_pattern": seen,
        "embedding_length_per_layer_input": config.hidden_size_per_layer_input or 0,
        "rope.dimension_count": d,
        "rope.dimension_count_swa": local,
    }


def shares_as_llama_cpp(config: Any) -> bool:
    """Whether the layers without keys of their own take them where llama.cpp does: those that see all from the last layer
    that has some, those that see a window from the one before it.
    """
    first = config.num_hidden_layers - config.num_kv_shared_layers
    giving = config.layer_types[max(first - 2, 0) : first]
    return config.num_kv_shared_layers == 0 or giving == ["sliding_attention", "full_attention"]


def divisors(config: Any) -> Tensor:
    """What the frequencies of layers without a window are divided by: float32 (d / 2,)."""
    d = of_kind(config, "full_attention", "head_dim")
    turned = int(d * rope(config).full.get("partial_rotary_factor", 1.0) / 2)
    return torch.tensor([1.0] * turned + [_NEVER] * (d // 2 - turned))
