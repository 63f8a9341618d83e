"""Which files and which tensors of a folder are the model's: what transformers takes, and what is refused by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import families
import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.methods import LrQat, Rtn
from trimtab.models.load import load, load_float
from trimtab.models.prepare import prepare

GRID = [{"match": "*", "grid": {"bits": 4, "group": 8}}]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A directory of a tiny model of a family, with a tokenizer; made once."""
    root = tmp_path_factory.mktemp("families")

    def make(model_type: str) -> Path:
        path = root / model_type
        if not path.exists():
            families.write(model_type, path)
            tiny.tokenizer().save_pretrained(path)
        return path

    return make


@pytest.fixture
def copied(made: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """A copy of it to damage, by a function from tensors to tensors."""

    def copy(model_type: str, change: Callable[[Tensors], Tensors] = dict) -> Path:
        path = shutil.copytree(made(model_type), tmp_path / model_type)
        file = path / "model.safetensors"
        save_file(change(load_file(file)), file, {"format": "pt"})
        return path

    return copy


def configure(path: Path, **keys: Any) -> None:
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def sharded(path: Path, names: tuple[str, str] = ("a.safetensors", "b.safetensors")) -> dict[str, str]:
    """The file of a folder split into two, with an index, which is returned."""
    tensors = load_file(path / "model.safetensors")
    half = {name: names[i % 2] for i, name in enumerate(sorted(tensors))}
    for file in names:
        save_file({n: t for n, t in tensors.items() if half[n] == file}, path / file, {"format": "pt"})
    (path / "model.safetensors").unlink()
    index(path, half)
    return half


def index(path: Path, listed: dict[str, str]) -> None:
    file = path / "model.safetensors.index.json"
    file.write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def same(path: Path, dtype: torch.dtype = torch.float32) -> None:
    """What we load is what transformers loads."""
    theirs = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    assert not families.differences(load_float(str(path), dtype=dtype), theirs)


def refused(path: Path, match: str) -> None:
    """Both ways to load say the same."""
    for attempt in (lambda: load_float(str(path)), lambda: load(str(path), Rtn(), GRID)):
        with pytest.raises(UserError, match=match):
            attempt()


# ---- which files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [False, True])
def test_a_stray_safetensors_file_is_ignored(split: bool, copied: Callable[..., Path]) -> None:
    """A stray safetensors file beside the model's, or beside the index: the last name used to win."""
    path = copied("llama")
    other = {name: torch.randn_like(t) for name, t in load_file(path / "model.safetensors").items()}
    if split:
        sharded(path)
    for name in ("zz_backup.safetensors", "model-00001-of-00001.safetensors", "adapter_model.safetensors"):
        save_file(other, path / name, {"format": "pt"})
    same(path)


def test_the_whole_file_goes_before_the_index(copied: Callable[..., Path]) -> None:
    path = copied("llama")
    whole = load_file(path / "model.safetensors")
    sharded(path)
    save_file({n: t + 1 for n, t in whole.items()}, path / "model.safetensors", {"format": "pt"})
    same(path)


def test_the_file_that_the_config_names_goes_before_all(copied: Callable[..., Path]) -> None:
    path = copied("llama")
    whole = load_file(path / "model.safetensors")
    save_file({n: t + 1 for n, t in whole.items()}, path / "other.safetensors", {"format": "pt"})
    configure(path, transformers_weights="other.safetensors")
    same(path)


def test_without_an_index_files_are_taken_together(copied: Callable[..., Path]) -> None:
    path = copied("llama")
    whole = load_float(str(path))
    listed = sharded(path)
    (path / "model.safetensors.index.json").unlink()
    assert not families.differences(load_float(str(path)), whole)
    twice = next(n for n, file in listed.items() if file == "a.safetensors")
    file = path / "b.safetensors"
    save_file(load_file(file) | {twice: load_file(path / "a.safetensors")[twice]}, file, {"format": "pt"})
    refused(path, rf"tensor {re.escape(twice)} stands in a\.safetensors and in b\.safetensors")


@pytest.mark.parametrize(
    "elsewhere", ["../other/a.safetensors", "/a.safetensors", "..\\a.safetensors", "C:\\a.safetensors"]
)
def test_an_index_names_no_file_outside_its_folder(elsewhere: str, copied: Callable[..., Path]) -> None:
    path = copied("llama")
    listed = sharded(path)
    index(path, listed | {next(iter(listed)): elsewhere})
    refused(path, r"index\.json names .* which is outside the folder")


def test_a_short_shard_is_named(copied: Callable[..., Path]) -> None:
    path = copied("llama")
    listed = sharded(path)
    gone = next(n for n, file in listed.items() if file == "b.safetensors")
    shard = load_file(path / "b.safetensors")
    del shard[gone]
    save_file(shard, path / "b.safetensors", {"format": "pt"})
    refused(path, rf"tensor {re.escape(gone)} should be in b\.safetensors, which is missing it")


# ---- which tensors --------------------------------------------------------------------------------------------------

BIAS = "model.layers.0.self_attn.q_proj.bias"
Q = "model.layers.0.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    "extra", [BIAS, "model.layers.0.mlp.up_proj.weight_scale", "model.layers.9.mlp.up_proj.weight"]
)
def test_a_tensor_that_the_config_does_not_declare_is_named(extra: str, copied: Callable[..., Path]) -> None:
    """A bias that the config does not declare, scales of weights, a layer too many: transformers only warns."""
    path = copied("llama", lambda tensors: tensors | {extra: torch.ones(32)})
    refused(path, rf"tensor {re.escape(extra)} is not a part of the LlamaForCausalLM")


