"""Layers of which a family keeps the matrix transposed: transformers' `Conv1D`, y = x W + b, of GPT-2 and its kin.

    in the model     a Conv1D           ->  an nn.Linear on the same memory  ->  a layer of ours, which remembers it
    of a source      W (K, N), floats   ->  (N, K), as of any linear layer
    in a float file  W (K, N)           <-  (N, K)

Only matrices of floats lie turned. Codes lie along the input dimension everywhere: here, in GGUF, and in what GPTQ and
bitsandbytes make of such layers. So nothing but what reads and writes matrices of floats asks here, and what it asks is
one question. A subclass of Conv1D, and a class of its name in another library, may compute something else: neither is one.

Legend: N out features, K in features.
"""

import copy
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from trimtab.layers.linear import QuantEmbedding, QuantLinear


def is_transposed(module: Any) -> bool:
    """Whether a module holds its matrix as (K, N) and computes no more than a linear layer."""
    return type(module) is Conv1D and getattr(module._parameters.get("weight"), "ndim", 0) == 2


def is_linear(module: Any) -> bool:
    """Whether a module is a linear layer in float, however it holds its matrix."""
    return isinstance(module, nn.Linear) or is_transposed(module)


def as_linear(module: nn.Module) -> nn.Module:
    """A linear layer on the memory of one that is transposed, with its hooks; any other module as it is."""
    if not is_transposed(module):
        return module
    made: Any = copy.copy(module)
    made.__class__ = nn.Linear
    weight_KN, bias = made._parameters["weight"], made._parameters["bias"]
    made._parameters = {"weight": nn.Parameter(weight_KN.detach().T, requires_grad=False), "bias": bias}
    made.out_features, made.in_features = made.weight.shape
    made.transposed = True
    linear: nn.Linear = made
    return linear


def in_file(module: Any, matrix_NK: Tensor) -> Tensor:
    """A layer's matrix as files of floats hold it: (K, N) if its family keeps it so, which one of ours remembers."""
    return matrix_NK.T if is_transposed(module) or getattr(module, "transposed", False) else matrix_NK


def replace_by(model: nn.Module, name: str, layer: QuantLinear | QuantEmbedding) -> None:
    """Put a layer of ours in the place of another, and have it remember how files of floats hold that one's matrix."""
    if isinstance(layer, QuantLinear):
        layer.transposed = getattr(model.get_submodule(name), "transposed", False)
    model.set_submodule(name, layer)
