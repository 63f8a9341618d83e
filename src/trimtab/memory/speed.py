"""Tokens per second of a recipe's training on this machine, from a probe of some seconds.

The model's shapes decide the speed, not its numbers: some blocks with random weights are quantized, given their adapters
and trained for a few steps. Of a small model that is the whole; of a large one t(1) and t(3) are the seconds of a
micro-batch with one decoder block and with three,

    t(n) = t(1) + (n - 1) (t(3) - t(1)) / 2

and if one micro-batch would take too long, fewer tokens are tried, which tells the speed of more a little too low. The
optimizer's step is measured with it. What comes around training (loading, folding, comparing) is not in it, nor is a
teacher.
"""

import copy
import gc
import warnings
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import TYPE_CHECKING

import torch

from trimtab.devices import wait
from trimtab.errors import UserError
from trimtab.kernels import tuning, workspace
from trimtab.models import decoder
from trimtab.models.architecture import architecture_of
from trimtab.models.opening import open_layers
from trimtab.models.prepare import prepare
from trimtab.models.sources import ModelSource
from trimtab.models.targets import placed_targets
from trimtab.models.transformers_bridge import cast_floats
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule
from trimtab.training.loss import summed_loss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SECONDS = 10.0
_WHOLE = 300_000_000
"""Models of at most so many parameters are probed whole."""
_BLOCKS = (1, 3)
_SHORT = 128
"""Tokens of the first try."""


@dataclass(frozen=True)
class Speed:
    """What a probe found."""

    tokens_per_second: float
    seconds: float | None
    """Of all of the recipe's steps; None where it names epochs, whose steps are known once the rows are counted."""
    how: str
    """What was measured, in a few words."""


def speed(recipe: Recipe, source: ModelSource, seconds: float | None = None) -> Speed:
    """Probe the speed of a recipe's training on this machine.

    Args:
        recipe: whose method, rules, batch and length count.
        source: the model.
        seconds: about how long to measure, ten by default; making the layers comes on top.

    Raises:
        UserError: where there is nothing to probe: no weights here, or layers that an earlier run stored.
    """
    if not source.weights:
        raise UserError("its weights are not here, so it will be trained elsewhere")
    if source.prepared:
        raise UserError("its layers are stored by an earlier run, and a probe makes layers of its own")
    seconds = SECONDS if seconds is None else seconds
    tuning.for_training()
    laid_out = source.layout()
    layers = len(decoder.blocks(laid_out)) if architecture_of(laid_out).blocks else 0
    whole = layers <= max(_BLOCKS) or sum(p.numel() for p in laid_out.parameters()) <= _WHOLE
    tokens, times = 0, []
    for blocks in [layers] if whole else _BLOCKS:
        model = _made(recipe, copy.deepcopy(laid_out), blocks)
        tokens = tokens or _tokens(recipe, model, seconds / 4)
        times.append(_seconds(recipe, model, tokens, seconds / (1 if whole else len(_BLOCKS))))
        del model
        workspace.clear()
        gc.collect()
    a_pass = times[0] if whole else times[0] + max(times[1] - times[0], 0) * (layers - 1) / (_BLOCKS[1] - _BLOCKS[0])
    rate = tokens / a_pass
    part = "" if whole else f", from 1 and 3 of {layers} blocks"
    total = None if recipe.train.epochs is not None else recipe.train.steps * recipe.train.batch_tokens / rate
    return Speed(rate, total, f"{tokens:,} tokens at once{part}")


def _made(recipe: Recipe, model: "PreTrainedModel", blocks: int) -> "PreTrainedModel":
    """The first blocks of a model with random weights, prepared for training."""
    open_layers(model)
    targets = placed_targets(model, recipe.method, recipe.rules)
    if architecture_of(model).blocks:
        decoder.set_blocks(model, list(decoder.blocks(model))[:blocks])
    cast_floats(model, recipe.dtype)
    there = {name for name, _ in model.named_modules()}
    rules = [Rule(t.name, t.grid or "float", t.rank) for t in targets if t.name in there and t.kind != "tied"]
    buffers = {name: b for name, b in model.named_buffers() if not b.is_meta}
    model.to_empty(device=recipe.device)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.02) if p.dim() > 1 else p.fill_(1)
        for name, b in model.named_buffers():
            b.copy_(buffers[name]) if name in buffers else b.zero_()
    model.tie_weights()
    prepare(model, recipe.method, rules)
    model.config.use_cache = False
    if recipe.train.activation_checkpointing:
        with warnings.catch_warnings():  # it has another name from transformers 6 on
            warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def _tokens(recipe: Recipe, model: "PreTrainedModel", seconds: float) -> int:
    """Tokens of a forward pass that take no longer than this: the recipe's micro-batch, or what of it does not."""
    length = 1024 if recipe.data is None else recipe.data.block_tokens
    wanted, short = recipe.train.micro_batch * length, min(_SHORT, length)
    took = _seconds(recipe, model, short, 0)
    while wanted > short and took * wanted / short > seconds:
        wanted = max(wanted // 2, short)
    return wanted


def _seconds(recipe: Recipe, model: "PreTrainedModel", tokens: int, budget: float) -> float:
    """Seconds of a micro-batch of so many tokens, with its share of an optimizer step; the first one is not counted."""
    length = min(1024 if recipe.data is None else recipe.data.block_tokens, tokens)
    vocabulary, device = model.config.get_text_config().vocab_size, next(model.parameters()).device
    ids = torch.randint(vocabulary, (max(tokens // length, 1), length), device=device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer, times = torch.optim.AdamW(trained, lr=1e-6), list[float]()
    share = min(tokens / recipe.train.batch_tokens, 1.0)
    began = perf_counter()
    while len(times) < 2 or perf_counter() - began < budget:
        start = perf_counter()
        (summed_loss(model, ids, input_ids=ids, use_cache=False) / ids.numel()).backward()
        wait(device)
        stepping = perf_counter()
        optimizer.step()
        optimizer.zero_grad()
        wait(device)
        times.append(stepping - start + share * (perf_counter() - stepping))
    return median(times[1:])
