"""What vLLM computes from a folder: the trained model, or a refusal. `make test-serving` runs this.

Tests take one start of the engine for each folder. Inputs of 4-bit layers stay in float where nothing says otherwise
(`VLLM_CPU_INT4_W4A8`), so that what is compared is the file and not a rounding that vLLM adds on some processors.
"""

import copy
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import trimtab as tt
from trimtab.errors import UserError
from trimtab.evaluation import serving
from trimtab.formats.export import Options, write
from trimtab.layers.linear import QuantLinear
from trimtab.methods import LrQat, Method, QBara, Rtn
from trimtab.models.transformers_bridge import quant_layers

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "tie_word_embeddings": True,
    "initializer_range": 0.06,
}
BLOCKS = torch.arange(128).view(2, 64) * 7 % 260
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
X86 = torch.cpu.get_capabilities() if platform.machine() in ("x86_64", "AMD64") else None
NO_FOUR_BITS = X86 is not None and not X86["avx512_f"]
needs_four_bits = pytest.mark.skipif(NO_FOUR_BITS, reason="vLLM's kernels of 4-bit layers need AVX-512")
needs_vnni = pytest.mark.skipif(
    X86 is not None and not (X86["avx512_vnni"] or X86["avx_vnni"]),
    reason="pairs of 8-bit products overflow their 16 bits in vLLM on a processor without VNNI",
)


def test_the_environment_is_there() -> None:
    assert Path(os.environ["TRIMTAB_VLLM_PYTHON"]).is_file(), "run `make test-serving`"


