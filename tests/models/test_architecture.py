"""Descriptions of families against the models themselves, and what the description of any other model says and refuses."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from trimtab.bit_search import sensitivity
from trimtab.bit_search.space import units
from trimtab.errors import UserError
from trimtab.formats.gguf import families
from trimtab.formats.mlx.write import config_keys
from trimtab.models import decoder
from trimtab.models.architecture import FAMILIES, FUSED, Architecture, architecture_of
from trimtab.models.asked import rope, softcap, windowed
from trimtab.models.head import AfterHead, after_head
from trimtab.models.in_llama_cpp import GGUF
from trimtab.pruning import structures
from trimtab.quant.grid import Grid

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
WINDOW = 5
QWEN: dict[str, Any] = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2}
GEMMA: dict[str, Any] = {"sliding_window": WINDOW, "query_pre_attn_scalar": 8, "final_logit_softcapping": 2.0}
KINDS = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "smollm3": SmolLM3Config(**SIZES, use_sliding_window=True, sliding_window=WINDOW, no_rope_layers=[1, 0, 1, 0]),
    "qwen2": Qwen2Config(**SIZES, **QWEN),
    "qwen3": Qwen3Config(**SIZES, head_dim=8, **QWEN),
    "gemma": GemmaConfig(**SIZES, head_dim=8),
    "gemma2": Gemma2Config(**SIZES, head_dim=8, **GEMMA),
    "gemma3_text": Gemma3TextConfig(**SIZES, head_dim=8, **GEMMA, layer_types=KINDS),
}
WINDOWS = {
    "mistral": [True] * 4,
    "smollm3": [False, True, False, True],
    "qwen2": [False, False, True, True],
    "qwen3": [False, False, True, True],
    "gemma2": [True, False, True, False],
    "gemma3_text": [True, False, False, True],
}
OTHERS: dict[str, Any] = {
    "gpt_neox": GPTNeoXConfig(
        vocab_size=90, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4
    ),
    "opt": OPTConfig(
        vocab_size=90, hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, word_embed_proj_dim=32
    ),
    "granite": GraniteConfig(**SIZES, logits_scaling=4.0),
}
LISTS = {"gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers", "granite": "model.layers"}
IDS = torch.arange(24).view(2, 12) * 7 % 90
each = pytest.mark.parametrize("name", FAMILIES)
other = pytest.mark.parametrize("name", OTHERS)


def random_model(config: Any) -> Any:
    """In double precision, so that what is equal is equal to many digits; every parameter random."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).double().eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    return model


def skeleton(config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config))


def inputs_of(model: Any, modules: dict[str, nn.Module]) -> tuple[dict[str, tuple[Any, dict[str, Any]]], Tensor]:
    """What each module is called with, (first argument, keywords), and the logits."""
    seen: dict[str, tuple[Any, dict[str, Any]]] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen[name] = args[0], kwargs

        return hook

    hooks = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in modules.items()]
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits
    for hook in hooks:
        hook.remove()
    return seen, logits


def last_part(name: str) -> str:
    return name.rpartition(".")[2]


# ---- families -------------------------------------------------------------------------------------------------------


def test_every_family_is_tried() -> None:
    assert list(CONFIGS) == list(FAMILIES)
    assert all(config.model_type == name for name, config in CONFIGS.items())
    assert all(family.model_type == name and family.known for name, family in FAMILIES.items())


@each
def test_a_model_and_its_config_have_one_description(name: str) -> None:
    assert architecture_of(CONFIGS[name]) is architecture_of(skeleton(CONFIGS[name])) is FAMILIES[name]


@each
def test_blocks_hold_all_layers_but_the_head(name: str) -> None:
    model: Any = skeleton(CONFIGS[name])
    names = decoder.block_names(model)
    assert [model.get_submodule(n) for n in names] == list(decoder.blocks(model)) == list(model.model.layers)
    outside = [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and not n.startswith(tuple(f"{b}." for b in names))
    ]
    assert outside == ["lm_head"]


