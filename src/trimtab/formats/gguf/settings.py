"""What a GGUF file's keys say of its model, held against the model that transformers makes of them.

transformers reads a dozen keys of a file and leaves out the others: rope scaling, head dimensions, caps, biases, what
attention is scaled by. A model without them loads, trains, and is another one. So every key of a file's architecture is

    put into the config           sizes, norms' epsilons, windows, caps, rope (`complete`), and compared with it afterwards
    held against the live model   head dimension, scale of attention, rotary frequencies (`require_agreement`)
    known to change nothing       `_IRRELEVANT`, and `_OFF` at the value that turns it off
    or the file is refused        by the name of the key

and where llama.cpp has a value of its own for a key that is missing, it is that value and not transformers'. The same
comparison is made of a file that is about to be written, with the keys that it will have: what is compiled into llama.cpp
for a family is in the family's description (`models.architecture`), and a config that departs from it is refused.

Legend: d head dimension.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.gguf import rotary
from trimtab.models.architecture import Gguf, architecture_of
from trimtab.models.asked import rope, windowed

_DIRECT: dict[str, tuple[str, ...]] = {
    "context_length": ("max_position_embeddings", "n_positions"),
    "embedding_length": ("hidden_size",),
    "block_count": ("num_hidden_layers",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "vocab_size": ("vocab_size",),
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_rms_epsilon": ("rms_norm_eps", "norm_eps"),
    "attention.layer_norm_epsilon": ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps"),
    "attention.sliding_window": ("sliding_window",),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "use_parallel_residual": ("use_parallel_residual",),
    "attention.clamp_kqv": ("clip_qkv",),
    "embedding_scale": ("embedding_multiplier",),
    "residual_scale": ("residual_multiplier",),
    "logit_scale": ("logits_scaling",),
}
"""Keys that are a value of the config, and its names there."""
_SEEN_IN_SHAPES = ("context_length", "feed_forward_length", "vocab_size")
"""Those that a config may do without: tensors have that size, or nothing does."""
_HANDLED = (
    *("attention.key_length", "attention.value_length", "attention.scale", "attention.sliding_window_pattern"),
    *("rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type"),
    *("rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.attn_factor"),
    *("rope.scaling.yarn_ext_factor", "rope.scaling.yarn_attn_factor", "rope.scaling.yarn_beta_fast"),
    "rope.scaling.yarn_beta_slow",
)
_IRRELEVANT = ("tensor_data_layout", "rope.scaling.finetuned")
_OFF: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,),
    "attention.max_alibi_bias": (0,),
    "attention.clamp_kqv": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "leading_dense_block_count": (0,),
    "nextn_predict_layers": (0,),
    "pooling_type": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "rope.scaling.alpha": (0,),
    "rope.scaling.yarn_log_multiplier": (0,),
}
"""Values at which a key changes nothing; any other is refused."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma2": {"attention.sliding_window": 4096, "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
}
"""What llama.cpp takes for a key that a file lacks, by architecture, where nothing is not what it takes."""


WITHOUT_WINDOWS = ("phi3",)
"""Architectures whose files say a sliding window that llama.cpp reads and leaves out."""


