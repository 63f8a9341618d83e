"""The Triton kernels against the torch references, in Triton's interpreter or on a GPU (TRIMTAB_TEST_DEVICE=cuda).

Triton decides when it is imported whether it interprets, so the cases run in one process of their own, this file as a
script, and each test looks up how its own case ended. What the kernels become on GPUs: `test_triton_compiled.py`.

The values are chosen such that every sum is exact in float32 in whatever order it is added, and that shifted levels do
meet ties: results must then agree to the bit, rank or not. Only `plain` factors are not exact.
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from trimtab.kernels import channel, dequantize, triton_channel, triton_gpu, triton_parts, triton_products
from trimtab.kernels.dequantize import Levels
from trimtab.quant import codebook, packing
from trimtab.quant.grid import CodebookGrid

DEVICE = os.environ.get("TRIMTAB_TEST_DEVICE", "cpu")
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
    narrow: bool = False
    kept: torch.dtype = torch.float32
    tokens: int = 1

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
    # Scales, zeros and offsets in the dtypes that files hold.
    cases += [Case("affine", 4, zero, gather=i > 0, kept=kept) for zero in ZEROS for i, kept in enumerate(DTYPES[:2])]
    for bits in (3, 4):
        for i, shape in enumerate(GROUPS):
            for j, tokens in enumerate((1, 5)):
                zero, kept, dtype = ZEROS[(bits + i + j) % 3], DTYPES[(i + j) % 3], DTYPES[(bits + i) % 3]
                cases.append(Case("affine_product", bits, zero, shape, dtype, kept=kept, tokens=tokens))
                if bits == 4:
                    zero = ZEROS[2 * (i % 2)]
                    double = (i + j) % 2 == 0
                    cases.append(Case("codebook_product", bits, zero, shape, dtype, double=double, tokens=tokens))
    levels = []
    for i, bits in enumerate((2, 3, 4, 8)):
        for j, zero in enumerate(ZEROS):
            for k, rank in enumerate((0, 3, 70)):
                shape, dtype = GROUPS[(i + j + k) % 4], DTYPES[(i + k) % 3]
                fixed = (i + j + k) % 2 == 0
                levels.append(
                    Case("levels", bits, zero, shape, dtype, rank, fixed, narrow=rank > 0 and (i + j) % 2 == 0)
                )
    cases += levels
    cases += [replace(case, dtype=torch.uint8) for case in levels if case.zero == "integer"]
    for narrow in (False, True):
        plain = Case("levels", 4, rank=8, dtype=torch.uint8, values="plain", narrow=narrow)
        cases += [replace(plain, bits=bits, fixed=bits < 4) for bits in (2, 3, 4, 8)]
    cases += [replace(case, operator="level_gradients") for case in levels]
    for i, shape in enumerate([(37, 37), (150, 150), (64, 64)]):
        cases += [
            Case("channel", bits, ZEROS[(i + bits) % 3], shape, rank=3, narrow=i != 1, values=values, tokens=7)
            for bits, values in ((2, "exact"), (4, "none clipped"))
        ]
    cases += [
        Case("channel", 2, shape=(20, 20), rank=3, tokens=7),
        Case("channel", 3, rank=3, shape=(64, 64), values="nan"),
    ]
    return cases


CASES = {str(case): case for case in _cases()}


# ---- one case ---------------------------------------------------------------------------------------------------


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
    if case.operator == "affine_product":  # exact sums, but for the last rounding
        offset = None if offset is None else (offset * 8).round() / 8
    codes = packing.pack(torch.randint(0, 2**case.bits, (N, k), dtype=torch.uint8), case.bits)
    if case.operator.endswith("_product"):
        return _product(case, codes, scale, zero, offset)
    rows = torch.randint(0, N, (9,)) if case.gather else None
    out = torch.empty(N if rows is None else len(rows), k, dtype=case.dtype)
    if case.operator == "affine":
        if case.values == "extreme":
            extremes = torch.tensor([torch.inf, torch.nan, 3.4e38, 1e-41, 65519.0, 65520.0, 1e-6, 0.0])
            scale = extremes[torch.arange(N * groups) % 8].view(N, groups)
        return _differ(case, out, codes, rows, *_kept(case, scale, zero, offset), case.bits, 2.0 ** (case.bits - 1))
    if case.operator == "codebook":
        return _differ(case, out, codes, rows, *_absmax(case, groups), offset, case.bits)
    return _levels(case, out, codes, scale, zero, offset)


def _kept(case: Case, scale: Tensor, zero: Tensor | None, offset: Tensor | None) -> tuple[Tensor | None, ...]:
    """As a weight stores them."""
    if case.kept == torch.float32:
        return scale, zero, offset
    return scale.to(case.kept), None if zero is None else zero.byte(), None if offset is None else offset.to(case.kept)


def _absmax(case: Case, groups: int) -> tuple[Tensor | None, ...]:
    table = codebook.table(CodebookGrid(f"nf{case.bits}"))
    absmax = torch.rand(N, groups)
    if not case.double:
        return table, absmax, None, None, None
    absmax, *rest = codebook.compress_absmax(absmax)
    return table, absmax, codebook.dynamic_map(), *rest


def _product(case: Case, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None) -> str:
    """Sums in another order than the reference's; on tensor cores of weights rounded to bfloat16."""
    k, group = case.shape
    x = (torch.randint(-8, 9, (case.tokens, k)) / 8).to(case.dtype)
    y = torch.empty(case.tokens, N, dtype=case.dtype)
    if case.operator == "affine_product":
        about = *_kept(case, scale, zero, offset), case.bits, 2.0 ** (case.bits - 1)
    else:
        about = *_absmax(case, k // group), offset, case.bits
    weight = torch.empty(N, k)
    fill = dequantize._affine if case.operator == "affine_product" else dequantize._codebook
    fill(weight, codes, None, *about)
    _call(triton_products, case.operator, y, x, codes, *about)
    if case.dtype == torch.bfloat16 and case.tokens > 1:
        weight = weight.bfloat16()
    exact = x.double() @ weight.double().t()
    error = (y.double() - exact).abs()
    allowed = torch.finfo(case.dtype).eps / 2 * exact.abs() + 1e-6 * (x.double().abs() @ weight.double().abs().t())
    return (
        "" if bool((error <= allowed).all()) else f"off by {float((error / allowed).max()):.3g} times what is allowed"
    )


def _factors(case: Case, k: int) -> tuple[Tensor | None, Tensor | None]:
    rank = case.rank
    if not rank:
        return None, None
    if case.values == "plain":
        return torch.randn(rank, k), torch.randn(N, rank)
    a, b = torch.randint(-2, 3, (rank, k)).float(), torch.randint(-2, 3, (N, rank)).float()
    if case.narrow:  # less than half of bfloat16's last place: it is to be rounded away
        a, b = a * (1 + 2.0**-10), b * (1 - 2.0**-11)
    return a, b


def _levels(case: Case, out: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None) -> str:
    k = out.shape[1]
    a, b = _factors(case, k)
    phi = torch.randint(0, 256, (N, k), dtype=torch.uint8) if case.fixed else codes
    gain = 2.0**-9 if case.fixed and case.bits < 8 else 0.5
    if case.values == "none clipped":
        phi, gain = packing.pack(torch.full((N, k), 7, dtype=torch.uint8), case.bits), 0.125
    center = 2.0 ** (case.bits - 1)
    about = Levels(phi, case.bits, case.fixed, a, b, gain, scale, zero, offset, center, case.narrow)
    if case.values == "nan":
        assert a is not None
        a[1, 5] = torch.nan
    if case.operator == "channel":
        return _channel(case, about)
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


def _channel(case: Case, about: Levels) -> str:
    """Weights, bits of clipped levels, their number, and the gradients of A, B, scale and offset without dL/dW."""
    k = case.shape[0]
    out, bits = torch.empty(N, k, dtype=torch.bfloat16), torch.empty(N, -(-k // 64), dtype=torch.int64)
    _call(triton_channel, "level_weights_clipped", out, bits, *about)
    weight = torch.empty_like(out)
    dequantize._levels(weight, *about)
    entries = channel.clipped_levels(about, k)
    wrong = [] if _same(out, weight) else ["weights"]
    found = channel.clipped_entries(bits)
    wrong += [] if all(map(torch.equal, found, entries)) else ["bits"]
    assert len(entries[0]) if case.values != "none clipped" else not len(entries[0])
    if case.values == "nan":  # of which sums become NaN
        assert (entries[1] == 5).sum() == N
        return ", ".join(wrong)
    g, x = (torch.randint(-4, 5, (case.tokens, size)).bfloat16() / 4 for size in (N, k))
    y = (x.float() @ weight.float().t()).bfloat16()
    expected = channel.gradients(about, g, x, y, entries)
    count = channel.Clipped()
    device = [t.to(DEVICE) if isinstance(t, Tensor) else t for t in (g, x, y, bits)]
    on_device = Levels(*(t.to(DEVICE) if isinstance(t, Tensor) else t for t in about))
    got = channel.gradients(on_device, *device, count)
    assert count._seen is not None
    if DEVICE != "cpu":
        torch.cuda.synchronize()
    wrong += [] if int(count._seen) == len(entries[0]) else ["count"]
    for name, one, other in zip("ABso", got, expected, strict=True):
        if (one is None) != (other is None) or (
            one is not None and other is not None and not torch.allclose(one.cpu(), other, rtol=1e-5, atol=1e-4)
        ):
            wrong.append(f"gradient of {name}")
    sums = triton_channel.column_products(device[0], device[2]).cpu()
    wrong += [] if torch.allclose(sums, (g.float() * y.float()).sum(0), rtol=1e-5) else ["column products"]
    return ", ".join(wrong)


def _call(module: Any, name: str, *arguments: Any) -> list[Any]:
    """Calls a kernel on the device with copies of the arguments, and what it has written into the arguments."""
    moved = [a.to(DEVICE, copy=True) if isinstance(a, Tensor) else a for a in arguments]
    with numpy.errstate(all="ignore"):  # the interpreter is made of numpy, which would warn of an overflow
        getattr(module, name)(*moved)
    for to, got in zip(arguments, moved, strict=True):
        if isinstance(to, Tensor):
            to.copy_(got)
    return list(arguments)


def _differ(case: Case, *arguments: Any, but: Tensor | None = None) -> str:
    """Calls kernel and reference on copies of the arguments, and compares all of them, filled or not."""
    got, expected = ([a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2))
    _call(triton_gpu, case.operator, *got)
    getattr(dequantize, f"_{case.operator}")(*expected)
    if but is not None:
        got[0][but] = expected[0][but]
    wrong = [i for i, (x, y) in enumerate(zip(got, expected, strict=True)) if isinstance(x, Tensor) and not _same(x, y)]
    return f"arguments {wrong} differ" if wrong else ""


def _same(x: Tensor, y: Tensor) -> bool:
    return torch.equal(x.nan_to_num(nan=1.25), y.nan_to_num(nan=1.25)) and torch.equal(x.isnan(), y.isnan())


# ---- the tests proper -------------------------------------------------------------------------------------------


def _script(what: str, **environment: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "error", __file__, what]
    changed = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, str]:
    return _script("cases", TRITON_INTERPRET="1" if DEVICE == "cpu" else "0")


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_reference(name: str, outcomes: dict[str, str]) -> None:
    assert outcomes[name] == ""


def test_the_operators_use_them_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr(triton_gpu, "affine", lambda out, *rest: called.append("triton"))
    run = dequantize._on_cuda("affine", lambda out, *rest: called.append("reference"))
    monkeypatch.delenv("TRIMTAB_KERNELS", raising=False)
    about = torch.empty(1, 1, dtype=torch.uint8), None, torch.empty(1, 1), None, None, 8, 128.0
    run(torch.empty(1, 1), *about)
    run(torch.empty(1, 1, dtype=torch.float64), *about)
    monkeypatch.setenv("TRIMTAB_KERNELS", "torch")
    run(torch.empty(1, 1), *about)
    monkeypatch.delenv("TRIMTAB_KERNELS")
    monkeypatch.setattr(triton_parts, "triton", None)
    monkeypatch.setattr(dequantize, "_say_that_triton_is_missing", lambda: None)
    run(torch.empty(1, 1), *about)
    assert called == ["triton", "reference", "reference", "reference"]


if __name__ == "__main__":
    torch.set_num_threads(1)
    assert triton_parts.available()
    every = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    json.dump({name: _run(CASES[name]) for name in list(CASES)[::every]}, sys.stdout)
