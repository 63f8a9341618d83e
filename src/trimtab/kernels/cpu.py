"""The C kernels of `c/`: compiled on first use, kept in a cache, called through ctypes.

A build is keyed by source, flags, compiler and processor, so a cache shared by machines is safe, and named after what it
holds, so one that was cut short is known and made again. Others must not be able to write it (`cache`). It needs only a C
compiler that knows OpenMP (`cc`, `gcc` or `clang`, or what CC names); without one, a single warning says so and the plain
torch references run. They run on Windows, too, whose compilers take other flags. The library asks for the `libgomp` that
torch has already loaded, so both share one thread pool.

    TRIMTAB_KERNELS=torch      never compile, always the references
    TRIMTAB_CACHE=DIR          where builds are kept (default: the user's cache folder, ~/.cache/trimtab on Linux)

Every function here takes CPU tensors, which `arguments` checks before a pointer is taken, and fills `out`.

Legend: N out features, K in features, G groups in a row, R rank.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.kernels.arguments import address as _at
from trimtab.kernels.arguments import checked
from trimtab.kernels.cache import own_folder, trusted

_SOURCES = tuple(sorted(Path(__file__).with_name("c").glob("*.[ch]")))
_HEARD: dict[str, Any] = {"capture_output": True, "encoding": "utf-8", "errors": "replace"}
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC")


def _fields(pointers: str = "", longs: str = "", ints: str = "", floats: str = "") -> list[tuple[str, Any]]:
    kinds = ((pointers, ctypes.c_void_p), (longs, ctypes.c_long), (ints, ctypes.c_int), (floats, ctypes.c_float))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _Codes(ctypes.Structure):
    """`Codes` of codes.c, field for field."""

    _fields_ = (
        *_fields(pointers="codes", longs="row_bytes", ints="bits"),
        *_fields(longs="K G"),
        *_fields(pointers="scales zeros offsets", ints="scale_kind zero_kind offset_kind", floats="center"),
        *_fields(pointers="table absmax map block_scales mean"),
    )


class _Levels(ctypes.Structure):
    """`Levels` of levels.c, field for field."""

    _fields_ = (
        *_fields(pointers="phi", longs="row_bytes", ints="bits"),
        *_fields(floats="half unit"),
        *_fields(pointers="A B", longs="R"),
        *_fields(floats="gain top"),
        *_fields(pointers="scales zeros offsets", floats="center"),
        *_fields(longs="N K G"),
    )


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None (after one warning, but for Windows) where they cannot be had."""
    if sys.platform == "win32" or os.environ.get("TRIMTAB_KERNELS") == "torch":
        return None
    compiler = _compiler()
    if compiler is None:
        warnings.warn(
            "no C compiler found (cc, gcc, clang or $CC): trimtab uses its slower torch kernels", stacklevel=2
        )
        return None
    try:
        return _declare(ctypes.CDLL(str(_build(compiler))))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        warnings.warn(f"trimtab's C kernels could not be built, its slower torch kernels run: {said}", stacklevel=2)
        return None


def serves(tensor: Tensor) -> bool:
    """Whether there are kernels for a tensor on its device."""
    return tensor.device.type == "cpu" and library() is not None


def _compiler() -> str | None:
    named = os.environ.get("CC")
    return next((path for name in (named, "cc", "gcc", "clang") if name and (path := shutil.which(name))), None)


def _build(compiler: str) -> Path:
    """The path of the shared library, compiled if the cache has none for this source, compiler and processor."""
    version = subprocess.run([compiler, "--version"], check=True, **_HEARD).stdout
    key = "\n".join([*(f.read_text(encoding="utf-8") for f in _SOURCES), *_FLAGS, version, _processor()])
    folder, name = own_folder(), f"kernels-{_short(key.encode())}"
    for kept in folder.glob(f"{name}-*.so"):
        if kept.stem.endswith(_short(trusted(kept).read_bytes())):
            return kept
        kept.unlink(missing_ok=True)  # damaged: loading it could end the process
    # Compiled under a name of its own and renamed: processes that start together never load half a file.
    with tempfile.TemporaryDirectory(dir=folder) as staging:
        built = Path(staging) / f"{name}.so"
        command = [compiler, *_FLAGS, "-o", str(built), *(str(f) for f in _SOURCES if f.suffix == ".c")]
        subprocess.run(command, check=True, **_HEARD)
        built.chmod(0o700)
        return built.replace(folder / f"{name}-{_short(built.read_bytes())}.so")


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _processor() -> str:
    """What `-march=native` depends on."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.machine() + platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
    return "".join(sorted({line for line in lines if line.startswith(wanted)}))


def _declare(lib: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the types of its functions; where one is a pointer to a structure, ctypes takes the structure."""
    p, n, i = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
    codes, levels = ctypes.POINTER(_Codes), ctypes.POINTER(_Levels)
    for name, arguments in {
        "dequantize": [codes, p, n, p, i],
        "product_of_few": [codes, p, i, n, n, p],
        "level_codes": [levels, p],
        "level_weights": [levels, p, i],
        "level_gradients": [levels, p, p, p],
        "level_weights_clipped": [levels, p, p],
        "column_products": [p, p, n, n, p],
        "entries_of_product": [p, p, n, n, n, p, p, n, p],
        "extremes": [p, i, n, n, n, p, p],
        "range_errors": [p, n, n, n, p, p, p, ctypes.c_float, i, ctypes.c_float, p],
        "encode": [p, i, n, n, n, p, p, p, ctypes.c_float, i, i, n, p],
        "encode_table": [p, i, n, n, n, p, i, i, n, p, p],
    }.items():
        function = getattr(lib, name)
        function.argtypes, function.restype = arguments, None
    return lib


