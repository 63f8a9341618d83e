"""Which backend serves which tensors: where one reads them the compiled one, else the torch reference, which agrees."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trimtab.kernels import cpu, dequantize, triton_gpu, triton_parts
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import quantize
from trimtab.quant.grid import CodebookGrid, Grid


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
    monkeypatch.setattr(cpu, "affine", lambda *arguments: (called.append("c"), seen.extend(arguments)))
    run = dequantize._on_cpu(
        "affine",
        lambda *arguments: (called.append("torch"), seen.extend(arguments)),  # type: ignore[func-returns-value]
    )
    run(*given)
    assert called == ["c" if reads and there else "torch"]
    assert all(a is b for a, b in zip(seen, given, strict=True))


@pytest.mark.parametrize(("dtype", "reads"), [(torch.float16, True), (torch.float64, False)])
@pytest.mark.parametrize("there", [True, False])
def test_on_a_gpu(
    called: list[str], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reads: bool, there: bool
) -> None:
    monkeypatch.setattr(dequantize, "_triton", lambda: there)
    monkeypatch.setattr(triton_gpu, "affine", lambda *arguments: called.append("triton"))
    dequantize._on_cuda("affine", lambda *arguments: called.append("torch"))(*affine(dtype))
    assert called == ["triton" if reads and there else "torch"]


@pytest.mark.parametrize("backend", ["c", "triton"])
@pytest.mark.parametrize(
    ("dtype", "there", "by"),
    [
        (torch.float32, True, torch.float32), (torch.uint8, True, torch.uint8), (torch.float64, True, torch.uint8),
        (torch.float32, False, None), (torch.float64, False, None),
    ],
)  # fmt: skip
def test_levels_get_the_codes_of_one_backend(
    monkeypatch: pytest.MonkeyPatch, backend: str, dtype: torch.dtype, there: bool, by: torch.dtype | None
) -> None:
    """In a dtype that the kernel does not write, too: it makes the codes, and they become values."""
    called: list[Any] = []

    def kernel(out: torch.Tensor, *about: Any) -> None:
        called.append(out.dtype)
        out.fill_(9)

    monkeypatch.setattr(cpu, "library", lambda: object() if there else None)
    monkeypatch.setattr(dequantize, "_triton", lambda: there)
    monkeypatch.setattr(cpu if backend == "c" else triton_gpu, "levels", kernel)
    on = dequantize._on_cpu if backend == "c" else dequantize._on_cuda
    about = (torch.zeros(2, 2, dtype=torch.uint8), 4, False, None, None, 1.0, torch.ones(2, 1), None, None, 8.0, False)
    out = torch.empty(2, 4, dtype=dtype)
    on("levels", lambda *arguments: called.append(None))(out, *about)
    assert called == [by]
    assert by is None or (out == (9 if by == dtype else 1)).all()


def test_a_gpu_without_triton_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless the references were asked for."""
    monkeypatch.setattr(triton_parts, "triton", None)
    dequantize._say_that_triton_is_missing.cache_clear()
    monkeypatch.setenv("TRIMTAB_KERNELS", "torch")
    assert not dequantize._triton()
    dequantize._say_that_triton_is_missing.cache_clear()
    monkeypatch.delenv("TRIMTAB_KERNELS")
    with pytest.warns(UserWarning, match="Triton is not installed .*: on a GPU trimtab uses its slower") as said:
        assert not any(dequantize._triton() for _ in range(3))
    assert len(said) == 1


@pytest.mark.parametrize(
    "name", ["affine", "codebook", "affine_product", "codebook_product", "levels", "level_gradients"]
)
def test_every_operator_is_there_for_every_device(name: str) -> None:
    for device in ("CPU", "CUDA", "CompositeExplicitAutograd", "Meta"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"trimtab::{name}", device), device


class Calls(TorchDispatchMode):
    """The operators that are called, less views."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "trimtab" or not func.is_view:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("grid", [Grid(4, 16), CodebookGrid("nf4", 16, True)], ids=["affine", "codebook"])
def test_a_layer_of_a_generated_token_is_two_operators_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, grid: Grid | CodebookGrid
) -> None:
    """Memory for y, and the product; each more is a launch. (The CPU's operators stand in for a GPU's.)"""
    layer = QuantLinear(quantize(torch.randn(8, 32), grid))
    x = torch.randn(1, 1, 32).bfloat16()
    monkeypatch.setattr(dequantize, "on_gpu", lambda tensor: True)
    with torch.no_grad(), Calls() as calls:
        y = layer(x)
    assert y.shape == (1, 1, 8)
    assert y.dtype == torch.bfloat16
    kind = "codebook" if isinstance(grid, CodebookGrid) else "affine"
    assert calls.names == ["aten.empty.memory_format", f"trimtab.{kind}_product.default"]