class Keys(NamedTuple):
    """What a file says of its model."""

    architecture: str
    values: Mapping[str, Any]
    """By what follows the architecture's name in the key."""
    factors: Mapping[str, Tensor]
    """Those of `rotary.TENSORS` that it has."""
    tensors: frozenset[str]
    """Names of all its tensors."""

    def get(self, key: str) -> Any:
        """The value of a key that llama.cpp computes with, its own where the file has none, or None."""
        if key == "attention.sliding_window" and self.architecture in WITHOUT_WINDOWS:
            return None
        return self.values.get(key, _DEFAULTS.get(self.architecture, {}).get(key))

    @property
    def head(self) -> int:
        """d."""
        return int(self.get("attention.key_length") or self.get("embedding_length") // self.get("attention.head_count"))

    @property
    def rotated(self) -> int:
        """Rotated dimensions of a head."""
        return int(self.get("rope.dimension_count") or self.head)


def _refused(keys: Keys, key: str, why: str) -> UserError:
    name = f"{keys.architecture}.{key}"
    said = f" (here {keys.values[key]!r})" if key in keys.values else ""
    return UserError(f"{name}{said} {why}")


def require_single(keys: Keys) -> None:
    """Raise a `UserError` if a size is one for each layer, which no config of a family read here holds."""
    for key in _DIRECT:
        if isinstance(keys.get(key), list):
            raise _refused(keys, key, "is one for each layer, which is not read")


def require_known(keys: Keys, own: Collection[str] = ()) -> None:
    """Raise a `UserError` that names the first key that is not understood and may change what the model computes.

    Args:
        keys: of a file.
        own: those that its family alone has.
    """
    for key, value in keys.values.items():
        if key in _IRRELEVANT or key in _DIRECT or key in _HANDLED or key in own:
            continue
        if key in _OFF and value in _OFF[key]:
            continue
        raise _refused(keys, key, "is not understood, and may change what the model computes")
    if keys.get("attention.value_length") not in (None, keys.head):
        raise _refused(keys, "attention.value_length", f"is another than that of keys ({keys.head})")
    if not 0 < keys.rotated <= keys.head:
        raise _refused(keys, "rope.dimension_count", f"is more than a head has ({keys.head})")
    _require_yarn(keys)


def _require_yarn(keys: Keys) -> None:
    """Keys of yarn's that llama.cpp reads for few families must say what it computes for the others."""
    kind, scale = rotary.scaling(keys.values)
    computed = {
        "rope.scaling.yarn_ext_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 1 + 0.1 * math.log(scale),
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
    }
    for key, value in computed.items():
        if kind == "yarn" and not math.isclose(keys.values.get(key, value), value, rel_tol=1e-4):
            raise _refused(keys, key, f"is another than llama.cpp computes for {keys.architecture}, which is {value:g}")


def complete(config: Any, keys: Keys) -> None:
    """Put into transformers' config, in place, what a file says and transformers leaves out of it.

    Raises:
        UserError: naming a key that is not understood, or that this config has no place for.
    """
    require_known(keys)
    if keys.head != config.hidden_size // config.num_attention_heads or hasattr(config, "head_dim"):
        config.head_dim = keys.head
    values = {key: keys.get(key) for key in _DIRECT}
    values["attention.head_count_kv"] = values["attention.head_count_kv"] or values["attention.head_count"]
    for key, value in values.items():
        name = _place(config, key)
        # No window, and no cap, is what llama.cpp takes where a file names none.
        if name is not None and (value is not None or key in ("attention.sliding_window", "final_logit_softcapping")):
            setattr(config, name, value if value or isinstance(value, bool) else None)
    for name, part in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up")):
        if hasattr(config, name):
            setattr(config, name, any(t.endswith(f".{part}.bias") for t in keys.tensors))
    family = architecture_of(config).gguf
    if family is not None:
        _complete_family(config, keys, family)
    if getattr(config, "rope_parameters", None) is not None:
        config.rope_parameters = _rope_parameters(config, keys)


def _place(config: Any, key: str) -> str | None:
    return next((name for name in _DIRECT[key] if hasattr(config, name)), None)


def inner_size(config: Any) -> int:
    """Features between the two products of an MLP; families that have `n_inner` take four times their own for None."""
    name = _place(config, "feed_forward_length")
    return int(getattr(config, name or "", None) or 4 * config.hidden_size)


def _held(config: Any, key: str) -> Any:
    """What a model computes with, where a key of a file is one number of it; None where it has no such number."""
    name, family = _place(config, key), architecture_of(config).gguf
    if name is None and family is not None and key == "attention.layer_norm_epsilon":
        return family.epsilon
    if name == "n_inner":
        return inner_size(config)
    return None if name is None else getattr(config, name)


def _complete_family(config: Any, keys: Keys, family: Gguf) -> None:
    if family.window_every is not None:
        pattern, n = keys.get("attention.sliding_window_pattern") or family.window_every, config.num_hidden_layers
        sees = pattern if isinstance(pattern, list) else [(i + 1) % pattern != 0 for i in range(n)]
        inside = bool(config.sliding_window)
        config.layer_types = ["sliding_attention" if inside and seen else "full_attention" for seen in sees]
    if family.large_layers is not None:
        config.query_pre_attn_scalar = attention_scalar(config, family)


def attention_scalar(config: Any, family: Gguf) -> int:
    """One over the square of what llama.cpp scales attention by in a family that has `query_pre_attn_scalar`."""
    by_heads = config.num_hidden_layers == family.large_layers
    return int(config.hidden_size // config.num_attention_heads if by_heads else config.head_dim)


def _rope_parameters(config: Any, keys: Keys) -> dict[str, Any]:
    found = rotary.parameters(keys.values, keys.factors, keys.rotated)
    if found is None:
        wrong = next((t for t in rotary.TENSORS if t in keys.factors), f"{keys.architecture}.rope.scaling.type")
        raise UserError(f"{wrong}: its scaling of rotary frequencies is none that transformers has")
    if keys.rotated != keys.head or "partial_rotary_factor" in rope(config).full:
        found["partial_rotary_factor"] = keys.rotated / keys.head
    if rope(config).windowed is None:
        return found
    local = {"rope_type": "default", "rope_theta": float(keys.get("rope.freq_base_swa") or 10000.0)}
    return {"full_attention": found, "sliding_attention": local}


# ---- held against the live model -------------------------------------------------------------------------------------


def require_agreement(model: Any, keys: Keys) -> None:
    """Raise a `UserError` that names the first key in which a model and a file differ.

    Args:
        model: of transformers, with a base model; its parameters may be on the meta device.
        keys: of the file that it was read from, or that it is about to be written to.
    """
    config = model.config.get_text_config()
    described = architecture_of(config).gguf
    require_known(keys, () if described is None else {*described.keys, *described.experts})
    for key in _DIRECT:
        value = keys.get(key)
        if isinstance(value, list):  # one for each layer, which is seen in the shapes of its tensors
            continue
        name, found = _place(config, key), _held(config, key)
        nothing = not value or value in _OFF.get(key, ()) or (name is None and key in _SEEN_IN_SHAPES)
        if value is None or (found is None and nothing):
            continue
        if found is None or not math.isclose(found, value, rel_tol=1e-6):
            raise _refused(keys, key, f"is {found!r} in a {config.model_type} model as transformers computes it")
    _require_attention(model, config, keys)
    _require_windows(config, keys)
    _require_rope(model, config, keys)


def _require_attention(model: Any, config: Any, keys: Keys) -> None:
    family = architecture_of(config).gguf
    scalar = keys.head if family is None or family.large_layers is None else attention_scalar(config, family)
    wanted = float(keys.get("attention.scale") or (family and family.scale) or scalar**-0.5)
    for name, module in model.named_modules():
        head, scale = getattr(module, "head_dim", None), getattr(module, "scaling", None)
        sees = "attention.key_length_swa" if getattr(module, "sliding_window", None) else "attention.key_length"
        said = keys.get(sees) or keys.head
        if isinstance(head, int) and head != said:
            raise _refused(keys, sees, f"should be {head}: {name} has such heads")
        if isinstance(head, int) and isinstance(scale, float) and not math.isclose(scale, wanted, rel_tol=1e-5):
            raise _refused(keys, "attention.scale", f"should be {wanted:g}: {name} scales by {scale:g}")


def _require_windows(config: Any, keys: Keys) -> None:
    family = architecture_of(config).gguf
    if family is None:
        return
    every, pattern = family.window_every, keys.get("attention.sliding_window_pattern")
    if every is None and pattern is not None:
        raise _refused(keys, "attention.sliding_window_pattern", "is not understood in this family")
    inside, n = bool(keys.get("attention.sliding_window")) and every is not None, config.num_hidden_layers
    step: Any = pattern or every
    wanted = step if isinstance(step, list) else [bool(step) and (i + 1) % step != 0 for i in range(n)]
    found = windowed(config)
    if found != [inside and bool(seen) for seen in wanted]:
        raise _refused(keys, "attention.sliding_window", f"is of other layers than in this {config.model_type} model")


def _require_rope(model: Any, config: Any, keys: Keys) -> None:
    made, own = rotary.of_model(model), keys.values.get("rope.freq_base_swa")
    family = architecture_of(config).gguf
    unused = "sliding_attention" in made or (family is not None and family.window_every and not any(windowed(config)))
    if own not in (None, keys.values.get("rope.freq_base", 10000.0)) and not unused:
        raise _refused(keys, "rope.freq_base_swa", f"has no place in a {config.model_type} model")
    if not made and any(key.startswith("rope.") for key in keys.values):
        raise _refused(keys, "rope.freq_base", f"has no place in a {config.model_type} model")
    values = dict(keys.values)
    if family is not None and not family.windowed_base:  # layers with a window have the base of the others
        values["rope.freq_base_swa"] = values.get("rope.freq_base", 10000.0)
    for kind, found in made.items():
        local = kind == "sliding_attention"
        rotated = int((local and keys.get("rope.dimension_count_swa")) or keys.rotated)
        if not found.equals(rotary.of_keys(values, keys.factors, rotated, windowed=local)):
            said = {k: v for k, v in keys.values.items() if k.startswith("rope.")} | dict.fromkeys(keys.factors, "...")
            wanted = rope(config)
            raise UserError(
                f"{keys.architecture}.rope.*: llama.cpp makes other rotary frequencies of {said} than transformers of "
                f"{wanted.windowed if local else wanted.full}"
            )
