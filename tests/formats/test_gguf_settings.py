"""What a GGUF file's keys say of its model: all of it reaches the model, or the file is refused by the name of the key.

The oracle of what is written is the float model in memory, read back through `tt.load`; that of what is read, llama.cpp's
own equations, written out here in float64. Queries and keys are scaled up, so that a lost rotation shows.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    Glm4Config,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    OlmoConfig,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

import trimtab as tt
from gguf_models import EOS, FAMILIES, GEMMA, GEMMA4, QWEN2, SIZES, WRITTEN, byte_level_tokenizer, random_model
from trimtab.errors import UserError
from trimtab.formats.gguf import families
from trimtab.formats.gguf.read import GgufSource
from trimtab.formats.gguf.rotary import FREQS, LONG, SHORT
from trimtab.formats.gguf.write import save
from trimtab.methods import Rtn
from trimtab.models.load import load_float

IDS = torch.arange(96).view(2, 48) * 7 % 250
BASE: dict[str, Any] = {"rope_theta": 10000.0}
LINEAR = {**BASE, "rope_type": "linear", "factor": 4.0}
YARN = {**BASE, "rope_type": "yarn", "factor": 128.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
ODD = {**LLAMA3, "low_freq_factor": 1.5, "high_freq_factor": 5.0, "original_max_position_embeddings": 100}
OTHER_BASE = {
    "full_attention": {**BASE, "rope_type": "default"},
    "sliding_attention": {"rope_theta": 500.0, "rope_type": "default"},
}
LOCAL = {**BASE, "rope_type": "default"}
CONFIGS: dict[str, Any] = {
    **FAMILIES,
    "another base": LlamaConfig(**SIZES, rope_parameters={"rope_theta": 5e5, "rope_type": "default"}),
    "linear": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama3": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama3 of odd factors": LlamaConfig(**SIZES, rope_parameters=ODD),
    "yarn": LlamaConfig(**SIZES, rope_parameters=YARN),
    "yarn with another attention": Qwen2Config(**QWEN2, rope_parameters={**YARN, "attention_factor": 1.1}),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "mistral with linear": MistralConfig(**SIZES, sliding_window=None, rope_parameters=LINEAR),
    "qwen3 of small heads": Qwen3Config(**SIZES),
    "qwen3 of odd heads": Qwen3Config(**{**SIZES, "head_dim": 48}, tie_word_embeddings=True),
    "gemma2 with other caps": Gemma2Config(
        **SIZES, **GEMMA, attn_logit_softcapping=5.0, final_logit_softcapping=3.0, rope_parameters=LINEAR
    ),
    "gemma3 with caps": Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 6},
        **GEMMA,
        final_logit_softcapping=3.0,
        rope_parameters={"full_attention": LINEAR, "sliding_attention": LOCAL},
    ),
    "phi3": WRITTEN["phi3"],
    "phi4": WRITTEN["phi4"],
}


EXPERTS: dict[str, Any] = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
EVERY = {**FAMILIES, **WRITTEN}
ONE = [{"match": "*.0.mlp.*up_proj", "grid": {"bits": 8, "group": 32, "scale_dtype": "float16"}}]
RULES = [*ONE, {"match": "*", "grid": None}]


def shown(config: Any) -> PreTrainedModel:
    """A random float32 model whose attention depends on where tokens are, with one layer of codes."""
    model = random_model(config).float()
    for name, p in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            p.data *= 12 if config.model_type == "llama" else 3
    return tt.prepare(model, Rtn(), RULES)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def written(config: Any, folder: Path) -> tuple[PreTrainedModel, Path]:
    model = shown(config)
    save(folder / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    return model, folder / "model.gguf"


@pytest.mark.parametrize("name", CONFIGS)
def test_a_written_file_computes_what_was_trained(name: str, tmp_path: Path) -> None:
    """A GGUF base that loses rope scaling and attention scale, and Qwen3 whose heads are not of 128: both were silent."""
    model, path = written(CONFIGS[name], tmp_path)
    # One frequency in Llama 3's blend leaves its parameters open, up to the rounding of what they give.
    tolerance = {"rtol": 0, "atol": 1e-4 if "odd factors" in name else 0}
    torch.testing.assert_close(logits(load_float(str(path), dtype=torch.float32)), logits(model), **tolerance)
    loaded, _ = tt.load(str(path), rules=RULES, dtype=torch.float32)
    torch.testing.assert_close(logits(loaded), logits(model), **tolerance)
    assert loaded.config.rope_parameters["rope_theta" if "gemma3" not in name else "full_attention"]


# ---- a file of other hands -------------------------------------------------------------------------------------------


def changed(path: Path, keys: Mapping[str, Any] = {}, extra: Mapping[str, np.ndarray] = {}) -> Path:
    """A copy of a file with other keys (None leaves one out) and further tensors."""
    reader = gguf.GGUFReader(path)
    out = path.with_name("changed.gguf")
    writer = gguf.GGUFWriter(out, str(reader.fields["general.architecture"].contents()))
    values = {n: f.contents() for n, f in reader.fields.items() if not n.startswith(("GGUF.", "general.arch"))}
    for key, value in (values | dict(keys)).items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif value is not None:
            writer.add_string(key, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    for name, data in extra.items():
        writer.add_tensor(name, data.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(LlamaConfig(**SIZES), tmp_path_factory.mktemp("llama"))[1]


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 6}, **GEMMA), tmp_path_factory.mktemp("gemma"))[1]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("attention.sliding_window", 16),
        ("attention.sliding_window_pattern", 2),
        ("attention.max_alibi_bias", 8.0),
        ("attention.clamp_kqv", 6.0),
        ("attention.value_length", 16),
        ("attention.layer_norm_epsilon", 1e-5),
        ("attention.temperature_scale", 0.1),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("router_logit_softcapping", 30.0),
        ("logit_scale", 8.0),
        ("residual_scale", 0.25),
        ("embedding_scale", 12.0),
        ("expert_count", 8),
        ("expert_shared_count", 1),
        ("expert_gating_func", 2),
        ("pooling_type", 1),
        ("rope.dimension_count", 64),
        ("rope.freq_base_swa", 500.0),
        ("rope.scaling.alpha", 1000.0),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.scaling.yarn_log_multiplier", 1.0),
        ("use_parallel_residual", True),
        ("swin_norm", True),
        ("of_a_newer_llama_cpp", 3),
    ],
)
def test_a_key_that_no_llama_of_transformers_has_refuses_the_file(llama: Path, key: str, value: Any) -> None:
    path = changed(llama, {f"llama.{key}": value})
    with pytest.raises(UserError, match=rf"changed\.gguf: llama\.({key}|rope\.).*use the model's safetensors"):
        tt.load(str(path), rules=RULES)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.scale", 32**-0.5),
        ("attention.causal", True),
        ("expert_count", 0),
        ("logit_scale", 1.0),
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.scaling.attn_factor", 1.0),
        ("rope.scaling.finetuned", True),
        ("tensor_data_layout", "Meta AI original pth"),
        ("rope.freq_base", None),
        ("vocab_size", None),
        ("attention.value_length", None),
        ("rope.dimension_count", None),
    ],
)
def test_a_key_that_says_nothing_new_is_taken(llama: Path, key: str, value: Any) -> None:
    expected = logits(load_float(str(llama), dtype=torch.float32))
    path = changed(llama, {f"llama.{key}": value})
    assert torch.equal(logits(load_float(str(path), dtype=torch.float32)), expected)


def reference(rope: dict[str, Any]) -> torch.Tensor:
    model = shown(LlamaConfig(**SIZES, rope_parameters=rope))
    return logits(model)


def test_values_for_each_layer_are_refused(llama: Path) -> None:
    with pytest.raises(UserError, match=r"llama\.attention\.head_count_kv .*is one for each layer, which is not read"):
        load_float(str(changed(llama, {"llama.attention.head_count_kv": [2, 2, 1]})))


def test_both_names_of_a_linear_scaling(llama: Path) -> None:
    for keys in (
        {"rope.scaling.factor": 4.0},  # linear is what no type means
        {"rope.scale_linear": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ):
        path = changed(llama, {f"llama.{k}": v for k, v in keys.items()})
        assert torch.equal(logits(load_float(str(path), dtype=torch.float32)), reference(LINEAR)), keys


def converter(rope: dict[str, Any], d: int = 32) -> np.ndarray:
    """`rope_freqs` as llama.cpp's converter makes them of a config, one frequency at a time."""
    out = []
    for i in range(0, d, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / d)
        low = rope["original_max_position_embeddings"] / rope["low_freq_factor"]
        high = rope["original_max_position_embeddings"] / rope["high_freq_factor"]
        if wavelength < high:
            out.append(1.0)
        elif wavelength > low:
            out.append(rope["factor"])
        else:
            smooth = rope["original_max_position_embeddings"] / wavelength - rope["low_freq_factor"]
            smooth /= rope["high_freq_factor"] - rope["low_freq_factor"]
            out.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(out)


