"""Each way in which a tensor may no longer be what it was, alone, and what is said of it."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import cases
from trimtab.errors import UserError
from trimtab.layers import intact
from trimtab.layers.linear import QuantEmbedding

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


def test_every_use_of_a_weight_names_what_was_cut_of_it() -> None:
    """Also those that would read nothing of what was cut: a spec of it could be saved."""
    for name, tensor in (
        ("qa-hira-nf4-g32", "absmax"),
        ("qa-lora-int4-g32-integer", "zero"),
        ("rtn-int4-g32-real", "offset"),
    ):
        layer = cases.build(cases.CASES[name])
        p = layer.base.get_parameter(tensor)
        p.data = p.data[:, 1:]
        uses: list[Callable[[], object]] = [layer.base.spec, layer.spec, lambda x=layer: x(torch.ones(2, cases.K))]
        uses.append(layer.base.read_absmax if tensor == "absmax" else layer.base.range)  # type: ignore[arg-type]
        if tensor == "absmax":
            uses.append(lambda x=layer: x.base.with_offset(torch.zeros(cases.N, 2)))
        if layer.adapter is not None:
            uses.append(lambda x=layer: x.adapter.fold(x.base))
        for use in uses:
            with pytest.raises(UserError, match=rf"Weight of 48 x 64: {tensor} is "):
                use()


def test_an_adapter_that_is_elsewhere_than_its_weight() -> None:
    for name, beside in (("lora-int4-g32-real", "that it is added to"), ("qa-lora-int4-g32-real", "that it moves")):
        layer = cases.build(cases.CASES[name])
        assert layer.adapter is not None
        layer.adapter.to("meta")
        with pytest.raises(UserError, match=rf"delta.A is .* on meta, and the weight {beside} is on cpu"):
            layer.adapter.merged(layer.base, torch.float32)
        with pytest.raises(UserError, match=r"adapter.delta.A is .* on meta, and the layer's input is on cpu"):
            layer(torch.ones(2, cases.K))
    embedding = QuantEmbedding(cases.build(cases.CASES["rtn-int4-g32-integer"]).base, torch.float32).to("meta")
    with pytest.raises(UserError, match=r"base.codes is .* on meta, and the layer's input is on cpu"):
        embedding(torch.tensor([0, 1]))


def _partly_moved() -> Pair:
    pair = Pair()
    pair.inner.to("meta")
    return pair
