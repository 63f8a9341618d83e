"""Layers that a family keeps transposed (GPT-2's Conv1D) in other libraries' formats, by these libraries where they are."""

import json
import warnings
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from test_export_gptq import unpacked
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from exported import linears, tensors, write
from gguf_models import GPT2, byte_level_tokenizer, random_model
from transposed import CONFIGS, FIRST, FOUR, close, logits, plain, read, saved, shake, turned
from trimtab.errors import UserError
from trimtab.formats.compressed_tensors import write as compressed_tensors
from trimtab.formats.export_size import export_sizes
from trimtab.formats.gguf.write import save as save_gguf
from trimtab.methods import Lora, LrQat, Method, Peqa, QBara, Qlora, Rtn
from trimtab.models import sources
from trimtab.models.load import load_float
from trimtab.models.packed import PackedSource
from trimtab.models.prepare import prepare_meta
from trimtab.models.sources import open_source
from trimtab.models.targets import targets
from trimtab.models.with_adapter import load_model
from trimtab.recipe.rules import parse_rules

# ---- GPTQ ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_gptq_holds_codes_along_the_inputs(name: str, tmp_path: Path) -> None:
    """Its loops take the matrix of a Conv1D turned, so the words are those of a linear layer: (K b / 32, N)."""
    rules = [{"match": "*.0.mlp.c_fc", "grid": None}, *FOUR]
    model = tt.prepare(turned(name), Rtn(), rules)
    assert write(model, "gptq", tmp_path / "out").kind == "exact"
    stored, theirs = tensors(tmp_path / "out"), turned(name)
    assert stored[f"{FIRST}.qweight"].shape == (32 * 4 // 32, 96)
    for own, layer in linears(model).items():
        codes_KN = unpacked(stored[f"{own}.qweight"].numpy(), 4).astype(np.float64)
        groups, scales = stored[f"{own}.g_idx"].numpy(), stored[f"{own}.scales"].numpy().astype(np.float64)
        weight_KN = scales[groups] * (codes_KN - 8)
        assert np.array_equal(weight_KN, layer.dequantize(torch.float64).numpy().T)
        assert weight_KN.shape == theirs.get_submodule(own).weight.shape  # type: ignore[union-attr]
    left = "transformer.h.0.mlp.c_fc"
    assert torch.equal(stored[f"{left}.weight"], theirs.get_submodule(left).weight)  # type: ignore[arg-type]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert any(left.replace(".", r"\.") in pattern for pattern in config["dynamic"])


@pytest.mark.parametrize("name", CONFIGS)
def test_what_a_lossy_export_changes_lies_as_it_lay(name: str, tmp_path: Path) -> None:
    """A square matrix above all, which would be read either way."""
    square = "transformer.h.0.attn.c_proj"
    model = tt.prepare(turned(name), Rtn(), [{"match": square, "grid": {"codebook": "nf4", "group": 32}}, *FOUR])
    assert write(model, "gptq", tmp_path / "gptq", allow_lossy=True).kind == "lossy"
    whole = linears(model)[square].dequantize(torch.float32)
    assert whole.shape == (32, 32)
    write(model, "dense", tmp_path / "dense")
    assert torch.equal(tensors(tmp_path / "dense")[f"{square}.weight"], whole.T)


def test_gptq_of_such_a_model_is_a_base_code_for_code(tmp_path: Path) -> None:
    """Read as it stands, trained on its grid, dequantized where a rule wants floats or the whole of it in float."""
    ours = tt.prepare(turned(), Rtn(), FOUR)
    write(ours, "gptq", tmp_path / "theirs")
    (tmp_path / "theirs/manifest.json").unlink()
    folder, expected = tmp_path / "theirs", logits(ours)
    assert torch.equal(logits(_packed(folder, Rtn(), None)), expected)
    tuned = _packed(folder, LrQat(rank=2), None)
    assert torch.equal(logits(tuned), expected)
    left = _packed(folder, Rtn(), [{"match": "*.c_attn", "grid": None}, {"match": "*", "grid": "same"}])
    held = left.get_submodule(FIRST)
    assert type(held) is Conv1D
    assert torch.equal(held.weight, linears(ours)[FIRST].dequantize(torch.float32).T)
    close(logits(left), expected)
    floats = _packed(folder, Lora(rank=2), [{"match": "*", "grid": "float"}])
    assert torch.equal(logits(floats), expected)


def _packed(folder: Path, method: Method, rules: Any) -> Any:
    source = open_source(str(folder))
    assert isinstance(source, PackedSource)
    source.tokenizer = lambda: None  # type: ignore[method-assign]
    return read(folder, method, rules, source=source)


# ---- bitsandbytes -------------------------------------------------------------------------------------------------


def test_bitsandbytes_of_such_a_model_is_read(tmp_path: Path) -> None:
    """transformers turns the matrix before bitsandbytes packs it, as its `Bnb4bitQuantize` does."""
    folder, theirs = saved(tmp_path / "m", n_embd=64), turned(n_embd=64)
    found = tensors(folder)
    for own, module in theirs.named_modules():
        if type(module) is Conv1D:
            weight_NK = found.pop(f"{own}.weight").T.contiguous()
            packed, state = bnb.quantize_4bit(weight_NK, quant_type="nf4", blocksize=64)
            found[f"{own}.weight"] = packed
            found |= {f"{own}.weight.{k}": t for k, t in state.as_dict(packed=True).items()}
            module.weight.data = bnb.dequantize_4bit(packed, state).T.contiguous()  # type: ignore[assignment]
    save_file({n: t.contiguous() for n, t in found.items()}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    close(logits(_packed(folder, Qlora(rank=2), None)), logits(theirs))


# ---- peft ---------------------------------------------------------------------------------------------------------

ADAPTERS: dict[str, tuple[Method, list[dict[str, Any]]]] = {
    "lora": (Lora(rank=4, alpha=8.0), [{"match": "*", "grid": "float"}]),
    "qlora": (Qlora(rank=4, alpha=8.0), [{"match": "*", "grid": {"codebook": "nf4", "group": 32}}]),
    "q-bara": (QBara(rank=4, alpha=8.0), FOUR),
}


@pytest.mark.parametrize("case", ADAPTERS)
def test_peft_computes_the_same(case: str, tmp_path: Path) -> None:
    method, rules = ADAPTERS[case]
    model = tt.prepare(turned(), method, rules)
    shake(model)
    assert write(model, "peft", tmp_path / "out").kind == "exact"
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["fan_in_fan_out"] is True
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out/base")
    untuned = logits(base)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="fan_in_fan_out")  # which PEFT puts right with a warning
        theirs = peft.PeftModel.from_pretrained(base, tmp_path / "out")
    ours = logits(model)
    moved = (ours - untuned).abs().max()
    assert moved > 0.05
    assert (ours - logits(theirs)).abs().max() < 2e-4 * moved
    assert (ours - logits(theirs.merge_and_unload())).abs().max() < 2e-4 * moved


def test_what_peft_trained_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs: Any = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(saved(tmp_path / "m")),
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True),
    )
    shake(theirs)
    for p in theirs.parameters():
        p.data = p.data.bfloat16().float() if p.requires_grad else p.data  # which ours are stored in
    theirs.save_pretrained(tmp_path / "lora")
    monkeypatch.setattr(sources, "read_tokenizer", lambda _: "a tokenizer")
    model, _ = load_model(str(tmp_path / "m"), str(tmp_path / "lora"), dtype=torch.float32)
    close(logits(model), logits(theirs))
    with pytest.raises(UserError, match="wrapped by peft"):
        tt.prepare(theirs, Rtn(), FOUR)


