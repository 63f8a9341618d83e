"""Our GGUF files in llama.cpp itself: the same tokens, and the model's own log-probabilities within the engine's noise.

llama.cpp runs in an environment of its own, whose Python `TRIMTAB_LLAMA_CPP_PYTHON` names (`make test-serving` sets it).
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from trimtab.evaluation import serving
from trimtab.formats.gguf.vocabulary import PRE_TOKENIZERS, vocabulary
from trimtab.formats.gguf.write import save
from trimtab.methods import LrQat, Rtn
from trimtab.models.prepare import fold, prepare
from trimtab.models.transformers_bridge import quant_layers

sys.path.insert(0, str(Path(__file__).parents[1]))
from gguf_models import FAMILIES, GPT2, MIXTURES, QWEN2, SIZES, WRITTEN, byte_level_tokenizer, random_model

PYTHON = os.environ.get("TRIMTAB_LLAMA_CPP_PYTHON")

IDS = torch.arange(96).view(2, 48) * 7 % 250
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS: dict[str, Any] = {
    **FAMILIES,
    **WRITTEN,
    **MIXTURES,
    **GPT2,
    "llama with biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "linear": LlamaConfig(**SIZES, rope_parameters={**ROPE, "rope_type": "linear"}),
    "llama3": LlamaConfig(**SIZES, rope_parameters={**ROPE, **LLAMA3}),
    "yarn": Qwen2Config(**QWEN2, rope_parameters={**ROPE, "rope_type": "yarn", "original_max_position_embeddings": 16}),
}


def test_the_environment_is_there() -> None:
    assert Path(PYTHON or "").is_file(), "run `make test-serving`"


def engine(path: Path) -> Tensor:
    return serving.engine_logprobs(path.parent, "llama.cpp", IDS)


def ours(model: PreTrainedModel) -> Tensor:
    return serving.model_logprobs(model, IDS)


def rms(a: Tensor, b: Tensor) -> float:
    return (a - b).square().mean().sqrt().item()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_family_is_computed_as_transformers_does(name: str, tmp_path: Path) -> None:
    """In float32, so that what is left is the engine's float16 cache: a wrong row, norm or frequency is far above it."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32).eval()
    model.load_state_dict({k: v.float() for k, v in random_model(CONFIGS[name]).state_dict().items()})
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    expected = ours(model)
    assert rms(engine(tmp_path / "model.gguf"), expected) < 2e-3 * expected.std()


FORMS = ((2, "symmetric"), (8, "symmetric"), (3, "integer"), (4, "integer"), (4, "real"), (5, "real"))
"""One for each type of block, and one narrower than its type."""


@pytest.mark.parametrize(("bits", "zero"), FORMS)
def test_a_tuned_model_is_served_within_the_engines_noise(bits: int, zero: str, tmp_path: Path) -> None:
    check_tuned([{"match": "*", "grid": {"bits": bits, "group": 32, "zero": zero}}], tmp_path)


def test_mixed_widths(tmp_path: Path) -> None:
    """2, 3, 4 and 8 bits, a real zero, an embedding of 8 bits and a float layer, each tensor in a type of its own."""
    grids: dict[str, Any] = {
        "model.embed_tokens": {"bits": 8, "group": 32},
        "*.0.self_attn.q_proj": {"bits": 2, "group": 32},
        "*.0.self_attn.*": {"bits": 8, "group": 64},
        "*.0.mlp.down_proj": None,
        "*.0.mlp.*": {"bits": 3, "group": 32, "zero": "integer"},
        "*.1.self_attn.*": {"bits": 4, "group": 32, "zero": "real"},
        "*": {"bits": 4, "group": 32},
    }
    check_tuned([{"match": match, "grid": grid} for match, grid in grids.items()], tmp_path)


def test_tuned_experts(tmp_path: Path) -> None:
    check_tuned([{"match": "*", "grid": {"bits": 4, "group": 32}}], tmp_path, MIXTURES["qwen3_moe"])


def test_a_tuned_model_that_transformers_keeps_transposed(tmp_path: Path) -> None:
    check_tuned(
        [{"match": "*.0.*", "grid": {"bits": 8, "group": 64}}, {"match": "*", "grid": {"bits": 4, "group": 32}}],
        tmp_path,
        GPT2["gpt2"],
    )


def check_tuned(rules: list[dict[str, Any]], tmp_path: Path, config: Any = FAMILIES["llama"]) -> None:
    """The noise is that of the untuned model of the same form, in the same run."""
    differences = []
    for method in (Rtn(), LrQat(rank=4, alpha=64.0)):
        model = prepare(random_model(config).float(), method, rules)
        torch.manual_seed(1)
        for layer in quant_layers(model).values():
            adapter = getattr(layer, "adapter", None)
            for p in () if adapter is None else adapter.parameters():
                p.data += torch.randn_like(p) * p.abs().mean().clamp(min=1e-3) * 0.1
        fold(model)
        file = tmp_path / method.name / "model.gguf"
        file.parent.mkdir()
        save(file, model, byte_level_tokenizer(), name="tiny")
        differences.append(rms(engine(file), ours(model)))
    noise, tuned = differences
    assert 0 < tuned <= 1.5 * noise
    assert noise < 0.05


