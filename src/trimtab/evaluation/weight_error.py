"""How far the stored weight of each layer is from the one it was rounded from: ||W_hat - W|| / ||W||, layer by layer.

Legend: N out features, K in features.
"""

import math

import torch
from transformers import PreTrainedModel

from trimtab.layers.linear import QuantLinear
from trimtab.layers.weights import Weight
from trimtab.models.sources import ModelSource
from trimtab.models.transformers_bridge import quant_layers

_ROWS = 1024
"""Rows that are compared in float32 at once: an embedding is as large as many layers."""


@torch.no_grad()
def weight_errors(model: PreTrainedModel, source: ModelSource) -> dict[str, float]:
    """Relative Frobenius error of each quantized layer's stored weight, adapters left out, by name.

    Args:
        model: that was loaded from `source`.
        source: still open; one that trimtab saved holds no float weights, and gives no errors.
    """
    if source.prepared:
        return {}
    found = {}
    for name, layer in quant_layers(model).items():
        if (isinstance(layer, QuantLinear) and layer.tied) or layer.base.grid is None:
            continue
        stored = layer.base.dequantize(torch.bfloat16)
        given = source.read(f"{name}.weight", torch.bfloat16)
        true = given.dequantize(torch.bfloat16) if isinstance(given, Weight) else given
        squared, squares = 0.0, 0.0
        for ours_NK, theirs_NK in zip(stored.split(_ROWS), true.split(_ROWS), strict=True):
            theirs = theirs_NK.to(ours_NK.device).float()
            squared += (ours_NK.float() - theirs).square().sum().item()
            squares += theirs.square().sum().item()
        found[name] = math.sqrt(squared / squares) if squares else 0.0
    return found
