"""PEFT LoRA files, with peft as the oracle, in both directions."""

import json
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import trimtab as tt
from exported import EMBEDDING, IDS, everywhere, linears, llama, logits, prepared, shake, tensors, write
from trimtab.errors import UserError
from trimtab.evaluation import serving
from trimtab.layers.adapters import DeltaOutput
from trimtab.methods import Lora, LrQat, Method, QaBlora, QaHira, QaLora, QBara, Qlora
from trimtab.models.peft_init import start_from

NF4 = everywhere(codebook="nf4", group=32)
REAL = everywhere(bits=4, group=16, zero="real", scale_dtype="float32")
CASES: dict[str, tuple[Method, list[dict[str, Any]]]] = {
    "lora": (Lora(rank=4, alpha=8.0), [everywhere(bits=4, group=32)]),
    "qlora": (Qlora(rank=4, alpha=8.0), [EMBEDDING, NF4]),
    "q-bara": (QBara(rank=4, alpha=8.0), [NF4]),
    "qa-lora": (QaLora(rank=4), [REAL]),
    "qa-blora": (QaBlora(rank=4, repeat=2), [NF4]),
    "qa-hira": (QaHira(), [REAL]),
    "some": (Qlora(rank=4), [{"match": "*.0.mlp.*", "grid": None}, NF4]),
}


def reloaded(folder: Path) -> Any:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    return peft.PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("name", CASES)
def test_peft_computes_the_same(tmp_path: Path, name: str) -> None:
    method, rules = CASES[name]
    model = prepared(*rules, method=method, dtype=torch.float32)
    shake(model)
    report = write(model, "peft", tmp_path / "out")
    assert report.kind == "exact"
    ours, base = logits(model), tensors(tmp_path / "out/base")
    assert all(torch.equal(base[f"{n}.weight"], x.base.dequantize(torch.float32)) for n, x in linears(model).items())
    theirs = logits(reloaded(tmp_path / "out"))
    untuned = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out/base"))
    moved = (ours - untuned).abs().max()
    assert moved > 0.05
    assert (ours - theirs).abs().max() < 2e-4 * moved


def test_parity_takes_adapter_and_base(tmp_path: Path) -> None:
    """The engine's side of `trimtab parity`, in a process of its own."""
    model = prepared(NF4, method=QBara(rank=4, alpha=8.0), dtype=torch.float32)
    shake(model)
    write(model, "peft", tmp_path / "out")
    served = serving.engine_logprobs(tmp_path / "out", "transformers", IDS, sys.executable)
    assert (served - serving.model_logprobs(model, IDS)).abs().max() < 1e-4
    base = serving.engine_logprobs(tmp_path / "out/base", "transformers", IDS, sys.executable)
    assert (served - base).abs().max() > 0.05


def test_ranks_that_differ(tmp_path: Path) -> None:
    """QA-HiRA's rank is K / p: down_proj has twice the inputs."""
    model = prepared(REAL, method=QaHira(), dtype=torch.float32)
    write(model, "peft", tmp_path / "out")
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert config["r"] == 4
    assert set(config["rank_pattern"].values()) == {8}
    assert sorted(config["rank_pattern"]) == [f"model.layers.{i}.mlp.down_proj" for i in range(2)]


def test_factors_are_stored_as_they_act(tmp_path: Path) -> None:
    model = prepared(NF4, method=QBara(rank=4, alpha=8.0))
    shake(model)
    write(model, "peft", tmp_path / "out")
    stored = load_file(tmp_path / "out/adapter_model.safetensors")
    for name, layer in linears(model).items():
        assert isinstance(layer.adapter, DeltaOutput)
        a, b = (stored[f"base_model.model.{name}.lora_{x}.weight"] for x in "AB")
        assert a.dtype == torch.bfloat16
        assert torch.allclose(b.double() @ a.double() * 8 / 4 / 2, layer.adapter.delta.dense().double(), atol=1e-6)


def test_refused(tmp_path: Path) -> None:
    integer = prepared(everywhere(bits=4, group=16, zero="integer"), method=QaHira())
    with pytest.raises(UserError, match=r"q_proj: rounds its update to integer zeros.*`zero: real`"):
        write(integer, "peft", tmp_path / "out")
    tt.fold(integer)
    with pytest.raises(UserError, match="keeps no adapter"):
        write(integer, "peft", tmp_path / "out")
    with pytest.raises(UserError, match="trained in its codes"):
        write(prepared(everywhere(bits=4, group=16), method=LrQat(rank=2)), "peft", tmp_path / "out")


@pytest.mark.parametrize("rslora", [False, True])
def test_start_from_peft(tmp_path: Path, rslora: bool) -> None:
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4, lora_alpha=12, use_rslora=rslora, target_modules=["q_proj", "down_proj"], init_lora_weights=False,
        alpha_pattern={} if rslora else {"layers.1.mlp.down_proj": 20}, task_type="CAUSAL_LM",
    )  # fmt: skip
    wrapped = peft.get_peft_model(llama(dtype=torch.float32), config).eval()
    for name, p in wrapped.named_parameters():
        if "lora_" in name:
            p.data = p.data.bfloat16().float()
    wrapped.save_pretrained(tmp_path / "lora")
    rules = [{"match": p, "grid": "float"} for p in ("*q_proj", "*down_proj")] + [{"match": "*", "grid": None}]
    model = tt.prepare(llama(dtype=torch.float32), Lora(rank=4, alpha=4.0), rules)
    start_from(model, str(tmp_path / "lora"))
    with torch.no_grad():
        theirs = wrapped(IDS).logits
    assert (logits(model) - theirs).abs().max() < 2e-2 * (theirs - logits(llama(dtype=torch.float32))).abs().max()
    other = prepared(NF4, method=Qlora(rank=8))
    with pytest.raises(UserError, match=r"set method.rank to 4"):
        start_from(other, str(tmp_path / "lora"))
    with pytest.raises(UserError, match=r"has no low-rank output adapter"):
        start_from(prepared(everywhere(bits=4, group=32), method=LrQat(rank=4)), str(tmp_path / "lora"))
    with pytest.raises(UserError, match="no such file"):
        start_from(other, str(tmp_path))
    settings = tmp_path / "lora/adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"use_dora": True}))
    with pytest.raises(UserError, match="use_dora is True"):
        start_from(other, str(tmp_path / "lora"))
