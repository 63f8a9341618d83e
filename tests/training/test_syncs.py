"""How often a micro-step asks a device for numbers: on a GPU each time the host waits until all queued work is done.

The steps run on the CPU, under a mode that sees every operator, forward and backward. What would make a host wait on a GPU
are operators that give a number to Python or a shape that depends on numbers. Copies to the host, which no operator is for
on a CPU, are seen as calls of `tolist`, `numpy` and `cpu`.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import tiny
from trimtab.kernels import arguments as kernels
from trimtab.kernels import cpu
from trimtab.layers.linear import QuantEmbedding
from trimtab.models.load import load
from trimtab.recipe import texts
from trimtab.recipe.recipe import from_dict
from trimtab.training import divergence, teacher_cache
from trimtab.training.divergence import LOGITS_CHUNK_TOKENS
from trimtab.training.ours import Ours
from trimtab.training.trainer import fit, packed

aten = torch.ops.aten
_WAITS = {
    aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default,
    aten.is_nonzero.default, aten._unique2.default, aten.item.default, aten.repeat_interleave.Tensor,
}  # fmt: skip
_INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}


class Waits(TorchDispatchMode):
    """Counts what would make a host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITS or (func in _INDEXED and any(t is not None and t.dtype == torch.bool for t in args[1])):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


def waits(recipe: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Of each micro-step of a run."""
    found, step, running = [], Ours.training_step, [False]

    def counted(self: Ours, *args: Any, **kwargs: Any) -> Tensor:
        mode = Waits()
        running.append(True)
        with mode:
            for name in ("tolist", "numpy", "cpu"):
                plain = getattr(Tensor, name)

                def noted(t: Tensor, *a: Any, _plain: Any = plain, _name: str = name, **k: Any) -> Any:
                    mode.seen.append(_name)
                    return _plain(t, *a, **k)

                context.setattr(Tensor, name, noted)
            loss = step(self, *args, **kwargs)
        context.undo()
        found.append(mode.seen)
        return loss

    context = pytest.MonkeyPatch()
    monkeypatch.setattr(Ours, "training_step", counted)
    parsed = from_dict(recipe)
    torch.manual_seed(0)
    model, tokenizer = load(parsed.model.path, parsed.method, parsed.rules, dtype=parsed.dtype)
    teacher_cache.ask(parsed, tokenizer, texts.training_of(parsed).rows, packed)
    fit(model, tokenizer, parsed)
    return found


@pytest.mark.parametrize(
    "changes",
    [
        {"method": {"name": "lr-qat", "rank": 4}},
        {"method": {"name": "lr-qat", "rank": 4}, "rules": [{"match": "*", "grid": {"bits": 4, "group": 16}}]},
        {"method": {"name": "qlora", "rank": 4}},
        {"method": {"name": "q-bara", "rank": 4}},
        {"method": {"name": "qa-hira"}},
        {"method": {"name": "qlora", "rank": 4}, "distill": {"weight": 0.5, "teacher": "bfloat16"}},
        {"method": {"name": "qlora", "rank": 4}, "distill": {"weight": 0.5, "teacher": "cached", "top_k": 4}},
    ],
    ids=lambda c: "-".join(map(str, [c["method"]["name"], *list(c)[1:], c.get("distill", {}).get("teacher", "")])),
)
def test_a_micro_step_waits_once(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """For transformers, which asks in a forward pass whether its mask masks anything.

    Whether the loss is a number is asked once a step. A teacher in memory has a forward pass of its own.
    """
    monkeypatch.setattr(cpu, "library", lambda: None)  # the C kernels list clipped levels; a GPU's do not
    monkeypatch.setattr(
        kernels, "within", kernels._within_on_device
    )  # token ids are looked at by the host on a CPU only
    recipe = tiny.recipe(given / "model", given / "data.jsonl", tmp_path / "run", **changes)
    recipe["train"] |= {"steps": 1, "micro_batch": 2}
    found = waits(recipe, monkeypatch)
    assert found
    for seen in found:
        assert 1 <= len(seen) <= (2 if changes.get("distill", {}).get("teacher") == "bfloat16" else 1), seen


def test_an_embedding_with_a_factor_copies_none_from_the_host() -> None:
    """`torch.tensor` of a number is such a copy, which waits; `torch.full` is not."""
    from trimtab.layers.weights import quantize
    from trimtab.quant.grid import Grid

    layer = QuantEmbedding(quantize(torch.randn(8, 32), Grid(8, 32)), torch.bfloat16, scale=32**0.5)
    ids = torch.tensor([1, 2])
    expected = layer.base.dequantize(torch.bfloat16, rows=ids) * torch.tensor(32**0.5, dtype=torch.bfloat16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", None)
        assert torch.equal(layer(ids), expected)


@pytest.mark.parametrize(("free", "tokens"), [(1 << 20, 1), (1 << 30, 1), (8 << 30, 2), (1 << 36, 16), (1 << 50, 32)])
def test_logits_at_once_grow_with_what_is_free(free: int, tokens: int) -> None:
    """Of 128,000 words, 1.5 MB a token: 128 to 4096 tokens, a sixteenth of what is free where that is more than 128's."""
    found = divergence._at_once(free, 128_000)
    assert found == tokens * LOGITS_CHUNK_TOKENS
    assert found == LOGITS_CHUNK_TOKENS or found * 12 * 128_000 <= free / 16
    assert divergence.tokens_at_once(torch.device("cpu"), 128_000) == LOGITS_CHUNK_TOKENS
