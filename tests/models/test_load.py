"""Loading quantizes while it reads: the same layers as `prepare` makes, in little more memory than they take."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.layers.linear import QuantEmbedding, QuantLinear
from trimtab.layers.weights import AffineWeight, DenseWeight
from trimtab.methods import Lora, LrQat, Method, QaHira, Qat, QBara, Rtn
from trimtab.models.load import load, load_float
from trimtab.models.prepare import prepare
from trimtab.models.sources import open_source
from trimtab.models.transformers_bridge import quant_layers

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "gemma3": Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
}
IDS = torch.arange(24).view(2, 12) * 11 % 250
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
FOUR: dict[str, Any] = {"match": "*", "grid": {"bits": 4, "group": 32, "zero": "integer"}}


def write(path: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A random model directory; biases are not zero and norms not one."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(path, **options)
    tiny.tokenizer().save_pretrained(path)
    return path


def theirs(path: Path, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def logits(model: PreTrainedModel) -> Tensor:
    assert not model.training
    with torch.no_grad():
        return model(IDS).logits


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {name: write(root / name.replace(", ", "-"), name) for name in CONFIGS}
    made["sharded"] = write(root / "sharded", max_shard_size="200KB")
    assert len(list(made["sharded"].glob("model-*.safetensors"))) > 1
    assert (made["sharded"] / "model.safetensors.index.json").exists()
    return made


EVERY = [*CONFIGS, "sharded"]


# ---- the float model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_the_float_model_is_that_of_transformers(name: str, dtype: torch.dtype, paths: dict[str, Path]) -> None:
    ours, expected = load_float(str(paths[name]), dtype=dtype), theirs(paths[name], dtype)
    assert torch.equal(logits(ours), logits(expected))
    state = ours.state_dict()
    assert state.keys() == expected.state_dict().keys()
    for key, tensor in expected.state_dict().items():
        assert state[key].dtype == tensor.dtype
        assert torch.equal(state[key], tensor), key
    tied = CONFIGS.get(name, CONFIGS["llama"]).tie_word_embeddings
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) == tied
    assert not any(p.requires_grad for p in ours.parameters())


def test_a_sharded_model_is_the_same_model(paths: dict[str, Path]) -> None:
    assert torch.equal(logits(load_float(str(paths["sharded"]))), logits(load_float(str(paths["llama"]))))


# ---- the prepared model --------------------------------------------------------------------------------------------

# method, rules, model
LOADS: dict[str, tuple[Method, list[dict[str, Any]] | None, str]] = {
    "rtn": (Rtn(), [FOUR], "llama"),
    "no rules": (Rtn(), None, "sharded"),
    "biases": (LrQat(rank=2), [{"match": "*.[01].*", "grid": {"bits": 3, "group": 16}}], "qwen2"),
    "tied": (LrQat(rank=2), [EMBEDDING, FOUR], "llama, tied"),
    "tied in float": (QaHira(), [FOUR], "llama, tied"),
    "gemma": (QBara(rank=2), [EMBEDDING, {"match": "*", "grid": {"codebook": "nf4", "group": 32}}], "gemma3"),
    "qat": (Qat(), [{"match": "*", "grid": {"bits": 2, "zero": "real"}}], "sharded"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LOADS)
def test_loading_is_preparing_in_memory(name: str, dtype: torch.dtype, paths: dict[str, Path]) -> None:
    """Every tensor, whether code, scale or bias, is the same; A is random, so it gets the same seed."""
    method, rules, path = LOADS[name]
    torch.manual_seed(1)
    ours, _ = load(str(paths[path]), method, rules, dtype=dtype)
    torch.manual_seed(1)
    # Codes come from the numbers in the file; what stays float is cast afterwards.
    expected = prepare(theirs(paths[path], torch.bfloat16), method, rules)
    state, wanted = ours.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    stored = {f"{n}.{k}" for n, layer in quant_layers(ours).items() for k in layer.state_dict() if k != "bias"}
    for key, tensor in wanted.items():
        assert torch.equal(state[key], tensor if key in stored else tensor.to(dtype)), key
        assert state[key].dtype == (tensor.dtype if key in stored else dtype), key
    asking = {n for n, p in expected.named_parameters() if p.requires_grad}
    assert {n for n, p in ours.named_parameters() if p.requires_grad} == asking
    layers, others = quant_layers(ours), quant_layers(expected)
    assert {n: type(layer) for n, layer in layers.items()} == {n: type(layer) for n, layer in others.items()}
    assert ours.config.quantization_config.layers.keys() == layers.keys()
    if dtype == torch.bfloat16:
        assert [layer.spec() for layer in layers.values()] == [layer.spec() for layer in others.values()]
        assert torch.equal(logits(ours), logits(expected))


@pytest.mark.parametrize("name", EVERY)
def test_untouched_layers_are_those_of_transformers(name: str, paths: dict[str, Path]) -> None:
    """Only one layer has a grid: with its weight put back, the logits are those of the float model, bit for bit."""
    only = "model.layers.1.mlp.up_proj"
    rules = [{"match": only, "grid": {"bits": 4, "group": 32}}, {"match": "*", "grid": None}]
    model, _ = load(str(paths[name]), Rtn(), rules, dtype=torch.float32)
    expected = theirs(paths[name], torch.float32)
    assert list(quant_layers(model)) == [only]
    seen: list[tuple[Tensor, Tensor]] = []
    for m in (model, expected):
        m.get_submodule(only).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ours, exact = logits(model), logits(expected)
    assert torch.equal(seen[0], seen[1])  # all that comes before the layer
    assert not torch.equal(ours, exact)
    expected.get_submodule(only).weight.data = model.get_submodule(only).dequantize(torch.float32)
    assert torch.equal(ours, logits(expected))
    model.set_submodule(only, theirs(paths[name], torch.float32).get_submodule(only))
    assert torch.equal(logits(model), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama, tied", "gemma3"])
def test_an_8_bit_embedding_serves_both_ends(name: str, dtype: torch.dtype, paths: dict[str, Path]) -> None:
    """Rows and tied head are those of the dequantized matrix; Gemma multiplies rows by sqrt(K) but not the head."""
    model, _ = load(str(paths[name]), Rtn(), [EMBEDDING], dtype=dtype)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    assert isinstance(head, QuantLinear)
    assert head.tied
    assert head.base is embedding.base
    assert (embedding.scale is not None) == (name == "gemma3")
    expected = theirs(paths[name], dtype)
    exact = expected.lm_head.weight.detach().float()
    stored = embedding.base.dequantize(torch.float32)
    assert 0 < (stored - exact).norm() / exact.norm() < 0.01
    expected.lm_head.weight.data = stored.to(dtype)
    assert expected.model.embed_tokens.weight is expected.lm_head.weight
    assert torch.equal(embedding(IDS), expected.model.embed_tokens(IDS))
    assert torch.equal(logits(model), logits(expected))


def test_the_tokenizer_comes_along(paths: dict[str, Path]) -> None:
    _, kept = load(str(paths["llama"]), Rtn())
    assert kept.eos_token_id == 256
    assert kept.get_vocab() == tiny.tokenizer().get_vocab()


def test_a_loaded_model_is_saved_and_loaded_again(paths: dict[str, Path], tmp_path: Path) -> None:
    model, kept = load(str(paths["llama, tied"]), Rtn(), [EMBEDDING, FOUR])
    tt.save(model, tmp_path / "saved", kept)
    again, tokens = load(str(tmp_path / "saved"))
    assert torch.equal(logits(again), logits(model))
    assert tokens.get_vocab() == kept.get_vocab()
    with pytest.raises(UserError, match="saved by trimtab"):
        load_float(str(tmp_path / "saved"))


@pytest.mark.parametrize("start", [None, tt.Gptq(tokens=IDS)], ids=["rtn", "gptq"])
def test_the_error_of_rounding_is_measured_where_weights_pass_by(
    start: tt.Gptq | None, paths: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the file; each weight is read once, and compared in parts."""
    monkeypatch.setattr("trimtab.models.weight_error._ROWS", 100)
    source, read, errors = open_source(str(paths["llama"])), list[str](), dict[str, float]()
    real = type(source).read
    monkeypatch.setattr(
        type(source), "read", lambda self, name, *a, **o: read.append(name) or real(self, name, *a, **o)
    )
    model, _ = load(
        str(paths["llama"]), LrQat(rank=4), [EMBEDDING, FOUR], source=source, start=start, errors=errors, quiet=True
    )
    assert start is not None or len(read) == len(set(read)), "GPTQ has every block in float before it rounds it"
    given = load_file(paths["llama"] / "model.safetensors")
    assert set(errors) == {name for name, layer in quant_layers(model).items() if layer.base.grid is not None}
    for name, error in errors.items():
        stored, true = (
            quant_layers(model)[name].base.dequantize(torch.float32),
            given[f"{name}.weight"].float(),
        )
        assert error == pytest.approx(((stored - true).norm() / true.norm()).item(), rel=1e-4)


