"""What folding says of itself: what training moved, and what folding changed, counted by hand."""

from typing import Any

import pytest
import torch

import trimtab as tt
from tests.exported import llama
from trimtab.errors import UserError
from trimtab.layers.movement import Movement
from trimtab.layers.weights import AffineWeight
from trimtab.methods import Lora, LrQat, Peqa, QaHira, QBara, Qlora
from trimtab.models.transformers_bridge import quant_layers
from trimtab.quant.grid import CodebookGrid, Grid

RULES: dict[str, Any] = {
    "integer": Grid(3, 32, zero="integer"),
    "real": Grid(3, 32, zero="real"),
    "nf4": CodebookGrid("nf4", 32),
}


def prepared(method: Any, grid: str) -> Any:
    return tt.prepare(llama(), method, [{"match": "*", "grid": RULES[grid]}])


def first(model: Any) -> Any:
    return model.get_submodule("model.layers.0.self_attn.q_proj")


def test_untrained_nothing_moved() -> None:
    for method, grid in ((LrQat(rank=2), "integer"), (QaHira(), "real"), (QaHira(), "nf4"), (Peqa(), "real")):
        for layer in tt.fold(prepared(method, grid)):
            rows, columns = 64, 64
            assert (layer.moved.codes, layer.moved.groups, layer.differing) == (0, 0, 0)
            if layer.name.endswith("q_proj"):
                assert layer.moved == Movement(0, rows * columns, 0, rows * columns // 32)


def test_codes_that_training_moved_are_counted() -> None:
    """Three levels of the first layer are pushed up by two steps: these codes move, and no scale."""
    model = prepared(LrQat(rank=64, alpha=64.0), "integer")
    adapter, base = first(model).adapter, first(model).base
    room = (base.integer_codes() <= base.grid.top - 2).nonzero()[::500][:3]
    with torch.no_grad():
        adapter.delta.A.copy_(torch.eye(64))
        for row, column in room.tolist():
            adapter.delta.B[row, column] = 2.0
    report = {layer.name: layer for layer in tt.fold(model)}
    found = report.pop("model.layers.0.self_attn.q_proj")
    assert len(room) == 3
    assert (found.moved.codes, found.moved.groups, found.differing) == (3, 0, 0)
    assert all(layer.moved.codes == 0 for layer in report.values())


@pytest.mark.parametrize("grid", RULES)
def test_groups_that_training_moved_are_counted(grid: str) -> None:
    """An offset moves in the blocks of the first layer's first row; its codes stay."""
    model = prepared(QaHira(), grid)
    with torch.no_grad():
        first(model).adapter.delta.M[0] = 3.0
    found = tt.fold(model)[0]
    assert found.name == "model.layers.0.self_attn.q_proj"
    assert (found.moved.codes, found.moved.groups, found.differing) == (0, 2, 0)


def test_an_adapter_that_stays_moves_nothing() -> None:
    model = prepared(QBara(rank=2), "nf4")
    with torch.no_grad():
        first(model).adapter.delta.B.fill_(0.1)
    layer = tt.fold(model)[0]
    assert (layer.action, layer.differing) == ("kept", 0)
    assert layer.moved == Movement(0, 64 * 64, 0, 64 * 2)


@pytest.mark.parametrize(("method", "grid"), [(Qlora(rank=2), "nf4"), (QBara(rank=2), "nf4"), (Lora(rank=2), None)])
def test_a_merged_adapter_is_compared_with_base_and_adapter_together(method: Any, grid: str | None) -> None:
    """What differs is the rounding of the bfloat16 copy, not the whole update."""
    model = tt.prepare(llama(), method, None if grid is None else [{"match": "*", "grid": RULES[grid]}])
    layer = first(model)
    with torch.no_grad():
        for p in layer.adapter.parameters():
            p.fill_(0.5)
        trained = layer.base.dequantize(torch.float32) + layer.adapter.delta.dense()
    bare = int((layer.base.dequantize(torch.float32) != trained).sum())
    report = {f.name: f for f in tt.fold(model, merge=True)}["model.layers.0.self_attn.q_proj"]
    stored = first(model).dequantize(torch.float32)
    assert report.action == "merged"
    assert report.differing == int((stored != trained).sum())
    assert bare == 64 * 64
    assert ((stored - trained).norm() / trained.norm()).item() == pytest.approx(report.error, rel=1e-4)
    assert report.moved.codes == 0
    assert not isinstance(first(model).base, AffineWeight)


def test_folding_tells_transformers_that_the_model_changed() -> None:
    """Its config describes the layers as they are then: without adapters."""
    model = prepared(LrQat(rank=2), "integer")
    before = [dict(spec) for spec in model.config.quantization_config.specs]
    tt.fold(model)
    after = model.config.quantization_config
    assert any("adapter" in spec and spec["adapter"] for spec in before)
    assert [spec for spec in after.specs if spec.get("adapter")] == []
    assert set(after.layers) == set(quant_layers(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("method", "grid"), [(LrQat(rank=2), "integer"), (QaHira(), "nf4"), (Peqa(), "real"), (Qlora(rank=2), "nf4")]
)
def test_what_diverged_is_not_folded(method: Any, grid: str, value: float) -> None:
    """Codes could be made of it, and nobody would see; of the layers before it, none is folded either."""
    model = prepared(method, grid)
    last = [n for n, layer in quant_layers(model).items() if getattr(layer, "adapter", None) is not None][-1]
    part, parameter = next(iter(model.get_submodule(last).adapter.named_parameters()))
    with torch.no_grad():
        parameter.view(-1)[0] = value
    with pytest.raises(UserError, match=rf"{last}: {part} holds NaN or infinite values.* earlier checkpoint"):
        tt.fold(model)
    assert all(layer.adapter is not None for layer in quant_layers(model).values() if hasattr(layer, "adapter"))
