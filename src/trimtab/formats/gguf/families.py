"""What llama.cpp has to be told of each family of models: metadata, the order of rows, and what it adds to a norm.

A family's file says its sizes and rotary settings under keys of its own architecture; everything else (activation, where
the norms stand, which layers see a window) is compiled into llama.cpp. So a config that departs from what is compiled in
is refused here: the file would load and be another model.

    Llama, Mistral, SmolLM2  `llama`      rows of q and k reordered: llama.cpp rotates neighbours, transformers halves

        row of the file      h 2i + j  of head h    <-  row i + j d/2 of the same head      d rows a head, j in {0, 1}

    Qwen2, Qwen3, Gemma      their own    rows as they are
    Gemma                                 norms hold 1 + w, since transformers multiplies by that and llama.cpp by the norm

Legend: d head dimension.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.models.architecture import FAMILIES, Gguf, architecture_of, rope


def family(config: Any) -> Gguf:
    """How the family of a config is written.

    Raises:
        UserError: if it is not one of those written, or departs from what llama.cpp computes for it.
    """
    found = architecture_of(config).gguf
    if found is None:
        written = ", ".join(name for name, family in FAMILIES.items() if family.gguf is not None)
        raise UserError(f"GGUF: {config.model_type} models are not written; those of {written} are")
    for wrong in _departures(config, found):
        raise UserError(f"GGUF: {wrong}, which llama.cpp does not compute for {found.architecture}")
    return found


def _departures(config: Any, found: Gguf) -> Iterator[str]:
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", found.activation)
    if activation != found.activation:
        yield f"activation {activation}"
    kinds = getattr(config, "layer_types", None) or []
    every = found.window_every
    wanted = [
        "full_attention" if every is None or (i + 1) % every == 0 else "sliding_attention" for i in range(len(kinds))
    ]
    if kinds != wanted:
        yield f"layer_types {kinds}"
    rotary = [
        int(found.no_rope_every is None or (i + 1) % found.no_rope_every != 0) for i in range(config.num_hidden_layers)
    ]
    if getattr(config, "no_rope_layers", rotary) != rotary:
        yield f"no_rope_layers {config.no_rope_layers}"
    if found.tied and not config.tie_word_embeddings:
        yield "a head apart from the embedding"
    if getattr(config, "use_bidirectional_attention", False):
        yield "bidirectional attention"
    cap = architecture_of(config).attention_softcap
    if cap is not None and not found.caps_attention and getattr(config, cap) is not None:
        yield cap
    if found.large_layers is not None:
        large = config.num_hidden_layers == found.large_layers
        scale = config.hidden_size // config.num_attention_heads if large else head_dim(config)
        if config.query_pre_attn_scalar != scale:
            yield f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it takes {scale})"


def head_dim(config: Any) -> int:
    """d."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def metadata(config: Any, vocabulary_rows: int) -> dict[str, Any]:
    """The keys of a family's architecture, int, float or bool each.

    Args:
        config: transformers' config of the text model.
        vocabulary_rows: rows of the embedding.
    """
    found, d = family(config), head_dim(config)
    values: dict[str, Any] = {
        "vocab_size": vocabulary_rows,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": d,
        "attention.value_length": d,
    }
    if found.permuted:
        values["rope.dimension_count"] = d
    if found.window_every is not None:
        values["attention.sliding_window"] = config.sliding_window
    caps = architecture_of(config)
    for key, name in (("attn", caps.attention_softcap), ("final", caps.softcap)):
        if name is not None and getattr(config, name, None) is not None:
            values[f"{key}_logit_softcapping"] = float(getattr(config, name))
    return {f"{found.architecture}.{key}": value for key, value in (values | _rope(config)).items()}


def _rope(config: Any) -> dict[str, Any]:
    full, local = rope(config)
    values: dict[str, Any] = {"rope.freq_base": float(full["rope_theta"])}
    if local is not None:
        values["rope.freq_base_swa"] = float(local["rope_theta"])
        if local.get("rope_type", "default") != "default":
            raise UserError(f"GGUF: rope_type {local['rope_type']} in layers with a window is not written")
    kind = full.get("rope_type", "default")
    if kind == "linear":
        values |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(full["factor"])}
    elif kind == "yarn":
        values |= {"rope.scaling.type": "yarn", "rope.scaling.factor": float(full["factor"])}
        values["rope.scaling.original_context_length"] = full["original_max_position_embeddings"]
        names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        values |= {f"rope.scaling.yarn_{to}": float(full[of]) for of, to in names.items() if full.get(of) is not None}
    elif kind not in ("default", "llama3"):
        raise UserError(f"GGUF: rope_type {kind} is not written; default, linear, yarn and llama3 are")
    return values


def rope_factors(config: Any) -> Tensor | None:
    """What llama.cpp divides each rotary frequency by under Llama 3's scaling: float32 (d / 2,), or None.

    Low frequencies are divided by `factor`, high ones by 1, those between by a blend; the equation is Llama 3's.
    """
    full = rope(config).full
    if full.get("rope_type") != "llama3":
        return None
    d = head_dim(config)
    wavelength = 2 * math.pi * full["rope_theta"] ** (torch.arange(0, d, 2, dtype=torch.float64) / d)
    old, low, high = full["original_max_position_embeddings"], full["low_freq_factor"], full["high_freq_factor"]
    smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / full["factor"] + smooth)).float()


def row_order(config: Any, name: str, rows: int) -> Tensor | None:
    """Which row of transformers' parameter each row of the file is: int64 (rows,), or None if they are the same."""
    if not family(config).permuted:
        return None
    names = architecture_of(config).attention
    heads = {names.queries: config.num_attention_heads, names.keys: config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return None
    return torch.arange(rows).view(count, 2, rows // count // 2).transpose(1, 2).flatten()