# ---- what engines do not read -----------------------------------------------------------------------------------------


def test_compressed_tensors_is_refused_by_name(tmp_path: Path) -> None:
    """Its readers replace `nn.Linear` alone; asked in advance, of a model in memory, and of a folder."""
    said = r"compressed-tensors: the model's Conv1D layers: transformer\.h\.0\.attn\.c_attn is one.*export to dense or gptq"
    model = tt.prepare(turned(), Rtn(), FOUR)
    for options in ({}, {"engine": "vllm"}, {"allow_lossy": True}):
        with pytest.raises(UserError, match=said):
            write(model, "compressed-tensors", tmp_path / "out", **options)
    tt.save(model, tmp_path / "s")
    with pytest.raises(UserError, match=said):
        tt.export(tmp_path / "s", "compressed-tensors")
    floats = tt.prepare(turned(), Rtn(), [{"match": "transformer.wte", "grid": {"bits": 8, "group": 32}}, *NONE])
    write(floats, "compressed-tensors", tmp_path / "floats")
    close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "floats")), logits(floats))


NONE: list[dict[str, Any]] = [{"match": "*", "grid": None}]


def test_transformers_leaves_such_layers_at_random_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why it is refused: that this has not changed. The file's codes are not read, and nothing stops it."""
    monkeypatch.setattr(compressed_tensors.CompressedTensors, "transposed", True)
    model = tt.prepare(turned(), Rtn(), FOUR)
    write(model, "compressed-tensors", tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(theirs) - logits(model)).abs().max() > 0.1


