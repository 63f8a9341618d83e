"""A tiny random config of every causal family that the installed transformers knows, by rules and a few exceptions."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.heterogeneity.configuration_utils import AmbiguousGlobalPerLayerAttributeError
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 96
LAYERS = 2

_NAMES = {
    VOCABULARY: """
        vocab_size n_vocab src_vocab_size text_vocab_size vocab_size_per_layer_input
    """,
    32: """
        hidden_size n_embd d_model dim n_embed emb_dim embed_dim embedding_size attention_hidden_size d_embed
        word_embed_proj_dim embedding_dim lru_width hidden_dim
    """,
    16: """
        moe_intermediate_size shared_expert_intermediate_size moe_shared_expert_intermediate_size
        expert_ffn_hidden_size intermediate_size_mlp qk_head_dim q_lora_rank kv_lora_rank lora_rank o_lora_rank
        image_size
    """,
    2: """
        num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_decoder_layers
        num_encoder_layers depth num_key_value_heads n_kv_heads num_kv_heads swa_num_key_value_heads
        multi_query_group_num num_experts_per_tok moe_topk moe_k num_experts_per_token moe_top_k top_k_experts
        num_experts_per_topk linear_num_key_heads
    """,
    4: """
        num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads
        num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads num_experts
        num_local_experts n_routed_experts moe_num_experts ffn_num_experts rotary_dim linear_num_value_heads
        linear_conv_kernel_dim
    """,
    8: """
        head_dim v_head_dim qk_nope_head_dim attention_head_dim kv_channels swa_head_dim swa_v_head_dim
        global_head_dim linear_key_head_dim linear_value_head_dim index_head_dim qk_rope_head_dim sliding_window
        attention_window_size local_attention window_size patch_size mamba_n_heads mamba_num_heads n_mamba_heads
        mamba_d_head mamba_head_dim mamba_headdim hidden_size_per_layer_input state_size mamba_d_state
        ssm_state_size
    """,
    1: """
        n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group num_expert_groups num_expert_group
        first_k_dense_replace num_dense_layers moe_layer_start_index
    """,
    64: """
        intermediate_size ffn_dim n_inner d_ff ffn_hidden_size encoder_ffn_dim decoder_ffn_dim d_inner dff
        shared_intermediate_size feed_forward_size dim_ff
        max_position_embeddings n_positions n_ctx max_target_positions max_source_positions max_seq_len
        model_max_length
    """,
}
SMALL = {name: size for size, names in _NAMES.items() for name in names.split()}
"""Sizes by the names that configs give them."""

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Keys of what each layer is."""

ALWAYS = {"head_dim", "num_key_value_heads"}
"""Set even where the default is None."""

ROPES = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
GEMMA4: dict[str, Any] = {"head_dim": 8, "global_head_dim": 16, "hidden_size_per_layer_input": 32}
QWEN4: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}


def _mrope(*sections: int) -> dict[str, Any]:
    """Rotary embeddings of positions in time, height and width: halves of what is rotated of a head."""
    return {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": list(sections)}}
    }


