"""The reference of a preference method: the model at step 0, whatever it began with, and no second copy of its codes."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import tiny
import trimtab as tt
from trimtab.methods import Loftq, Lora, LrQat, Method, Peqa, QaHira, Qat, QBara, Qlora
from trimtab.models.prepared import quant_layers

IDS = torch.arange(24).view(2, 12)
REAL = {"bits": 3, "group": 32, "zero": "real"}
RULES = [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, {"match": "lm_head", "grid": REAL},
         {"match": "*", "grid": REAL}]  # fmt: skip
FRESH: list[Method] = [
    LrQat(rank=4, alpha=64.0), Peqa(), Qat(), QaHira(), QBara(rank=4), Qlora(rank=4), Lora(rank=4),
]  # fmt: skip
ELSEWHERE: list[Method] = [Loftq(rank=4), LrQat(rank=4, alpha=64.0, storage="int", svd=True)]
"""Methods whose adapters act at step 0."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def prepared(path: Path, method: Method) -> PreTrainedModel:
    torch.manual_seed(0)
    return tt.load(str(path), method, None if method.name == "lora" else RULES, dtype=torch.float32)[0]


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def train(model: PreTrainedModel) -> None:
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    for _ in range(2):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def extra_bytes(reference: PreTrainedModel, model: PreTrainedModel) -> int:
    """Bytes of what a reference does not share with its model."""
    shared = {p.data_ptr() for p in [*model.parameters(), *model.buffers()]}
    return sum(p.nbytes for p in [*reference.parameters(), *reference.buffers()] if p.data_ptr() not in shared)


@pytest.mark.parametrize(
    "method", [*FRESH, *ELSEWHERE], ids=lambda m: f"{m.name}-svd" if getattr(m, "svd", 0) else m.name
)
def test_it_stays_at_step_0(method: Method, path: Path) -> None:
    """Bit for bit, through training and folding; and of a model trained before, at that."""
    model = prepared(path, method)
    before, trained = logits(model), sum(p.nbytes for p in model.parameters() if p.requires_grad)
    reference = tt.reference(model)
    assert torch.equal(logits(reference), before)
    assert extra_bytes(reference, model) <= (0 if method in FRESH else 0.7 * trained)
    assert not any(p.requires_grad for p in reference.parameters())
    train(model)
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(reference), before)
    now = logits(model)
    later = tt.reference(model)
    assert extra_bytes(later, model) <= trained  # of a master weight: its codes
    train(model)
    tt.fold(model)
    assert torch.equal(logits(later), now)
    assert torch.equal(logits(reference), before)


def test_it_shares_the_codes_and_has_layers_of_its_own(path: Path) -> None:
    model = prepared(path, LrQat(rank=4))
    reference = tt.reference(model)
    assert type(reference) is type(model)
    for name, layer in quant_layers(model).items():
        other: Any = reference.get_submodule(name)
        assert other is not layer
        assert other.base is layer.base
        assert getattr(other, "adapter", None) is None
    assert reference.config is not model.config
    assert not reference.training


def test_what_is_trained_besides_adapters_is_kept(path: Path) -> None:
    """Norms that somebody thaws are in no adapter."""
    model = prepared(path, LrQat(rank=4))
    model.model.norm.weight.requires_grad_(True)
    reference, before = tt.reference(model), logits(model)
    train(model)
    assert torch.equal(logits(reference), before)


def test_a_forward_that_was_replaced_is_not_taken_along(path: Path) -> None:
    """TRL and accelerate bind a forward to the model: copied, it would run the model that is trained."""
    model = prepared(path, LrQat(rank=4))
    original = model.forward
    model.forward = lambda *args, **kwargs: original(*args, **kwargs)  # type: ignore[method-assign]
    reference, before = tt.reference(model), logits(model)
    train(model)
    assert torch.equal(logits(reference), before)


def test_a_tied_head_is_that_of_the_embedding(tmp_path: Path) -> None:
    rules = [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, {"match": "*", "grid": REAL}]
    model, _ = tt.load(str(tiny.model(tmp_path / "tied")), LrQat(rank=4, alpha=64.0), rules, dtype=torch.float32)
    reference: Any = tt.reference(model)
    assert torch.equal(logits(reference), logits(model))
    assert reference.lm_head.base is reference.model.embed_tokens.base is model.model.embed_tokens.base
    copied = copy.deepcopy(reference)
    assert torch.equal(logits(copied), logits(model))