def test_a_layer_kept_in_float_is_a_dense_weight(paths: dict[str, Path]) -> None:
    rules = [{"match": "*.1.*_proj", "grid": "float"}, {"match": "*", "grid": None}]
    model, _ = load(str(paths["llama"]), Lora(rank=2), rules, dtype=torch.bfloat16)
    assert [type(layer.base) for layer in quant_layers(model).values()] == [DenseWeight] * 7
    assert torch.equal(logits(model), logits(theirs(paths["llama"], torch.bfloat16)))


# ---- what loading must not lose or borrow --------------------------------------------------------------------------


@pytest.mark.parametrize(("stored", "dtype"), [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_dense_base_has_the_compute_dtype(stored: torch.dtype, dtype: torch.dtype, tmp_path: Path) -> None:
    model, _ = load(str(write(tmp_path / "model", dtype=stored)), Lora(rank=2), dtype=dtype)
    assert {layer.base.weight.dtype for layer in quant_layers(model).values()} == {dtype}


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("method", [Lora(rank=2), Qat()], ids=lambda m: m.name)
def test_a_loaded_model_does_not_depend_on_its_file(method: Method, tmp_path: Path) -> None:
    """Else writing over the file would change the model in memory, and truncating it would end the process."""
    path = write(tmp_path / "model", dtype=torch.float32)
    model, _ = load(str(path), method, dtype=torch.float32)
    assert any(p.requires_grad for p in model.parameters())
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_the_generation_config_is_kept(paths: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(paths["llama"], tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9], "do_sample": True, "top_k": 3}))
    for model in (load(str(path), Rtn())[0], load_float(str(path))):
        assert model.generation_config.eos_token_id == [7, 9]
        assert model.generation_config.top_k == 3