QWEN3_5: dict[str, Any] = {
    **_mrope(2, 1, 1)["text_config"],
    "head_dim": 32,  # of which a quarter is rotated
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
QWEN3_5["rope_parameters"]["partial_rotary_factor"] = 0.25
ZAMBA: dict[str, Any] = {
    "layers_block_type": ["mamba", "hybrid"] * 2,
    "num_hidden_layers": 4,
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
}
DOTS3: dict[str, Any] = {
    "head_dim": 16, "index_n_heads": 4, "shared_experts_intermediate_size": 16, "kv_lora_rank": 16, "q_lora_rank": 16,
    "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_attention_heads": 4, "num_key_value_heads": 4,
    **{f"swa_{key}": value for key, value in (
        ("num_attention_heads", 4), ("num_key_value_heads", 4), ("q_lora_rank", 16), ("kv_lora_rank", 16), ("head_dim", 16),
        ("qk_nope_head_dim", 8), ("v_head_dim", 8))},
}  # fmt: skip
_MROPE = ("cosmos3_edge", "glm46v", "glm4v", "paddleocr_vl", "qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker")
_WINDOWS = ["sliding_attention"]
EXCEPTIONS: dict[str, dict[str, Any]] = {
    **{name: _mrope(2, 1, 1) for name in _MROPE},
    "chameleon": {"vocabulary_map": {"<image>": 8, "IMGIMGA": 9, "IMGIMGBZ": 10}},
    "cohere_compass": {
        "text_config": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": ROPES}
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "granite_docling": {"vision_config": {"out_hidden_size": 32}},
    "hunyuan_vl": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "xdrope_section": [1, 1, 1, 1]}}
    },
    "inkling2": {"vision_config": {"text_hidden_size": 32}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [0, 1]}},
    "step3p7": {"text_config": {"sliding_window": 8}},
    "blt": {
        "encoder_hash_byte_group_vocab": 50,
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
    },
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": ROPES},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dots3_note": {
        "text_config": DOTS3,
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32},
        "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
    },
    "dots3_note_text": DOTS3,
    "gemma3n_text": {
        "intermediate_size": 64,
        "activation_sparsity_pattern": None,
        "num_kv_shared_layers": 0,
        "num_hidden_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gemma2": {"query_pre_attn_scalar": 8},
    "gemma3_text": {
        "query_pre_attn_scalar": 8,
        "layer_types": [*_WINDOWS * 5, "full_attention"],
        "num_hidden_layers": 6,
    },
    "mistral": {"sliding_window": None},
    "olmo3": {"layer_types": [*_WINDOWS * 3, "full_attention"], "num_hidden_layers": 4},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "got_ocr2": {"vision_config": {"output_channels": 16, "mlp_dim": 64}},
    "kimi_linear": {"linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "phi4_multimodal": {
        "audio_config": {
            "ext_pw_out_channel": 32,
            "depthwise_separable_out_channel": 32,
            "nemo_conv_channels": 16,
            "num_blocks": 2,
        }
    },
    "qwen3_5": {"text_config": QWEN3_5},
    "qwen3_5_text": QWEN3_5,
    "qwen4_exp": {"text_config": QWEN4},
    "qwen4_exp_text": QWEN4,
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
    "roc_bert": {
        "shape_vocab_size": 30,
        "pronunciation_vocab_size": 30,
        "shape_embed_dim": 8,
        "pronunciation_embed_dim": 8,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": ZAMBA,
    "zamba2": ZAMBA,
    "zaya": {"num_experts_per_tok": 1},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 16},
}
"""What a family needs beside the rules."""

_DRAFTS = "it drafts for another model, and the rules here make no config of it that transformers accepts"
NOT_BUILT: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "musicgen": "its decoder takes another config than AutoModelForCausalLM gives it",
    "musicgen_melody": "its decoder takes another config than AutoModelForCausalLM gives it",
}
"""Families that cannot be made here, and why."""


_TIMM, _RULES = "its vision tower needs timm", "the rules here make no config of it that transformers accepts"
_LARGE = "no config makes its tower small"
NOT_BUILT_TO_SEE: dict[str, str] = {
    "deepseek_ocr2": _RULES,
    "diffusion_gemma": _RULES,
    "emu3": _LARGE,
    "ernie4_5_vl_moe": _RULES,
    "evolla": "transformers names it by a class that there is not",
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "git": "its own loss takes an image for granted",
    "glm4v_moe": _RULES,
    "glm_ocr": _RULES,
    "glmga": _RULES,
    "granite4_vision": _RULES,
    "janus": _LARGE,
    "kyutai_speech_to_text": _RULES,
    "muse_spark": _RULES,
    "nemo_speechlm": _RULES,
    "nemotron_h_omni": _RULES,
    "perception_lm": _TIMM,
    "qwen2_5_omni": _LARGE,
    "qwen3_omni_moe": _RULES,
    "shieldgemma2": "transformers reads no head for what it saves of it",
    "vibevoice_asr": _LARGE,
}
"""Families that also see or hear and cannot be made here, and why."""


