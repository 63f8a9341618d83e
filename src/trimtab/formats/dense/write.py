"""Dense safetensors in transformers' layout: every matrix as the model computes with it, for readers that know no codes.

    W = dequantize(q, s, z) in the model's dtype      the very matrix that our layer multiplies with: no loss, only size
    W = dequantize + delta, rounded once              where an output adapter is kept: equal up to that rounding

Matrices are made one at a time, so the export never holds the dense model.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.formats.declaration import ALL_KINDS, Engine, Format, Writing
from trimtab.formats.directory import Shards, write_surroundings
from trimtab.formats.files import Files, Held
from trimtab.models.transposed import in_file

_ENGINES = (
    Engine(name="transformers", bits=(), zeros=()),
    Engine(name="vllm", bits=(), zeros=(), lacks=frozenset({"implied heads"})),
)


def matrix(layer: Any, dtype: torch.dtype) -> Tensor:
    """The (N, K) matrix of one of our layers in `dtype`, a kept output adapter added before rounding."""
    with torch.no_grad():
        adapter = getattr(layer, "adapter", None)
        made: Tensor = layer.base.dequantize(dtype) if adapter is None else adapter.merged(layer.base, dtype)
        return made


def add_dense(shards: Shards, held: Held, dtype: torch.dtype) -> None:
    """Write one of our layers as an ordinary `weight`, and its bias."""
    add_matrix(shards, held, None if getattr(held.layer, "tied", False) else matrix(held.layer, dtype))


def add_matrix(shards: Shards, held: Held, matrix_NK: Tensor | None) -> None:
    """Write this matrix (none for a tied head) and the bias of one of our layers, or the rows that are held of them."""
    if matrix_NK is not None and not getattr(held.layer, "tied", False):
        shards.add(f"{held.name}.weight", in_file(held.layer, matrix_NK[held.rows]))
    bias = getattr(held.layer, "bias", None)
    if bias is not None:
        shards.add(f"{held.name}.bias", (bias if matrix_NK is None else bias.to(matrix_NK.dtype))[held.rows])


class Dense(Format):
    """bfloat16, float16 or float32 safetensors."""

    name = "dense"
    summary = "plain safetensors in the model's dtype"
    forms = ()
    dense = ALL_KINDS
    transposed = True
    adapters = "merged"
    experts = ("alone", "stack")
    engines = _ENGINES

    def write(self, folder: Path, writing: Writing) -> None:
        """Every matrix dequantized, in order of the model."""
        files, dtype = Files(writing.model), writing.dtype
        shards = Shards(folder, writing.max_shard_bytes)
        for name, tensor in files.floats(dtype):
            shards.add(name, tensor)
        for held in files.layers():
            add_dense(shards, held, dtype)
        for name, tensor in files.stacks(lambda layer: matrix(layer, dtype)):
            shards.add(name, tensor)
        shards.close()
        write_surroundings(folder, writing.model, writing.tokenizer, writing.dtype, None)