@pytest.mark.parametrize("rope", [LLAMA3, ODD, {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 8.0}])
def test_llama3_is_found_again_by_its_divisors(llama: Path, rope: dict[str, Any], tmp_path: Path) -> None:
    """llama.cpp's converter writes no parameter of it, only what the frequencies are divided by."""
    path = changed(llama, {"llama.rope.freq_base": 5e5}, {FREQS: converter(rope)})
    model = load_float(str(path), dtype=torch.float32)
    assert model.config.rope_parameters["rope_type"] == "llama3"
    assert (logits(model) - reference(rope)).abs().max() < 1e-4
    _, own = written(LlamaConfig(**SIZES, rope_parameters=rope), tmp_path)
    ours = next(t.data for t in gguf.GGUFReader(own).tensors if t.name == FREQS)
    np.testing.assert_allclose(ours, converter(rope), rtol=1e-6)


def test_divisors_of_no_known_scaling_refuse_the_file(llama: Path) -> None:
    odd = np.linspace(1, 3, 16) ** 2
    with pytest.raises(UserError, match=r"rope_freqs\.weight: its scaling of rotary frequencies is none that transf"):
        load_float(str(changed(llama, extra={FREQS: odd})))
    with pytest.raises(UserError, match=r"rope_freqs\.weight"):
        load_float(str(changed(llama, {"llama.rope.scaling.factor": 4.0}, {FREQS: converter(LLAMA3)})))
    same = changed(llama, extra={FREQS: np.full(16, 4.0)})
    assert torch.equal(logits(load_float(str(same), dtype=torch.float32)), reference(LINEAR))


