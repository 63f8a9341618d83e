"""Mixtures of experts are read, tuned, folded, saved and read again like any other model, an expert's matrix a layer.

Oracles: transformers' own loader, which reads the float checkpoints and the folders that are written.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import trimtab as tt
from experts import CONFIGS, FOUR, IDS, logits, mixture
from trimtab.errors import UserError
from trimtab.layers.experts import QuantExperts, stacks
from trimtab.layers.linear import QuantLinear
from trimtab.methods import LrQat, Method, Peqa, Rtn, make
from trimtab.models.checkpoint import Checkpoint
from trimtab.models.load import load
from trimtab.models.share import shares
from trimtab.models.sources import SafetensorsSource
from trimtab.models.transformers_bridge import quant_layers

FIRST = "model.layers.0.mlp.experts"


def saved(name: str, folder: Path) -> Path:
    mixture(name).save_pretrained(folder)
    return folder


def read(folder: Path, method: Method, rules: Any = FOUR, **options: Any) -> Any:
    source = SafetensorsSource(folder)
    source.tokenizer = lambda: None  # type: ignore[method-assign]
    return load(str(folder), method, rules, dtype=torch.float32, source=source, quiet=True, **options)[0]


def shake(model: Any) -> None:
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p) * p.abs().mean() + 0.01 * torch.randn_like(p))


@pytest.mark.parametrize("name", CONFIGS)
def test_each_expert_is_read_by_itself(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers reads, bit for bit, and no other expert's tensors on the way to one."""
    folder = saved(name, tmp_path / "m")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    asked: list[set[str]] = []
    mapped = Checkpoint.mapped

    def listening(self: Checkpoint, names: Any) -> Any:
        names = list(names)
        asked.append({n for n in names if ".experts.3." in n and "layers.0." in n})
        return mapped(self, names)

    monkeypatch.setattr(Checkpoint, "mapped", listening)
    ours = read(
        folder, Rtn(), [{"match": "*.q_proj", "grid": {"bits": 4, "group": 32}}, {"match": "*", "grid": "float"}]
    )
    first, experts = next((n, m) for n, m in theirs.named_modules() if stacks(m))
    for own in ("gate_up_proj", "down_proj"):
        for e in range(4):
            layer = ours.get_submodule(f"{first}.{e}.{own}")
            stack = getattr(experts, own)[e]
            assert torch.equal(layer.dequantize(torch.float32), stack.T if experts.is_transposed else stack)
            if name == "gpt_oss":
                assert torch.equal(layer.bias, getattr(experts, f"{own}_bias")[e])
    held = {"mixtral": 3, "qwen3_moe": 3}.get(name, 0)
    assert sum(map(len, asked)) == held, "gate, up and down of expert 3, once each"


@pytest.mark.parametrize("name", CONFIGS)
def test_read_tuned_folded_saved_and_read_again(name: str, tmp_path: Path) -> None:
    folder = saved(name, tmp_path / "m")
    model = read(folder, LrQat(rank=2))
    assert torch.equal(logits(model), logits(tt.prepare(mixture(name), LrQat(rank=2), FOUR)))
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    assert any(".experts." in n for n in trained)
    shake(model)
    expected = logits(model)
    report = tt.fold(model)
    assert {x.kind for x in report} == {"bitwise"}
    assert torch.equal(logits(model), expected)
    tt.save(model, tmp_path / "s")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)
    assert torch.equal(logits(again), expected)
    more = tt.prepare(again, Peqa())  # a base for further tuning
    assert torch.equal(logits(more), expected)
    for format_ in ("dense", "compressed-tensors"):
        if (name, format_) in {("granitemoe", "compressed-tensors"), ("gpt_oss", "compressed-tensors")}:
            with pytest.raises(
                UserError, match=r"the model's experts: .* keep all of them in one tensor; export to dense"
            ):
                tt.export(tmp_path / "s", format_)
            continue
        tt.export(tmp_path / "s", format_)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "s" / format_, dtype=torch.float32)
        torch.testing.assert_close(logits(theirs), expected, rtol=0, atol=2e-2 * expected.abs().max().item())


