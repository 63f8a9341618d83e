"""Matrix products in half precision, for processors without instructions for it.

On x86 without AVX-512 (most laptops) torch multiplies bfloat16 and float16 in loops of its own: 3 to 30 times slower than
float32 (`benchmarks/speed/products.py`), the worst where an operand is not laid out for them, as in every backward pass.
Here such products are taken in float32, block by block. Operands are exact in float32 and sums were float32 before, so the
result, rounded once, differs by the order of its sums only.

`install` replaces torch's CPU kernels in the process; `tuning` decides whether, and calls it once. On other processors, and
with TRIMTAB_KERNELS=torch, it does nothing.
"""

import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_BLOCK = 512
"""Rows and columns of a block. Each is copied in float32, 1 MiB, whatever the size of the matrices."""
_FEW = 8
"""A product of fewer rows does too little with a weight to be worth its copy."""
_HALF = frozenset([torch.bfloat16, torch.float16])
_installed: list[torch.library.Library] = []


def slow() -> bool:
    """Whether this processor's products in half precision are to be replaced."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    old = "AVX512" not in torch.backends.cpu.get_cpu_capability()
    return x86 and old and os.environ.get("TRIMTAB_KERNELS") != "torch"


def workspace_bytes(dtype: torch.dtype) -> int:
    """What a product of this type takes beside its operands and result: a block of each in float32."""
    return 3 * 4 * _BLOCK**2 if dtype in _HALF and slow() else 0


def install(*, force: bool = False) -> bool:
    """Take products of bfloat16 and float16 in float32 from now on, where that is faster (`slow`) or it is forced.

    Returns:
        Whether torch's kernels were replaced by this call.
    """
    if _installed or not (force or slow()):
        return False
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*verriding a previously registered kernel")
        for name, instead in _INSTEAD.items():
            original = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, instead(original), "CPU", with_keyset=True)
    _installed.append(library)
    return True


def uninstall() -> None:
    """Give torch its own kernels back."""
    while _installed:
        _installed.pop()._destroy()


def _product(ours: Callable[..., Tensor], first: int = 0) -> Callable[[Any], Callable[..., Tensor]]:
    """A kernel that leaves to the original what is not in half precision, too small, or an error for it to tell."""

    def made(original: Any) -> Callable[..., Tensor]:
        def kernel(keys: Any, *args: Any, **kwargs: Any) -> Tensor:
            a, b, out = args[first], args[first + 1], kwargs.get("out")
            whole = a.dtype == b.dtype in _HALF and a.shape[-2] >= _FEW and b.numel()
            fits = whole and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
            if fits and (out is None or (out.dtype == a.dtype and out.shape == (*a.shape[:-1], b.shape[-1]))):
                return ours(*args, **kwargs)
            return original.call_boxed(keys, *args, **kwargs)

        return kernel

    return made


def _attention_backward(original: Any) -> Callable[..., Any]:
    """A sequence at a time, so that no more than one is copied."""

    def kernel(keys: Any, *args: Any, **kwargs: Any) -> Any:
        given, (sums, *rest) = args[:5], args[5:]  # the gradient, q, k, v and the result; logsumexp; dropout, causality
        q, mask = args[1], kwargs.pop("attn_mask", None)
        if q.dtype not in _HALF:
            return original.call_boxed(keys, *args, **kwargs, attn_mask=mask)
        found = tuple(torch.empty_like(t) for t in args[1:4])
        for i in range(len(q)):
            one = slice(i, i + 1)
            masked = mask[one] if mask is not None and mask.ndim == 4 and len(mask) > 1 else mask
            masked = masked.float() if masked is not None and masked.dtype in _HALF else masked
            wide = (t[one].float() for t in given)
            parts = original.call_boxed(keys, *wide, sums[one], *rest, **kwargs, attn_mask=masked)
            for whole, part in zip(found, parts, strict=True):
                whole[one] = part
        return found

    return kernel


def _blocks(size: int) -> list[slice]:
    return [slice(i, i + _BLOCK) for i in range(0, size, _BLOCK)]


def _mm(a_MK: Tensor, b_KN: Tensor, *, out: Tensor | None = None) -> Tensor:
    out_MN = a_MK.new_empty(len(a_MK), b_KN.shape[1]) if out is None else out
    return _addmm(out_MN, a_MK, b_KN, beta=0, out=out_MN)


def _addmm(
    c: Tensor, a_MK: Tensor, b_KN: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor | None = None
) -> Tensor:
    out_MN = a_MK.new_empty(len(a_MK), b_KN.shape[1]) if out is None else out
    c_MN = c.expand_as(out_MN)
    for m in _blocks(out_MN.shape[0]):
        for n in _blocks(out_MN.shape[1]):
            some = c_MN[m, n].float()  # with a beta of 0 nobody looks at it
            for i, k in enumerate(_blocks(a_MK.shape[1])):
                some.addmm_(a_MK[m, k].float(), b_KN[k, n].float(), beta=1 if i else beta, alpha=alpha)
            out_MN[m, n] = some
    return out_MN


def _bmm(a_BMK: Tensor, b_BKN: Tensor, *, out: Tensor | None = None) -> Tensor:
    out_BMN = a_BMK.new_empty(*a_BMK.shape[:2], b_BKN.shape[2]) if out is None else out
    for a, b, y in zip(a_BMK, b_BKN, out_BMN, strict=True):
        _mm(a, b, out=y)
    return out_BMN


_INSTEAD: dict[str, Callable[[Any], Callable[..., Any]]] = {
    "mm": _product(_mm),
    "mm.out": _product(_mm),
    "addmm": _product(_addmm, 1),
    "addmm.out": _product(_addmm, 1),
    "bmm": _product(_bmm),
    "bmm.out": _product(_bmm),
    "_scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward,
}
