"""A prepared model among other libraries: its dtype, casts, resizing, trainers, and what a stranger makes of its files."""

import copy
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from trl import SFTConfig, SFTTrainer

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.methods import Lora, LrQat, Rtn
from trimtab.models.prepared import quant_layers

IDS = torch.arange(24).view(2, 12) * 7 % 90
SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
HEAD = {"match": "lm_head", "grid": {"bits": 8, "group": 32}}
FOUR = {"match": "*", "grid": {"bits": 4, "group": 32}}
TIED, UNTIED = [EMBEDDING, FOUR], [EMBEDDING, HEAD, FOUR]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    # its embedding's scale is a buffer, and it has two sets of rotary frequencies
    "gemma": Gemma3TextConfig(
        **SIZES, head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "long": LlamaConfig(
        **SIZES,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        tie_word_embeddings=True,
    ),
}


def made(name: str = "llama", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype).eval()


def prepared(name: str = "llama", dtype: torch.dtype = torch.float32, method: Any = None) -> PreTrainedModel:
    return tt.prepare(made(name, dtype), method or Rtn(), UNTIED if name == "untied" else TIED)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def reloaded(path: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, **options).eval()


# ---- the dtype that it computes in -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rules", [TIED, [FOUR]], ids=["embedding too", "embedding float"])
def test_the_dtype_is_that_which_it_computes_in(rules: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """`model.dtype` of a prepared or reloaded float32 model said bfloat16, that of a scale."""
    model = tt.prepare(made(dtype=dtype), Rtn(), rules)
    tt.save(model, tmp_path / "m")
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for found in (model, reloaded(tmp_path / "m"), tt.load(str(tmp_path / "m"), dtype=dtype)[0], copy.deepcopy(model)):
        assert found.dtype == found.model.dtype == dtype == logits(found).dtype
        assert found.to(other).dtype == found.model.dtype == other == logits(found).dtype
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")


def test_it_stays_what_it_was() -> None:
    """Its class is a subclass of the same name, and copies and pickles are like it."""
    model = prepared()
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.can_generate()
    assert model.config_class is LlamaConfig
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(logits(copied), logits(model))
        assert copied.model.rotary_emb.to(torch.bfloat16).inv_freq is not model.model.rotary_emb.inv_freq
        assert copied.model.rotary_emb.inv_freq.dtype == torch.float32
    out = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert out.shape == (2, 7)


# ---- casts ----------------------------------------------------------------------------------------------------------


def by_data(model: PreTrainedModel) -> None:
    for _, buffer in model.named_buffers():
        if buffer.is_floating_point():
            buffer.data = buffer.data.bfloat16()


def by_parts(model: PreTrainedModel) -> None:
    for module in model.modules():
        if not list(module.children()):
            module.to(torch.bfloat16)


def by_back_and_forth(model: PreTrainedModel) -> None:
    model.to(torch.float16).to(torch.float32)


CASTS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "to bfloat16": lambda m: m.to(torch.bfloat16),
    "to float16": lambda m: m.to(dtype=torch.float16),
    "bfloat16": lambda m: m.bfloat16(),
    "half": lambda m: m.half(),
    "float": lambda m: m.bfloat16().float(),
    "type": lambda m: m.type(torch.bfloat16),
    "double": lambda m: m.double(),
    "the base model": lambda m: m.model.to(torch.bfloat16),
    "parts": by_parts,
    "back and forth": by_back_and_forth,
    "data": by_data,
    "nothing": lambda _: None,
}


@pytest.mark.parametrize("name", ["llama", "gemma", "long"])
@pytest.mark.parametrize("cast", CASTS)
def test_what_is_saved_was_computed_whatever_the_cast(cast: str, name: str, tmp_path: Path) -> None:
    """`.to(bfloat16)` after `prepare` rounded the rotary buffers, so that the reloaded model differed by 0.2."""
    model = prepared(name)
    whole = {n: b.clone() for n, b in model.named_buffers()}
    CASTS[cast](model)
    if cast not in ("data", "the base model", "parts"):
        assert all(torch.equal(b, whole[n]) and b.dtype == whole[n].dtype for n, b in model.named_buffers())
    if cast in ("the base model", "parts"):
        model.to(model.model.embed_tokens.dtype)
    expected = logits(model)
    tt.fold(model)
    tt.save(model, tmp_path / "m")
    again = reloaded(tmp_path / "m")
    assert again.dtype == model.dtype
    assert torch.equal(logits(again), expected)
    again.to(torch.bfloat16)
    tt.save(again, tmp_path / "n")
    assert torch.equal(logits(reloaded(tmp_path / "n")), logits(again))