def seeing() -> list[str]:
    """Every `model_type` that AutoModelForMultimodalLM takes: models that see or hear beside reading."""
    return list(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def families() -> list[str]:
    """Every `model_type` that AutoModelForCausalLM takes."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def _values(kind: type[PreTrainedConfig], extra: dict[str, Any], vocabulary: int) -> dict[str, Any]:
    default = kind()
    keys = {getattr(kind, "attribute_map", {}).get(key, key) for key in default.to_dict()}
    latent = "kv_lora_rank" in keys and "per_layer_config" not in keys
    found: dict[str, Any] = {}
    kinds: dict[str, list[str]] = {}
    for key in sorted(keys - extra.keys()):
        value = _default(default, key)
        if value is _VARYING:
            continue
        if key in SMALL and (key in ALWAYS or (isinstance(value, int) and not isinstance(value, bool) and value > 0)):
            found[key] = vocabulary if SMALL[key] == VOCABULARY else SMALL[key]
        elif key.endswith("_token_id") and isinstance(value, int):
            found[key] = min(value, vocabulary - 1)
        elif key in KINDS and value:
            kinds[key] = list(dict.fromkeys(value))
    if kinds:  # a layer of each kind
        depth = max(LAYERS, *map(len, kinds.values()))
        found |= {key: (some * depth)[:depth] for key, some in kinds.items()} | {"num_hidden_layers": depth}
    if latent:  # keys and values of every head come out of one latent vector
        found.pop("head_dim", None)
        if "num_key_value_heads" in found:
            found["num_key_value_heads"] = found["num_attention_heads"]
    for name in getattr(kind, "sub_configs", None) or {}:
        part = _default(default, name)
        if isinstance(part, PreTrainedConfig):
            found[name] = type(part)(**_values(type(part), dict(extra.pop(name, {})), vocabulary))
    return found | extra


_VARYING = object()
"""Stands for a value that layers have each their own of."""


def _default(config: PreTrainedConfig, key: str) -> Any:
    try:
        return getattr(config, key, None)
    except AmbiguousGlobalPerLayerAttributeError:
        return _VARYING


def tiny_config(model_type: str, vocabulary: int = VOCABULARY) -> PreTrainedConfig:
    """A config with two layers of 32 channels."""
    kind = CONFIG_MAPPING[model_type]
    config: PreTrainedConfig = kind(**_values(kind, dict(EXCEPTIONS.get(model_type, {})), vocabulary))
    return config


def random_model(model_type: str, auto: Any = AutoModelForCausalLM, vocabulary: int = VOCABULARY) -> PreTrainedModel:
    """The family's model with random numbers everywhere, in norms and biases, too, of one of transformers' auto classes."""
    torch.manual_seed(0)
    model: PreTrainedModel = auto.from_config(tiny_config(model_type, vocabulary), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def write(model_type: str, path: Path) -> Path:
    """A directory of it, as transformers saves it, with the family's own config."""
    model, config = random_model(model_type), tiny_config(model_type)
    model.save_pretrained(path)
    if type(config) is not type(model.config):  # a part of a larger family's config, which its checkpoints have
        config.save_pretrained(path)
    return path


def logits(model: PreTrainedModel) -> Tensor:
    """Of twelve tokens. The last bit of a product depends on where its factors lie, and those that transformers read lie
    in the mapped file: so they are moved."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    with torch.no_grad():
        found: Tensor = model(input_ids=torch.arange(12)[None] * 5 % 90, use_cache=False).logits
    return found


def differences(ours: PreTrainedModel, theirs: PreTrainedModel) -> list[str]:
    """Names of parameters and buffers, those that no file holds among them, that are not the same bits; and of ties."""
    found = [] if type(ours) is type(theirs) else [type(ours).__name__]
    for one, two in (
        (ours.state_dict(), theirs.state_dict()),
        (dict(ours.named_buffers()), dict(theirs.named_buffers())),
    ):
        found += sorted(one.keys() ^ two.keys())
        found += [n for n in one.keys() & two.keys() if one[n].dtype != two[n].dtype or not torch.equal(one[n], two[n])]
    return found + sorted(ours.all_tied_weights_keys.items() ^ theirs.all_tied_weights_keys.items())
