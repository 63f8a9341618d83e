"""Contract 9 of docs/design.md, section 4: what is saved is what was trained, in a fresh process; and a base of today.

One process that imports trimtab reloads every saved model and compares logits to the bit; another that never does must
fail on every way to load them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import tiny
import trimtab as tt
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import AffineWeight
from trimtab.methods import Lora, LrQat, Method, Peqa, QaBlora, QaHira, Qat, QBara, Qlora, Rtn
from trimtab.models.transformers_bridge import quant_layers

IDS = torch.arange(24).view(2, 12) * 5 % 64
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}


def everywhere(**grid: Any) -> dict[str, Any]:
    return {"match": "*", "grid": grid}


def with_head(**grid: Any) -> list[dict[str, Any]]:
    return [{"match": "lm_head", "grid": grid}, everywhere(**grid)]


NF4 = {"codebook": "nf4", "group": 32}
# name -> method, rules, tied, dtype
MODELS: dict[str, tuple[Method, list[dict[str, Any]] | None, bool, torch.dtype]] = {
    "lr-qat": (LrQat(rank=4), [EMBEDDING, everywhere(bits=4, group=32, zero="integer")], True, torch.float32),
    "qa-hira": (QaHira(), with_head(bits=4, group=16, zero="real"), False, torch.bfloat16),
    "qa-blora": (QaBlora(rank=4), [EMBEDDING, everywhere(**NF4)], True, torch.float32),
    "q-bara": (QBara(rank=4), [EMBEDDING, everywhere(**NF4, double_quant=True)], True, torch.bfloat16),
    "qat": (Qat(), with_head(bits=3, zero="real", scale_dtype="float32"), False, torch.float32),
    "peqa": (
        Peqa(),
        [EMBEDDING, {"match": "*down*", "grid": None}, everywhere(bits=2, group=16)],
        True,
        torch.bfloat16,
    ),
    "lora": (Lora(rank=4), None, False, torch.bfloat16),
}

RELOAD = """
import json, sys
import torch
from safetensors.torch import load_file
import transformers
assert "trimtab" not in sys.modules
import trimtab
torch.set_num_threads(1)
ids = torch.arange(24).view(2, 12) * 5 % 64
report = {}
for path in sys.argv[1:]:
    model = transformers.AutoModelForCausalLM.from_pretrained(path).eval()
    kept = load_file(path + "/expected/logits.safetensors")["logits"]
    with torch.no_grad():
        logits = model(ids).logits
    report[path.rpartition("/")[2]] = [
        logits.dtype == kept.dtype and torch.equal(logits, kept),
        sorted(n for n, p in model.named_parameters() if p.requires_grad),
    ]
print(json.dumps(report))
"""

STRANGER = """
import json, sys
import transformers
report = []
for path in sys.argv[1:]:
    for loader in (transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM, transformers.AutoModel):
        try:
            loader.from_pretrained(path)
        except Exception as error:
            report.append(type(error).__name__)
        else:
            report.append("a model")
assert "trimtab" not in sys.modules
print(json.dumps(report))
"""


def llama(*, tied: bool, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)  # rotary frequencies stay float32, as when loaded
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def shake(model: PreTrainedModel) -> None:
    """Move every trained number, as training would but further."""
    torch.manual_seed(1)
    for layer in quant_layers(model).values():
        if not isinstance(layer, QuantLinear) or layer.adapter is None:
            continue
        base = layer.base
        step = base.scale.detach().float().abs().mean() if isinstance(base, AffineWeight) else torch.tensor(0.05)
        with torch.no_grad():
            for name, p in layer.adapter.named_parameters():
                size = {"scale": 0.1 * p.abs(), "offset": 0.3 * step, "master": step, "delta.A": 1.0}.get(name, 0.0)
                last = {"levels": 0.5, "offset": 0.5 * step, "output": 0.05}.get(layer.adapter.place, 0.0)
                p.add_(torch.randn_like(p) * (last if name in ("delta.B", "delta.M") else size))


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def wanting(model: PreTrainedModel) -> list[str]:
    return sorted(n for n, p in model.named_parameters() if p.requires_grad)


def child(script: str, paths: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", script, *paths],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment, "HF_HUB_OFFLINE": "1"},
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every model saved as trained, folded and merged; and what the two processes said of them."""
    root = tmp_path_factory.mktemp("models")
    made: dict[str, Any] = {}

    def keep(model: PreTrainedModel, name: str) -> None:
        tt.save(model, root / name)
        (root / name / "expected").mkdir()
        save_file({"logits": logits(model)}, root / name / "expected" / "logits.safetensors")
        made[name] = (logits(model), wanting(model))

    for name, (method, rules, tied, dtype) in MODELS.items():
        model = tt.prepare(llama(tied=tied, dtype=dtype), method, rules)
        shake(model)
        keep(model, f"{name}-trained")
        made[f"{name}-report"] = tt.fold(model)
        keep(model, f"{name}-folded")
        if name in ("q-bara", "lora"):
            made[f"{name}-merge-report"] = tt.fold(model, merge=True)
            keep(model, f"{name}-merged")
    friend = child(RELOAD, [str(p) for p in sorted(root.iterdir())])
    stranger = child(STRANGER, [str(root / n) for n in ("lr-qat-folded", "qa-hira-trained", "lora-trained")])
    for name, process in (("friend", friend), ("stranger", stranger)):
        out, error = process.communicate(timeout=240)
        assert process.returncode == 0, error[-3000:]
        made[name] = json.loads(out.splitlines()[-1])
    made["root"] = root
    return made


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_gives_the_same_logits(name: str, saved: dict[str, Any]) -> None:
    stages = [n for n in saved["friend"] if n.rpartition("-")[0] == name]
    assert len(stages) == (3 if name in ("q-bara", "lora") else 2)
    for stage in stages:
        same, want_gradients = saved["friend"][stage]
        assert same, stage
        assert want_gradients == saved[stage][1], stage