def test_longrope_is_read_with_its_factors(llama: Path) -> None:
    short, long = np.linspace(1, 2, 16), np.linspace(1, 9, 16)
    keys = {
        "rope.scaling.type": "longrope",
        "rope.scaling.original_context_length": 16,
        "rope.scaling.attn_factor": 1.2,
    }
    named = {f"llama.{k}": v for k, v in keys.items()}
    with pytest.raises(UserError, match=r"scaling of rotary frequencies is none"):
        load_float(str(changed(llama, named)))
    model = load_float(str(changed(llama, named, {SHORT: short, LONG: long})), dtype=torch.float32)
    found = model.config.rope_parameters
    assert (found["rope_type"], found["attention_factor"]) == ("longrope", pytest.approx(1.2))
    np.testing.assert_allclose(found["long_factor"], long, rtol=1e-6)
    np.testing.assert_allclose(
        model.model.rotary_emb.inv_freq.numpy(), 1e4 ** (-np.arange(0, 32, 2) / 32) / short, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("yarn_beta_fast", 16.0), ("yarn_beta_slow", 2.0), ("yarn_attn_factor", 1.0), ("yarn_ext_factor", 0.5)],
)
def test_keys_of_yarn_that_llama_cpp_does_not_read_here(llama: Path, key: str, value: float) -> None:
    yarn = {"rope.scaling.type": "yarn", "rope.scaling.factor": 128.0, "rope.scaling.original_context_length": 16}
    keys = {f"llama.{k}": v for k, v in yarn.items()}
    assert torch.equal(logits(load_float(str(changed(llama, keys)), dtype=torch.float32)), reference(YARN))
    with pytest.raises(UserError, match=rf"llama\.rope\.scaling\.{key} .*is another than llama\.cpp computes"):
        load_float(str(changed(llama, keys | {f"llama.rope.scaling.{key}": value})))