def test_rules_on_a_saved_model_are_not_ignored(paths: dict[str, Path], tmp_path: Path) -> None:
    model, kept = load(str(paths["llama"]), Rtn(), [FOUR])
    tt.save(model, tmp_path / "saved", kept)
    again, _ = load(str(tmp_path / "saved"), rules=[{"match": "*", "grid": {"bits": 2, "group": 32}}])
    base = quant_layers(again)["model.layers.0.self_attn.q_proj"].base
    assert isinstance(base, AffineWeight)
    assert base.grid.bits == 2


# ---- what can be wrong ---------------------------------------------------------------------------------------------

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def broken(paths: dict[str, Path], tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(paths["llama"], tmp_path / "broken")


def rewrite(path: Path, tensors: dict[str, Tensor | None]) -> None:
    """Put these tensors in place of what the file has; None leaves one out."""
    file = path / "model.safetensors"
    changed = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, file, {"format": "pt"})


def both_refuse(path: Path | str, match: str, rules: list[dict[str, Any]] | None = None) -> None:
    """Loading refuses, with and without quantizing."""
    for attempt in (lambda: load(str(path), Rtn(), rules), lambda: load_float(str(path))):
        with pytest.raises(UserError, match=match):
            attempt()


@pytest.mark.parametrize("name", [UP, "model.norm.weight", "lm_head.weight"])
def test_a_missing_tensor_is_named(name: str, broken: Path) -> None:
    rewrite(broken, {name: None})
    both_refuse(broken, rf"broken: no tensor {name} in its safetensors")


