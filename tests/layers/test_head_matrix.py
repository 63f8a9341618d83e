"""What may be done with the matrix that a head lends: everything that reads it, and nothing that writes to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cases
from cases import CASES, K, N
from trimtab.errors import UserError
from trimtab.layers.head_matrix import read_only


def _out(m: Tensor) -> None:
    torch.add(torch.ones(2, 3), 1, out=m)


def _set(name: str, value: Any) -> Callable[[Tensor], None]:
    return lambda m: setattr(m, name, value)


def _item(m: Tensor) -> None:
    m[0] = 1


def _iadd(m: Tensor) -> None:
    m += 1


WRITES: dict[str, Callable[[Tensor], Any]] = {
    "add_": lambda m: m.add_(1),
    "copy_": lambda m: m.copy_(torch.zeros(2, 3)),
    "[]": _item,
    "+=": _iadd,
    "data": lambda m: m.data,
    "data=": _set("data", torch.zeros(2, 3)),
    "grad=": _set("grad", None),
    "out=": _out,
}
READS: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda m: m.shape,
    "grad": lambda m: m.grad,
    "T": lambda m: m.T,
    "item": lambda m: m[0],
    "sum": lambda m: torch.sum(input=m),
    "linear": lambda m: F.linear(torch.ones(1, 3), m),
    "added to another": lambda m: torch.zeros(2, 3).add_(m),
    "copied to another": lambda m: torch.zeros(2, 3).copy_(m),
    "dunder": lambda m: m.__len__(),
    "requires_grad_": lambda m: m.requires_grad_(False),
    "requires_grad=": _set("requires_grad", False),
}


@pytest.mark.parametrize("how", WRITES)
def test_writing_names_the_layer_and_changes_nothing(how: str) -> None:
    for name, said in (("model.head", "model.head"), ("", "lm_head")):
        matrix = torch.ones(2, 3)
        with pytest.raises(UserError, match=rf"^{said if how != 'out=' else 'lm_head'}\.weight is computed"):
            WRITES[how](read_only(matrix, name))
        assert torch.equal(matrix, torch.ones(2, 3))


@pytest.mark.parametrize("how", READS)
def test_reading_gives_what_an_ordinary_tensor_gives(how: str) -> None:
    found, wanted = READS[how](read_only(torch.ones(2, 3), "")), READS[how](torch.ones(2, 3))
    if not isinstance(wanted, Tensor):
        assert found == wanted
    elif how != "requires_grad_":  # which gives the matrix itself
        assert type(found) is Tensor
        assert torch.equal(found, wanted)


def test_gradients_go_through_it() -> None:
    leaf = torch.ones(2, 3, requires_grad=True)
    (read_only(leaf * 2, "") @ torch.ones(3)).sum().backward()
    assert torch.equal(leaf.grad, torch.full((2, 3), 2.0))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["rtn-int4-g32-integer", "lora-int4-g32-integer", "lr-qat-fixed8-int4-g32-integer"])
def test_a_head_lends_it_with_and_without_an_adapter(name: str) -> None:
    head = cases.build(CASES[name])
    head.name, head.head_dtype = "model.head", torch.float32
    with pytest.raises(UserError, match=r"^model\.head\.weight is computed"):
        head.weight.add_(1)
    assert head.weight.shape == (N, K)
    with pytest.raises(
        AttributeError, match=r"model\.head\.weight cannot be set: its matrix is stored as AffineWeight"
    ):
        head.weight = torch.zeros(N, K)
