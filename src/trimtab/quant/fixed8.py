"""Levels in 8 bits, b of them the integer part: LR-QAT's down-cast weight Phi.

    n = floor(u * 2^f)      f = 8 - b;   read back as (n + 0.5) / 2^f: at most 2^-(f+1) of a step away, and no ties

Adapters move levels across rounding boundaries, so the fraction matters. `encode.c` and `levels.c` do the same.

Levels in float are brought to 4096 parts of a step in the same way (`fine`) where what found them knows more than 8 bits
hold: with 8 bits before them, they are exact in float32 with or without z subtracted.
"""

import torch
from torch import Tensor

_FINE = 4096


def write(levels: Tensor, bits: int) -> Tensor:
    """Levels in [0, 2^bits - 1], of any shape, as uint8. What is read back rounds to the codes that they round to."""
    return _units(levels, 1 << (8 - bits)).to(torch.uint8)


def fine(levels: Tensor) -> Tensor:
    """Levels in [0, 255] in the middle of their 4096th of a step, float32: none is a tie, and each rounds as it did."""
    return (_units(levels, _FINE) + 0.5) / _FINE


def _units(levels: Tensor, unit: int) -> Tensor:
    n = (levels * unit).floor()
    # A level exactly between two codes reads back half a unit higher; where that would round it up against
    # half-to-even, the unit below is as near and rounds to the right code.
    return n - (((n + 0.5) / unit).round() != levels.round()).float()


def read(kept: Tensor, bits: int) -> Tensor:
    """The levels that uint8 values stand for: fresh float32 of the same shape."""
    return kept.float().add_(0.5).mul_(2.0 ** (bits - 8))
