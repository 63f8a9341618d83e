"""A weight laid out by its spec alone: what is read from a file is put into it, and what is planned is counted in it."""

import torch
from torch import Tensor

from trimtab.layers.weights import AffineWeight, CodebookWeight, DenseWeight, Spec, Weight
from trimtab.quant import codebook, packing
from trimtab.quant.grid import CodebookGrid, Grid, Range, group_size


def from_spec(spec: Spec) -> Weight:
    """A weight laid out by its spec, with no data yet (make it under `torch.device("meta")`)."""
    n, k = spec["shape"]
    if spec["kind"] == "dense":
        return DenseWeight(torch.empty(n, k, dtype=getattr(torch, spec["dtype"])))
    if spec["kind"] == "codebook":
        return _empty_codebook(spec, n, k)
    grid, storage = Grid(**spec["grid"]), spec["storage"]
    shape = (n, k // group_size(grid, k))
    range_ = Range(
        _floats(shape),
        _floats(shape) if grid.zero == "integer" else None,
        _floats(shape) if grid.zero == "real" else None,
    )
    if storage == "int":
        codes = torch.empty(n, packing.row_bytes(grid.bits, k), dtype=torch.uint8)
    else:
        codes = torch.empty(n, k, dtype={"fixed8": torch.uint8, "bf16": torch.bfloat16, "fp32": torch.float32}[storage])
    return AffineWeight(codes, range_, grid, k, storage)


def _empty_codebook(spec: Spec, n: int, k: int) -> CodebookWeight:
    grid = CodebookGrid(**spec["grid"])
    shape = (n, k // group_size(grid, k))
    absmax: tuple[Tensor, ...] = (torch.empty(shape, dtype=torch.uint8) if grid.powers else _floats(shape),)
    if grid.double_quant:
        blocks = -(-shape[0] * shape[1] // codebook.DOUBLE_BLOCK)
        absmax = (torch.empty(shape, dtype=torch.uint8), _floats((blocks,)), _floats((1,)))
    codes = torch.empty(n, packing.row_bytes(grid.bits, k), dtype=torch.uint8)
    return CodebookWeight(codes, absmax, grid, k, _floats(shape) if spec["offset"] else None)


def _floats(shape: tuple[int, ...]) -> Tensor:
    """In float32, whatever torch's default is: transformers sets it to the model's dtype while it lays a model out."""
    return torch.empty(shape, dtype=torch.float32)