def test_windows_and_caps_of_gemma(gemma: Path) -> None:
    def config(**keys: Any) -> Any:
        return load_float(str(changed(gemma, {f"gemma3.{k}": v for k, v in keys.items()})), dtype=torch.float32).config

    found = config()
    assert found.query_pre_attn_scalar == 32, "transformers takes 256 for every file"
    assert (found.sliding_window, found.layer_types.count("sliding_attention")) == (16, 5)
    assert config(**{"attention.sliding_window_pattern": 2}).layer_types.count("sliding_attention") == 3
    seen = [True, False, False, True, True, False]
    by_layer = config(**{"attention.sliding_window_pattern": seen}).layer_types
    assert [kind == "sliding_attention" for kind in by_layer] == seen
    assert config(**{"attention.sliding_window": None}).layer_types == ["full_attention"] * 6
    assert config(**{"rope.freq_base_swa": 500.0}).rope_parameters["sliding_attention"]["rope_theta"] == 500
    assert config(final_logit_softcapping=7.0).final_logit_softcapping == 7
    with pytest.raises(UserError, match=r"gemma3\.attention\.scale"):
        config(**{"attention.scale": 1.0})


def test_tensors_that_no_parameter_takes_refuse_the_file(llama: Path) -> None:
    for name in ("blk.0.attn_q_norm.weight", "blk.1.ffn_gate_inp.weight", "per_layer_model_proj.weight"):
        with pytest.raises(UserError, match=rf"tensor {name} is not a parameter of a llama model"):
            load_float(str(changed(llama, extra={name: np.ones(32)})))


def test_a_part_of_a_split_file_is_named(llama: Path) -> None:
    with pytest.raises(UserError, match="is one of 3 parts; join them"):
        load_float(str(changed(llama, {"split.count": 3, "split.no": 0})))


