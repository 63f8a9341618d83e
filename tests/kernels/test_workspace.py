"""The one buffer of each slot: kept, grown, given back, and never given out where memory cannot be shared."""

import weakref
from collections.abc import Iterator

import pytest
import torch

import cases
from cases import CASES, K, N
from trimtab.kernels import cpu, workspace

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    workspace.clear()
    yield
    workspace.clear()


def taken(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    made = workspace.take("slot", (rows, columns), dtype, CPU)
    assert (made.shape, made.dtype, made.is_contiguous()) == ((rows, columns), dtype, True)
    return made


def storage(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def test_memory_is_kept_until_more_is_needed() -> None:
    first = taken(3, 8)
    assert first.untyped_storage().nbytes() == 3 * 8 * 4
    assert {storage(t) for t in (taken(3, 8), taken(8, 3), taken(1, 8), taken(6, 8, torch.bfloat16))} == {
        storage(first)
    }
    larger = taken(3, 9)
    assert storage(larger) != storage(first)
    assert larger.untyped_storage().nbytes() == 3 * 9 * 4
    assert storage(taken(3, 8)) == storage(larger)


def test_the_old_memory_is_gone_before_the_new_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    taken(2, 2)
    old = weakref.ref(workspace._kept.buffers["slot"])
    empty, alive = torch.empty, []
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: (alive.append(old()), empty(*args, **kwargs))[1])
    taken(20, 20)
    assert alive == [None]


def test_cleared_it_is_given_back() -> None:
    taken(2, 2)
    old = weakref.ref(workspace._kept.buffers["slot"])
    workspace.clear()
    assert old() is None
    workspace.clear()


def test_made_under_inference_mode_it_serves_training_too() -> None:
    with torch.inference_mode():
        taken(2, 2)
    leaf = torch.ones(2, 2, requires_grad=True)
    (taken(2, 2).fill_(3) * leaf).sum().backward()
    assert leaf.grad is not None
    assert (leaf.grad == 3).all()


def test_other_devices_and_compilers_get_memory_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert workspace.take("slot", (2, 2), torch.float32, torch.device("meta")).is_meta
    shared = storage(taken(2, 2))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert storage(taken(2, 2)) != shared


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("rtn-int4-g32-integer", ["weight", "weight"]),
        ("lora-nf4-g32", ["weight", "weight"]),
        ("lr-qat-fixed8-int4-g32-integer", ["weight", "weight", "gradient"]),
        ("peqa-int4-channel-symmetric", ["weight", "weight", "gradient"]),
        ("qat-int4-g32-integer", ["gradient"]),  # its weight is made with a graph
    ],
)
def test_a_layer_makes_its_matrices_there(name: str, slots: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In forward, in backward, and dL/dW: nothing of N x K is allocated again in every layer."""
    layer, real, seen = cases.build(CASES[name]), workspace.take, []
    monkeypatch.setattr(workspace, "take", lambda slot, *rest: (seen.append((slot, rest[0])), real(slot, *rest))[1])
    layer(cases.random(3, K, seed=0).requires_grad_()).sum().backward()
    assert seen == [(slot, (N, K)) for slot in slots]


@pytest.mark.skipif(cpu.library() is None, reason="no C kernels")
def test_a_layer_whose_output_serves_makes_its_matrix_there_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Per channel in bfloat16 dL/dW is not formed."""
    layer, real, seen = cases.build(CASES["lr-qat-fixed8-int4-channel-integer"], bias=False), workspace.take, []
    monkeypatch.setattr(workspace, "take", lambda slot, *rest: (seen.append(slot), real(slot, *rest))[1])
    layer(cases.random(3, K, seed=0).bfloat16().requires_grad_()).sum().backward()
    assert seen == ["weight", "weight"]
