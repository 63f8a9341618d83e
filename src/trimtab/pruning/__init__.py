"""Structured pruning: an ordinary, smaller checkpoint out of a Llama-like one.

    from trimtab import prune
    pruned = prune.prune(model, prune.Options(ratio=0.3), blocks)          in memory
    prune.prune_checkpoint("smollm2-135m", "pruned", prune.Options(ratio=0.3))

Reading order: `structures` (what can be taken out), `importance` (what it is worth), `widths` (how much of each), `depth`
(whole layers instead), `pruning` (all of it together), `checkpoint` (files).
"""

from trimtab.pruning.checkpoint import prune_checkpoint, save
from trimtab.pruning.pruning import Options, Pruned, prune
from trimtab.pruning.structures import Widths

__all__ = ["Options", "Pruned", "Widths", "prune", "prune_checkpoint", "save"]