def test_the_language_model_of_one_that_sees(tmp_path: Path) -> None:
    """Its tensors have the names that they would have by themselves; towers and projector are not in the file."""
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    config = LlavaConfig(text_config=FAMILIES["llama"].to_dict(), vision_config=vision, image_token_index=258)
    model = LlavaForConditionalGeneration(config).eval()
    text = random_model(FAMILIES["llama"])
    model.model.language_model.load_state_dict({k: v.float() for k, v in text.base_model.state_dict().items()})
    model.lm_head.load_state_dict(text.lm_head.state_dict())
    prepare(model, Rtn(), [{"match": "*", "grid": {"bits": 8, "group": 32}}])
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    expected = ours(model)
    assert rms(engine(tmp_path / "model.gguf"), expected) < 2e-2 * expected.std()


def test_four_bit_floats(tmp_path: Path) -> None:
    """MXFP4 in tensors of two dimensions; llama.cpp rounds what it multiplies them with to 8 bits."""
    model = prepare(
        random_model(FAMILIES["llama"]).float(), Rtn(), [{"match": "*", "grid": {"codebook": "mxfp4", "group": 32}}]
    )
    save(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    expected = ours(model)
    assert rms(engine(tmp_path / "model.gguf"), expected) < 2e-2 * expected.std()


# ---- tokens --------------------------------------------------------------------------------------------------------

TEXTS = [
    "The moths, 12 of them: 1234567 don't care; they'll (never) I'M WE'VE stop...",
    "  two spaces\n\n\nthree lines\t tab \r\n end   ",
    "été naïve Straße привет мир 你好世界 日本語 안녕 🙂🚀 x²+y½",
    "def f(x):\n    return {'a': [1, 2.5e-3], \"b\": x/2}  # http://a.b/c?d=e",
]
TOKENIZE = """
import json, sys, llama_cpp
model = llama_cpp.Llama(sys.argv[1], vocab_only=True, verbose=False)
texts = json.loads(sys.argv[2])
print(json.dumps([model.tokenize(t.encode(), add_bos=False, special=True) for t in texts]))
"""


def byte_level(steps: tuple[str, ...], *, whole_words: bool) -> PreTrainedTokenizerFast:
    """A tokenizer trained on the very texts, with a pre-tokenizer of these steps."""
    trained = Tokenizer(models.BPE(ignore_merges=whole_words))
    made: list[Any] = []
    for step in steps:
        kind, _, rest = step.partition(" ")
        if kind == "digits":
            made.append(pre_tokenizers.Digits(individual_digits=True))
        elif kind == "split":
            made.append(pre_tokenizers.Split(Regex(rest), "isolated"))
        else:
            made.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=rest == "regex"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(made)
    trained.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([*TEXTS, "12 123 1234 the them they"] * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<eos>")


def sentencepiece(*, prefix: bool) -> PreTrainedTokenizerFast:
    """Llama 2's form (with a space before the text) or Gemma's, with bytes for what it does not know."""
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizer
    trained.train_from_iterator(TEXTS[:3] * 3, BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    pieces = ["<unk>", "<eos>", *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
    merges = [tuple(m) for m in learned["merges"]]
    model = models.BPE(
        {p: i for i, p in enumerate(pieces)}, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True
    )
    made = Tokenizer(model)
    made.normalizer = normalizer
    made.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<eos>", unk_token="<unk>")


TOKENIZERS = {
    **{known.name: (known.steps, known.whole_words) for known in PRE_TOKENIZERS},
    "sentencepiece with a prefix": True,
    "sentencepiece": False,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_llama_cpp_cuts_text_into_the_same_tokens(name: str, tmp_path: Path) -> None:
    about = TOKENIZERS[name]
    theirs = sentencepiece(prefix=about) if isinstance(about, bool) else byte_level(about[0], whole_words=about[1])
    config = LlamaConfig(**{**SIZES, "vocab_size": len(theirs) + 3, "num_hidden_layers": 1, "bos_token_id": None})
    made = vocabulary(theirs, config.vocab_size, config)
    assert made.pre == (name if isinstance(about, tuple) else "default")
    save(tmp_path / "model.gguf", random_model(config), theirs, name="tiny")
    assert PYTHON is not None
    command = [PYTHON, "-P", "-c", TOKENIZE, str(tmp_path / "model.gguf"), json.dumps([*TEXTS, "a<eos>b"])]
    read = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    for text, ids in zip([*TEXTS, "a<eos>b"], read, strict=True):
        assert ids == theirs(text, add_special_tokens=False).input_ids, text
