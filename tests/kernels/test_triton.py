"""The Triton kernels against the torch references, in Triton's interpreter, and compiled for a GPU that need not be there.

Triton decides when it is imported whether it interprets, so both run in processes of their own, each this file as a
script. The cases run in one such process, and each test looks up how its own case ended.

The values are chosen such that every sum is exact in float32 in whatever order it is added, and that shifted levels do
meet ties: results must then agree to the bit, rank or not. Only `plain` factors are not exact.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from trimtab.kernels import dequantize, triton_gpu
from trimtab.kernels.dequantize import Levels
from trimtab.quant import codebook, packing
from trimtab.quant.grid import CodebookGrid

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux only")

N = 37
GROUPS = ((37, 37), (36, 12), (144, 48), (300, 150))
"""(K, g): per channel, and K that no part divides; the last has groups of two tiles."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ZEROS = ("symmetric", "integer", "real")


@dataclass(frozen=True)
class Case:
    """One call of one operator."""

    operator: str
    bits: int
    zero: str = "symmetric"
    shape: tuple[int, int] = GROUPS[2]
    dtype: torch.dtype = torch.bfloat16
    rank: int = 0
    fixed: bool = False
    gather: bool = False
    double: bool = False
    values: str = "exact"

    def __str__(self) -> str:
        changed = [f"{k}={v}" for k, v in vars(self).items() if v != getattr(Case("", 0), k)]
        return re.sub(r"torch\.| ", "", "-".join(changed))


def _cases() -> list[Case]:
    cases = []
    for bits in range(1, 9):
        for i, shape in enumerate(GROUPS):
            for j, zero in enumerate(ZEROS):
                dtype = DTYPES[(bits + i + j) % 3]
                cases.append(Case("affine", bits, zero, shape, dtype, gather=(bits + j) % 2 == 0))
    cases += [Case("affine", 4, "real", dtype=dtype, values="extreme") for dtype in DTYPES]
    for bits in (2, 3, 4):
        for i, shape in enumerate(GROUPS):
            for j, double in enumerate((False, True)):
                zero, dtype = ZEROS[2 * (i % 2)], DTYPES[(i + j) % 3]
                cases.append(Case("codebook", bits, zero, shape, dtype, gather=i < 2, double=double))
    # Enough absmax for two of double quantization's blocks.
    cases.append(Case("codebook", 4, shape=(36, 4), double=True))
    levels = []
    for i, bits in enumerate((2, 3, 4, 8)):
        for j, zero in enumerate(ZEROS):
            for k, rank in enumerate((0, 3, 70)):
                shape, dtype = GROUPS[(i + j + k) % 4], DTYPES[(i + k) % 3]
                levels.append(Case("levels", bits, zero, shape, dtype, rank, fixed=(i + j + k) % 2 == 0))
    cases += levels
    cases += [replace(case, dtype=torch.uint8) for case in levels if case.zero == "integer"]
    cases += [Case("levels", bits, rank=8, fixed=bits < 4, dtype=torch.uint8, values="plain") for bits in (2, 3, 4, 8)]
    return cases + [replace(case, operator="level_gradients") for case in levels]


CASES = {str(case): case for case in _cases()}


# ---- one case, in the interpreter -------------------------------------------------------------------------------


def _run(case: Case) -> str:
    """How the kernel differs from its reference: nothing, or what is wrong."""
    torch.manual_seed(0)
    k, group = case.shape
    groups = k // group
    scale = (
        torch.randint(1, 256, (N, groups))
        / 128.0
        * torch.tensor([1.0, -1.0]).repeat(N * groups)[: N * groups].view(N, -1)
    )
    zero = torch.randint(0, 2**case.bits, (N, groups)).float() if case.zero == "integer" else None
    offset = torch.randn(N, groups) if case.zero == "real" else None
    codes = packing.pack(torch.randint(0, 2**case.bits, (N, k), dtype=torch.uint8), case.bits)
    rows = torch.randint(0, N, (9,)) if case.gather else None
    out = torch.empty(N if rows is None else len(rows), k, dtype=case.dtype)
    if case.operator == "affine":
        if case.values == "extreme":
            extremes = torch.tensor([torch.inf, torch.nan, 3.4e38, 1e-41, 65519.0, 65520.0, 1e-6, 0.0])
            scale = extremes[torch.arange(N * groups) % 8].view(N, groups)
        return _differ(case, out, codes, rows, scale, zero, offset, case.bits, 2.0 ** (case.bits - 1))
    if case.operator == "codebook":
        table = codebook.table(CodebookGrid(f"nf{case.bits}"))
        absmax = torch.rand(N, groups)
        doubled = (None, None, None)
        if case.double:
            absmax, *rest = codebook.compress_absmax(absmax)
            doubled = codebook.dynamic_map(), *rest
        return _differ(case, out, codes, rows, table, absmax, *doubled, offset, case.bits)
    return _levels(case, out, codes, scale, zero, offset)


