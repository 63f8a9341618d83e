"""What the Triton kernels become on GPUs that need not be there: registers, spills, instructions, programs.

Triton compiles for a GPU that its driver only names. For NVIDIA's the assembler comes with Triton's package and says what
it has spilled; AMD's code says it itself. Shapes are those of a layer of 4096 x 4096 and 512 or 4096 tokens. This shows
what a kernel is made of, not how fast it is.

Compiling runs in a process of its own for each GPU, this file as a script, since Triton has one driver in a process.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from trimtab.kernels import triton_channel, triton_gpu, triton_products

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton is made for Linux only")

GPUS = ("80", "90", "gfx942")
"""A100, H100 or H200, MI300."""
N = K = 4096
Row = dict[str, Any]


# ---- compiling --------------------------------------------------------------------------------------------------


def _target(gpu: str) -> Any:
    from triton.backends.compiler import GPUTarget

    return GPUTarget("hip", gpu, 64) if gpu.startswith("gfx") else GPUTarget("cuda", int(gpu), 32)


def _nvidia(code: str, gpu: str) -> Row:
    import triton

    assembler = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(code)
        file.flush()
        name = f"--gpu-name=sm_{gpu}{'a' if gpu >= '90' else ''}"
        command = [str(assembler), "-v", name, file.name, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    (registers,), (spilled,) = re.findall(r"Used (\d+) registers", said), re.findall(r"(\d+) bytes spill stores", said)
    return {
        "registers": int(registers),
        "spilled": int(spilled),
        "matrix": sorted(set(re.findall(r"wgmma\.mma_async[\w.]*|mma\.sync[\w.]*", code))),
        "memory": sorted(set(re.findall(r"\b(?:ld|st)\.global[.\w]*", code))),
        "fused": len(re.findall(r"\bfma\.rn\.f32\b", code)),
    }


def _amd(code: str, gpu: str) -> Row:
    number = {name: int(found) for name, found in re.findall(r"\.(\w+_count):\s+(\d+)", code)}
    return {
        "registers": number["vgpr_count"],
        "spilled": number["vgpr_spill_count"] + number["sgpr_spill_count"],
        "matrix": sorted(set(re.findall(r"\bv_mfma_\w+", code))),
        "memory": sorted(set(re.findall(r"\b(?:global|buffer)_(?:load|store)_\w+", code))),
        "fused": len(re.findall(r"\bv_(?:fma|pk_fma|fmac)_f32\b", code)),
    }


class _Compiled:
    """Stands for a kernel: a launch compiles it, and notes what has come out under the label of the moment."""

    label = ""
    found: ClassVar[dict[str, Row]] = {}

    def __init__(self, kernel: Any, gpu: str) -> None:
        self.kernel, self.gpu = kernel, gpu

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_only(*arguments: Any, **options: Any) -> None:
            made = self.kernel.warmup(*arguments, grid=grid, **options)
            amd = self.gpu.startswith("gfx")
            row = _amd(made.asm["amdgcn"], self.gpu) if amd else _nvidia(made.asm["ptx"], self.gpu)
            programs = 1
            for size in grid:
                programs *= size
            self.found[f"{self.label} {self.kernel.__name__}"] = {**row, "programs": programs}

        return compile_only


def _compile_all(gpu: str) -> dict[str, Row]:
    import triton

    class Driver:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> Any:
            return _target(gpu)

    triton.runtime.driver.set_active(Driver())
    for module in (triton_gpu, triton_products, triton_channel):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, _Compiled(getattr(module, name), gpu))
    for label, call in [*_calls(), *(_further_levels() if gpu == "90" else [])]:
        _Compiled.label = label
        call()
    return _Compiled.found


def _empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(*shape, dtype=dtype)


def _about(group: int, rank: int, narrow: bool, fixed: bool = False) -> tuple[Any, ...]:
    codes, scale = _empty(N, K if fixed else K // 2, dtype=torch.uint8), _empty(N, K // group)
    return codes, 4, fixed, _empty(rank, K), _empty(N, rank), 0.5, scale, None, scale, 8.0, narrow


def _calls() -> Iterator[tuple[str, Any]]:
    half, byte = torch.bfloat16, torch.uint8
    out, codes, mask = _empty(N, K, dtype=half), _empty(N, K // 2, dtype=byte), _empty(N, K // 64, dtype=torch.int64)
    scale = _empty(N, K // 64, dtype=half)
    doubled = _empty(N, K // 64, dtype=byte), _empty(256), _empty(N * K // 64 // 256), _empty(1)
    yield "real g64", lambda: triton_gpu.affine(out, codes, torch.zeros(N).long(), scale, None, scale, 4, 8.0)
    yield "nf4 g64", lambda: triton_gpu.codebook(out, codes, None, _empty(16), *doubled, _empty(N, K // 64), 4)
    yield from _levels("channel r32", *_about(K, 32, True))
    yield "channel r32 float32", lambda: triton_gpu.levels(out, *_about(K, 32, False))
    about, tokens = _about(K, 32, True), _empty(4096, K, dtype=half)
    yield "channel r32", lambda: triton_channel.level_weights_clipped(out, mask, *about)
    factors = about[3], about[4]
    yield (
        "channel r32",
        lambda: triton_channel.take_out(_empty(32, K), _empty(N, 32), mask, tokens, tokens, *factors, _empty(N, 1)),
    )
    yield "4096 tokens", lambda: triton_channel.column_products(tokens, tokens)
    for t in (1, 4):
        x, y = _empty(t, K, dtype=half), _empty(t, N, dtype=half)
        yield f"{t} tokens g64", lambda y=y, x=x: triton_products.affine_product(y, x, codes, scale, None, None, 4, 8.0)
        yield (
            f"{t} tokens nf4",
            lambda y=y, x=x: triton_products.codebook_product(y, x, codes, _empty(16), *doubled, None, 4),
        )


def _levels(label: str, *about: Any) -> Iterator[tuple[str, Any]]:
    """Forward, folding and backward."""
    out, sums = _empty(N, K, dtype=torch.bfloat16), _empty(N, about[6].shape[1])
    yield label, lambda: triton_gpu.levels(out, *about)
    yield f"{label} codes", lambda: triton_gpu.levels(_empty(N, K, dtype=torch.uint8), *about)
    yield label, lambda: triton_gpu.level_gradients(out, sums, sums.clone(), *about)


def _further_levels() -> Iterator[tuple[str, Any]]:
    yield from _levels("channel r64", *_about(K, 64, True))
    yield from _levels("g64 r32", *_about(64, 32, True))
    yield from _levels("g32 r32 fixed8", *_about(32, 32, True, True))


# ---- the tests proper -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GPUS)
def rows(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    cache = str(tmp_path_factory.mktemp("triton"))
    changed = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    command = [sys.executable, "-W", "error", __file__, request.param]
    result = subprocess.run(command, env=changed, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found: dict[str, Row] = json.loads(result.stdout)
    return {name: {**row, "gpu": request.param} for name, row in found.items()}


def _of(rows: dict[str, Row], *kernels: str) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if name.rpartition(" ")[2] in {f"_{k}_kernel" for k in kernels}}


def test_every_kernel_is_compiled(rows: dict[str, Row]) -> None:
    known = {
        name for m in (triton_gpu, triton_products, triton_channel) for name in vars(m) if name.endswith("_kernel")
    }
    assert {name.rpartition(" ")[2] for name in rows} == known


def test_nothing_is_spilled(rows: dict[str, Row]) -> None:
    assert {name: row["spilled"] for name, row in rows.items() if row["spilled"]} == {}


def test_registers_leave_room_for_several_programs(rows: dict[str, Row]) -> None:
    """65536 of an SM: 80 leave three programs of 8 warps, 128 four of 4; weights without a product have far fewer."""
    assert {name: row["registers"] for name, row in rows.items() if row["registers"] > 128} == {}
    of_levels = _of(rows, "levels", "gradients", "clipped")
    assert {n: r["registers"] for n, r in of_levels.items() if r["registers"] > 80 and r["gpu"] in ("80", "90")} == {}
    assert all(row["registers"] <= 48 for row in _of(rows, "affine", "codebook").values())


def test_bfloat16_factors_are_multiplied_by_matrix_instructions(rows: dict[str, Row]) -> None:
    narrow = {n: r for n, r in _of(rows, "levels", "gradients", "clipped").items() if "float32" not in n}
    assert len(narrow) >= 4
    assert all(any("bf16" in name for name in row["matrix"]) for row in narrow.values())
    several = {n: r for n, r in _of(rows, "affine_product", "codebook_product").items() if n.startswith("4 tokens")}
    assert len(several) == 2
    assert all(any("bf16" in name for name in row["matrix"]) for row in several.values())


def test_float32_factors_are_not_cut_to_fewer_bits(rows: dict[str, Row]) -> None:
    wide = {n: r for n, r in rows.items() if "float32" in n}
    assert len(wide) == 1
    assert not any(re.search("tf32|bf16|xf32", name) for row in wide.values() for name in row["matrix"])


def test_forward_folding_and_backward_multiply_alike(rows: dict[str, Row]) -> None:
    """The same instruction on tiles of the same size: their sums, and so their codes, are the same to the bit."""
    of_levels = {n: r for n, r in _of(rows, "levels", "gradients", "clipped").items() if "float32" not in n}
    for label in {" ".join(name.split()[:2]) for name in of_levels}:
        alike = {n: r for n, r in of_levels.items() if n.startswith(f"{label} ")}
        assert len(alike) >= 3
        assert len({tuple(row["matrix"]) for row in alike.values()}) == 1
        assert len({row["programs"] for row in alike.values()}) == 1


def test_there_are_programs_enough(rows: dict[str, Row]) -> None:
    """For the 132 multiprocessors of an H100 to have several each, per channel too."""
    assert {name: row["programs"] for name, row in rows.items() if row["programs"] < 256} == {}
    assert all(row["programs"] == 4096 for row in _of(rows, "gradients").values())


def test_memory_is_passed_16_bytes_at_a_time(rows: dict[str, Row]) -> None:
    for name, row in _of(rows, "affine", "codebook", "levels", "gradients", "clipped").items():
        for way in ("ld|load", "st|store") if "codes" not in name else ("ld|load",):  # a thread has 8 or 16 of a byte
            passed = [m for m in row["memory"] if re.search(way, m)]
            assert any(re.search(r"\.v4\.|\.v2\.b64|dwordx4|dwordx2", m) for m in passed), (name, passed)


def test_a_product_and_a_sum_round_twice(rows: dict[str, Row]) -> None:
    assert all(row["fused"] == 0 for row in _of(rows, "affine", "codebook").values())


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(_compile_all(sys.argv[1]), sys.stdout)
