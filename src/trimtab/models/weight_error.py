"""How far the stored weight of a layer is from the one it was rounded from: ||W_hat - W|| / ||W||.

Legend: N out features, K in features.
"""

import math

import torch
from torch import Tensor

from trimtab.layers.weights import Weight

_ROWS = 1024
"""Rows that are compared in float32 at once: an embedding is as large as many layers."""


@torch.no_grad()
def weight_error(stored: Weight, given: Tensor | Weight) -> float:
    """Relative Frobenius error of a stored weight, adapters left out.

    Args:
        stored: of shape (N, K).
        given: what it was made of, of the same shape.
    """
    squared, squares, device = 0.0, 0.0, next(stored.parameters()).device
    for begin in range(0, stored.shape[0], _ROWS):
        rows = torch.arange(begin, min(begin + _ROWS, stored.shape[0])).to(device)
        ours_NK = stored.dequantize(torch.float32, rows=rows)
        theirs_NK = given.dequantize(torch.float32, rows=rows) if isinstance(given, Weight) else given[rows].float()
        squared += (ours_NK - theirs_NK).square().sum().item()
        squares += theirs_NK.square().sum().item()
    return math.sqrt(squared / squares) if squares else 0.0
