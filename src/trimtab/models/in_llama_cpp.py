"""How each family's models are written for llama.cpp, and what is compiled into it: one frozen entry each.

What follows from an entry and a config is in `formats.gguf.families`; whether it is right is asked of llama.cpp itself
(`tests/serving/test_llama_cpp.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class Gguf:
    """How a family's models are written for llama.cpp, and what is compiled into it."""

    architecture: str
    """llama.cpp's name for the family."""
    permuted: bool = False
    """Whether rows of q and k are in the order of llama.cpp's rotary embedding."""
    activation: str = "silu"
    norm_shift: float = 0.0
    """Added to every norm: transformers multiplies by 1 + w in some families, llama.cpp always by the norm."""
    window_every: int | None = None
    """All layers but every n-th see a sliding window; None if none do."""
    no_rope_every: int | None = None
    """Every n-th layer has no rotary embedding; None if all have one."""
    large_layers: int | None = None
    """Layers of the one size whose attention is scaled by hidden / heads instead of the head dimension; None if
    `query_pre_attn_scalar` is not a key of the family."""
    caps: bool = False
    """Whether it always caps scores of attention, and logits; else it caps logits where a file says so."""
    biases: frozenset[str] = frozenset()
    """Which keys of the config may ask for biases."""
    ropes: frozenset[str] = frozenset({"linear", "yarn"})
    """Scalings of rotary frequencies that it computes, by transformers' `rope_type`."""
    windowed_base: bool = False
    """Whether layers with a sliding window have a rotary base of their own."""
    partial_rotary: bool = False
    """Whether it may rotate a part of a head."""
    head: Literal["tied", "apart", "either"] = "either"
    """Whether it reads the head from the embedding: always, never, or where a file has no other."""
    scale: float | None = None
    """What scores of attention are multiplied by; None for one over the root of the head dimension."""
    by_layer: bool = False
    """Whether its files say sizes of layers that see a window apart from those of layers that see all, and which do."""
    delta_nets: bool = False
    """Whether layers of linear attention, gated delta nets, stand between those of full attention."""
    keys: frozenset[str] = frozenset()
    """Keys of its files that no other family's have."""
    learned_positions: bool = False
    """Whether positions are an embedding instead of a rotation, and norms are LayerNorms with biases: GPT-2's way."""
    epsilon: float | None = None
    """Of norms that have no parameters; None where norms have, and the config says theirs."""
    experts: Mapping[str, str] = field(default_factory=dict)
    """Of a mixture, numbers and sizes of its experts: keys of the file, by keys of the config."""
    ungrouped: bool = False
    """Whether there have to be as many heads of keys as of queries."""
    compiled: Mapping[str, Any] = field(default_factory=dict)
    """What keys of the config have to say, where it is not transformers' default."""
    factors: Mapping[str, str] = field(default_factory=dict)
    """Numbers that it multiplies, divides or clamps by: keys of the file, by keys of the config."""


_BIAS_KEYS = frozenset({"attention_bias", "mlp_bias"})
_LLAMA_ROPES = frozenset({"linear", "yarn", "llama3"})
_GEMMA_GGUF: dict[str, Any] = {"activation": "gelu_pytorch_tanh", "norm_shift": 1.0}

_EXPERTS = {"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"}

GGUF: Mapping[str, Gguf] = {
    "llama": Gguf(architecture="llama", permuted=True, biases=_BIAS_KEYS, ropes=_LLAMA_ROPES),
    "mistral": Gguf(architecture="llama", permuted=True, biases=_BIAS_KEYS, ropes=_LLAMA_ROPES),
    "smollm3": Gguf(architecture="smollm3", permuted=True, no_rope_every=4),
    "qwen2": Gguf(architecture="qwen2"),
    "qwen3": Gguf(architecture="qwen3"),
    "gemma2": Gguf(
        architecture="gemma2",
        **_GEMMA_GGUF,
        window_every=2,
        large_layers=46,
        caps=True,
        head="tied",
    ),
    "gemma3_text": Gguf(architecture="gemma3", **_GEMMA_GGUF, window_every=6, windowed_base=True, large_layers=62),
    "phi3": Gguf(architecture="phi3", ropes=frozenset({"longrope"}), partial_rotary=True),
    "granite": Gguf(
        architecture="granite",
        permuted=True,
        biases=_BIAS_KEYS,
        ropes=_LLAMA_ROPES,
        factors={
            "attention.scale": "attention_multiplier",
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "logit_scale": "logits_scaling",
        },
    ),
    "glm4": Gguf(architecture="glm4", biases=frozenset({"attention_bias"}), partial_rotary=True),
    "qwen3_5_text": Gguf(
        architecture="qwen35",
        norm_shift=1.0,
        partial_rotary=True,
        delta_nets=True,
        keys=frozenset(
            {
                *("ssm.conv_kernel", "ssm.state_size", "ssm.group_count", "ssm.time_step_rank"),
                *("ssm.inner_size", "full_attention_interval", "rope.dimension_sections"),
            }
        ),
    ),
    "gemma4_text": Gguf(
        architecture="gemma4",
        activation="gelu_pytorch_tanh",
        window_every=6,
        windowed_base=True,
        ropes=frozenset({"proportional"}),
        scale=1.0,
        by_layer=True,
        keys=frozenset(
            {
                *("attention.key_length_swa", "attention.value_length_swa", "attention.shared_kv_layers"),
                *("embedding_length_per_layer_input", "rope.dimension_count_swa"),
            }
        ),
    ),
    "mixtral": Gguf(
        architecture="llama",
        permuted=True,
        ropes=_LLAMA_ROPES,
        experts=_EXPERTS,
    ),
    "qwen3_moe": Gguf(
        architecture="qwen3moe",
        experts={**_EXPERTS, "expert_feed_forward_length": "moe_intermediate_size"},
        compiled={"norm_topk_prob": True},
    ),
    "olmoe": Gguf(architecture="olmoe", ungrouped=True, experts={**_EXPERTS, "expert_count": "num_experts"}),
    "olmo": Gguf(architecture="olmo", permuted=True, epsilon=1e-5, factors={"attention.clamp_kqv": "clip_qkv"}),
    "olmo2": Gguf(architecture="olmo2", head="apart"),
    "olmo3": Gguf(architecture="olmo2", head="apart", window_every=4),
    "gpt2": Gguf(architecture="gpt2", learned_positions=True),
}
"""By transformers' `model_type`."""
