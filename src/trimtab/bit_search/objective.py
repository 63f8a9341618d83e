"""What a configuration is worth: a trial, always measured with its quantization applied.

    rounded    KL(float || rounded) per token: no training, one forward pass of the model with its weights rounded to the
               nearest on their grids; inputs and cache stay as they are
    tuned      held-out loss (see `held_out`) after a short fine-tune of the recipe's method on the configuration: quantized
               weights and adapters, as they would be folded and served

Tokens are the same in every trial, so that trials are paired and most of the noise of sampling text cancels.
(The paper's public code measures the 16-bit model with the adapter on it; and memory where it could be computed.)
"""

import gc
import tempfile
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.bit_search.held_out import Loss
from trimtab.bit_search.sensitivity import divergence, on_grids
from trimtab.models.targets import targets
from trimtab.quant.grid import AnyGrid, Grid
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule
from trimtab.training.build import RunContext, build, simulate
from trimtab.training.trainer import fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Rounded:
    """KL to the float model, per token.

    Args:
        model: in float; its weights are swapped for the time of a trial.
        recipe: `method` decides which layers a rule may name.
        windows_WL: int64 tokens.
    """

    def __init__(self, model: "PreTrainedModel", recipe: Recipe, windows_WL: Tensor) -> None:
        self._model, self._method = model.eval(), recipe.method
        self._blocks = windows_WL.split(1)
        head: Any = model.get_output_embeddings()
        self._head = head.weight.data
        with torch.no_grad():
            self._float = [self._hidden(some) for some in self._blocks]

    def _hidden(self, ids_BL: Tensor) -> Tensor:
        """What enters the head: the norm before it is the model's own affair, so any family will do."""
        ids_BL = ids_BL.to(self._head.device)
        hidden: Tensor = self._model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        return hidden

    @torch.no_grad()
    def __call__(self, rules: Sequence[Rule], steps: int) -> float:
        """Nats a token; `steps` is of no account."""
        total, head = 0.0, self._model.get_output_embeddings()
        found = targets(self._model, self._method, rules)
        with on_grids(self._model, {t.name: t.grid for t in found if t.grid is not None and t.kind != "tied"}):
            moved = [self._hidden(some) for some in self._blocks]
            rounded_head: Any = head.weight.data
            for ours, theirs in zip(self._float, moved, strict=True):
                total += divergence(self._model, ours, theirs, heads=(self._head, rounded_head), normed=True)
        return total / sum(b.numel() for b in self._blocks)


class Tuned:
    """Held-out loss after a short fine-tune of what a run would tune: its start, its rounding, its teacher.

    Args:
        recipe: its model, method, data and learning rates; its length is the trial's.
        given: tokenizer, training rows and start.
        loss: what a trained model is measured by.
    """

    def __init__(self, recipe: Recipe, given: RunContext, loss: Loss) -> None:
        self._recipe, self._given, self._loss = recipe, given, loss

    def __call__(self, rules: Sequence[Rule], steps: int) -> float:
        """Nats a token; infinite where training diverged."""
        with tempfile.TemporaryDirectory(prefix="trimtab-trial-") as folder:
            recipe = at_length(self._recipe, rules, steps, folder)
            model = build(recipe, self._given)
            simulate(recipe, model, self._given)
            fit(model, self._given.tokenizer, recipe, rows=self._given.labelled or self._given.rows)
            value = self._loss(model)
        del model
        gc.collect()
        return value


def at_length(recipe: Recipe, rules: Sequence[Rule], steps: int, folder: str) -> Recipe:
    """The recipe of a trial."""
    quiet = {"report_to": "none", "evaluate_steps": None, "early_stop": None, "epochs": None}
    training = recipe.train.model_copy(update={"steps": steps, "save_steps": steps + 1, **quiet})
    changes = {"rules": list(rules), "train": training, "output": folder, "search": None, "prune": None}
    return recipe.model_copy(update=changes)


def for_every_width(recipe: Recipe, template: AnyGrid) -> Recipe:
    """The recipe of all trials and points: its rate of scales is meant for its own width, and its teacher is asked once."""
    changes: dict[str, Any] = {}
    if recipe.train.lr_scale_bits is None and isinstance(template, Grid):
        changes["train"] = recipe.train.model_copy(update={"lr_scale_bits": template.bits})
    if recipe.distill is not None and recipe.teacher_cache is not None:
        changes["distill"] = recipe.distill.model_copy(update={"cache": str(recipe.teacher_cache)})
    return recipe.model_copy(update=changes)