def _levels(case: Case, out: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None) -> str:
    k, rank = out.shape[1], case.rank
    a = b = None
    if rank and case.values == "plain":
        a, b = torch.randn(rank, k), torch.randn(N, rank)
    elif rank:
        a, b = torch.randint(-2, 3, (rank, k)).float(), torch.randint(-2, 3, (N, rank)).float()
    phi = torch.randint(0, 256, (N, k), dtype=torch.uint8) if case.fixed else codes
    gain = 2.0**-9 if case.fixed and case.bits < 8 else 0.5
    about = Levels(phi, case.bits, case.fixed, a, b, gain, scale, zero, offset, 2.0 ** (case.bits - 1))
    if case.values == "plain":
        u = dequantize.level_values(about, k)
        tie = (u - u.floor() - 0.5).abs() < 1e-5
        assert tie.float().mean() < 0.01
        return _differ(case, out, *about, but=tie)
    if case.operator == "levels":
        return _differ(case, out, *about)
    grad = (torch.randint(-8, 9, out.shape) / 8).to(case.dtype)
    sums = torch.empty_like(scale), None if offset is None else torch.empty_like(scale)
    return _differ(case, grad, *sums, *about)


def _differ(case: Case, *arguments: Any, but: Tensor | None = None) -> str:
    """Calls kernel and reference on copies of the arguments, and compares all of them, filled or not."""
    got, expected = ([a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2))
    with numpy.errstate(all="ignore"):  # the interpreter is made of numpy, which would warn of an overflow
        getattr(triton_gpu, case.operator)(*got)
    getattr(dequantize, f"_{case.operator}")(*expected)
    if but is not None:
        got[0][but] = expected[0][but]
    wrong = [i for i, (x, y) in enumerate(zip(got, expected, strict=True)) if isinstance(x, Tensor) and not _same(x, y)]
    return f"arguments {wrong} differ" if wrong else ""


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=1.25), y.nan_to_num(nan=1.25)) and torch.equal(x.isnan(), y.isnan())


# ---- compiled for a GPU -----------------------------------------------------------------------------------------


def _compiled() -> dict[str, list[str]]:
    """The memory accesses and fused products in each kernel's code for an H100, which no driver is asked about."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    class Compiled:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def compile_only(*arguments: Any, **options: Any) -> None:
                code = self.kernel.warmup(*arguments, grid=grid, **options).asm["ptx"]
                found[self.kernel.__name__] = re.findall(r"\b(?:(?:ld|st)\.global|fma)\.[.\w]*", code)

            return compile_only

    found: dict[str, list[str]] = {}
    triton.runtime.driver.set_active(Driver())
    for name in [name for name in vars(triton_gpu) if name.endswith("_kernel")]:
        setattr(triton_gpu, name, Compiled(getattr(triton_gpu, name)))
    k, groups = 1024, 16
    codes, scale, rows = torch.empty(N, k // 2, dtype=torch.uint8), torch.empty(N, groups), torch.zeros(N).long()
    doubled = scale.to(torch.uint8), torch.empty(256), torch.empty(-(-N * groups // 256)), torch.empty(1)
    out = torch.empty(N, k, dtype=torch.bfloat16)
    about = Levels(codes, 4, False, torch.empty(8, k), torch.empty(N, 8), 0.5, scale, None, scale, 8.0)
    triton_gpu.affine(out, codes, rows, scale, None, scale, 4, 8.0)
    triton_gpu.codebook(out, codes, rows, torch.empty(16), *doubled, scale, 4)
    triton_gpu.levels(out, *about)
    triton_gpu.level_gradients(out, scale, scale, *about)
    return found


# ---- the tests proper -------------------------------------------------------------------------------------------


def _script(what: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", __file__, what]
    changed = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return _script("cases", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_compiles_for_a_gpu(tmp_path: Path) -> None:
    found = _script("compiled", TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path))
    assert found.keys() == {f"_{name}_kernel" for name in ("affine", "codebook", "levels", "gradients")}
    for kernel, code in found.items():
        # The packed codes and the result pass 16 bytes at a time.
        assert "ld.global.v4.b32" in code
        assert {name for name in code if name.startswith("st.global") and ".v4." in name}
        # q * s + o must round twice, on every kernel that has one.
        assert kernel in ("_levels_kernel", "_gradients_kernel") or not any(name.startswith("fma") for name in code)


def test_the_operators_use_them_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(triton_gpu, "levels", lambda out, *rest: called.append("triton"))
    run = dequantize._on_cuda("levels", lambda out, *rest: called.append("reference"))
    monkeypatch.delenv("TRIMTAB_KERNELS", raising=False)
    scale = torch.empty(1, 1)
    about = Levels(torch.empty(1, 1, dtype=torch.uint8), 8, False, None, None, 1.0, scale, None, None, 128.0)
    run(torch.empty(1, 1), *about)
    run(torch.empty(1, 1, dtype=torch.float64), *about)
    monkeypatch.setenv("TRIMTAB_KERNELS", "torch")
    run(torch.empty(1, 1), *about)
    monkeypatch.delenv("TRIMTAB_KERNELS")
    monkeypatch.setattr(triton_gpu, "triton", None)
    run(torch.empty(1, 1), *about)
    assert called == ["triton", "reference", "reference", "reference"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert triton_gpu.available()
    made = _compiled() if sys.argv[1] == "compiled" else {name: _run(case) for name, case in CASES.items()}
    json.dump(made, sys.stdout)
