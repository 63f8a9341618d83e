"""What trials are measured on: model, tokenizer, rows and held-out text of a recipe, each read when it is first asked for.

It knows of no study and opens no storage, so it can be where neither is: in a task on another machine (`ray_engine`).
"""

import gc
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.bit_search import held_out as measured
from trimtab.bit_search import sensitivity
from trimtab.bit_search.objective import Rounded, Tuned
from trimtab.bit_search.space import Space
from trimtab.data.sources import Texts
from trimtab.data.templates import set_template
from trimtab.devices import release
from trimtab.models.load import load_float
from trimtab.models.opening import open_layers
from trimtab.models.sources import ModelSource, open_source
from trimtab.recipe import texts
from trimtab.recipe.recipe import Recipe
from trimtab.training import teacher_cache
from trimtab.training.build import RunContext, calibration
from trimtab.training.labelled import Labelled, label
from trimtab.training.trainer import packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Objective = Callable[[Sequence[Any], int], float]


class Bench:
    """Measures choices of widths, on the device of its recipe.

    Args:
        recipe: with a `search` block, as `objective.for_every_width` makes it.
        source: of its model, if it is open already.
    """

    def __init__(self, recipe: Recipe, source: ModelSource | None = None) -> None:
        assert recipe.search is not None
        assert recipe.data is not None
        self.recipe, self.block = recipe, recipe.search
        self.source = source or open_source(recipe.model.path)

    @cached_property
    def tokenizer(self) -> Any:
        """The model's, with the template of the data."""
        tokenizer = self.source.tokenizer()
        set_template(tokenizer, None if self.recipe.data is None else self.recipe.data.template)
        return tokenizer

    @cached_property
    def _texts(self) -> Texts:
        assert self.recipe.data is not None
        return texts.training(self.recipe.data)

    @cached_property
    def rows(self) -> Any:
        """Of training."""
        return self._texts.rows

    @cached_property
    def _labelled(self) -> Labelled:
        vocabulary = self.source.layout().config.get_text_config().vocab_size
        return label(self.recipe, self.tokenizer, self.rows, vocabulary)

    @cached_property
    def float_model(self) -> "PreTrainedModel":
        """In float, until `free`."""
        found = self.recipe
        model = load_float(found.model.path, dtype=found.dtype, device=found.device, source=self.source)
        open_layers(model)
        return model

    def windows(self, rows: Any, tokens: int) -> torch.Tensor:
        """Windows of rows, int64 (W, L)."""
        return measured.windows(self.recipe, self.tokenizer, rows, tokens)

    @cached_property
    def held_out(self) -> Any:
        """Rows that trials are measured on."""
        block = self.recipe.data
        assert block is not None
        found = texts.held_out(block, None if block.eval_path else self._texts)
        return self.rows if found is None else found

    @cached_property
    def loss(self) -> measured.Loss:
        """Of a trained model, in nats a token."""
        return measured.loss(self.recipe, self.tokenizer, self.held_out, self.block.tokens)

    def objective(self) -> Objective:
        """What a trial runs: of rules and steps, nats a token."""
        if self.block.objective == "rounded":
            return Rounded(self.float_model, self.recipe, self.windows(self.held_out, self.block.tokens))
        self.free()  # a trial loads its own, quantized
        start = calibration(self.recipe, self.rows, self.tokenizer)
        given = RunContext(self.source, self.tokenizer, self.rows, self._labelled, None, start)
        return Tuned(self.recipe, given, self.loss)

    def teach(self) -> None:
        """Fill a teacher's cache, where trials learn from one."""
        if self.block.objective == "tuned":
            self.free()
            teacher_cache.ask(self.recipe, self.tokenizer, self.rows, packed, source=self.source)

    def free(self) -> None:
        """Let go of the float model."""
        if self.__dict__.pop("float_model", None) is not None:
            gc.collect()
            release(self.recipe.device)

    def prior(self, space: Space) -> dict[str, Any]:
        """What each choice costs by itself, measured: values of JSON to note with a study, in this order.

        Args:
            space: what may be chosen.

        Returns:
            `float_quality` of tuned trials, what the `sensitivities` took, and last the `prior`, costs (units, choices):
            who finds that finds the rest.
        """
        windows, noted = self.windows(self.rows, self.block.sensitivity_tokens), dict[str, Any]()
        # A width costs the same at every rank.
        distinct = list(dict.fromkeys(space.placements))
        about = self.float_model, space.units, distinct, windows
        exact, began = self.block.sensitivity == "exact", time.perf_counter()
        found = sensitivity.exact(*about) if exact else sensitivity.fisher(*about, seed=self.block.seed)
        if self.block.objective == "tuned":
            noted["float_quality"] = self.loss(self.float_model)
        took = {"passes": found.passes, "tokens": windows.numel(), "seconds": time.perf_counter() - began}
        cost = np.maximum(found.cost_UC[:, [distinct.index(p) for p in space.placements]], 0.0)
        return noted | {"sensitivities": took, "prior": [[float(c) for c in row] for row in cost]}
