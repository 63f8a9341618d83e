"""What llama.cpp has to be told of each family of models: metadata, the order of rows, and what it adds to a norm.

A family's file says its sizes and rotary settings under keys of its own architecture; everything else (activation, where
the norms stand, which layers see a window) is compiled into llama.cpp. So a config that departs from what is compiled in
is refused here, and so is one with a field that is not known here and not at its class's default: the file would load and
be another model. What is written is held against the model once more (`settings.require_agreement`).

    Llama, Mistral, SmolLM2  `llama`      rows of q and k reordered: llama.cpp rotates neighbours, transformers halves

        row of the file      h 2i + j  of head h    <-  row i + j d/2 of the same head      d rows a head, j in {0, 1}

    Granite, OLMo, SmolLM3   their own    the same order
    Qwen, Gemma, Phi, OLMo 2 their own    rows as they are; fused q, k, v and fused gate and up stay fused
    GPT-2                    its own      rows as they are, of matrices that transformers keeps transposed (`transposed`)
    Qwen3.5                  its own      heads of values in another order where they are more than those of keys (`delta`)
    Gemma 4                  its own      sizes by kind of layer (`by_layer`), norms as they are
    GLM-4                    its own      rows as they are: there transformers rotates neighbours, too
    Gemma 2, 3, Qwen3.5                   norms hold 1 + w, since transformers multiplies by that and llama.cpp by the norm

Legend: d head dimension, r of which are rotated.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trimtab.errors import UserError
from trimtab.formats.gguf import by_layer, delta, rotary, settings
from trimtab.models.architecture import architecture_of
from trimtab.models.asked import rope, windowed
from trimtab.models.in_llama_cpp import GGUF, Gguf

_COMPUTED = frozenset(
    {
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters"),
        *("hidden_act", "hidden_activation", "tie_word_embeddings", "attention_bias", "mlp_bias"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "layer_types", "_sliding_window_pattern"),
        *("no_rope_layers", "no_rope_layer_interval", "query_pre_attn_scalar", "use_bidirectional_attention"),
        *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads"),
        *("linear_num_value_heads", "original_max_position_embeddings"),
        *("attn_logit_softcapping", "final_logit_softcapping", "per_layer_config", "vocab_size_per_layer_input"),
        *("hidden_size_per_layer_input", "attention_k_eq_v", "num_kv_shared_layers", "use_double_wide_mlp"),
        *("n_positions", "n_embd", "n_layer", "n_head", "n_inner", "layer_norm_epsilon"),
    }
)
"""Fields of a config that are written, or held against what is compiled in."""
_OF_NO_MATTER = frozenset(
    {
        *("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "use_cache", "attention_dropout"),
        *("pretraining_tp", "transformers_version", "architectures", "dtype", "torch_dtype", "id2label", "label2id"),
        *("_name_or_path", "model_type", "output_hidden_states", "output_attentions", "return_dict", "problem_type"),
        *("output_router_logits", "router_aux_loss_coef", "router_jitter_noise"),
        *("quantization_config", "chunk_size_feed_forward", "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    }
)
"""Fields that no logit of a model in use depends on."""


def family(config: Any) -> Gguf:
    """How the family of a config is written.

    Raises:
        UserError: if it is not one of those written, or departs from what llama.cpp computes for it.
    """
    found = architecture_of(config).gguf
    if found is None:
        raise UserError(f"GGUF: {config.model_type} models are not written; those of {', '.join(GGUF)} are")
    for wrong in _departures(config, found):
        raise UserError(f"GGUF: {wrong}, which llama.cpp does not compute for {found.architecture}")
    return found


def _departures(config: Any, found: Gguf) -> Iterator[str]:
    architecture, d = architecture_of(config), head_dim(config)
    usual = type(config)().to_dict()
    for name, value in config.to_dict().items():
        known = _COMPUTED | _OF_NO_MATTER | set(found.factors.values()) | set(found.experts.values())
        if name in usual and name not in known and value != found.compiled.get(name, usual[name]):
            yield f"{name} {value}"
    activation = getattr(config, "hidden_activation", None) or getattr(config, "hidden_act", found.activation)
    if activation != found.activation:
        yield f"activation {activation}"
    yield from _attention(config, found)
    if found.ungrouped and config.num_key_value_heads != config.num_attention_heads:
        yield f"num_key_value_heads {config.num_key_value_heads} beside {config.num_attention_heads} of queries"
    if found.head == "tied" and not config.tie_word_embeddings:
        yield "a head apart from the embedding"
    if found.head == "apart" and config.tie_word_embeddings:
        yield "a head that is the embedding"
    if architecture.implied_head_dim and d * config.num_attention_heads != config.hidden_size:
        yield f"head_dim {d} with {config.num_attention_heads} heads of {config.hidden_size} features"
    for name in ("attention_bias", "mlp_bias"):
        if getattr(config, name, False) and name not in found.biases:
            yield name
    for name in (architecture.attention_softcap, architecture.softcap):
        if name is not None and found.caps != bool(getattr(config, name, None)) and (found.caps or "attn" in name):
            yield f"{name} {getattr(config, name)}"
    kind = rope(config).full.get("rope_type", "default")
    if kind not in ("default", *found.ropes):
        yield f"rope_type {kind} (it takes {', '.join(('default', *sorted(found.ropes)))})"
    if rotated_of(config) != d and not found.partial_rotary:
        yield f"heads of {d} of which {rotated_of(config)} are rotated"
    local = rope(config).windowed
    if local is not None and not found.windowed_base and local["rope_theta"] != rope(config).full["rope_theta"]:
        yield f"rope_theta {local['rope_theta']} in layers with a window"


def _attention(config: Any, found: Gguf) -> Iterator[str]:
    kinds, every = getattr(config, "layer_types", None) or [], found.window_every
    other, between = ("linear_attention", delta.period(config)) if found.delta_nets else ("sliding_attention", every)
    wanted = ["full_attention" if between is None or (i + 1) % between == 0 else other for i in range(len(kinds))]
    if kinds != wanted and not found.by_layer:
        yield f"layer_types {kinds}"
    if every is None and any(windowed(config)):
        yield f"sliding_window {config.sliding_window}"
    if every is not None and not config.sliding_window:
        yield "no sliding_window"
    rotated = [
        int(found.no_rope_every is None or (i + 1) % found.no_rope_every != 0) for i in range(config.num_hidden_layers)
    ]
    if getattr(config, "no_rope_layers", rotated) != rotated:
        yield f"no_rope_layers {config.no_rope_layers}"
    if getattr(config, "use_bidirectional_attention", None) not in (None, False, "vision"):
        yield "bidirectional attention"
    if found.by_layer and not by_layer.shares_as_llama_cpp(config):
        yield f"num_kv_shared_layers {config.num_kv_shared_layers} after layers of other kinds than sliding, full"
    if found.delta_nets and sum(delta.sections(config)) > head_dim(config):
        yield f"mrope_section {delta.sections(config)} in heads of {head_dim(config)}"
    if found.delta_nets and config.linear_key_head_dim != config.linear_value_head_dim:
        yield f"linear_value_head_dim {config.linear_value_head_dim} with keys of {config.linear_key_head_dim}"
    if found.large_layers is not None and config.query_pre_attn_scalar != settings.attention_scalar(config, found):
        yield f"query_pre_attn_scalar {config.query_pre_attn_scalar} (it takes {settings.attention_scalar(config, found)})"


def head_dim(config: Any) -> int:
    """d, in layers without a window."""
    if (found := architecture_of(config).gguf) is not None and found.by_layer:
        return by_layer.of_kind(config, "full_attention", "head_dim")
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rotated_of(config: Any) -> int:
    """Rotated dimensions of a head in layers without a window; proportional frequencies are as many as a head has."""
    if rope(config).full.get("rope_type") == "proportional":
        return head_dim(config)
    return int(head_dim(config) * rope(config).full.get("partial_rotary_factor", 1.0))


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
        "feed_forward_length": settings.inner_size(config),
        "attention.head_count": config.num_attention_heads,
        "attention.key_length": d,
        "attention.value_length": d,
    }
    if found.by_layer:
        values |= by_layer.metadata(config)
    elif not found.learned_positions:
        values["attention.head_count_kv"] = config.num_key_value_heads
    if found.learned_positions:
        values["attention.layer_norm_epsilon"] = float(config.layer_norm_epsilon)
    elif found.epsilon is None:
        values["attention.layer_norm_rms_epsilon"] = float(config.rms_norm_eps)
    else:
        values["attention.layer_norm_epsilon"] = found.epsilon
    if found.permuted or rotated_of(config) != d:
        values["rope.dimension_count"] = rotated_of(config)
    if found.window_every is not None or found.architecture in settings.WITHOUT_WINDOWS:
        values["attention.sliding_window"] = config.sliding_window or 0
    if found.delta_nets:
        values |= delta.metadata(config)
    values |= {key: int(getattr(config, setting)) for key, setting in found.experts.items()}
    for key, setting in found.factors.items():
        if getattr(config, setting) is not None:
            values[key] = float(getattr(config, setting))
    caps = architecture_of(config)
    for key, name in (("attn", caps.attention_softcap), ("final", caps.softcap)):
        if name is not None and getattr(config, name, None) is not None:
            values[f"{key}_logit_softcapping"] = float(getattr(config, name))
    return {f"{found.architecture}.{key}": value for key, value in (values | _rope(config)).items()}


def _rope(config: Any) -> dict[str, Any]:
    full, local = rope(config)
    if not full:
        return {}
    values: dict[str, Any] = {"rope.freq_base": float(full["rope_theta"])}
    if local is not None:
        values |= {"rope.freq_base_swa": float(local["rope_theta"])} if family(config).windowed_base else {}
        if local.get("rope_type", "default") != "default":
            raise UserError(f"GGUF: rope_type {local['rope_type']} in layers with a window is not written")
    kind = full.get("rope_type", "default")
    if kind in ("linear", "yarn"):
        values |= {"rope.scaling.type": kind, "rope.scaling.factor": float(full["factor"])}
    if kind in ("llama3", "yarn", "longrope"):
        values["rope.scaling.original_context_length"] = int(full["original_max_position_embeddings"])
    if kind in ("yarn", "longrope"):
        theirs = 1 + 0.1 * math.log(full["factor"]) if kind == "yarn" else 1.0
        attention = ROPE_INIT_FUNCTIONS[kind](config)[1] / theirs
        values |= {} if math.isclose(attention, 1) else {"rope.scaling.attn_factor": attention}
    return values


def rope_factors(config: Any) -> dict[str, Tensor]:
    """What llama.cpp divides each rotary frequency by, where one scaling of all does not say it: float32 (r / 2,) each.

    By the names of `rotary.TENSORS`. Llama 3's scaling has one divisor for each frequency; longrope has two, for contexts
    up to the one that the model was first trained on and for longer ones.
    """
    full = rope(config).full
    kind = full.get("rope_type")
    if kind == "llama3":
        return {rotary.FREQS: rotary.llama3_divisors(full, head_dim(config)).float()}
    if kind == "proportional":
        return {rotary.FREQS: by_layer.divisors(config)}
    if kind == "longrope":
        return {
            name: torch.tensor(full[f"{which}_factor"], dtype=torch.float32)
            for name, which in ((rotary.LONG, "long"), (rotary.SHORT, "short"))
        }
    return {}


class Placed(NamedTuple):
    """Where the rows and columns of a tensor of the file come from: int64 each, None where they stay."""

    rows: Tensor | None
    columns: Tensor | None

    def of(self, value: Tensor) -> Tensor:
        """A float parameter in the order of the file."""
        value = value if self.rows is None else value[self.rows.to(value.device)]
        return value if self.columns is None else value[:, self.columns.to(value.device)]


def placed(config: Any, name: str, shape: tuple[int, ...]) -> Placed:
    """The order of a parameter of transformers' in the file."""
    described = architecture_of(config)
    if delta.INSIDE in name:
        return Placed(delta.row_order(config, name, shape[0]), delta.column_order(config, name, shape[-1]))
    if described.gguf is None or not described.gguf.permuted:
        return Placed(None, None)
    names = described.attention
    heads = {names.queries: config.num_attention_heads, names.keys: config.num_key_value_heads}
    count = heads.get(name.split(".")[-2])
    if count is None:
        return Placed(None, None)
    return Placed(torch.arange(shape[0]).view(count, 2, shape[0] // count // 2).transpose(1, 2).flatten(), None)


_RENAMED = {"linear_attn.dt_bias": "linear_attn.dt_proj.bias", "layer_scalar": "layer_scalar.weight"}
"""Ends of names that gguf's own table has under those that an older family, or the converter, gave them."""


def asked(name: str) -> str:
    """What gguf's table of names is asked for."""
    end = next((end for end in _RENAMED if name.endswith(f".{end}")), None)
    return name if end is None else name.removesuffix(end) + _RENAMED[end]


def values(found: Gguf, name: str, value: Tensor) -> Tensor:
    """The numbers of a float parameter as llama.cpp takes them: matrices as they are, positions and all else in float32."""
    if delta.INSIDE in name:
        return delta.values(name, value)
    shift = found.norm_shift if name.endswith("norm.weight") else 0.0
    return value if value.dim() > 1 and not name.endswith(".wpe.weight") else value.float() + shift