_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}
"""`Kind` of codes.c: dtypes that scales and zeros are read in."""


def _affine(columns: int, codes: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, bits: int,
            center: float) -> _Codes:  # fmt: skip
    kinds = (0 if t is None else _KINDS[t.dtype] for t in (scale, zero, offset))
    return _Codes(
        _at(codes), codes.shape[1], bits, columns, scale.shape[1], _at(scale), _at(zero), _at(offset), *kinds, center,
        None, None, None, None, None,
    )  # fmt: skip


def _codebook(columns: int, codes: Tensor, table: Tensor, absmax: Tensor, dynamic_map: Tensor | None,
              block_scale: Tensor | None, mean: Tensor | None, offset: Tensor | None, bits: int) -> _Codes:  # fmt: skip
    return _Codes(
        codes=_at(codes), row_bytes=codes.shape[1], bits=bits, K=columns, G=absmax.shape[1], offsets=_at(offset),
        offset_kind=_KINDS[torch.float32], table=_at(table), absmax=_at(absmax), map=_at(dynamic_map),
        block_scales=_at(block_scale), mean=_at(mean),
    )  # fmt: skip


def _dequantize(out: Tensor, rows: Tensor | None, described: _Codes) -> None:
    lib = library()
    assert lib is not None
    rows = None if rows is None else rows.long()
    lib.dequantize(described, _at(rows), out.shape[0], _at(out), out.dtype == torch.bfloat16)


@checked("c")
def affine(out: Tensor, codes: Tensor, rows: Tensor | None, *about: Any) -> None:
    """s * (q - z), or s * q + o, of packed codes into `out` (N, K), float32 or bfloat16; scales and zeros: `_KINDS`."""
    _dequantize(out, rows, _affine(out.shape[1], codes, *about))


@checked("c")
def codebook(out: Tensor, codes: Tensor, rows: Tensor | None, *about: Any) -> None:
    """absmax * table[q] + o of packed codes into `out` (N, K); absmax is float32, or uint8 with the three after it."""
    _dequantize(out, rows, _codebook(out.shape[1], codes, *about))


def _product(y: Tensor, x: Tensor, described: _Codes) -> None:
    lib = library()
    assert lib is not None
    lib.product_of_few(described, _at(x), x.dtype == torch.bfloat16, *x.shape[:1], y.shape[1], _at(y))


@checked("c")
def affine_product(y: Tensor, x: Tensor, codes: Tensor, *about: Any) -> None:
    """x W^T of a few rows x (T, K), float32 or bfloat16, summed in float32, into `y` (T, N), float32.

    For a bfloat16 x the weights may be rounded to bfloat16 first, as the ordinary way rounds them.
    """
    _product(y, x, _affine(x.shape[1], codes, *about))


@checked("c")
def codebook_product(y: Tensor, x: Tensor, codes: Tensor, *about: Any) -> None:
    """The same for codebook codes."""
    _product(y, x, _codebook(x.shape[1], codes, *about))


def _levels(shape: torch.Size, phi: Tensor, bits: int, fixed: bool, a: Tensor | None, b: Tensor | None, gain: float,
            scale: Tensor, zero: Tensor | None, offset: Tensor | None, center: float, narrow: bool) -> _Levels:  # fmt: skip
    if narrow and a is not None and b is not None:
        a, b = a.bfloat16().float(), b.bfloat16().float()
    made = _Levels(
        _at(phi), phi.shape[1], 8 if fixed else bits, 0.5 if fixed else 0.0, 2.0 ** (bits - 8) if fixed else 1.0,
        _at(a), _at(b), 0 if a is None else a.shape[0], gain, 2.0**bits - 1,
        _at(scale), _at(zero), _at(offset), center, *shape, scale.shape[1],
    )  # fmt: skip
    made.kept = a, b  # as long as what points to them
    return made