# ---- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        (MistralConfig(**SIZES, sliding_window=8), "sliding_window 8"),
        (Qwen2Config(**QWEN2, rope_parameters=LLAMA3), "rope_type llama3"),
        (Qwen3Config(**SIZES, attention_bias=True), "attention_bias"),
        (Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=None), "attn_logit_softcapping None"),
        (Gemma2Config(**SIZES, **GEMMA, final_logit_softcapping=None), "final_logit_softcapping None"),
        (Gemma3TextConfig(**SIZES, **GEMMA, attn_logit_softcapping=5.0), r"attn_logit_softcapping 5\.0"),
        (LlamaConfig(**SIZES, rope_parameters={**YARN, "truncate": False}), "other rotary frequencies"),
        (LlamaConfig(**SIZES, rope_parameters={**YARN, "beta_fast": 8.0, "beta_slow": 2.0}), "other rotary frequen"),
        (LlamaConfig(**SIZES, rope_parameters={**LINEAR, "partial_rotary_factor": 0.5}), "of which 16 are rotated"),
        (Olmo2Config(**QWEN2, tie_word_embeddings=True), "a head that is the embedding"),
        (OlmoConfig(**QWEN2, attention_bias=True), "attention_bias"),
        (Phi3Config(**QWEN2, sliding_window=16), "sliding_window 16"),
        (Olmo3Config(**QWEN2, rope_parameters=OTHER_BASE), r"rope_theta 500\.0 in layers with a window"),
        (Gemma4TextConfig(**{**GEMMA4, "num_kv_shared_layers": 2}), "num_kv_shared_layers 2"),
        (
            Gemma4TextConfig(**GEMMA4, enable_moe_block=True, num_experts=4, top_k_experts=2, moe_intermediate_size=32),
            "enable_moe_block True",
        ),
        (SmolLM3Config(**QWEN2, no_rope_layers=[1, 1, 0]), r"no_rope_layers \[1, 1, 0\]"),
        (Glm4Config(**SIZES, rope_parameters={**LLAMA3, "partial_rotary_factor": 0.5}), r"rope_type llama3 \(it takes"),
    ],
    ids=str,
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(config: Any, cause: str, tmp_path: Path) -> None:
    """Mistral with a sliding window was exported as exact: llama.cpp's Llama has no window."""
    with pytest.raises(UserError, match=rf"GGUF: .*{cause}"):
        written(config, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", EVERY)
def test_a_field_of_a_config_that_is_not_known_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {*families.family(EVERY[name]).factors.values(), *families._COMPUTED, *families._OF_NO_MATTER}
    assert set(type(EVERY[name])().to_dict()) - known <= {"is_encoder_decoder", *EXPERTS}
    monkeypatch.setattr(families, "_COMPUTED", families._COMPUTED - {"hidden_size"})
    with pytest.raises(UserError, match=r"hidden_size 64, which llama\.cpp does not"):
        written(EVERY[name], tmp_path)


def test_a_tuned_file_keeps_its_keys_and_is_not_written_for_another_model(llama: Path, tmp_path: Path) -> None:
    """The file's `rope_freqs` was copied beside a model that had been trained without it, and parity said exact."""
    path = changed(llama, {"llama.rope.freq_base": 5e5}, {FREQS: converter(LLAMA3)})
    model, _ = tt.load(str(path), Rtn(), [{"match": "*.q_proj", "grid": {"bits": 4, "group": 32}}, *RULES])
    save(tmp_path / "out.gguf", model, None, name="t", source=path)
    before, after = (gguf.GGUFReader(file).fields for file in (path, tmp_path / "out.gguf"))
    kept = {n: f.contents() for n, f in before.items() if n.startswith("llama.")}
    assert {n: f.contents() for n, f in after.items() if n.startswith("llama.")} == kept
    again = load_float(str(tmp_path / "out.gguf"), dtype=torch.bfloat16)
    assert torch.equal(logits(again), logits(model))
    model.config.rope_parameters = {"rope_theta": 5e5, "rope_type": "default"}
    with pytest.raises(UserError, match=r"other rotary frequencies.*rope_freqs.*llama\.cpp would compute another"):
        save(tmp_path / "other.gguf", model, None, name="t", source=path)


# ---- where a text ends -----------------------------------------------------------------------------------------------


def ends(path: Path) -> dict[str, int]:
    fields = gguf.GGUFReader(path).fields
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    return {n.split(".")[-1][:3]: fields[n].contents() for n in names if n in fields}


def test_every_token_at_which_the_model_stops_is_in_the_file(tmp_path: Path) -> None:
    """The end of turns: a tuned model never stopped, since only the tokenizer's own end was written."""
    model, tokenizer = shown(LlamaConfig(**SIZES)), byte_level_tokenizer()
    path = tmp_path / "model.gguf"
    for stops, wanted in (
        (EOS, {"eos": EOS}),
        ([EOS, 7], {"eos": EOS, "eot": 7}),
        ([7, EOS, 9], {"eos": EOS, "eot": 7, "eom": 9}),
        ([7], {"eos": EOS, "eot": 7}),
    ):
        model.generation_config.eos_token_id = stops
        save(path, model, tokenizer, name="t")
        assert ends(path) == wanted
        read = load_float(str(path)).generation_config.eos_token_id
        assert sorted([read] if isinstance(read, int) else read) == sorted(wanted.values())
    model.generation_config.eos_token_id = [EOS, 7, 8, 9]
    with pytest.raises(UserError, match=r"stops at 4 tokens, and a file names three: token 9"):
        save(path, model, tokenizer, name="t")


def test_a_token_that_a_tuned_model_stops_at_is_added_to_its_file(tmp_path: Path) -> None:
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<stop>", "<|im_end|>"]})
    config = LlamaConfig(**{**SIZES, "vocab_size": 264})
    path, out = tmp_path / "model.gguf", tmp_path / "out.gguf"
    save(path, shown(config), tokenizer, name="t")
    model = tt.load(str(path), rules=RULES)[0]
    save(out, model, None, name="t", source=path)
    assert out.read_bytes() == path.read_bytes()
    stop, by_name = tokenizer.convert_tokens_to_ids(["<stop>", "<|im_end|>"])
    model.generation_config.eos_token_id = [EOS, stop, by_name, 7]
    save(out, model, None, name="t", source=path)
    assert ends(out) == {"eos": EOS, "eot": stop}, "7 is a letter; and llama.cpp knows the other by its text"
    assert GgufSource(out).config().eos_token_id == [EOS, stop]