@pytest.mark.parametrize(("name", "shape"), [(UP, (96, 64)), (UP, (128, 32)), ("model.norm.weight", (60,))])
def test_a_tensor_of_another_shape_is_named(name: str, shape: tuple[int, ...], broken: Path) -> None:
    rewrite(broken, {name: torch.zeros(shape)})
    both_refuse(broken, rf"broken: {name} has shape .*, the config says")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, "model.norm.weight"])
def test_a_tensor_that_is_not_finite_is_named(name: str, value: float, broken: Path) -> None:
    tensor = load_file(broken / "model.safetensors")[name]
    tensor.view(-1)[5] = value
    rewrite(broken, {name: tensor})
    both_refuse(broken, f"{name}: holds NaN or infinite values")


@pytest.mark.parametrize("size", [0, 7, 500, -1])
def test_a_truncated_file_is_named(size: int, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    both_refuse(broken, r"model\.safetensors: truncated or not a safetensors file")


def test_a_missing_shard_is_named(paths: dict[str, Path], tmp_path: Path) -> None:
    path = shutil.copytree(paths["sharded"], tmp_path / "sharded")
    shard = sorted(path.glob("model-*.safetensors"))[1]
    shard.unlink()
    both_refuse(path, rf"sharded: tensor .* should be in {shard.name}, which is missing it")
    (path / "model.safetensors.index.json").write_text("{")
    both_refuse(path, r"model\.safetensors\.index\.json: not valid JSON")


def test_pickled_weights_are_refused(broken: Path) -> None:
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    both_refuse(broken, r"broken: only pickled weights \(pytorch_model\.bin\).*save_pretrained")


def test_a_directory_without_weights_or_config(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    both_refuse(broken, r"broken: holds no \.safetensors file")
    (broken / "config.json").write_text("{not json")
    both_refuse(broken, r"config\.json: not valid JSON")
    (broken / "config.json").unlink()
    both_refuse(broken, r"broken: no config\.json in it")


def test_a_model_quantized_by_others_is_refused(broken: Path) -> None:
    config = json.loads((broken / "config.json").read_text())
    for by, why in {
        "quanto": "broken: already quantized by quanto; start from the float model",
        "gptq": "broken: its quantization_config says gptq, and no layer in its files is stored so",
    }.items():
        config["quantization_config"] = {"quant_method": by, "bits": 4}
        (broken / "config.json").write_text(json.dumps(config))
        both_refuse(broken, why)


def test_a_group_that_does_not_fit_is_named(paths: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.q_proj: group 48 does not divide the 64"):
        load(str(paths["llama"]), Rtn(), [{"match": "*", "grid": {"bits": 4, "group": 48}}])


def test_a_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from huggingface_hub import constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what the variable is when the library is imported
    both_refuse("nobody/no-such-model", "model.path: nobody/no-such-model: no such directory, and the hub did not give")


@pytest.mark.parametrize("path", ["./absent", "absent", "/absent/model", "a/b/c", "absent/model.gguf"])
def test_a_path_that_does_not_exist_is_never_asked_of_the_hub(path: str) -> None:
    both_refuse(path, "no such file or directory")


def test_a_file_is_no_model(paths: dict[str, Path]) -> None:
    both_refuse(paths["llama"] / "model.safetensors", r"a model is a directory or a \.gguf file")