def test_a_cast_before_preparing_is_saved_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = tt.prepare(made().bfloat16(), Rtn(), TIED)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    tt.save(model, tmp_path / "m")
    assert "model.rotary_emb.inv_freq: is not what" in caplog.text
    config = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 3
    assert "model.rotary_emb.inv_freq" in config["buffers"]
    assert torch.equal(logits(reloaded(tmp_path / "m")), logits(model))
    loaded, _ = tt.load(str(tmp_path / "m"))
    assert torch.equal(logits(loaded), logits(model))


def test_frequencies_that_follow_the_text_are_not_taken_for_a_cast(tmp_path: Path) -> None:
    model = prepared("long")
    with torch.no_grad():
        model(torch.arange(90).view(1, 90))  # longer than the 64 that it was made for: other frequencies from now on
    tt.save(model, tmp_path / "m")
    assert "buffers" not in json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]


# ---- markers --------------------------------------------------------------------------------------------------------

STRANGER = """
import json, sys
import transformers
report = {}
for path in sys.argv[1:]:
    for loader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoModel):
        try:
            loader.from_pretrained(path)
        except Exception as error:
            report[path + " " + loader.__name__] = type(error).__name__
        else:
            report[path + " " + loader.__name__] = "a model"
assert "trimtab" not in sys.modules
print(json.dumps(report))
"""