@pytest.mark.parametrize("name", MODELS)
def test_folding_a_model(name: str, saved: dict[str, Any]) -> None:
    report, (trained, had), (folded, has) = (saved[f"{name}-{part}"] for part in ("report", "trained", "folded"))
    assert had
    assert torch.isfinite(trained.float()).all()
    assert torch.equal(trained, folded)
    if name in ("q-bara", "lora"):
        assert {(f.action, f.kind) for f in report} == {("kept", "algebraic")}
        assert has == had
        merged, none_left = saved[f"{name}-merged"]
        assert not none_left
        assert {(f.action, f.kind) for f in saved[f"{name}-merge-report"]} == {("merged", "algebraic")}
        assert all(0 < f.error < 4e-3 for f in saved[f"{name}-merge-report"])
        assert (merged - trained).float().norm() < 0.05 * trained.float().norm()
    else:
        assert {(f.action, f.kind, f.error, f.differing) for f in report} == {("folded", "bitwise", 0.0, 0)}
        assert not has
    assert len(report) == len({f.name for f in report}) == (12 if name == "peqa" else 14 + (name in ("qa-hira", "qat")))


def test_a_process_without_trimtab_never_gets_a_model(saved: dict[str, Any]) -> None:
    assert len(saved["stranger"]) == 9
    assert "a model" not in saved["stranger"]


def test_a_tied_head_is_stored_once(saved: dict[str, Any]) -> None:
    tensors = load_file(saved["root"] / "lr-qat-folded" / "model.safetensors")
    assert "model.embed_tokens.base.codes" in tensors
    assert not [n for n in tensors if n.startswith("lm_head")]
    config = json.loads((saved["root"] / "lr-qat-folded" / "config.json").read_text())
    assert config["dtype"] == "float32"
    assert config["quantization_config"]["format_version"] == 1
    assert config["quantization_config"]["layout"]


def test_the_dtype_asked_for_is_computed_in_and_nothing_stored_changes(saved: dict[str, Any]) -> None:
    path = saved["root"] / "lr-qat-trained"
    plain = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for dtype in (torch.bfloat16, torch.float16):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
        assert model.model.norm.weight.dtype == dtype
        assert logits(model).dtype == dtype
        assert wanting(model) == saved["lr-qat-trained"][1]
        for name, kept in model.state_dict().items():
            if "norm" not in name:
                assert kept.dtype == plain[name].dtype
                assert torch.equal(kept, plain[name])


def test_what_transformers_keeps_in_float32_stays_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Families name modules that float16 would harm; a quantized model of theirs is read as transformers reads it."""
    monkeypatch.setattr(LlamaForCausalLM, "_keep_in_fp32_modules", ["post_attention_layernorm"])
    tiny.model(tmp_path / "float", tied=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float16)
    kept = {name: p.dtype for name, p in plain.named_parameters() if "norm" in name}
    assert set(kept.values()) == {torch.float16, torch.float32}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.float32)
    tt.save(tt.prepare(model, Rtn()), tmp_path / "quantized")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.float16)
    assert {name: p.dtype for name, p in again.named_parameters() if "norm" in name} == kept
    assert again.lm_head.weight.dtype == torch.float16


def train(model: PreTrainedModel, steps: int = 3) -> None:
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(steps):
        loss = model(input_ids=IDS, labels=IDS).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("second", [QaHira(), Lora(rank=4), Qlora(rank=4), LrQat(rank=4), Peqa()], ids=lambda m: m.name)
def test_a_model_folded_yesterday_is_a_base_today(second: Method, saved: dict[str, Any], tmp_path: Path) -> None:
    yesterday = saved["root"] / "lr-qat-folded"
    model = AutoModelForCausalLM.from_pretrained(yesterday)
    assert torch.equal(logits(model), saved["lr-qat-folded"][0])
    before = {n: layer.base.integer_codes() for n, layer in quant_layers(model).items()}  # type: ignore[operator]
    tt.prepare(model, second)  # no rules: every layer keeps the grid that it has
    assert torch.equal(logits(model), saved["lr-qat-folded"][0])
    train(model)
    shake(model)
    trained = logits(model)
    assert not torch.equal(trained, saved["lr-qat-folded"][0])
    tt.save(model, tmp_path / "trained")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "trained")), trained)
    tt.fold(model)
    assert torch.equal(logits(model), trained)
    tt.save(model, tmp_path / "today")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "today")
    assert torch.equal(logits(again), trained)
    same = [torch.equal(layer.base.integer_codes(), before[n]) for n, layer in quant_layers(again).items()]
    assert all(same) == (second.name != "lr-qat")