@pytest.mark.parametrize(
    "kind", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.int32, torch.bool]
)
@pytest.mark.parametrize("name", [Q, "model.norm.weight", "model.embed_tokens.weight"])
def test_numbers_without_their_scale_are_refused(kind: torch.dtype, name: str, copied: Callable[..., Path]) -> None:
    """FP8 or integer weights without a `quantization_config`: the raw values were read."""
    path = copied("llama", lambda tensors: tensors | {name: tensors[name].to(kind)})
    refused(path, rf"model\.safetensors: {re.escape(name)} is stored as .*start from the float model")


@pytest.mark.parametrize("kind", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_floats_of_any_width_are_read(kind: torch.dtype, copied: Callable[..., Path]) -> None:
    same(copied("llama", lambda tensors: tensors | {Q: tensors[Q].to(kind)}))


def test_what_old_checkpoints_hold_beside_the_model_is_ignored(copied: Callable[..., Path]) -> None:
    """By transformers' own lists: frequencies of rotary embeddings, masks of attention."""
    old = {
        "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
        "gpt_neox.layers.0.attention.bias": torch.ones(4),
    }
    rotary = {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}
    same(copied("gpt_neox", lambda tensors: tensors | old | rotary))


@pytest.mark.parametrize("expert", [0, 3])
def test_a_missing_expert_is_named(expert: int, copied: Callable[..., Path]) -> None:
    gone = f"model.layers.1.mlp.experts.{expert}.up_proj.weight"
    path = copied("qwen3_moe", lambda tensors: {n: t for n, t in tensors.items() if n != gone})
    refused(path, rf"no tensor {re.escape(gone)} in its safetensors")


@pytest.mark.parametrize("model_type", ["gpt_neox", "qwen3_moe", "llama4_text", "gemma3"])
def test_a_tensor_of_another_shape_is_named_in_every_layout(model_type: str, copied: Callable[..., Path]) -> None:
    def narrow(tensors: Tensors) -> Tensors:
        name = next(n for n, t in tensors.items() if t.dim() == 2 and "embed" in n)
        return tensors | {name: tensors[name][:, :-1].contiguous()}

    refused(copied(model_type, narrow), r"has shape \(\d+, 31\), the config says \(\d+, 32\)")


def test_two_tensors_for_one_place_are_refused(copied: Callable[..., Path]) -> None:
    path = copied("llama", lambda tensors: tensors | {"layers.0.self_attn.q_proj.weight": tensors[Q] + 1})
    refused(path, "are both model.layers.0.self_attn.q_proj.weight of the model")


def test_names_of_a_model_without_its_head_are_read(copied: Callable[..., Path]) -> None:
    """A base model's checkpoint has no prefix; its embedding is the head."""
    path = copied(
        "gpt2", lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items() if "lm_head" not in n}
    )
    assert "wte.weight" in load_file(path / "model.safetensors")
    same(path)


# ---- ties, buffers, precision ---------------------------------------------------------------------------------------

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("held", ["embedding", "head", "both", "both, but others"])
def test_ties_are_those_of_the_file(held: str, copied: Callable[..., Path]) -> None:
    """What stands twice with other numbers is not tied; what stands under the head's name is the embedding, too."""

    def change(tensors: Tensors) -> Tensors:
        embedding = tensors.pop(EMBEDDING)
        tensors.pop("lm_head.weight", None)
        head = embedding + (held == "both, but others")
        one = {} if held == "head" else {EMBEDDING: embedding}
        return tensors | one | ({} if held == "embedding" else {"lm_head.weight": head})

    path = copied("llama", change)
    configure(path, tie_word_embeddings=True)
    same(path)
    ours = load_float(str(path))
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == (held != "both, but others")


