"""Products in half precision taken in float32: against float64, and torch's own kernels where they are given back."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from trimtab.kernels import products

HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """On any processor; small blocks, so that products have several each way."""
    monkeypatch.setattr(products, "_BLOCK", 32)
    products.uninstall()
    products.install(force=True)
    yield
    products.uninstall()
    products.install()


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def near(found: Tensor, wanted: Tensor) -> bool:
    """Within one rounding of the result, and float32's of the sum."""
    half = torch.finfo(found.dtype).eps / 2
    return bool(((found.double() - wanted).abs() <= 1.01 * half * wanted.abs() + 1e-4).all())


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(("m", "k", "n"), [(70, 100, 45), (8, 33, 1), (200, 1, 64), (9, 33, 70), (3, 40, 40)])
def test_products_are_rounded_once(installed: None, dtype: torch.dtype, m: int, k: int, n: int) -> None:
    a, b, c = random(m, k, dtype=dtype), random(n, k, dtype=dtype).t(), random(n, dtype=dtype)
    exact = a.double() @ b.double()
    if m >= products._FEW:
        assert near(a @ b, exact)
        assert near(torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * c.double() + 2 * exact)
        assert near(torch.bmm(a.expand(2, m, k), b.expand(2, k, n))[1], exact)
    out = torch.empty(m, n, dtype=dtype)
    assert torch.mm(a, b, out=out) is out
    assert torch.equal(out, a @ b)
    torch.addmm(c, a, b, out=out)
    assert torch.equal(out, F.linear(a, b.t(), c))
    old = torch.full((m, n), torch.nan, dtype=dtype)
    assert torch.equal(torch.addmm(old, a, b, beta=0), a @ b)


