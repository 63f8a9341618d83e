"""Every stored form to weights in one fused pass, as operators that torch.library knows.

    affine            packed codes, scales, zeros              ->  s * (q - z), or s * q + o
    codebook          packed codes, absmax, a table            ->  absmax * table[q] (+ o)
    .._product        a few rows x and either of these     ->  x W^T, summed in float32, W never written (generation)
    levels            stored levels (+ gain * B A), scales     ->  round, clamp; codes, or their weights
    level_gradients   dL/dW and the same                       ->  dL/du, dL/ds, dL/do

Each operator fills a tensor that its caller made, so the caller decides where a result of N x K lives (`workspace`), and
has three backends: C on the CPU (`cpu`), Triton on a GPU (`triton_gpu`, `triton_products`), and the plain torch
composition below, which is the reference for both and serves every other device and dtype. Values agree to the bit, but
for the sum over the rank in `levels`, whose order of adding is each backend's own. What an operator takes is stated in
`arguments`, and held in each.

Legend: N out features, K in features, G groups in a row, R rank.
"""

import os
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.kernels import cpu
from trimtab.kernels.arguments import OPERATORS, Backend, checked
from trimtab.quant import fixed8, packing
from trimtab.quant.codebook import expand_absmax, from_codebook
from trimtab.quant.grid import Grid, Range, from_codes
from trimtab.quant.opaque import exact, stored

_AFFINE = "Tensor scale, Tensor? zero, Tensor? offset, int bits, float center"
_CODEBOOK = (
    "Tensor table, Tensor absmax, Tensor? dynamic_map, Tensor? block_scale, Tensor? mean, Tensor? offset, int bits"
)
_LEVELS = (
    "Tensor phi, int bits, bool fixed, Tensor? a, Tensor? b, float gain, Tensor scale, Tensor? zero, Tensor? offset, "
    "float center, bool narrow"
)