@pytest.mark.parametrize("format_", ["mlx"])
def test_others_are_refused_by_name(format_: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"{format_}: .*gpt2"):
        write(tt.prepare(turned(), Rtn(), FOUR), format_, tmp_path / "out")


# ---- sizes ----------------------------------------------------------------------------------------------------------


def test_sizes_that_are_told_in_advance(tmp_path: Path) -> None:
    model, rules = turned(), parse_rules(FOUR)
    chosen = targets(model, Peqa(), rules)
    told = export_sizes(model, chosen, Peqa(), dtype=torch.float32)
    ready = tt.prepare(turned(), Peqa(), FOUR)
    tt.fold(ready)
    assert isinstance(told["compressed-tensors"], str)
    assert "Conv1D" in told["compressed-tensors"]
    tt.save(ready, tmp_path / "s")
    for name in ("dense", "gptq"):
        tt.export(tmp_path / "s", name)
        stored = sum(t.numel() * t.element_size() for t in tensors(tmp_path / "s" / name).values())
        assert told[name] == stored
    with torch.device("meta"):
        laid = turned()
    prepare_meta(laid, Peqa(), rules)
    assert not any(type(m) is Conv1D for m in laid.modules())


def test_plain_is_what_the_tests_compare_with() -> None:
    """The oracle itself: another model than the float one, by more than rounding of sums."""
    model = tt.prepare(turned(), Rtn(), FOUR)
    assert (logits(plain(model)) - logits(turned())).abs().max() > 0.1


# ---- GGUF ---------------------------------------------------------------------------------------------------------------

