"""What a method and its adapter say of themselves before a weight is there, against what they then do."""

import pytest
import torch

import cases
from cases import CASES, TRAINED


@pytest.mark.parametrize("name", CASES)
def test_a_method_says_what_it_attaches(name: str) -> None:
    method, adapter = CASES[name].method, cases.build(CASES[name]).adapter
    assert method.trains == (adapter is not None)
    assert method.adapter is (None if adapter is None else type(adapter))


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_says_what_it_does_to_the_weight(name: str) -> None:
    layer = cases.build(TRAINED[name])
    cases.perturb(layer, TRAINED[name], 3)
    base, adapter = layer.base, layer.adapter
    assert adapter is not None
    with torch.no_grad():
        moved = not torch.equal(layer.dequantize(torch.float32), base.dequantize(torch.float32))
    assert moved == adapter.moves_weight
    assert adapter.folded(base.spec()) == adapter.fold(base).weight.spec()
    assert not adapter.stays(merge=True)
    assert adapter.stays(merge=False) == (not moved)
