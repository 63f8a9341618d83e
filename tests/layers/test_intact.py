"""Each way in which a tensor may no longer be what it was, alone, and what is said of it."""

import pytest
import torch
from torch import Tensor, nn

from trimtab.errors import UserError
from trimtab.layers import intact

CPU = torch.device("cpu")


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(2, 3))
        self.b = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
        self.inner = nn.Linear(1, 1)


def changed(**tensors: Tensor | None) -> Pair:
    pair = Pair()
    for name, t in tensors.items():
        setattr(pair, name, None if t is None else nn.Parameter(t, requires_grad=False))
    return pair


def test_what_is_kept_of_a_weight() -> None:
    """Its own tensors; those of a module in it are that module's."""
    assert intact.kept(Pair()) == {"a": (torch.float32, (2, 3)), "b": (torch.uint8, (4,))}


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"a": None}, r"it: a is None and should be contiguous float32 \(2, 3\)"),
        ({"a": torch.zeros(2, 3, dtype=torch.bfloat16)}, r"it: a is bfloat16 \(2, 3\) on cpu"),
        ({"a": torch.zeros(3, 2)}, r"it: a is float32 \(3, 2\) on cpu"),
        ({"a": torch.zeros(3, 2).t()}, r"it: a is float32 \(2, 3\) with strides \(1, 2\)"),
        ({"b": torch.zeros(4, dtype=torch.uint8, device="meta")}, "it: b is on meta and a on cpu"),
        ({"a": torch.zeros(2, 3, device="meta")}, "it: b is on cpu and a on meta"),
    ],
)
def test_a_stored_tensor_that_changed(tensors: dict[str, Tensor | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        intact.stored("it", intact.kept(Pair()), changed(**tensors))


def test_stored_tensors_that_did_not() -> None:
    intact.stored("it", intact.kept(Pair()), Pair())
    intact.stored("it", intact.kept(Pair()), Pair().to("meta"))


@pytest.mark.parametrize("tensor", [torch.zeros(3), torch.zeros(2, dtype=torch.int32), torch.zeros(2, device="meta")])
def test_a_float_tensor_that_changed(tensor: Tensor) -> None:
    wanted = r"bias is .* and should be of a float type, \(2,\) on cpu"
    with pytest.raises(UserError, match=wanted):
        intact.floating("bias", tensor, (2,), CPU)
    with pytest.raises(UserError, match=r"the trained " + wanted):
        intact.trained("bias", tensor, (2,), CPU)


def test_float_tensors_that_did_not() -> None:
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        t = torch.ones(2, dtype=dtype, requires_grad=True)
        assert intact.floating("bias", t, (2,)) is intact.floating("bias", t, (2,), CPU) is t
        acting = intact.trained("bias", t, (2,))
        assert acting.dtype == torch.float32
        assert acting.requires_grad
    assert intact.floating("bias", torch.zeros(2, device="meta"), (2,)).is_meta


def test_a_layer_that_is_elsewhere() -> None:
    intact.on(CPU, Pair())
    with pytest.raises(UserError, match=r"inner.weight is .* on meta, and the layer's input is on cpu; move the whole"):
        intact.on(CPU, _partly_moved())
    with pytest.raises(UserError, match=r"a is .* on cpu, and its base is on meta"):
        intact.on(torch.device("meta"), Pair(), "its base")


def _partly_moved() -> Pair:
    pair = Pair()
    pair.inner.to("meta")
    return pair
