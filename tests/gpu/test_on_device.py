"""The contracts that depend on where a model computes, on TRIMTAB_TEST_DEVICE: the CPU, or with `make test-gpu` a GPU.

Each is a whole path through a tiny model of each method. On a GPU what matters is that all kernels of a layer agree with
one another (forward, backward, folding, one token) and with the references, which the CPU runs.
"""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
import trimtab
from trimtab.kernels import channel, cpu
from trimtab.layers.linear import QuantLinear
from trimtab.models.load import load_as_it_is
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe.rules import Rule

DEVICE = os.environ.get("TRIMTAB_TEST_DEVICE", "cpu")
NF4 = CodebookGrid("nf4", 32, True)
CASES: dict[str, tuple[dict[str, Any], Grid | CodebookGrid | None]] = {
    "lr-qat-channel": ({"name": "lr-qat", "rank": 8}, Grid(4, None)),
    "lr-qat-g32": ({"name": "lr-qat", "rank": 8}, Grid(3, 32, "integer")),
    "lr-qat-real-float32": ({"name": "lr-qat", "rank": 8, "adapter_dtype": "float32"}, Grid(4, 32, "real")),
    "peqa": ({"name": "peqa"}, Grid(4, 32)),
    "qat": ({"name": "qat"}, Grid(4, 32)),
    "qa-lora": ({"name": "qa-lora", "rank": 4}, Grid(4, 32, "real")),
    "qa-hira": ({"name": "qa-hira"}, Grid(4, 32, "integer")),
    "qa-blora": ({"name": "qa-blora", "rank": 4}, Grid(4, 32, "real")),
    "qlora": ({"name": "qlora", "rank": 4}, NF4),
    "q-bara": ({"name": "q-bara", "rank": 4}, NF4),
    "loftq": ({"name": "loftq", "rank": 4}, NF4),
    "lora": ({"name": "lora", "rank": 4}, None),
}
MERGED = ("qlora", "q-bara", "loftq", "lora")
"""Whose folding copies the weight, rounded once more."""
IDS = torch.randint(250, (2, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("given") / "model")


def made(path: Path, name: str, dtype: torch.dtype = torch.bfloat16) -> Any:
    """On the device, its adapters moved from where they start, the same for each call."""
    options, grid = CASES[name]
    method = trimtab.methods.make(options["name"], **{k: v for k, v in options.items() if k != "name"})
    model, _ = load_as_it_is(str(path), dtype=dtype)
    torch.manual_seed(0)
    model = trimtab.prepare(model, method, None if grid is None else [Rule("*", grid)])
    random = torch.Generator().manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.mul_(1 + 0.05 * torch.randn(p.shape, generator=random)).add_(
                0.02 * torch.randn(p.shape, generator=random) if p.data.abs().max() == 0 else 0
            )
    return model.to(DEVICE).eval()


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids.to(DEVICE)).logits
    return found.float().cpu()


def near(found: torch.Tensor, wanted: torch.Tensor, share: float) -> bool:
    return bool((found - wanted).norm() <= share * wanted.norm())


@pytest.mark.parametrize("name", CASES)
def test_a_folded_model_is_the_trained_one_and_so_is_what_was_saved(path: Path, tmp_path: Path, name: str) -> None:
    model = made(path, name)
    trained = logits(model)
    trimtab.fold(model, merge=True)
    folded = logits(model)
    assert near(folded, trained, 2e-2) if name in MERGED else torch.equal(folded, trained)
    trimtab.save(model, tmp_path / "saved", tokenizer=tiny.tokenizer())
    again, _ = load_as_it_is(str(tmp_path / "saved"))
    assert torch.equal(logits(again.to(DEVICE).eval()), folded)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_references(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 on the CPU without any kernel of ours, against bfloat16 on the device."""

    def gradients(model: Any) -> dict[str, torch.Tensor]:
        ids = IDS.to(next(model.parameters()).device)
        F.cross_entropy(model(input_ids=ids).logits.float()[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        return {n: p.grad.float().cpu() for n, p in model.named_parameters() if p.grad is not None}

    found = gradients(made(path, name).train())
    monkeypatch.setattr(cpu, "library", lambda: None)
    wanted = gradients(made(path, name, torch.float32).cpu().train())
    assert found.keys() == wanted.keys() != set()
    for which in {n.rpartition(".")[2] for n in found}:
        pairs = [(found[n].flatten(), wanted[n].flatten()) for n in found if n.rpartition(".")[2] == which]
        one, other = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        assert near(one, other, 0.1), which


@pytest.mark.parametrize("name", ["qlora", "lr-qat-g32", "lr-qat-channel"])
def test_kernels_of_one_token_agree_with_the_whole(path: Path, name: str) -> None:
    model = made(path, name)
    if name not in MERGED:
        trimtab.fold(model)
    whole = logits(model)
    with torch.no_grad():
        cache = model(input_ids=IDS[:, :-1].to(DEVICE), use_cache=True).past_key_values
        last = model(input_ids=IDS[:, -1:].to(DEVICE), past_key_values=cache, use_cache=True).logits
    assert near(last.float().cpu()[:, 0], whole[:, -1], 2e-2)


def test_kernels_without_dl_dw_agree_with_those_that_form_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """LR-QAT per channel, with clipped levels."""
    torch.manual_seed(0)
    method = trimtab.methods.make("lr-qat", rank=8)
    base, adapter = method.build(torch.randn(96, 128) / 10, Grid(4, None))
    layer = QuantLinear(base, adapter).to(DEVICE)
    layer.adapter.delta.B.data.normal_(0, 20.0)
    clipped = len(channel.clipped_levels(layer.adapter._about(layer.base), 128)[0])
    assert 0 < clipped <= channel.FEW * 96 * 128
    x = torch.randn(40, 128).bfloat16().to(DEVICE).requires_grad_()

    def gradients() -> list[torch.Tensor]:
        layer.zero_grad()
        x.grad = None
        layer(x).float().square().mean().backward()
        return [p.grad.clone() for p in [*layer.parameters(), x] if p.grad is not None]

    assert layer.uses_output(torch.bfloat16)
    without = gradients()
    monkeypatch.setattr(type(layer.adapter), "uses_output", lambda *_: False)
    formed = gradients()
    assert len(without) == len(formed) == 4
    for one, other in zip(without, formed, strict=True):
        assert near(one.float(), other.float(), 3e-2)


def test_a_copy_of_a_model_does_not_share_what_is_known_of_clipped_levels(path: Path) -> None:
    model = made(path, "lr-qat-channel")
    copied = copy.deepcopy(model)
    pairs = zip(model.modules(), copied.modules(), strict=True)
    clipped = [(a._clipped, b._clipped) for a, b in pairs if hasattr(a, "_clipped")]
    assert clipped
    assert all(a is not b for a, b in clipped)