METHODS = ["peqa", "qat", "qa-lora", "qa-hira", "qa-blora", "qlora", "q-bara", "loftq", "lora"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_experts(method: str, tmp_path: Path) -> None:
    tuned = make(method)
    grid: dict[str, Any] | str = {"bits": 4, "group": 32, "zero": "real"}
    if method in ("qlora", "q-bara", "loftq"):
        grid = {"codebook": "nf4", "group": 32}
    rank = 2 if hasattr(tuned, "rank") else None
    rule = {"match": "*", "grid": "float" if method == "lora" else grid} | ({"rank": rank} if rank else {})
    model = tt.prepare(mixture("mixtral"), tuned, [rule])
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or p.grad is not None, name
    shake(model)
    expected = logits(model)
    tt.fold(model)
    assert torch.equal(logits(model), expected)
    tt.save(model, tmp_path / "s")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)), expected)


def test_rules_speak_of_experts(tmp_path: Path) -> None:
    """A width, a rank, or none at all for some of them; what is left in float beside others is held in float."""
    rules = [
        {"match": "*.experts.*.gate_up_proj", "grid": {"bits": 3, "group": 32}, "rank": 1},
        {"match": "*.experts.0.down_proj", "grid": {"bits": 2, "group": 32}},
        {"match": "*.experts.*", "grid": None},
        *FOUR,
    ]
    model = tt.prepare(mixture("qwen3_moe"), LrQat(rank=4), rules)
    layers = quant_layers(model)
    first = layers[f"{FIRST}.0.gate_up_proj"]
    assert isinstance(first, QuantLinear)
    assert first.adapter is not None
    assert (first.base.grid.bits, first.adapter.delta.shape.rank) == (3, 1)
    assert layers[f"{FIRST}.0.down_proj"].base.grid.bits == 2
    left = layers[f"{FIRST}.1.down_proj"]
    assert isinstance(left, QuantLinear)
    assert left.base.grid is None
    assert left.adapter is None
    expected = logits(model)
    tt.save(model, tmp_path / "s")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "s", dtype=torch.float32)), expected)
    whole = tt.prepare(mixture("qwen3_moe"), Rtn(), [{"match": "*.experts.*", "grid": None}, *FOUR])
    assert not isinstance(whole.get_submodule(FIRST), QuantExperts), "no rule speaks of it, so it stays as it was"


def test_routers_stay_and_experts_count() -> None:
    model = tt.prepare(mixture("mixtral"), Rtn(), FOUR)
    found = shares(model)
    assert found.total == sum(p.numel() for p in mixture("mixtral").parameters())
    assert found.low_bit > 0.85
    assert "a router, whose outputs choose experts" in found.line()
    assert "fused into one tensor" not in found.line()


def test_a_model_that_it_fails_on_is_left_as_it_was() -> None:
    model = mixture("mixtral")
    expected = logits(model)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.experts").down_proj[2, 0, 0] = float("nan")
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.experts\.2\.down_proj\.weight"):
        tt.prepare(model, Rtn(), FOUR)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.experts").down_proj.copy_(
            mixture("mixtral").get_submodule("model.layers.1.mlp.experts").down_proj
        )
    assert torch.equal(logits(model), expected)
    assert not any(isinstance(m, QuantExperts) for m in model.modules())


def test_gptq_says_which_experts_no_token_reached(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    folder = saved("mixtral", tmp_path / "m")
    start = tt.Gptq(tokens=torch.tensor([[5, 6]]))
    with caplog.at_level(logging.WARNING, "trimtab"):
        model = read(folder, Rtn(), start=start)
    (said,) = [r.message for r in caplog.records if "no calibration token" in r.message]
    assert ".experts." in said
    near, by_gptq = tt.prepare(mixture("mixtral"), Rtn(), FOUR), dict(quant_layers(model))
    same = {n: torch.equal(x.base.codes, by_gptq[n].base.codes) for n, x in quant_layers(near).items()}  # type: ignore[union-attr]
    assert not all(same.values())
    assert all(same[n] for n in same if n in said)