def test_persistent_buffers_are_read(copied: Callable[..., Path]) -> None:
    """The correction of DeepSeek's router is a buffer that files hold; frequencies of rotary embeddings are none."""
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    path = copied("deepseek_v3", lambda tensors: tensors | {name: torch.arange(4.0)})
    assert torch.equal(load_float(str(path)).state_dict()[name], torch.arange(4.0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        same(path, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "model_type", ["gpt_oss", "llama4_text", "deepseek_v3", "mamba2", "longcat_flash", "qwen3_next"]
)
def test_what_a_model_keeps_in_float32_is_kept_as_transformers_keeps_it(
    model_type: str, dtype: torch.dtype, made: Callable[[str], Path]
) -> None:
    same(made(model_type), dtype)


# ---- quantizing while reading ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt_neox", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gemma3", "phi3"])
def test_loading_is_preparing_in_every_layout(model_type: str, made: Callable[[str], Path]) -> None:
    """Checkpoints that were called incomplete: GPT-NeoX (`embed_out`), fused experts, text and vision."""
    path = made(model_type)
    ours, _ = load(str(path), LrQat(rank=2), GRID, dtype=torch.float32)
    theirs = prepare(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), LrQat(rank=2), GRID)
    one, two = ours.state_dict(), theirs.state_dict()
    assert one.keys() == two.keys()
    assert not [n for n in one if "adapter" not in n and not torch.equal(one[n], two[n])]


@pytest.mark.parametrize(
    ("model_type", "match"),
    [
        ("gpt_neox", "*"),
        ("mixtral", "*"),
        ("qwen3_5", "*"),
        ("gemma3", "model.language_model.*"),
        ("got_ocr2", "model.language_model.*"),
    ],
)
def test_what_is_saved_is_loaded_again(
    model_type: str, match: str, made: Callable[[str], Path], tmp_path: Path
) -> None:
    """A vision-language model was trained, folded and saved, and could not be loaded again."""
    rules = [{"match": match, "grid": {"bits": 4}}, {"match": "*", "grid": None}]
    model, tokenizer = load(str(made(model_type)), Rtn(), rules, dtype=torch.float32)
    expected = families.logits(model)
    tt.save(model, tmp_path / "saved", tokenizer)
    again, _ = load(str(tmp_path / "saved"), dtype=torch.float32)
    assert torch.equal(families.logits(again), expected)
    file = tmp_path / "saved" / "model.safetensors"
    tensors = load_file(file)
    for changed, said in (
        (dict(list(tensors.items())[1:]), "no tensor"),
        (tensors | {"stray": torch.ones(2)}, "stray"),
    ):
        save_file(changed, file, {"format": "pt"})
        with pytest.raises(UserError, match=said):
            load(str(tmp_path / "saved"), dtype=torch.float32, verify=False)


@pytest.mark.parametrize("model_type", ["emu3", "mllama"])
def test_what_could_not_be_loaded_again_is_refused(model_type: str, made: Callable[[str], Path]) -> None:
    with pytest.raises(UserError, match="what is saved of it could not be loaded again"):
        load(str(made(model_type)), Rtn(), GRID)


# ---- whose it is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "by"),
    [
        ({"text_config": {"quantization": {"bits": 4}}}, "MLX"),
        ({"quantization_config": {"quant_method": "quanto"}}, "quanto"),
        ({"quantization_config": {"bits": 4}}, "a library that it does not name"),
        ({"compression_config": {"format": "int-quantized"}}, "compressed-tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
    ],
)
def test_who_quantized_a_model_is_named(keys: dict[str, Any], by: str, copied: Callable[..., Path]) -> None:
    """Our own MLX export as a base was "already quantized by None"."""
    path = copied("llama")
    configure(path, **keys)
    refused(path, f"already quantized by {by}; start from the float model")


@pytest.mark.parametrize(
    "keys", [{"quantization": {"group_size": 64, "bits": 4}}, {"quantization_config": {"quant_method": "gptq"}}]
)
def test_a_config_that_belongs_to_other_weights(keys: dict[str, Any], copied: Callable[..., Path]) -> None:
    path = copied("llama")
    configure(path, **keys)
    refused(path, "no layer in its files is stored so|quantization_config")


def test_an_adapter_beside_the_model_is_refused(copied: Callable[..., Path]) -> None:
    """transformers would load it with the model."""
    path = copied("llama")
    (path / "adapter_config.json").write_text("{}")
    refused(path, "holds an adapter beside the model")


def test_a_class_that_is_no_language_model_is_named(copied: Callable[..., Path]) -> None:
    path = copied("llama")
    configure(path, model_type="siglip", architectures=["SiglipModel"])
    refused(path, r"neither AutoModelForCausalLM nor AutoModelForMultimodalLM takes SiglipModel \(model_type siglip\)")


def test_a_layer_whose_name_would_not_last_is_refused(tmp_path: Path) -> None:
    """Of one called `weight_proj` transformers saves `weight_proj.weight` as `weight_proj`; ours was not found again."""
    model = families.random_model("inkling2_text")
    before = dict(model.named_modules())
    with pytest.raises(UserError, match=r"weight_proj: transformers renames it while saving .*grid: null"):
        tt.prepare(model, Rtn(), [{"match": "*", "grid": {"bits": 4}}])
    assert dict(model.named_modules()) == before
    rules = [{"match": "*.weight_proj", "grid": None}, {"match": "*", "grid": {"bits": 4}}]
    expected = families.logits(tt.prepare(model, Rtn(), rules))
    tt.save(model, tmp_path / "saved")
    assert torch.equal(families.logits(tt.load(str(tmp_path / "saved"), dtype=model.dtype)[0]), expected)
