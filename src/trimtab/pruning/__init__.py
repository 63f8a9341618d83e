"""Structured pruning: an ordinary, smaller checkpoint out of a Llama-like one.

    from trimtab import pruning
    pruning.prune(model, pruning.Options(ratio=0.3), windows)                       in memory
    trimtab.prune("smollm2-135m", "pruned", ratio=0.3)                              a checkpoint

Reading order: `structures` (what can be taken out), `importance` (what it is worth), `widths` (how much of each), `depth`
(whole layers instead), `pruning` (all of it together), `checkpoint` (files).
"""

from trimtab.pruning.checkpoint import prune_checkpoint, save
from trimtab.pruning.pruning import Options, Pruned, prune
from trimtab.pruning.structures import Widths

__all__ = ["Options", "Pruned", "Widths", "prune", "prune_checkpoint", "save"]