def gathered(model: PreTrainedModel, path: Path) -> None:
    """What transformers' FSDP path does: a full state from torch's own gathering."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    model.config.save_pretrained(path)
    save_file(state, path / "model.safetensors", {"format": "pt"})


def accelerated(model: PreTrainedModel, path: Path) -> None:
    Accelerator(cpu=True).save_model(model, str(path), max_shard_size="9KB")
    model.config.save_pretrained(path)


def unmarked(model: PreTrainedModel, path: Path) -> None:
    """A state that was gathered parameter by parameter, as DeepSpeed does."""
    model.save_pretrained(path, state_dict={name: p.detach() for name, p in model.named_parameters()})


WAYS: dict[str, Callable[[PreTrainedModel, Path], Any]] = {
    "save": lambda m, p: tt.save(m, p),
    "sharded": lambda m, p: m.save_pretrained(p, max_shard_size="5KB"),
    "state": lambda m, p: m.save_pretrained(p, state_dict=m.state_dict()),
    "by parameters": unmarked,
    "positional": lambda m, p: m.save_pretrained(p, True, m.state_dict()),
    "new format": lambda m, p: m.save_pretrained(p, save_original_format=False),
    "gathered": gathered,
    "accelerate": accelerated,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root, model = tmp_path_factory.mktemp("written"), prepared("untied", method=LrQat(rank=2))
    for name, way in WAYS.items():
        (root / name).mkdir()
        way(model, root / name)
    tensors = load_file(root / "save" / "model.safetensors")
    marked = [n for n, t in tensors.items() if t.shape == (1,) and n.endswith(".weight")]
    for name, dropped in (("no marker", marked), ("one marker", marked[:-1])):
        (root / name).mkdir()
        model.config.save_pretrained(root / name)
        kept = {n: t for n, t in tensors.items() if n not in dropped}
        save_file(kept, root / name / "model.safetensors", {"format": "pt"})
    environment = {**os.environ, "PYTHONPATH": "", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", STRANGER, *(str(root / name) for name in (*WAYS, "no marker", "one marker"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    said: dict[str, set[str]] = {}
    for key, outcome in json.loads(done.stdout.splitlines()[-1]).items():
        said.setdefault(Path(key.rpartition(" ")[0]).name, set()).add(outcome)
    return {"root": root, "model": model, "stranger": said, "marked": marked}


@pytest.mark.parametrize("way", WAYS)
def test_no_way_to_write_a_model_gives_a_stranger_random_weights(way: str, written: dict[str, Any]) -> None:
    """A sharded or gathered `save_pretrained` dropped the tensor that plain transformers fails at."""
    path = written["root"] / way
    assert written["stranger"][way]
    assert "a model" not in written["stranger"][way]
    assert torch.equal(logits(reloaded(path)), logits(written["model"]))
    if way in ("sharded", "accelerate"):
        assert len(list(path.glob("model-*.safetensors"))) > 1
        assert "model.layers.0.mlp.up_proj.weight" in (path / "model.safetensors.index.json").read_text()


def test_without_markers_a_stranger_would_get_a_model(written: dict[str, Any]) -> None:
    """What the markers are for: without any transformers only warns. One is enough, and every layer has one."""
    assert len(written["marked"]) == len(quant_layers(written["model"]))
    assert written["stranger"]["no marker"] == {"a model"}
    assert "a model" not in written["stranger"]["one marker"]


def test_states_are_read_back(written: dict[str, Any]) -> None:
    model, other = written["model"], prepared("untied", method=LrQat(rank=2))
    state = model.state_dict()
    assert state["lm_head.weight"].shape == (1,)
    other.load_state_dict(state)
    set_model_state_dict(other, get_model_state_dict(model))
    assert torch.equal(logits(other), logits(model))
    with pytest.raises(RuntimeError, match=r"q_proj\.weight: is a float weight, and the layer here is stored as"):
        other.load_state_dict(made("untied").state_dict(), strict=False)


# ---- other libraries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "untied"])
def test_a_low_bit_embedding_is_not_resized(name: str) -> None:
    """It gave an AttributeError about `.weight`."""
    model = prepared(name)
    assert isinstance(model.resize_token_embeddings(96), QuantEmbedding)
    assert isinstance(model.resize_token_embeddings(), QuantEmbedding)
    for options in ({"new_num_tokens": 100}, {"new_num_tokens": 96, "pad_to_multiple_of": 64}):
        with pytest.raises(UserError, match=r"^model\.embed_tokens: is quantized with 96 rows.*before it is prep"):
            model.resize_token_embeddings(**options)
    head_only = tt.prepare(made("untied"), Rtn(), [HEAD])
    with pytest.raises(UserError, match=r"^lm_head: is quantized"):
        head_only.resize_token_embeddings(100)
    neither = tt.prepare(made(name), Rtn(), [FOUR])
    neither.resize_token_embeddings(100)
    assert logits(neither).shape[-1] == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "untied"])
def test_only_a_head_has_a_weight(name: str, dtype: torch.dtype) -> None:
    model = prepared(name, dtype)
    head: Any = model.get_output_embeddings()
    x = torch.randn(3, 32, dtype=dtype)
    assert torch.equal(head(x), nn.functional.linear(x, head.weight))
    assert head.weight.dtype == dtype
    model.to(torch.float16)
    assert head.weight.dtype == torch.float16
    assert not hasattr(model.model.embed_tokens, "weight")
    if name == "untied":
        tt.prepare(model, Lora(rank=2))
        assert torch.equal(model.lm_head.weight, model.lm_head.adapter.merged(model.lm_head.base, torch.float16))
        tt.fold(model, merge=True)
        assert model.lm_head.weight.shape == (96, 32)


@pytest.mark.parametrize("name", ["llama", "untied"])
def test_trl_trains_a_model_with_a_low_bit_head(name: str, tmp_path: Path) -> None:
    """`QuantLinear has no .weight`: TRL's losses multiply by the head's weight themselves."""
    torch.manual_seed(0)
    config = copy.deepcopy(CONFIGS[name])
    config.vocab_size = 260
    model = AutoModelForCausalLM.from_config(config)
    rules = [EMBEDDING, {**HEAD, "grid": None}, FOUR] if name == "untied" else TIED
    if name == "untied":  # a head in few bits without an adapter: rounded first, then left alone
        tt.prepare(model, Rtn(), UNTIED)
        rules = [{"match": "lm_head", "grid": None}, {"match": "*embed*", "grid": None}, FOUR]
    tt.prepare(model, LrQat(rank=2), rules)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        expected = model(ids, labels=ids).loss
    rows = Dataset.from_dict({"input_ids": ids.tolist()})
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to=[], use_cpu=True, bf16=False,
        save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, logging_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tiny.tokenizer())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(expected.item(), rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    assert torch.equal(logits(reloaded(tmp_path / "saved")), logits(trainer.model.eval()))
