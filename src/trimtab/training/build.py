"""The model that a run trains, and every trial of a search: on its grids, with adapters, rounding what engines round."""

import torch
from transformers import PreTrainedModel

from trimtab.data import sequences as data
from trimtab.models import load as loading
from trimtab.models import peft_init as peft_start
from trimtab.models import simulate as simulation
from trimtab.pipeline.checks import Inputs
from trimtab.recipe.recipe import Recipe


def load(recipe: Recipe, given: Inputs) -> PreTrainedModel:
    """Load the model quantized, from the recipe's start, with fresh adapters or those of `model.adapter`."""
    torch.manual_seed(recipe.train.seed)
    model, _ = loading.load(
        recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype, source=given.source, start=given.start
    )
    if recipe.model.adapter is not None:
        peft_start.start_from(model, recipe.model.adapter)
    return model


def simulate(recipe: Recipe, model: PreTrainedModel, given: Inputs) -> None:
    """Round activations and KV cache where asked; what a base from an earlier run rounds, it goes on rounding."""
    kind, kv = recipe.activations, recipe.kv
    if kind is None and kv is None:
        return
    tokens = None
    if kind is not None and kind.mode == "static":
        assert recipe.data is not None, "the recipe was checked to have data"
        size, limit = recipe.data.block_tokens, simulation.CALIBRATION_TOKENS
        tokens = data.token_blocks(given.rows, given.tokenizer, block_tokens=size, limit_tokens=limit)
    simulation.simulate(model, activations=kind, kv=kv, calibration=tokens)