@checked("c")
def levels(out: Tensor, *about: Any) -> None:
    """What levels round to into `out` (N, K): codes if it is uint8, else weights in float32 or bfloat16."""
    lib = library()
    assert lib is not None
    described = _levels(out.shape, *about)
    if out.dtype == torch.uint8:
        lib.level_codes(described, _at(out))
    else:
        lib.level_weights(described, _at(out), out.dtype == torch.bfloat16)


@checked("c")
def level_gradients(grad: Tensor, of_scale: Tensor, of_offset: Tensor | None, *about: Any) -> None:
    """From dL/dW in `grad` (bfloat16) to dL/du in its place, and to the gradients of scale and offset."""
    lib = library()
    assert lib is not None
    lib.level_gradients(_levels(grad.shape, *about), _at(grad), _at(of_scale), _at(of_offset))


@checked("c")
def level_weights_clipped(out: Tensor, clipped: Tensor, *about: Any) -> None:
    """Weights in bfloat16 into `out`, and a bit for each clipped level into `clipped`: int64 (N, ceil(K / 64))."""
    lib = library()
    assert lib is not None
    lib.level_weights_clipped(_levels(out.shape, *about), _at(out), _at(clipped))


@checked("c")
def column_products(a_TN: Tensor, b_TN: Tensor) -> Tensor:
    """Sums over T of a * b, both bfloat16: float32 (N,)."""
    lib = library()
    assert lib is not None
    out = torch.empty(a_TN.shape[1])
    lib.column_products(_at(a_TN), _at(b_TN), *a_TN.shape, _at(out))
    return out


@checked("c")
def entries_of_product(g_TN: Tensor, x_TK: Tensor, n: Tensor, k: Tensor) -> Tensor:
    """The entries (n[p], k[p]) of g^T x, both bfloat16: float32."""
    lib = library()
    assert lib is not None
    out = torch.empty(len(n))
    lib.entries_of_product(_at(g_TN), _at(x_TK), *g_TN.shape, x_TK.shape[1], _at(n), _at(k), len(n), _at(out))
    return out


@checked("c")
def extremes(weight: Tensor, low: Tensor, high: Tensor) -> None:
    """The least and largest weight of each group of (N, K), float32 or bfloat16, into float32 (N, G)."""
    lib = library()
    assert lib is not None
    lib.extremes(_at(weight), weight.dtype == torch.bfloat16, *weight.shape, low.shape[1], _at(low), _at(high))


@checked("c")
def range_errors(
    out: Tensor, weight: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, center: float, bits: int,
    power: float,
) -> None:  # fmt: skip
    """The sum of |w - w_hat|^power over each group of a float32 weight (N, K) into `out` (N, G)."""
    lib = library()
    assert lib is not None
    lib.range_errors(
        _at(weight), *weight.shape, scale.shape[1], _at(scale), _at(zero), _at(offset), center, bits, power, _at(out)
    )


@checked("c")
def encode(
    weight: Tensor, out: Tensor, scale: Tensor, zero: Tensor | None, offset: Tensor | None, center: float, bits: int,
    fixed: bool,
) -> None:  # fmt: skip
    """Packed codes, or fixed8 levels, of a weight (N, K), float32 or bfloat16, into `out` (N, bytes)."""
    lib = library()
    assert lib is not None
    lib.encode(
        _at(weight), weight.dtype == torch.bfloat16, *weight.shape, scale.shape[1], _at(scale), _at(zero), _at(offset),
        center, bits, fixed, out.shape[1], _at(out),
    )  # fmt: skip


@checked("c")
def encode_table(weight: Tensor, out: Tensor, absmax: Tensor, middles: Tensor, bits: int) -> None:
    """Packed codes (N, bytes) and absmax (N, G) of a weight; `middles` lie between neighbouring entries of the table."""
    lib = library()
    assert lib is not None
    narrow, groups = weight.dtype == torch.bfloat16, absmax.shape[1]
    lib.encode_table(
        _at(weight),
        narrow,
        *weight.shape,
        groups,
        _at(middles),
        len(middles),
        bits,
        out.shape[1],
        _at(absmax),
        _at(out),
    )
