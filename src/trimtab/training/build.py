"""The model that a run trains, and every trial of a search: on its grids, with adapters, rounding what engines round."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.data.objectives import answers
from trimtab.data.sequences import token_windows
from trimtab.data.sources import Texts
from trimtab.models import simulate as simulating
from trimtab.models.block_start import Blockwise
from trimtab.models.gptq import Gptq
from trimtab.models.load import load
from trimtab.models.peft_init import start_from
from trimtab.models.sources import ModelSource
from trimtab.models.starting import Start
from trimtab.recipe import texts
from trimtab.recipe.recipe import Recipe
from trimtab.training.held_out import HeldOut
from trimtab.training.overview import Overview
from trimtab.training.parted import in_parts


@dataclass(frozen=True)
class RunContext:
    """What a run reads before any weight: opened once, and handed from stage to stage."""

    source: ModelSource
    tokenizer: Any
    rows: Any
    """Training rows, or None."""
    labelled: Any
    """What `training.labelled.label` made of them, or None."""
    held_out: Tensor | None
    """Held-out tokens (W, L), or None."""
    start: Start | None
    """GPTQ or a block-wise start, with its calibration set; None rounds to nearest."""
    notes: tuple[str, ...] = ()
    """What is to be known before a run, a line each."""
    while_training: HeldOut | None = None
    """What `train.evaluate_steps` measures on, or None."""
    texts: Texts | None = None
    """What was read to train on, or None."""
    overview: Overview | None = None
    """What of it training will see; None without training."""
    prompted: bool = False
    """Whether held-out rows have prompts, which their perplexity counts and training does not learn."""


def calibration(recipe: Recipe, rows: Any, tokenizer: Any) -> Start | None:
    """A start with its calibration set, from data of its own or from the training data; None for rounding to nearest."""
    block = recipe.start
    if block.name == "rtn":
        return None
    if block.path is not None:
        rows = texts.calibration(block, recipe.data)
    elif rows is None and recipe.data is not None:
        rows, objective = texts.training_of(recipe).rows, recipe.train.objective
        rows = rows if objective == "sft" else answers(rows, objective)
    length = min(recipe.data.block_tokens if recipe.data is not None else 1024, block.tokens)
    windows = token_windows(rows, tokenizer, block_tokens=length, limit_tokens=block.tokens)
    if block.name == "gptq":
        return Gptq(tokens=windows, damping=block.damping, act_order=block.act_order)
    return Blockwise(
        tokens=windows,
        trains=block.trains,
        steps=block.steps,
        windows=block.windows,
        lr=block.lr,
        lr_scale=block.lr_scale,
        seed=recipe.train.seed,
        on_disk=block.on_disk,
    )


def build(recipe: Recipe, given: RunContext, errors: dict[str, float] | None = None) -> PreTrainedModel:
    """Load the model quantized, from the recipe's start, with fresh adapters or those of `model.adapter`.

    Of several processes that keep a part each, it is sharded while it is read.

    Args:
        recipe: says all of it.
        given: what was read.
        errors: as of `load`.
    """
    torch.manual_seed(recipe.train.seed)
    model, _ = load(
        recipe.model.path,
        recipe.method,
        recipe.rules,
        dtype=recipe.dtype,
        device=recipe.device,
        source=given.source,
        start=given.start,
        quiet=True,
        errors=errors,
        shard=in_parts(recipe),
    )
    if recipe.model.adapter is not None:
        start_from(model, recipe.model.adapter)
    return model


def simulate(recipe: Recipe, model: PreTrainedModel, given: RunContext) -> None:
    """Round activations and KV cache where asked; what a base from an earlier run rounds, it keeps rounding."""
    kind, kv = recipe.activations, recipe.kv
    if kind is None and kv is None:
        return
    tokens = None
    if kind is not None and kind.mode == "static":
        assert recipe.data is not None, "the recipe was checked to have data"
        size, limit = recipe.data.block_tokens, simulating.CALIBRATION_TOKENS
        tokens = token_windows(given.rows, given.tokenizer, block_tokens=size, limit_tokens=limit)
    simulating.simulate(model, activations=kind, kv=kv, calibration=tokens)
