"""Mixtures of experts as llama.cpp holds them: three tensors a block, each of all experts.

    ffn_gate_exps, ffn_up_exps    (E, I, K)      rows 0 to I and I to 2 I of each expert's gate_up
    ffn_down_exps                 (E, N, I)

All experts of a tensor are of one type. Which of them a token gets, and how their weights are made, is compiled in.

Legend: E experts, N out features, K in features, I features between the two products.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trimtab.layers.experts import QuantExperts, layers_in, names, stacks
from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import Weight


class Stack(NamedTuple):
    """One tensor of all experts of a block."""

    layers: tuple[tuple[str, Any], ...]
    """Of each expert, its name in the model and the layer: ours, or one in float."""
    rows: slice
    """Which rows of their matrices are in it."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(E, rows, K)."""
        layer = self.layers[0][1]
        return len(self.layers), len(range(layer.out_features)[self.rows]), layer.in_features

    def order(self) -> Tensor:
        """Where the rows of the tensor come from in each matrix: int64."""
        return torch.arange(self.layers[0][1].out_features)[self.rows]


def experts_in(name: str, module: Any) -> Iterator[tuple[str, Stack]]:
    """The tensors of a block's experts, open or not, under the names that gguf's table asks for; none of another module."""
    opened = isinstance(module, QuantExperts)
    if not opened and not stacks(module):
        return
    layers = dict(layers_in(module)) if not opened else {
        f"{e}.{own}": getattr(module[e], own) for e in range(module.num_experts) for own in names(module)
    }  # fmt: skip
    for own in names(module):
        held = tuple((f"{name}.{e}.{own}", layers[f"{e}.{own}"]) for e in range(module.num_experts))
        half = held[0][1].out_features // 2
        parts = (
            {"gate_proj": slice(half), "up_proj": slice(half, None)} if own == "gate_up_proj" else {own: slice(None)}
        )
        for part, rows in parts.items():
            yield f"{name}.{part}.weight", Stack(held, rows)


def matrix_of(layer: Any, dtype: torch.dtype, dense: bool) -> Weight | Tensor:
    """An expert's matrix: as it is stored, or the floats that stand for it."""
    if not isinstance(layer, QuantLinear):
        weight: Tensor = layer.weight.data
        return weight
    return layer.base.dequantize(dtype) if dense or layer.base.grid is None else layer.base