@pytest.mark.parametrize("dtype", HALF)
def test_a_linear_layer_and_attention_have_the_gradients_of_float64(installed: None, dtype: torch.dtype) -> None:
    given = [random(2, 9, 40, 16, dtype=dtype) for _ in range(3)]
    given = [g * (i + 1) / 3 for i, g in enumerate(given)] + [random(24, 16, dtype=dtype) / 4]

    def run(tensors: list[Tensor]) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in tensors]
        mask = torch.ones(40, 40, dtype=torch.bool).tril()
        each = torch.stack([mask, mask.new_ones(40, 40)])[:, None]
        for one in (None, mask, torch.zeros(40, 40, dtype=tensors[0].dtype), each, each[1:]):
            y = F.scaled_dot_product_attention(*leaves[:3], attn_mask=one, is_causal=one is None)
            F.linear(y, leaves[3]).square().mean().backward()
        return [t.grad for t in leaves if t.grad is not None]

    ours, exact = run(given), run([g.double() for g in given])
    assert len(ours) == 4
    for found, wanted in zip(ours, exact, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < 8 * torch.finfo(dtype).eps


def test_kernels_are_replaced_once(installed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """`install` says whether it did, so that what depends on it is done as often."""
    assert not products.install(force=True)
    for slow, force, done in ((False, True, True), (True, False, True), (False, False, False)):
        products.uninstall()
        monkeypatch.setattr(products, "slow", lambda slow=slow: slow)
        assert products.install(force=force) is done


def test_which_products_are_taken() -> None:
    """In half precision, of eight rows and more, of shapes that fit; all others are torch's own, its errors, too."""

    class Original:
        def call_boxed(self, keys: object, *args: Tensor, **kwargs: Tensor) -> str:
            return "torch"

    def zeros(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.zeros(shape, dtype=dtype)

    a, b, single = zeros(8, 3), zeros(3, 5), zeros(8, 3, dtype=torch.float32)
    mm, addmm = (products._product(lambda *args, **kwargs: "ours", first)(Original()) for first in (0, 1))  # type: ignore[arg-type,return-value]
    taken = [
        (a, b), (a.half(), b.half()), (zeros(9, 3), b), (zeros(2, 8, 3), zeros(2, 3, 5)),
        (zeros(8, 3), zeros(3, 1)), (zeros(8, 1), zeros(1, 5)),
    ]  # fmt: skip
    left = [
        (single, b.float()), (a, b.float()), (single, b), (a, b.half()), (zeros(7, 3), b), (a, zeros(3, 0)),
        (a, zeros(4, 5)), (a, zeros(5, 3)), (zeros(8, 0), zeros(0, 5)), (zeros(2, 8, 3), zeros(3, 3, 5)),
        (zeros(1, 8, 3), zeros(2, 3, 5)),
    ]  # fmt: skip
    assert [mm(None, *pair) for pair in taken] == ["ours"] * len(taken)
    assert [mm(None, *pair) for pair in left] == ["torch"] * len(left)
    assert [addmm(None, zeros(5), *pair) for pair in (taken[0], left[0])] == ["ours", "torch"]
    assert mm(None, a, b, out=zeros(8, 5)) == "ours"
    assert mm(None, zeros(2, 8, 3), zeros(2, 3, 5), out=zeros(2, 8, 5)) == "ours"
    outs = (zeros(8, 5, dtype=torch.float32), zeros(8, 4), zeros(7, 5), zeros(40), zeros(8, 3))
    assert [mm(None, a, b, out=out) for out in outs] == ["torch"] * len(outs)


@pytest.mark.parametrize("mask", [None, "one", "wide", "each", "each wide", "shared"])
def test_attention_goes_backward_a_sequence_at_a_time_in_float32(mask: str | None) -> None:
    """Torch's own kernel is asked once for each sequence, with that sequence's mask; in float32 once, as it stands."""
    calls: list[tuple[list[torch.dtype], list[int], Tensor | None, tuple[object, ...]]] = []

    class Original:
        def call_boxed(self, keys: object, *args: Tensor, attn_mask: Tensor | None = None) -> tuple[Tensor, ...]:
            calls.append(([t.dtype for t in args[:5]], [len(t) for t in args[:6]], attn_mask, args[6:]))
            return args[1] * 1, args[2] * 2, args[3] * 3

    kernel = products._attention_backward(Original())
    grad, q, k, v, y, sums = (random(3, 2, 5, 4, dtype=torch.float32) + i for i in range(6))
    masks = {
        None: None, "one": torch.ones(5, 5), "wide": torch.ones(5, 5, dtype=torch.bfloat16),
        "each": torch.arange(3.0).view(3, 1, 1, 1), "each wide": torch.arange(3).view(3, 1, 1, 1).bfloat16(),
        "shared": torch.ones(1, 1, 5, 5),
    }  # fmt: skip
    given = masks[mask]
    wide = kernel(None, grad, q, k, v, y, sums, 0.5, False, attn_mask=given)
    assert [c[:2] for c in calls] == [([torch.float32] * 5, [3] * 6)]
    assert calls[0][2] is given
    assert torch.equal(wide[2], v * 3)
    calls.clear()
    halves = [t.half() for t in (grad, q, k, v, y)]
    found = kernel(None, *halves, sums, 0.5, False, attn_mask=given)
    assert [c[:2] for c in calls] == [([torch.float32] * 5, [1] * 6)] * 3
    assert all(c[3] == (0.5, False) for c in calls)
    for i, times in enumerate((1, 2, 3)):
        assert found[i].dtype == torch.float16
        assert torch.equal(found[i], (halves[i + 1].float() * times).half())
    for i, (*_, seen, _) in enumerate(calls):
        if given is None:
            assert seen is None
        else:
            assert seen is not None
            assert seen.dtype == torch.float32
            assert torch.equal(seen, (given[i : i + 1] if given.ndim == 4 and len(given) > 1 else given).float())


def test_what_is_wrong_is_still_refused(installed: None) -> None:
    a = random(64, 64, dtype=torch.bfloat16)
    for left, right in ((a, a.float()), (a, a[:32]), (a[:, :32], a)):
        with pytest.raises(RuntimeError):
            left @ right
    assert torch.mm(a, a[:, :0]).shape == (64, 0)
    assert torch.equal(torch.mm(a[:, :0], a[:0]), torch.zeros(64, 64, dtype=torch.bfloat16))


def test_torch_gets_its_kernels_back() -> None:
    calls: list[int] = []
    a = torch.ones(8, 8, dtype=torch.bfloat16)
    products.uninstall()
    with pytest.MonkeyPatch.context() as patch:
        made = products._product(lambda a, b: calls.append(1) or a.new_zeros(8, 8))
        patch.setitem(products._INSTEAD, "mm", made)
        products.install(force=True)
        assert a.mm(a).sum() == 0
        assert a.float().mm(a.float()).sum() == 512
        products.uninstall()
    assert a.mm(a).sum() == 512
    assert len(calls) == 1
    products.install()  # where this processor wants it


@pytest.mark.parametrize(
    ("machine", "capability", "switch", "slow"),
    [
        ("x86_64", "AVX2", None, True),
        ("AMD64", "DEFAULT", None, True),
        ("x86_64", "AVX512", None, False),
        ("arm64", "DEFAULT", None, False),
        ("x86_64", "AVX2", "torch", False),
    ],
)
def test_which_processors_are_slow(
    monkeypatch: pytest.MonkeyPatch, machine: str, capability: str, switch: str | None, slow: bool
) -> None:
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setenv("TRIMTAB_KERNELS", switch or "c")
    assert products.slow() is slow
    assert products.workspace_bytes(torch.bfloat16) == slow * 3 * 4 * products._BLOCK**2
    assert products.workspace_bytes(torch.float32) == 0
