"""The pooled delta: its elementwise formula in float64, its ways to be read, its size, and peft's LoRA as oracle."""

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn

import reference
from trimtab.errors import UserError
from trimtab.layers.deltas import DeltaShape, PooledDelta

N, K, GROUP = 12, 32, 8
SHAPES = {
    "lora": DeltaShape(out_features=N, in_features=K, rank=3, scaling=2.0),
    "q-bara": DeltaShape(out_features=N, in_features=K, rank=6, scaling=2.0, pool=2, repeat=2, mean=True),
    "q-bara-k4-sum": DeltaShape(out_features=N, in_features=K, rank=12, scaling=0.5, pool=4, repeat=4),
    "qa-lora": DeltaShape(out_features=N, in_features=K, rank=3, scaling=2.0, pool=GROUP),
    "qa-lora-mean": DeltaShape(out_features=N, in_features=K, rank=3, scaling=2.0, pool=GROUP, mean=True),
    "qa-lora-wide": DeltaShape(out_features=N, in_features=K, rank=3, scaling=2.0, pool=2 * GROUP),
    "qa-hira": DeltaShape(out_features=N, in_features=K, rank=None, scaling=1.5, pool=GROUP, repeat=3),
    "qa-hira-e1": DeltaShape(out_features=N, in_features=K, rank=None, scaling=1.0, pool=GROUP, mean=True),
    "qa-blora": DeltaShape(out_features=N, in_features=K, rank=3, scaling=2.0, pool=GROUP, repeat=2),
}
# Trainable parameters by the table of docs/design.md, section 2, with r = 3 and k = 2 or 4.
NUMBERS = {
    "lora": 3 * (N + K),
    "q-bara": 3 * (N + K),
    "q-bara-k4-sum": 3 * (N + K),
    "qa-lora": 3 * (N + K // GROUP),
    "qa-lora-mean": 3 * (N + K // GROUP),
    "qa-lora-wide": 3 * (N + K // (2 * GROUP)),
    "qa-hira": N * K // (GROUP * 3),
    "qa-hira-e1": N * K // GROUP,
    "qa-blora": 3 * (N // 2 + K // GROUP),
}


def trained(name: str, dtype: str = "bfloat16") -> PooledDelta:
    """A delta whose factors are no longer zero, and not exact in bfloat16."""
    delta = PooledDelta(replace(SHAPES[name], dtype=dtype))
    generator = torch.Generator().manual_seed(len(name))
    with torch.no_grad():
        for p in delta.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return delta


def elementwise(delta: PooledDelta, dtype: str = "bfloat16") -> Tensor:
    """delta_W[i, j] = scaling / k * (B A)[i // k, j // k], as written in the design, one number at a time."""
    shape = delta.shape
    factor = {n: reference.stored(p.detach().double(), dtype) for n, p in delta.named_parameters()}
    inner = factor["M"] if "M" in factor else factor["B"] @ factor["A"]
    gain = shape.scaling / shape.pool if shape.mean else shape.scaling
    out = torch.empty(N, K, dtype=torch.float64)
    for i in range(N):
        for j in range(K):
            out[i, j] = gain * inner[i // shape.repeat, j // shape.pool]
    return out


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dense_is_the_elementwise_formula(name: str, dtype: str) -> None:
    delta = trained(name, dtype)
    torch.testing.assert_close(delta.dense().double(), elementwise(delta, dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_forward_is_x_times_dense(name: str) -> None:
    delta = trained(name)
    x = torch.randn(2, 5, K, generator=torch.Generator().manual_seed(0))
    expected = x.double() @ elementwise(delta).T
    torch.testing.assert_close(delta(x).double(), expected, rtol=1e-5, atol=1e-4)
    narrow = delta(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert (narrow.double() - expected).norm() < 2e-2 * expected.norm()


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_of_forward_are_those_of_the_equations(name: str) -> None:
    delta = trained(name, "float32")
    generator = torch.Generator().manual_seed(1)
    x, g = torch.randn(7, K, generator=generator), torch.randn(7, N, generator=generator)
    leaf = x.clone().requires_grad_()
    delta(leaf).backward(g)
    factors = {n: p.detach().double() for n, p in delta.named_parameters()}
    shape = delta.shape
    update = reference.Update(factors, shape.scaling, shape.pool, shape.repeat, shape.mean)
    for name_, grad in update.backward(g.double().T @ x.double()).items():
        ours = delta.get_parameter(name_.removeprefix("delta.")).grad
        assert ours is not None
        assert (ours.double() - grad).norm() < 1e-5 * grad.norm()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.double(), g.double() @ elementwise(delta, "float32"), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", [n for n, s in SHAPES.items() if s.pool % GROUP == 0])
def test_per_group_is_the_value_on_each_block(name: str) -> None:
    delta = trained(name)
    blocks = delta.per_group(GROUP)
    assert blocks.shape == (N, K // GROUP)
    dense = elementwise(delta).view(N, K // GROUP, GROUP)
    assert torch.equal(dense, dense[:, :, :1].expand_as(dense))
    torch.testing.assert_close(blocks.double(), dense[:, :, 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_as_lora_is_an_ordinary_lora_of_the_same_update(name: str) -> None:
    delta = trained(name)
    a, b = delta.as_lora()
    rank = SHAPES[name].rank or K // SHAPES[name].pool
    assert a.shape == (rank, K)
    assert b.shape == (N, rank)
    torch.testing.assert_close(b.double() @ a.double(), elementwise(delta), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SHAPES)
def test_added_to_is_a_sum(name: str) -> None:
    delta, x = trained(name), torch.randn(N, K, generator=torch.Generator().manual_seed(2))
    before = x.clone()
    expected = x.double() + elementwise(delta)
    torch.testing.assert_close(delta.added_to(x).double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(x, before)


@pytest.mark.parametrize("name", SHAPES)
def test_numbers_and_start(name: str) -> None:
    delta = PooledDelta(SHAPES[name])
    assert sum(p.numel() for p in delta.parameters()) == SHAPES[name].parameters == NUMBERS[name]
    assert all(p.dtype == torch.float32 and p.requires_grad for p in delta.parameters())
    # The factor on the output side is zero, so that a method starts as its base; A is not, and neither is then dB.
    assert (delta.dense() == 0).all()
    if delta.A is not None:
        bound = (K // SHAPES[name].pool) ** -0.5  # Kaiming-uniform(sqrt 5) over K / p inputs
        assert 0.5 * bound < delta.A.abs().max() <= bound
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(3))
    assert (delta(x) == 0).all()
    delta(x).sum().backward()
    start = delta.M if delta.B is None else delta.B
    assert start is not None
    assert start.grad is not None
    assert start.grad.abs().max() > 0


@pytest.mark.parametrize("name", [n for n, s in SHAPES.items() if s.rank])
def test_the_input_side_starts_as_a_linear_layer_does(name: str) -> None:
    """Kaiming-uniform(sqrt 5) over K / p inputs, as torch's own layers."""
    shape = SHAPES[name]
    torch.manual_seed(5)
    theirs = nn.Linear(K // shape.pool, shape.rank or 0, bias=False)
    torch.manual_seed(5)
    ours = PooledDelta(shape).A
    assert ours is not None
    assert torch.equal(ours, theirs.weight)


@pytest.mark.parametrize("name", SHAPES)
def test_an_approached_update_is_shared_out_evenly(name: str) -> None:
    """What the factors hold has equal norms on both sides, each singular value for itself, and a rank that is free is 0."""
    delta, shape = trained(name, "float32"), SHAPES[name]
    tile = torch.outer(torch.arange(1.0, N // shape.repeat + 1), torch.arange(2.0, K // shape.pool + 2))
    update = tile.repeat_interleave(shape.repeat, 0).repeat_interleave(shape.pool, 1)
    delta.approach(update)
    torch.testing.assert_close(delta.dense(), update, rtol=1e-4, atol=1e-3)
    if delta.A is not None and delta.B is not None:
        torch.testing.assert_close(delta.A.norm(dim=1), delta.B.norm(dim=0), rtol=1e-4, atol=1e-2)
    delta.approach(torch.zeros(N, K))
    assert all((p == 0).all() for p in delta.parameters())


def test_balanced_deltas_have_the_rank_they_pay_for() -> None:
    rank = {name: torch.linalg.matrix_rank(elementwise(trained(name))).item() for name in ("lora", "q-bara")}
    assert rank == {"lora": 3, "q-bara": 6}


def test_lora_is_that_of_peft() -> None:
    torch.manual_seed(0)
    theirs = PeftLinear(nn.Linear(K, N, bias=False), "default", LoraConfig(r=3, lora_alpha=6), r=3, lora_alpha=6)
    delta = trained("lora")
    assert delta.A is not None
    assert delta.B is not None
    with torch.no_grad():
        delta.A.copy_(delta.A.bfloat16())
        delta.B.copy_(delta.B.bfloat16())
        theirs.lora_A["default"].weight.copy_(delta.A)
        theirs.lora_B["default"].weight.copy_(delta.B)
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(4))
    base = theirs.get_base_layer()(x)
    torch.testing.assert_close(base + delta(x), theirs(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta.dense(), theirs.get_delta_weight("default"), rtol=1e-5, atol=1e-6)
    upstream = torch.randn(5, N, generator=torch.Generator().manual_seed(5))
    delta(x).backward(upstream)
    theirs(x).backward(upstream)
    assert delta.A.grad is not None
    torch.testing.assert_close(delta.A.grad, theirs.lora_A["default"].weight.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(delta.B.grad, theirs.lora_B["default"].weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"rank": 0}, "rank 0"),
        ({"pool": 5}, r"pool 5 does not divide the 32 input features; use one of \[1, 2, 4, 8, 16, 32\]"),
        ({"repeat": 5}, r"repeat 5 does not divide the 12 output features; use one of \[1, 2, 4\]"),
        ({"pool": 0}, "pool 0"),
        ({"repeat": -1}, "repeat -1"),
    ],
)
def test_a_shape_is_checked_when_it_is_made(wrong: dict[str, int], said: str) -> None:
    options = {"out_features": N, "in_features": K, "rank": 2, **wrong}
    with pytest.raises(UserError, match=said):
        DeltaShape(scaling=1.0, **options)


def test_a_tile_that_does_not_fit_says_which_would() -> None:
    with pytest.raises(
        UserError, match=r"pool 5 does not divide the 192 input .*; use one of \[1, 2, 4, 8, 16, 32, 64\]"
    ):
        DeltaShape(out_features=1, in_features=192, rank=1, scaling=1.0, pool=5)
    assert DeltaShape(out_features=1, in_features=192, rank=1, scaling=1.0, pool=192, repeat=1).parameters == 2


def test_a_shape_by_default() -> None:
    shape = DeltaShape(out_features=4, in_features=8, rank=2, scaling=1.0)
    assert (shape.pool, shape.repeat, shape.mean, shape.dtype) == (1, 1, False, "bfloat16")
    with pytest.raises(FrozenInstanceError):
        shape.rank = 3  # type: ignore[misc]
    with pytest.raises(TypeError):
        DeltaShape(4, 8, 2, 1.0)  # type: ignore[misc]


@pytest.mark.parametrize(("pool", "repeat"), [(8, 4), (8, 1), (1, 4), (2, 2)])
def test_a_dense_update_has_memory_of_its_own(pool: int, repeat: int) -> None:
    """A number spread over a row by strides of 0 is nothing that a kernel can read."""
    delta = PooledDelta(DeltaShape(out_features=4, in_features=8, rank=None, scaling=1.0, pool=pool, repeat=repeat))
    made = delta.dense()
    assert made.is_contiguous()
    assert made.untyped_storage().nbytes() == 4 * 8 * 4
