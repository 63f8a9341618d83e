"""The C kernels once more, built with sanitizers for addresses and undefined behaviour: nothing is read beyond its end.

The sanitizers' library has to be loaded before anything else, so all runs in one process of its own, this file as a script:
a sweep over edges (2^k - 1, 2^k, 2^k + 1 columns, one row, one column, every group, ranks of 1 and beyond the layer), then
the kernels' tests that have small shapes. With a folder of other C sources it sweeps over those (`tests/mutate.py`).
"""

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trimtab.kernels import channel, cpu, dequantize
from trimtab.layers.weights import AffineWeight, CodebookWeight
from trimtab.quant.grid import CodebookGrid, Grid

SANITIZE = (
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-g",
)
TESTS = "ties or chunk or encoding_is or not_a_number or row_that or rules_of_torch or per_channel"
OPTIONS = "detect_leaks=0:alloc_dealloc_mismatch=0:detect_odr_violation=0"
COLUMNS = (1, 2, 3, 7, 8, 9, 14, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


# ---- in the process with sanitizers -----------------------------------------------------------------------------


def _sweep() -> None:
    zeros = ("symmetric", "integer", "real")
    for i, k in enumerate(COLUMNS):
        for j, n in enumerate((1, 3, 4, 5)):
            groups = [g for g in range(1, k + 1) if k % g == 0]
            for m, group in enumerate(groups):
                turn = i + j + m
                w = torch.randn(n, k, dtype=(torch.float32, torch.bfloat16)[turn % 2])
                _affine(w, Grid(turn % 8 + 1, group, zeros[turn % 3]), (1, 2, n + k + 3)[turn % 3])
                _codebook(w, CodebookGrid(("nf4", "nf3", "nf2", "fp4")[turn % 4], group, turn % 3 == 0))
    for rule in ("lp2", "lp2.4", "lp3.5"):
        AffineWeight.quantize(torch.randn(3, 33), Grid(3, 11, "integer", range=rule))


def _affine(w: torch.Tensor, grid: Grid, rank: int) -> None:
    n, k = w.shape
    for storage in ("int", "fixed8"):
        weight = AffineWeight.quantize(w, grid, storage)
        about = weight.described(weight.range(), (torch.randn(rank, k), torch.randn(n, rank)), 0.3)
        for dtype in (torch.float32, torch.bfloat16, torch.uint8):
            dequantize.levels(torch.empty(n, k, dtype=dtype), *about)
        offset = None if weight.offset is None else torch.empty(weight.scale.shape)
        dequantize.level_gradients(torch.randn(n, k).bfloat16(), torch.empty(weight.scale.shape), offset, *about)
        clipped = channel.weight_and_clipped(about, torch.empty(n, k, dtype=torch.bfloat16))
        g, x = torch.randn(3, n).bfloat16(), torch.randn(3, k).bfloat16()
        cpu.entries_of_product(g, x, *clipped)
        cpu.column_products(x, x)
        _read(weight)


def _codebook(w: torch.Tensor, grid: CodebookGrid) -> None:
    _read(CodebookWeight.quantize(w, grid))


def _read(weight: AffineWeight | CodebookWeight) -> None:
    n, k = weight.shape
    for dtype in (torch.float32, torch.bfloat16):
        weight.dequantize(dtype)
        weight.dequantize(dtype, rows=torch.tensor([n - 1, 0, n - 1]))
        weight.dequantize(dtype, rows=torch.empty(0, dtype=torch.int64))
        for rows in (0, 1, 2):
            weight.product_of_few(torch.randn(rows, k).to(dtype))


def _notices() -> bool:
    """Whether a sum that is written beyond its end stops a process."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        a, out = torch.ones(1, 64, dtype=torch.bfloat16), (ctypes.c_float * 64)()
        short = torch.empty(63)
        cpu.library().column_products(a.data_ptr(), a.data_ptr(), 1, 64, short.data_ptr())  # type: ignore[union-attr]
        os._exit(len(out) - 64)
    return os.waitpid(child, 0)[1] != 0


def _main(sources: list[str]) -> int:
    torch.set_num_threads(1)
    if sources:
        cpu._SOURCES = tuple(sorted(Path(sources[0]).glob("*.[ch]")))
    optimised = [flag for flag in cpu._FLAGS if flag != "-O3"]
    cpu._FLAGS = (*optimised, "-O1", *SANITIZE)  # type: ignore[assignment]
    assert cpu.library() is not None
    assert _notices(), "an error passes unseen"
    _sweep()
    if sources:
        return 0
    kernels = str(Path(__file__).with_name("test_kernels.py"))
    return int(pytest.main(["-q", "-x", "-s", "-n", "0", "-p", "no:cacheprovider", kernels, "-k", TESTS]))


# ---- the test proper --------------------------------------------------------------------------------------------


def _library(name: str) -> str | None:
    """Where the compiler keeps a sanitizer's library; None if it has none."""
    compiler = cpu._compiler()
    if compiler is None:
        return None
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if Path(found).is_absolute() and Path(found).exists() else None


def environment(cache: Path) -> dict[str, str] | None:
    """Of a process that sanitizers watch over; None where the compiler has none."""
    # With the C++ library beside it, or the sanitizer finds nobody to hand a C++ exception on to.
    asan, ubsan, cpp = (_library(name) for name in ("libasan.so", "libubsan.so", "libstdc++.so.6"))
    if asan is None or ubsan is None:
        return None
    return {
        **os.environ, "LD_PRELOAD": f"{asan} {cpp or ''}", "ASAN_OPTIONS": OPTIONS, "UBSAN_OPTIONS": "print_stacktrace=1",
        "TRIMTAB_CACHE": str(cache), "OMP_NUM_THREADS": "1", "TRIMTAB_KERNELS": "",
    }  # fmt: skip


@pytest.mark.skipif(sys.platform != "linux", reason="sanitizers are preloaded as on Linux")
def test_nothing_is_read_or_written_beyond_its_end(tmp_path: Path) -> None:
    around = environment(tmp_path)
    if around is None:
        pytest.skip(
            f"{shutil.which('cc') or 'no C compiler'}: has no libasan.so and libubsan.so, the sanitizers' libraries"
        )
    done = subprocess.run([sys.executable, __file__], env=around, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    assert done.stdout.count(".") > 100, done.stdout  # the tests did run


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