class Levels(NamedTuple):
    """What levels are made of: the arguments of `levels` and `level_gradients`, in their order."""

    phi: Tensor
    """Packed codes (N, bytes); or with `fixed` one byte a level (N, K), read as (n + 0.5) / 2^(8 - bits)."""
    bits: int
    fixed: bool
    a_RK: Tensor | None
    """float32 factors of the shift gain * B A, or None for no shift; see `narrow`."""
    b_NR: Tensor | None
    gain: float
    scale_NG: Tensor
    """float32, as are the zeros and offsets."""
    zero_NG: Tensor | None
    offset_NG: Tensor | None
    center: float
    narrow: bool = False
    """Whether the factors act as what bfloat16 holds of them: such a product is exact on tensor cores."""

    def acting(self, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """The factors A and B as they act, in this dtype."""
        if self.a_RK is None or self.b_NR is None:
            return None
        pair = self.a_RK, self.b_NR
        # An operator rounds: a compiler leaves out casts to bfloat16 and back.
        a, b = (stored(t, "bfloat16") for t in pair) if self.narrow else pair
        return a.to(dtype), b.to(dtype)


# ---- the plain torch references ---------------------------------------------------------------------------------


def _grid(bits: int) -> Grid:
    """The form of values; which kind of zero, a range says. Scales come in float32: not the way for bfloat16 ones."""
    return Grid(bits, scale_dtype="float32")


def _take(tensor: Tensor | None, rows: Tensor | None) -> Tensor | None:
    return tensor if tensor is None or rows is None else tensor[rows]


@checked("torch")
def _affine(
    out: Tensor, codes: Tensor, rows: Tensor | None, scale: Tensor, zero: Tensor | None, offset: Tensor | None,
    bits: int, center: float,
) -> None:  # fmt: skip
    kept, s, z, o = (_take(t, rows) for t in (codes, scale, zero, offset))
    assert kept is not None
    assert s is not None
    unpacked = packing.unpack(kept, bits, out.shape[1])
    out.copy_(from_codes(unpacked, Range(s, z, o), _grid(bits), out.dtype))


@checked("torch")
def _codebook(
    out: Tensor, codes: Tensor, rows: Tensor | None, table: Tensor, absmax: Tensor, dynamic_map: Tensor | None,
    block_scale: Tensor | None, mean: Tensor | None, offset: Tensor | None, bits: int,
) -> None:  # fmt: skip
    if block_scale is not None and mean is not None:
        absmax = expand_absmax(absmax, block_scale, mean)
    kept, a, o = (_take(t, rows) for t in (codes, absmax, offset))
    assert kept is not None
    assert a is not None
    out.copy_(from_codebook(packing.unpack(kept, bits, out.shape[1]), a, table, o))


@checked("torch")
def _affine_product(y: Tensor, x: Tensor, codes: Tensor, *about: Any) -> None:
    weight = torch.empty(y.shape[1], x.shape[1], device=x.device)
    _affine(weight, codes, None, *about)
    y.copy_(x.float() @ weight.t())


@checked("torch")
def _codebook_product(y: Tensor, x: Tensor, codes: Tensor, *about: Any) -> None:
    weight = torch.empty(y.shape[1], x.shape[1], device=x.device)
    _codebook(weight, codes, None, *about)
    y.copy_(x.float() @ weight.t())


def level_values(about: Levels, columns: int) -> Tensor:
    """Levels, neither rounded nor clamped: fresh float32 of shape (N, K)."""
    phi, bits = about.phi, about.bits
    u = fixed8.read(phi, bits) if about.fixed else packing.unpack(phi, bits, columns).float()
    factors = about.acting(u.dtype)
    if factors is None:
        return u
    a, b = factors
    with exact(u):  # levels decide codes: folding under autocast gives those of training
        return torch.addmm(u, b, a, alpha=about.gain)


@checked("torch")
def _levels(out: Tensor, *arguments: Any) -> None:
    about = Levels(*arguments)
    _valued(out, level_values(about, out.shape[1]).round_().clamp_(0, 2**about.bits - 1), about)


def _valued(out: Tensor, codes_NK: Tensor, about: Levels) -> None:
    """These codes into `out` if it is uint8, else their weights."""
    if out.dtype == torch.uint8:
        out.copy_(codes_NK)
    else:
        range_ = Range(about.scale_NG, about.zero_NG, about.offset_NG)
        out.copy_(from_codes(codes_NK, range_, _grid(about.bits), out.dtype))


@checked("torch")
def _level_gradients(grad: Tensor, of_scale: Tensor, of_offset: Tensor | None, *arguments: Any) -> None:
    about = Levels(*arguments)
    rounded = level_values(about, grad.shape[1]).round_()
    codes = rounded.clamp(0, 2**about.bits - 1)
    grouped = grad.to(of_scale.dtype).unflatten(1, (of_scale.shape[1], -1))
    total = grouped.sum(-1)
    zero = 0.0 if about.offset_NG is not None else about.center if about.zero_NG is None else about.zero_NG
    # sum of G (q - z) = sum of G q - z sum of G, which spares a pass for q - z
    of_scale.copy_((grouped * codes.unflatten(1, (of_scale.shape[1], -1))).sum(-1) - zero * total)
    if of_offset is not None:
        of_offset.copy_(total)
    grad.copy_((grouped * about.scale_NG.unsqueeze(-1)).flatten(1).mul_(codes == rounded))


# ---- operators --------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("trimtab", "DEF")
_OPERATORS: dict[str, tuple[str, Callable[..., None]]] = {
    "affine": (f"Tensor(a!) out, Tensor codes, Tensor? rows, {_AFFINE}", _affine),
    "codebook": (f"Tensor(a!) out, Tensor codes, Tensor? rows, {_CODEBOOK}", _codebook),
    "affine_product": (f"Tensor(a!) y, Tensor x, Tensor codes, {_AFFINE}", _affine_product),
    "codebook_product": (f"Tensor(a!) y, Tensor x, Tensor codes, {_CODEBOOK}", _codebook_product),
    "levels": (f"Tensor(a!) out, {_LEVELS}", _levels),
    "level_gradients": (
        f"Tensor(a!) grad, Tensor(b!) of_scale, Tensor(c!)? of_offset, {_LEVELS}",
        _level_gradients,
    ),
}


def _on_cpu(name: str, reference: Callable[..., None]) -> Callable[..., None]:
    return _served("c", name, reference, lambda: getattr(cpu, name) if cpu.library() is not None else None)


def _on_cuda(name: str, reference: Callable[..., None]) -> Callable[..., None]:
    def kernel() -> Callable[..., None] | None:
        if not _triton():
            return None
        # Not before a GPU is used: they import Triton.
        if name.endswith("_product"):
            from trimtab.kernels import triton_products as kernels
        else:
            from trimtab.kernels import triton_gpu as kernels  # type: ignore[no-redef]
        found: Callable[..., None] = getattr(kernels, name)
        return found

    return _served("triton", name, reference, kernel)


def _served(
    backend: Backend, name: str, reference: Callable[..., None], kernel: Callable[[], Callable[..., None] | None]
) -> Callable[..., None]:
    """An operator by the kernel of a backend, if there is one that reads these dtypes, else by the reference.

    Of levels the kernel makes the codes in every dtype, as in folding: another order of the sum over the rank differs at
    ties.
    """

    def run(*arguments: Any) -> None:
        compiled = kernel()
        if compiled is None:
            reference(*arguments)
        elif OPERATORS[name].fits(backend, arguments):
            compiled(*arguments)
        elif name == "levels":
            _values_of_compiled_codes(compiled, *arguments)
        else:
            reference(*arguments)

    return run


def _values_of_compiled_codes(compiled: Callable[..., None], *given: Any) -> None:
    out, *about = OPERATORS["levels"].admit(given, "torch")
    codes = torch.empty(out.shape, dtype=torch.uint8, device=out.device)
    compiled(codes, *about)
    _valued(out, codes, Levels(*about))


def _triton() -> bool:
    """Asked where a GPU is in use."""
    from trimtab.kernels import triton_parts

    there = triton_parts.available()
    if not there and os.environ.get("TRIMTAB_KERNELS") != "torch":
        _say_that_triton_is_missing()
    return there


@cache
def _say_that_triton_is_missing() -> None:
    warnings.warn(
        "Triton is not installed (`pip install triton`; on Windows `triton-windows`): on a GPU trimtab uses its slower "
        "torch kernels",
        stacklevel=2,
    )


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor is where the Triton kernels run."""
    return tensor.is_cuda and _triton()


def _nothing(*_: Any) -> None:
    """On tensors without data an operator that fills its arguments has nothing to do."""


for _name, (_schema, _reference) in _OPERATORS.items():
    _LIBRARY.define(f"{_name}({_schema}) -> ()")
    _LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _on_cpu(_name, _reference), "CPU")
    _LIBRARY.impl(_name, _on_cuda(_name, _reference), "CUDA")
    torch.library.register_fake(f"trimtab::{_name}", checked("no data", _name)(_nothing), lib=_LIBRARY)

affine = torch.ops.trimtab.affine.default
codebook = torch.ops.trimtab.codebook.default
affine_product = torch.ops.trimtab.affine_product.default
codebook_product = torch.ops.trimtab.codebook_product.default
levels = torch.ops.trimtab.levels.default
level_gradients = torch.ops.trimtab.level_gradients.default
