"""What a model's config asks for beside its sizes: windows, caps, biases, rotary embeddings. A reader may lack some of it.

Which keys of a config a family has is in its description (`architecture`).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from trimtab.models.architecture import Feature, architecture_of


def softcap(config: Any) -> float | None:
    """c of a model that makes its logits c tanh(logits / c); None for one that does not."""
    text = config.get_text_config()
    key = architecture_of(text).softcap
    return None if key is None else getattr(text, key, None)


def windowed(config: Any) -> list[bool]:
    """Which layers see a sliding window instead of everything before a token."""
    if architecture_of(config).window_everywhere:
        window = config.sliding_window  # one that no context outgrows hides nothing: Phi-3's of 262,144 tokens
        return [window is not None and window < config.max_position_embeddings] * config.num_hidden_layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    return [kind == "sliding_attention" for kind in kinds]


class Rope(NamedTuple):
    """Parameters of rotary embeddings, by transformers' keys."""

    full: dict[str, Any]
    """Empty where these layers rotate nothing."""
    windowed: dict[str, Any] | None
    """Of layers with a sliding window, where these have their own."""


def rope(config: Any) -> Rope:
    """The rotary embeddings of a config, which has one set of parameters or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return Rope(parameters.get("full_attention", parameters) or {}, parameters.get("sliding_attention"))


def features(config: Any) -> Iterator[tuple[Feature, str]]:
    """What the config of a text model asks for that one reader or another lacks, each with a word for it."""
    family = architecture_of(config)
    if any(windowed(config)):
        yield "windows", f"a sliding window of {getattr(config, 'sliding_window', None)} tokens"
    caps: tuple[tuple[Feature, str | None], ...] = (
        ("attention cap", family.attention_softcap),
        ("logit cap", family.softcap),
    )
    for feature, key in caps:
        if key is not None and getattr(config, key, None) is not None:
            yield feature, f"{key} {getattr(config, key)}"
    biases: tuple[tuple[Feature, str], ...] = (("attention bias", "attention_bias"), ("MLP bias", "mlp_bias"))
    for feature, key in biases:
        if getattr(config, key, False):
            yield feature, key
    if family.implied_head_dim:  # of other families it may be one for each layer, and then reading it raises
        heads, d = getattr(config, "num_attention_heads", None), getattr(config, "head_dim", None)
        if heads and d and heads * d != config.hidden_size:
            yield "implied heads", f"head_dim {d} with {heads} heads of {config.hidden_size} features"
    if getattr(config, "rope_parameters", None):
        yield from _rope_features(rope(config).full)


def _rope_features(full: dict[str, Any]) -> Iterator[tuple[Feature, str]]:
    kind = full.get("rope_type", "default")
    known: dict[str, Feature] = {"linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    if kind != "default":
        yield known.get(kind, "other rope"), f"rope_type {kind}"
    if full.get("partial_rotary_factor", 1) != 1:
        yield "partial rotary", f"partial_rotary_factor {full['partial_rotary_factor']}"
    if kind == "yarn" and (full.get("attention_factor") is not None or not full.get("truncate", True)):
        yield "yarn's own", "yarn with an attention_factor, or without truncate"
