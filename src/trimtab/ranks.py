"""Which of several processes this one is, for those that ask before torch is there, or without it; see `processes`."""

import os
import sys
from typing import Any

_STARTED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def _met() -> Any:
    """torch.distributed, once the processes have met in it."""
    found = sys.modules.get("torch.distributed")
    return found if found is not None and found.is_available() and found.is_initialized() else None


def count() -> int:
    """How many processes train together; 1 where nobody started several."""
    if (several := _met()) is not None:
        return int(several.get_world_size())
    return int(os.environ["WORLD_SIZE"]) if all(name in os.environ for name in _STARTED) else 1


def rank() -> int:
    """Which one this is, from 0."""
    if "RANK" in os.environ:
        return int(os.environ["RANK"]) if count() > 1 else 0
    several = _met()
    return 0 if several is None else int(several.get_rank())


def is_first() -> bool:
    """Whether this one speaks, reads and writes for all."""
    return rank() == 0


def is_first_here() -> bool:
    """Whether this one reads and compares for all on its machine."""
    return count() == 1 or os.environ.get("LOCAL_RANK", "0") == "0"
