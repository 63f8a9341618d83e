"""Which backend serves which tensors: where one reads them the compiled one, else the torch reference, which agrees."""

from typing import Any

import pytest
import torch

from trimtab.kernels import cpu, dequantize, triton_gpu
from trimtab.kernels.arguments import OPERATORS


def affine(dtype: torch.dtype) -> tuple[Any, ...]:
    scale = torch.ones(2, 1)
    return torch.empty(2, 4, dtype=dtype), torch.zeros(2, 2, dtype=torch.uint8), None, scale, None, None, 4, 8.0


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return []


@pytest.mark.parametrize(("dtype", "reads"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("there", [True, False])
def test_on_the_cpu(
    called: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reads: bool, there: bool
) -> None:
    monkeypatch.setattr(cpu, "library", lambda: object() if there else None)
    given = affine(dtype)
    seen: list[Any] = []
    run = dequantize._on_cpu(
        "affine",
        lambda *arguments: (called.append("torch"), seen.extend(arguments)),  # type: ignore[func-returns-value]
        lambda *arguments: (called.append("c"), seen.extend(arguments)),  # type: ignore[func-returns-value]
    )
    run(*given)
    assert called == ["c" if reads and there else "torch"]
    assert all(a is b for a, b in zip(seen, given, strict=True))


@pytest.mark.parametrize(("dtype", "reads"), [(torch.float16, True), (torch.float64, False)])
@pytest.mark.parametrize("there", [True, False])
def test_on_a_gpu(
    called: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reads: bool, there: bool
) -> None:
    monkeypatch.setattr(triton_gpu, "available", lambda: there)
    monkeypatch.setattr(triton_gpu, "affine", lambda *arguments: called.append("triton"))
    dequantize._on_cuda("affine", lambda *arguments: called.append("torch"))(*affine(dtype))
    assert called == ["triton" if reads and there else "torch"]


@pytest.mark.parametrize(
    ("dtype", "there", "by"),
    [
        (torch.float32, True, "c"), (torch.uint8, True, "c"), (torch.float64, True, "codes of c"),
        (torch.float32, False, "torch"), (torch.float64, False, "torch"),
    ],
)  # fmt: skip
def test_levels_get_the_codes_of_one_backend(
    called: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, there: bool, by: str
) -> None:
    monkeypatch.setattr(cpu, "library", lambda: object() if there else None)
    monkeypatch.setattr(cpu, "levels", lambda *arguments: called.append("c"))
    monkeypatch.setattr(dequantize, "_levels", lambda *arguments: called.append("torch"))
    monkeypatch.setattr(dequantize, "_values_of_compiled_codes", lambda *arguments: called.append("codes of c"))
    about = (torch.zeros(2, 2, dtype=torch.uint8), 4, False, None, None, 1.0, torch.ones(2, 1), None, None, 8.0)
    dequantize._levels_on_cpu(torch.empty(2, 4, dtype=dtype), *about)
    assert called == [by]


@pytest.mark.parametrize("name", ["affine", "codebook", "levels", "level_gradients"])
def test_every_operator_is_there_for_every_device(name: str) -> None:
    """A product of few rows is the CPU's alone, where reading a weight is all the work."""
    for device in ("CPU", "CUDA", "CompositeExplicitAutograd", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"trimtab::{name}", device), device
    product = f"trimtab::{name}_product"
    if f"{name}_product" in OPERATORS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(product, "CPU")