PARTS = {"attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}


def gguf_file(folder: Path, config: Any, method: Method, rules: Any) -> tuple[Any, Path]:
    """A GPT-2, and the file that it is written to."""
    model = tt.prepare(random_model(config).float(), method, rules)
    save_gguf(folder / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    return model, folder / "model.gguf"


@pytest.mark.parametrize("name", GPT2)
def test_gguf_is_laid_out_as_by_the_converter_of_llama_cpp(name: str, tmp_path: Path) -> None:
    """Matrices turned, positions in float32, and these keys; whether it is the same model is asked of llama.cpp."""
    rules = [{"match": "*.1.mlp.c_fc", "grid": None}, *FOUR]
    model, file = gguf_file(tmp_path, GPT2[name], Rtn(), rules)
    reader, theirs = gguf.GGUFReader(file), random_model(GPT2[name]).float()
    there = {t.name: t for t in reader.tensors}
    for block in range(3):
        for own, part in PARTS.items():
            tensor, layer = there[f"blk.{block}.{part}.weight"], model.get_submodule(f"transformer.h.{block}.{own}")
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            whole = layer.weight.T if type(layer) is Conv1D else layer.base.dequantize(torch.float32)
            assert np.array_equal(values, whole.detach().numpy())
    assert np.array_equal(there["position_embd.weight"].data, theirs.transformer.wpe.weight.detach().numpy())
    config = theirs.config
    head = {"output.weight"} if not config.tie_word_embeddings else set()
    ends = {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"} | head
    parts = [*PARTS.values(), "attn_norm", "ffn_norm"]
    assert set(there) == ends | {f"blk.{i}.{p}.{k}" for i in range(3) for p in parts for k in ("weight", "bias")}
    said = {n.removeprefix("gpt2."): f.contents() for n, f in reader.fields.items() if n.startswith("gpt2.")}
    assert said.pop("attention.layer_norm_epsilon") == pytest.approx(config.layer_norm_epsilon)
    assert said == {
        "vocab_size": 260,
        "context_length": 128,
        "embedding_length": 64,
        "block_count": 3,
        "feed_forward_length": config.n_inner or 256,
        "attention.head_count": 4,
        "attention.key_length": 16,
        "attention.value_length": 16,
    }


def test_positions_are_in_float32_whatever_the_model_computes_in(tmp_path: Path) -> None:
    """As llama.cpp's converter writes them; embeddings of tokens, which are as large, are in the model's dtype."""
    model = tt.prepare(random_model(GPT2["gpt2"]).bfloat16(), Rtn(), FOUR)
    save_gguf(tmp_path / "model.gguf", model, byte_level_tokenizer(), name="tiny")
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors}
    assert (kinds["position_embd.weight"], kinds["token_embd.weight"]) == ("F32", "BF16")


@pytest.mark.parametrize("name", GPT2)
def test_a_gguf_file_is_a_base_code_for_code(name: str, tmp_path: Path) -> None:
    """Read with the codes that it has, tuned, and written back with what was not tuned as it was; floats are floats."""
    rules = [{"match": "*.1.mlp.c_fc", "grid": None}, *FOUR]
    ours, file = gguf_file(tmp_path, GPT2[name], Rtn(), rules)
    same = [{"match": "*.1.mlp.c_fc", "grid": None}, {"match": "*", "grid": "same"}]
    model, _ = tt.load(str(file), Rtn(), same, dtype=torch.float32)
    for own, layer in linears(ours).items():
        assert torch.equal(linears(model)[own].base.codes, layer.base.codes)  # type: ignore[arg-type]
    assert torch.equal(logits(model), logits(ours))
    floats, _ = tt.load(str(file), Lora(rank=2), [{"match": "*", "grid": "float"}], dtype=torch.float32)
    close(logits(floats), logits(ours))
    close(logits(load_float(str(file), dtype=torch.float32)), logits(ours))
    tuned, _ = tt.load(str(file), LrQat(rank=2), same, dtype=torch.float32)
    shake(tuned)
    tt.fold(tuned)
    (tmp_path / "again").mkdir()
    save_gguf(tmp_path / "again/model.gguf", tuned, None, name="tiny", source=file)
    back, _ = tt.load(str(tmp_path / "again/model.gguf"), Rtn(), same, dtype=torch.float32)
    assert torch.equal(logits(back), logits(tuned))
    one, other = ({t.name: t.data for t in gguf.GGUFReader(f).tensors} for f in (file, tmp_path / "again/model.gguf"))
    changed = {n for n in one if not np.array_equal(one[n], other[n])}
    assert changed
    assert changed <= {f"blk.{i}.{part}.weight" for i in range(3) for part in PARTS.values()}
    assert "blk.1.ffn_up.weight" not in changed


def test_what_llama_cpp_does_not_compute_is_refused(tmp_path: Path) -> None:
    model = tt.prepare(turned(activation_function="relu"), Rtn(), FOUR)
    with pytest.raises(UserError, match=r"GGUF: activation_function relu, which llama\.cpp does not compute for gpt2"):
        write(model, "gguf", tmp_path / "out")
    with pytest.raises(UserError, match="GGUF: openai-gpt models are not written"):
        write(tt.prepare(turned("openai-gpt"), Rtn(), FOUR), "gguf", tmp_path / "out")
