"""The plan of one of several processes that share a model (`train.shard: fsdp`): each keeps a part, gathers what it uses.

    parted      codes, float parameters, adapters, their gradients and moments: 1 / processes of each
    gathered    what lies outside the blocks, from the first forward to the end of backward; and of the blocks the one that
                runs and the one that is fetched meanwhile; in backward one block's gradients before they are summed
    loading     parts, what lies outside the blocks, and one block whole: less than what training gathers. GPTQ works in
                more (`before`), and needs the same beside it

Activations are those of its own sequences. With ddp every process has what one has.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import nn

from trimtab import processes
from trimtab.memory.peak import Plan
from trimtab.models.decoder import blocks
from trimtab.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def count_of(recipe: Recipe) -> int:
    """How many processes a recipe is to be carried out by, here or elsewhere."""
    return recipe.train.processes or processes.count()


def parted(planned: Plan, model: "PreTrainedModel", count: int) -> Plan:
    """A plan of one process as that of one of `count`.

    Args:
        planned: of the model in one process, its micro-batches those of one of them.
        model: as it was laid out for that plan; some of its blocks may stand for all.
        count: processes.
    """
    sizes = [_bytes(block) for block in blocks(model)]
    outside, largest = _bytes(model) - sum(sizes), max(sizes)
    gradients = max(sum(4 * p.numel() for p in block.parameters() if p.requires_grad) for block in blocks(model))
    part = {
        name: -(-getattr(planned, name) // count)
        for name in ("codes", "float_parameters", "adapters", "gradients", "optimizer")
    }
    part["temporary"] = planned.temporary + outside + 2 * largest + gradients
    return replace(planned, **part, apart=min(planned.apart, part["gradients"]))


def whole_while_loading(model: "PreTrainedModel") -> int:
    """Bytes that a process has whole, beside its parts, while it loads: what lies outside the blocks, and one block."""
    sizes = [_bytes(block) for block in blocks(model)]
    return _bytes(model) - sum(sizes) + max(sizes)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
