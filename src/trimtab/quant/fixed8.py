"""Levels in 8 bits, b of them the integer part: LR-QAT's down-cast weight Phi.

    n = floor(u * 2^f)      f = 8 - b;   read back as (n + 0.5) / 2^f: at most 2^-(f+1) of a step away, and no ties

Adapters move levels across rounding boundaries, so the fraction matters. `encode.c` and `levels.c` do the same.
"""

import torch
from torch import Tensor


def write(levels: Tensor, bits: int) -> Tensor:
    """Levels in [0, 2^bits - 1], of any shape, as uint8. What is read back rounds to the codes that they round to."""
    unit = 1 << (8 - bits)
    n = (levels * unit).floor()
    # A level exactly between two codes reads back half a unit higher; where that would round it up against
    # half-to-even, the unit below is as near and rounds to the right code.
    n -= (((n + 0.5) / unit).round() != levels.round()).float()
    return n.to(torch.uint8)


def read(kept: Tensor, bits: int) -> Tensor:
    """The levels that uint8 values stand for: fresh float32 of the same shape."""
    return kept.float().add_(0.5).mul_(2.0 ** (bits - 8))
