"""Parameters that were cast, cut, turned or moved behind the model's back: the right result, or an error by name.

Mixed precision of FSDP2 and DeepSpeed casts any parameter (`p.data = p.data.bfloat16()`), past `Module._apply`. Once the C
kernels read such tensors as what they were made of: NaN, or `malloc(): invalid size`.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import cases
from cases import CASES, K
from trimtab.errors import UserError
from trimtab.layers import linear
from trimtab.layers.linear import QuantLinear

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "bfloat16": Tensor.bfloat16,
    "half": Tensor.half,
    "float": Tensor.float,
    "double": Tensor.double,
    "integers": Tensor.int,
    "transposed": Tensor.t,
    "rows": lambda t: t[:1],
    "columns": lambda t: t[..., 1:],
    "strided": lambda t: t.repeat_interleave(2, -1)[..., ::2],
    "empty": lambda t: t[:0],
    "meta": lambda t: t.to("meta"),
}
FLOATS = ("bfloat16", "half", "float", "double", "strided")
KINDS = (
    "rtn-int8-channel-integer",
    "lora-int4-g32-real",
    "q-bara-nf4-g32-double",
    "q-bara-float",
    "lr-qat-fixed8-int3-channel-symmetric",
    "lr-qat-int-int2-g32-real",
    "lr-qat-bf16-int4-g32-integer",
    "lr-qat-fp32-int2-g32-real",
    "peqa-int4-g32-integer",
    "qat-int3-g32-real",
    "qa-hira-int4-g32-integer",
    "qa-lora-nf4-g32",
    "qa-blora-int2-channel-real",
)
X = {dtype: cases.random(3, K, seed=2).to(dtype) for dtype in (torch.float32, torch.bfloat16)}


def change(layer: QuantLinear, name: str, how: Callable[[Tensor], Tensor]) -> None:
    """What an engine does; a tensor on another device takes the parameter's place."""
    owner, p = layer.get_submodule(name.rpartition(".")[0]), layer.get_parameter(name)
    changed = how(p.detach())
    if changed.is_meta or not changed.is_floating_point():
        setattr(owner, name.rpartition(".")[2], nn.Parameter(changed, requires_grad=False))
    else:
        p.data = changed


def trained_again(layer: QuantLinear, name: str) -> QuantLinear:
    """The same layer with the parameter as float32 of the same numbers."""
    other = deepcopy(layer)
    change(other, name, lambda t: t.float().contiguous())
    return other


def forward(layer: QuantLinear) -> list[Tensor]:
    with torch.no_grad():
        return [layer(x) for x in (*X.values(), X[torch.bfloat16][:1].unsqueeze(0))]


def backward(layer: QuantLinear) -> list[Tensor]:
    layer.zero_grad()
    found = []
    for x in X.values():
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        found.append(leaf.grad)
    return [t for t in (*found, *(p.grad for p in layer.parameters())) if t is not None]


def fold(layer: QuantLinear) -> list[Tensor]:
    assert layer.adapter is not None
    return [p.detach() for p in layer.adapter.fold(layer.base).weight.parameters()]


def save(layer: QuantLinear) -> list[Tensor]:
    with torch.device("meta"):
        made = linear.from_spec(layer.spec(), torch.float32)
    assert isinstance(made, QuantLinear)
    made.load_state_dict(layer.state_dict(), assign=True)
    return forward(made)


USES: tuple[Callable[[QuantLinear], list[Tensor]], ...] = (forward, backward, fold, save)


def outcome(use: Callable[[QuantLinear], list[Tensor]], layer: QuantLinear) -> list[Tensor] | str:
    try:
        return use(layer)
    except UserError as error:
        return str(error)
    except RuntimeError as error:
        if "in loading state_dict" not in str(error):  # torch's own, by name, where the saved layer is loaded
            raise
        return str(error)


def agree(found: list[Tensor], wanted: list[Tensor], rounding: float, what: Any) -> None:
    assert len(found) == len(wanted), what
    for a, b in zip(found, wanted, strict=True):
        assert not a.is_meta, what
        assert a.isfinite().all(), what
        assert a.shape == b.shape, what
        assert (a.float() - b.float()).norm() <= rounding * b.float().norm(), what


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", CHANGES)
def test_a_changed_parameter_is_used_rightly_or_named(kind: str, how: str) -> None:
    layer = cases.build(CASES[kind])
    if layer.adapter is not None:
        cases.perturb(layer, CASES[kind], seed=1)
    untouched = {use: use(deepcopy(layer)) for use in USES if use is not fold or layer.adapter is not None}
    for name, p in layer.named_parameters():
        changed = deepcopy(layer)
        try:
            change(changed, name, CHANGES[how])
        except RuntimeError:  # of one dimension, or no such change of this type
            continue
        now = changed.get_parameter(name)
        same = now.dtype == p.dtype and now.shape == p.shape and now.is_contiguous() and now.device == p.device
        loose = name.startswith("adapter") or name in ("base.weight", "bias")
        if same:
            wanted = untouched
        elif loose and now.shape == p.shape and how in FLOATS:
            like = trained_again(changed, name) if name.startswith("adapter") else changed
            wanted = {use: use(like) for use in untouched}
        else:
            wanted = {}
        for use in untouched:
            what, found = (kind, name, how, use.__name__), outcome(use, changed)
            if use is fold and name == "bias":
                continue
            if wanted:
                assert not isinstance(found, str), (what, found)
                agree(
                    found, wanted[use], 0.02 if use is backward else 0.0, what
                )  # gradients have the parameter's dtype
            elif use is save and loose:  # a spec says nothing of what is trained: loading it, or using it, does
                assert isinstance(found, str) or not same, what
            else:
                assert isinstance(found, str), (what, [t.shape for t in found])
                assert (how if how == "meta" else name.rpartition(".")[2]) in found, (what, found)
