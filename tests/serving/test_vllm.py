"""What vLLM computes from a compressed-tensors folder: the trained model, or a refusal. `make test-serving` runs this."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import trimtab as tt
from trimtab.errors import UserError
from trimtab.evaluate import serving
from trimtab.export import exporting
from trimtab.hf import quant_layers
from trimtab.linear import QuantLinear
from trimtab.methods import LrQat

BLOCKS = torch.arange(128).view(2, 64) * 7 % 260
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}


def test_the_environment_is_there() -> None:
    assert Path(os.environ["TRIMTAB_VLLM_PYTHON"]).is_file(), "run `make test-serving`"


def prepared(*rules: dict[str, Any], tuned: bool = True) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        tie_word_embeddings=True,
        initializer_range=0.06,
    )
    model = tt.prepare(LlamaForCausalLM(config).bfloat16(), LrQat(rank=4), [EMBEDDING, *rules])
    for layer in quant_layers(model).values():
        if tuned and isinstance(layer, QuantLinear) and layer.adapter is not None:
            with torch.no_grad():
                for name, p in layer.adapter.named_parameters():
                    p.mul_(1 + 0.05 * torch.randn_like(p)) if name == "scale" else p.add_(0.02 * torch.randn_like(p))
    tt.fold(model)
    return model


def export(model: PreTrainedModel, out: Path, **options: Any) -> Path:
    exporting.write(model, None, "compressed-tensors", out, source=out, options=exporting.Options(**options))
    return out


@pytest.mark.parametrize(("group", "zero"), [(64, "symmetric"), (32, "integer")])
def test_four_bits(tmp_path: Path, group: int, zero: str) -> None:
    """The engine's difference from the tuned model is no more than from the untuned one."""
    found = {}
    for tuned in (False, True):
        model = prepared({"match": "*", "grid": {"bits": 4, "group": group, "zero": zero}}, tuned=tuned)
        served = serving.engine_logprobs(export(model, tmp_path / f"{tuned}"), "vllm", BLOCKS)
        found[tuned] = serving.compare("vllm", serving.model_logprobs(model, BLOCKS), served, BLOCKS)
    assert found[True].rms_logprob <= 1.5 * found[False].rms_logprob
    assert found[True].rms_logprob < 0.05
    assert found[True].top1_agreement > 0.9


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