@each
def test_the_derived_description_finds_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A family that is not in the table yet."""
    known, model = FAMILIES[name], skeleton(CONFIGS[name])
    monkeypatch.setattr("trimtab.models.architecture.FAMILIES", {})
    derived = architecture_of(model)
    assert not derived.known
    assert (derived.blocks, derived.norm, derived.fused) == (known.blocks, known.norm, known.fused)
    assert (derived.attention, derived.mlp, derived.by_layer) == (known.attention, known.mlp, known.by_layer)


@each
def test_fused_layers_are_there_and_given_the_same_input(name: str) -> None:
    model, family = random_model(CONFIGS[name]), FAMILIES[name]
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not model.lm_head}
    seen, _ = inputs_of(model, linears)
    for block in decoder.block_names(model):
        inside = [n for n in linears if n.startswith(f"{block}.")]
        for group, parts in family.fused.items():
            together = [n for n in inside if last_part(n) in parts]
            assert sorted(last_part(n) for n in together) == sorted(parts)
            assert len({linears[n].in_features for n in together}) == 1
            assert len({id(seen[n][0]) for n in together}) == 1
            assert all(family.fusion(n) == (group, parts) for n in together)
        apart = {id(seen[n][0]) for n in inside if family.fusion(n)[0] not in family.fused}
        assert len(apart) == 2  # of what leads out of attention and out of the MLP
        assert not apart & {id(seen[n][0]) for n in inside if family.fusion(n)[0] in family.fused}


def test_no_layer_is_joined_in_two_ways() -> None:
    names = [part for parts in FUSED for part in parts]
    assert len(set(names)) == len(names)


@each
def test_logits_are_the_head_of_the_final_norm_of_the_last_block(name: str) -> None:
    model = random_model(CONFIGS[name])
    norm, last = decoder.final_norm(model), decoder.blocks(model)[-1]
    seen, logits = inputs_of(model, {"norm": norm, "head": model.get_output_embeddings()})
    left: list[Tensor] = []
    hook = last.register_forward_hook(lambda _, __, out: left.append(out[0] if isinstance(out, tuple) else out))
    inputs_of(model, {})
    hook.remove()
    assert torch.equal(seen["norm"][0], left[0])
    with torch.no_grad():
        hidden = norm(left[0])
        expected = plain = model.get_output_embeddings()(hidden)
    assert torch.equal(seen["head"][0], hidden)
    cap = softcap(model.config)
    if FAMILIES[name].softcap is None:
        assert cap is None
    else:
        assert cap == 2.0
        expected = cap * torch.tanh(plain / cap)
        assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(logits, expected)
    assert after_head(model) == AfterHead(softcap=cap)


@each
def test_keys_of_caps_and_factors_are_those_of_the_config(name: str) -> None:
    keys, family, anything = CONFIGS[name].to_dict(), FAMILIES[name], architecture_of(OTHERS["opt"])
    assert (anything.softcap in keys) == (family.softcap is not None)
    assert (anything.attention_softcap in keys) == (family.attention_softcap is not None)
    assert not keys.keys() & set(anything.logit_factors)
    assert anything.logit_factors
    of_layers = {key for key, value in keys.items() if isinstance(value, list) and len(value) == 4}
    assert of_layers - {"architectures"} <= set(family.by_layer)


@each
def test_the_embedding_is_scaled(name: str) -> None:
    model = random_model(CONFIGS[name])
    embedding = model.get_input_embeddings()
    scale = decoder.embedding_scale(model, embedding)
    assert scale == (pytest.approx(32**0.5) if name.startswith("gemma") else None)
    with torch.no_grad():
        torch.testing.assert_close(embedding(IDS), embedding.weight[IDS] * (scale or 1))


@each
def test_windows_are_seen_by_the_blocks_that_have_one(name: str) -> None:
    """The first token is changed where it enters a block: the last one moves if it sees more than a window."""
    model = random_model(CONFIGS[name])
    blocks = dict(zip(decoder.block_names(model), decoder.blocks(model), strict=True))
    seen, _ = inputs_of(model, blocks)
    hides = []
    for block, module in blocks.items():
        hidden, call = seen[block]
        moved = hidden.clone()
        moved[:, 0] += torch.randn_like(moved[:, 0])
        with torch.no_grad():
            before, after = (o[0] if isinstance(o := module(h, **call), tuple) else o for h in (hidden, moved))
        assert not torch.equal(before[:, 1], after[:, 1])  # well inside every window
        hides.append(torch.equal(before[:, -1], after[:, -1]))
    assert hides == windowed(model.config) == WINDOWS.get(name, [False] * 4)


@each
def test_rope_has_the_frequencies_of_the_model(name: str) -> None:
    model = random_model(CONFIGS[name])
    found = rope(model.config)
    parameters = [found.full, *([] if found.windowed is None else [found.windowed])]
    assert len(parameters) == (2 if name == "gemma3_text" else 1)
    buffers = {n: b.double() for n, b in model.model.rotary_emb.named_buffers() if n.endswith("inv_freq")}
    for kind, some in zip(("full_attention_", "sliding_attention_"), parameters, strict=False):
        held = buffers.get("inv_freq", buffers.get(f"{kind}inv_freq"))
        assert held is not None
        expected = some["rope_theta"] ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        torch.testing.assert_close(held, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", [n for n, family in FAMILIES.items() if family.gguf is not None])
def test_norms_multiply_by_what_gguf_is_told(name: str) -> None:
    """With a weight of zero a norm gives the shift itself, times an input of unit size."""
    model, gguf = random_model(CONFIGS[name]), FAMILIES[name].gguf
    assert gguf is not None
    norm: Any = decoder.final_norm(model)
    with torch.no_grad():
        norm.weight.zero_()
        torch.testing.assert_close(
            norm(torch.ones(32).double()), torch.full((32,), gguf.norm_shift).double(), rtol=1e-4, atol=0
        )


@each
def test_pruning_knows_every_family(name: str) -> None:
    about = structures.layout(skeleton(CONFIGS[name]))
    assert (about.family, about.layers, about.widths) == (FAMILIES[name], 4, structures.Widths(2, 48))


# ---- any other model ------------------------------------------------------------------------------------------------


@other
def test_another_model_has_blocks_and_fused_layers_by_name(name: str) -> None:
    model = skeleton(OTHERS[name])
    found = architecture_of(model)
    assert (found.model_type, found.known, found.gguf, found.mlx) == (name, False, GGUF.get(name), None)
    assert decoder.block_names(model) == [f"{LISTS[name]}.{i}" for i in range(len(decoder.blocks(model)))]
    searched = {u.name: [last_part(n) for n in u.layers] for u in units(model, "fusion")}
    first = {n.removeprefix(f"{LISTS[name]}.0."): layers for n, layers in searched.items() if ".layers.0." in n}
    assert {n: sorted(layers) for n, layers in first.items()} == {
        "gpt_neox": {n: [n] for n in ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")},
        "opt": {"qkv": ["k_proj", "q_proj", "v_proj"], "out": ["out_proj"], "fc1": ["fc1"], "fc2": ["fc2"]},
        "granite": {
            "qkv": ["k_proj", "q_proj", "v_proj"],
            "o": ["o_proj"],
            "gate_up": ["gate_proj", "up_proj"],
            "down": ["down_proj"],
        },
    }[name]  # fmt: skip


def test_another_model_like_llama_has_its_norm_and_says_that_it_scales() -> None:
    model = random_model(OTHERS["granite"])
    norm = decoder.final_norm(model)
    seen, logits = inputs_of(model, {"norm": norm})
    assert after_head(model) == AfterHead(factor=0.25)
    with torch.no_grad():
        torch.testing.assert_close(logits, model.lm_head(norm(seen["norm"][0])) / 4.0)


@pytest.mark.parametrize("name", ["gpt_neox", "opt"])
def test_what_is_not_known_of_another_model_is_refused_by_its_type(name: str) -> None:
    model = random_model(OTHERS[name])
    assert after_head(model) == AfterHead()
    with pytest.raises(UserError, match=f"final norm of {name} models is not known"):
        decoder.final_norm(model)
    with pytest.raises(UserError, match=f"final norm of {name} models is not known"):
        sensitivity.exact(model.float(), units(model, "layer"), [Grid(4, 16)], IDS)
    with pytest.raises(UserError, match=f"GGUF: {name} models are not written; those of llama, mistral, .* are"):
        families.family(model.config)
    with pytest.raises(UserError, match=f"mlx: model type '{name}' was not compared with mlx-lm; tested are llama, "):
        config_keys(model.config)
    refused = {"gpt_neox": "no block with float layers q_proj, k_proj, v_proj, o_proj", "opt": "not a plain decoder"}
    with pytest.raises(UserError, match=refused[name]):
        structures.layout(model)


@other
def test_a_config_alone_does_not_say_where_blocks_are(name: str) -> None:
    found = architecture_of(OTHERS[name])
    assert (found.model_type, found.known, found.blocks, found.norm) == (name, False, None, None)
    assert found.fused == Architecture(model_type="").fused


def test_a_model_without_a_list_is_refused() -> None:
    plain = nn.Sequential(nn.Linear(2, 2))
    assert architecture_of(plain) == architecture_of(nn.Sequential())
    with pytest.raises(UserError, match="Sequential: has no list of decoder blocks"):
        decoder.block_names(plain)


def test_a_model_that_sees_has_the_blocks_of_its_text_decoder() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**SIZES, "head_dim": 8}
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision))  # type: ignore[arg-type]
    assert decoder.block_names(model) == [f"model.language_model.layers.{i}" for i in range(4)]
    assert decoder.final_norm(model) is model.model.language_model.norm