@pytest.fixture(autouse=True)
def inputs_in_float(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_INT4_W4A8", "0")


def prepared(
    *rules: dict[str, Any], tuned: bool = True, method: Method | None = None, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    torch.manual_seed(0)
    model = tt.prepare(LlamaForCausalLM(LlamaConfig(**SIZES)).to(dtype), method or LrQat(rank=4), [EMBEDDING, *rules])
    for layer in quant_layers(model).values():
        if tuned and isinstance(layer, QuantLinear) and layer.adapter is not None:
            with torch.no_grad():
                for name, p in layer.adapter.named_parameters():
                    p.mul_(1 + 0.05 * torch.randn_like(p)) if name == "scale" else p.add_(0.02 * torch.randn_like(p))
    tt.fold(model)
    return model


def export(model: PreTrainedModel, out: Path, name: str = "compressed-tensors", **options: Any) -> Path:
    write(model, None, name, out, source=out, options=Options(**options))
    return out


def served(model: PreTrainedModel, folder: Path) -> serving.Served:
    """vLLM's log-probabilities of the folder against those of the model."""
    found = serving.engine_logprobs(folder, "vllm", BLOCKS)
    return serving.compare("vllm", serving.model_logprobs(model, BLOCKS), found, BLOCKS)


def noise(model: PreTrainedModel) -> float:
    """How far the model's dtype takes it from float32: engines that round in different places differ by as much."""
    whole = torch.nn.Module.float(copy.deepcopy(model))  # transformers refuses `.float()` to a quantized model
    exact = serving.model_logprobs(whole, BLOCKS)
    return serving.compare("", exact, serving.model_logprobs(model, BLOCKS), BLOCKS).rms_logprob


@needs_four_bits
@pytest.mark.parametrize(("group", "zero"), [(64, "symmetric"), (32, "integer")])
def test_four_bits(tmp_path: Path, group: int, zero: str) -> None:
    """The engine's difference from the tuned model is no more than from the untuned one."""
    found = {}
    for tuned in (False, True):
        model = prepared({"match": "*", "grid": {"bits": 4, "group": group, "zero": zero}}, tuned=tuned)
        found[tuned] = served(model, export(model, tmp_path / f"{tuned}"))
    assert found[True].rms_logprob <= 1.5 * found[False].rms_logprob
    assert found[True].rms_logprob < 0.05
    assert found[True].top1_agreement > 0.9


@pytest.mark.skipif(not NO_FOUR_BITS, reason="this processor has AVX-512")
def test_a_processor_without_kernels_of_four_bits_is_named(tmp_path: Path) -> None:
    model = prepared({"match": "*", "grid": {"bits": 4, "group": 64}})
    with pytest.raises(UserError, match="on x86 they need AVX-512"):
        serving.engine_logprobs(export(model, tmp_path / "out", engine="vllm-cpu"), "vllm", BLOCKS)


@needs_four_bits
def test_gptq_folders_are_read(tmp_path: Path) -> None:
    """The layout's own reader cannot be installed here; vLLM's is another hand's."""
    rules = [{"match": "*.0.mlp.down_proj", "grid": None}, {"match": "*", "grid": {"bits": 4, "group": 64}}]
    model = prepared(*rules)
    found = served(model, export(model, tmp_path / "out", "gptq", engine="vllm-cpu"))
    assert found.rms_logprob < 2 * noise(model)
    assert found.top1_agreement > 0.9
    model = prepared({"match": "*", "grid": {"bits": 4, "group": 64, "zero": "integer"}})
    with pytest.raises(UserError, match="zero that is integer, which vllm-cpu does not run in gptq"):
        export(model, tmp_path / "integer", "gptq", engine="vllm-cpu")
    with pytest.raises(UserError, match="bits=4, sym=False"):
        serving.engine_logprobs(export(model, tmp_path / "integer", "gptq"), "vllm", BLOCKS)


@needs_four_bits
@pytest.mark.parametrize("zero", ["symmetric", "integer"])
def test_awq_folders_are_read(tmp_path: Path, zero: str) -> None:
    """With integer zeros, which vLLM does not run in GPTQ's layout, and a layer in float."""
    rules = [
        {"match": "*.0.mlp.down_proj", "grid": None},
        {"match": "*", "grid": {"bits": 4, "group": 64, "zero": zero}},
    ]
    model = prepared(*rules)
    found = served(model, export(model, tmp_path / "out", "awq", engine="vllm-cpu"))
    assert found.rms_logprob < 2 * noise(model)
    assert found.top1_agreement > 0.9


def test_experts_are_served_dense_and_their_codes_refused(tmp_path: Path) -> None:
    """The names are those of the family's checkpoints; for packed experts vLLM has kernels on GPUs alone."""
    torch.manual_seed(0)
    about = {key: value for key, value in SIZES.items() if key != "tie_word_embeddings"}
    config = Qwen3MoeConfig(**about, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
    rules = [{"match": "*", "grid": {"bits": 4, "group": 32}}]
    model = tt.prepare(Qwen3MoeForCausalLM(config).bfloat16().eval(), LrQat(rank=4), rules)
    tt.fold(model)
    found = served(model, export(model, tmp_path / "dense", "dense"))
    assert found.rms_logprob < 1.5 * noise(model)
    with pytest.raises(UserError, match="No WNA16 MoE backend"):
        serving.engine_logprobs(export(model, tmp_path / "packed"), "vllm", BLOCKS)


def test_eight_bits_have_no_kernel_on_a_cpu(tmp_path: Path) -> None:
    """Refused by us for that engine, and by the engine itself if written for another."""
    model = prepared({"match": "*", "grid": {"bits": 8}})
    with pytest.raises(UserError, match="8 bits, which vllm-cpu does not run"):
        export(model, tmp_path / "out", engine="vllm-cpu")
    with pytest.raises(UserError, match=r"(?i)kernel"):
        serving.engine_logprobs(export(model, tmp_path / "out"), "vllm", BLOCKS)


def test_unlike_joined_layers(tmp_path: Path) -> None:
    """Refused by us, and by the engine if written for transformers only."""
    other = {"match": "*.1.self_attn.v_proj", "grid": {"bits": 4, "group": 32}}
    model = prepared(other, {"match": "*", "grid": {"bits": 4, "group": 64}})
    with pytest.raises(UserError, match="joins q_proj/k_proj/v_proj"):
        export(model, tmp_path / "out", engine="vllm-cpu")
    with pytest.raises(UserError, match="vllm cannot run it"):
        serving.engine_logprobs(export(model, tmp_path / "out", engine="transformers"), "vllm", BLOCKS)


@needs_four_bits
def test_four_bits_in_several_groups(tmp_path: Path) -> None:
    """Joined layers alike, others not: groups of 32 and 64, per channel, integer zeros and none, and a float layer."""
    grids: dict[str, Any] = {
        "*.0.self_attn.*": {"bits": 4, "group": 32},
        "*.0.mlp.down_proj": None,
        "*.0.mlp.*": {"bits": 4},
        "*.1.self_attn.o_proj": {"bits": 4, "group": 64, "zero": "integer"},
        "*": {"bits": 4, "group": 64},
    }
    model = prepared(*({"match": match, "grid": grid} for match, grid in grids.items()))
    found = served(model, export(model, tmp_path / "out", engine="vllm-cpu"))
    assert found.rms_logprob < 2 * noise(model)
    assert found.top1_agreement > 0.9


def test_mixed_widths(tmp_path: Path) -> None:
    """2, 3, 4 and 8 bits in one model: refused for vLLM on a CPU, which has no such kernels; transformers runs them."""
    grids = {
        "*.0.self_attn.*": {"bits": 8},
        "*.0.mlp.*": {"bits": 3, "group": 32},
        "*.1.self_attn.*": {"bits": 2, "group": 32},
        "*": {"bits": 4, "group": 64},
    }
    model = prepared(*({"match": match, "grid": grid} for match, grid in grids.items()))
    with pytest.raises(UserError, match=r"8 bits, which vllm-cpu does not run in compressed-tensors; use 4;.*10 more"):
        export(model, tmp_path / "out", engine="vllm-cpu")
    codes = export(model, tmp_path / "out", engine="transformers")
    matrices = export(model, tmp_path / "dense", "dense")
    found, expected = (
        serving.engine_logprobs(folder, "transformers", BLOCKS, sys.executable) for folder in (codes, matrices)
    )
    assert torch.equal(found, expected)


def test_dense(tmp_path: Path) -> None:
    model = prepared({"match": "*", "grid": {"codebook": "nf4", "group": 32}}, method=Rtn())
    found = served(model, export(model, tmp_path / "out", "dense"))
    assert found.rms_logprob < 2 * noise(model)
    assert found.top1_agreement > 0.9


GPT2 = GPT2Config(
    n_embd=128, n_layer=2, n_head=4, n_positions=128, vocab_size=260, bos_token_id=0, eos_token_id=0, initializer_range=0.06
)  # fmt: skip


@pytest.mark.parametrize("name", ["dense", pytest.param("gptq", marks=needs_four_bits)])
def test_layers_that_a_family_keeps_transposed(tmp_path: Path, name: str) -> None:
    """vLLM turns what GPT-2's files hold in float, and leaves GPTQ's words: one layer of each kind."""
    torch.manual_seed(0)
    rules: list[dict[str, Any]] = [
        {"match": "*.0.mlp.c_proj", "grid": None},
        {"match": "*", "grid": {"bits": 4, "group": 64}},
    ]
    model = tt.prepare(AutoModelForCausalLM.from_config(GPT2).bfloat16().eval(), Rtn(), rules)
    found = served(model, export(model, tmp_path / "out", name))
    assert found.rms_logprob < 2 * noise(model)
    assert found.top1_agreement > 0.9


def test_an_adapter_on_its_base(tmp_path: Path) -> None:
    """Q-BaRA's files as a LoRA of rank 2 r: served with it, and far from the base without."""
    model = prepared({"match": "*", "grid": {"codebook": "nf4", "group": 32}}, method=QBara(rank=4, alpha=8.0))
    out = export(model, tmp_path / "out", "peft")
    found = served(model, out)
    assert found.rms_logprob < 2 * noise(model)
    assert found.top1_agreement > 0.9
    base = AutoModelForCausalLM.from_pretrained(out / "base")
    moved = serving.compare("", serving.model_logprobs(model, BLOCKS), serving.model_logprobs(base, BLOCKS), BLOCKS)
    assert moved.rms_logprob > 5 * found.rms_logprob


@pytest.mark.parametrize("second", [{"bits": 4, "group": 32}, pytest.param({"bits": 8}, marks=needs_vnni)])
def test_rounded_inputs(tmp_path: Path, second: dict[str, Any]) -> None:
    """W4A8 in groups, then the same or W8A8 per channel: nearer to the model with rounded inputs than to that without.

    In float16, since bfloat16 moves inputs so far that too many of their codes differ.
    """
    rules = [{"match": "*.0.*", "grid": {"bits": 4, "group": 32}}, {"match": "*", "grid": second}]
    model = prepared(*rules, dtype=torch.float16)
    for name, p in model.named_parameters():
        if name.endswith("layernorm.weight"):
            p.data[3] = 40.0  # one channel sets the range of every token, so that the others are rounded coarsely
    tt.simulate(model, activations=tt.Activations(8))
    found = serving.engine_logprobs(export(model, tmp_path / "out", engine="vllm-cpu"), "vllm", BLOCKS)
    differences, bound = [], 2 * noise(model)
    for _ in range(2):
        differences.append(serving.compare("vllm", serving.model_logprobs(model, BLOCKS), found, BLOCKS))
        for layer in quant_layers(model).values():
            layer.inputs = None
    rounded, unrounded = differences
    assert rounded.rms_logprob < bound
    assert rounded.rms_logprob < 0.5 * unrounded.rms_logprob
