"""What a run measures of its models: the float one and the rounded one before training, and what it has saved.

In one process, and in several that have a whole model each, the first one measures and the others wait. Where each keeps a
part (`train.shard: fsdp`) no process has a whole model to measure: all of them load it in parts, run it together on the
same text, and find the same numbers. Tasks are asked of a whole model all the same, by the first.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from trimtab import processes
from trimtab.evaluation import harness
from trimtab.evaluation.chat import Chat
from trimtab.evaluation.perplexity import perplexity
from trimtab.models.load import load, load_float
from trimtab.models.reload import reload
from trimtab.pipeline.measured import Measured
from trimtab.recipe.recipe import Recipe
from trimtab.training.build import RunContext
from trimtab.training.parted import in_parts


class Measuring:
    """Measures what a recipe asks for, into a run's metrics.

    Args:
        recipe: of the run.
        given: what the run has read.
        metrics: gets `perplexity`, `answers`, `tasks`, and `perplexity_of` where held-out rows have prompts: training
            learns answers alone, so that its loss may fall while the perplexity of whole rows rises.
        say: told what is measured.
    """

    def __init__(self, recipe: Recipe, given: RunContext, metrics: dict[str, Any], say: Callable[[str], None]) -> None:
        self._recipe, self._given, self._metrics, self._say = recipe, given, metrics, say
        self._parts = in_parts(recipe)

    def float_model(self, before: Measured) -> None:
        """Perplexity of the untuned float model where asked; it is gone before the next model comes."""
        if "float" in self._recipe.evaluate.baselines:
            self._together(partial(self._float_model, before))
            gc.collect()

    def _float_model(self, before: Measured) -> None:
        recipe, given = self._recipe, self._given

        def measure() -> float:
            self._say("measuring the float model (untuned)")
            about: dict[str, Any] = {"dtype": recipe.dtype, "device": recipe.device, "source": given.source}
            model = load_float(recipe.model.path, **about, shard=self._parts)
            assert given.held_out is not None, "the recipe was checked to have held-out data"
            return perplexity(model, given.held_out)

        self._metrics["perplexity"]["float"] = before.once("float", measure)

    def rounded(self, model: PreTrainedModel, before: Measured) -> None:
        """Perplexity and an answer of the model before it is tuned, where asked."""
        self._together(partial(self._rounded, model, before))

    def _rounded(self, model: PreTrainedModel, before: Measured) -> None:
        held_out, block = self._given.held_out, self._recipe.evaluate

        def measure(windows_WL: Tensor) -> float:
            self._say("measuring the rounded model, before tuning")
            return perplexity(model, windows_WL)

        if "rounded" in block.baselines and held_out is not None:
            self._metrics["perplexity"]["rounded"] = before.once("rounded", partial(measure, held_out))
        if block.prompt:
            ask = partial(Chat(model, self._given.tokenizer).answer, block.prompt, block.answer_tokens)
            self._metrics["answers"]["before"] = before.once("before", ask)

    def saved(self, folder: Path) -> None:
        """Perplexity, tasks and an answer of what was saved: what is evaluated is what is served."""
        block = self._recipe.evaluate
        if self._given.held_out is not None or block.prompt or block.tasks:
            self._together(partial(self._saved, folder))
            if block.tasks and self._parts:
                processes.first(lambda: self._tasks(folder, self._reloaded(folder)))

    def _saved(self, folder: Path) -> None:
        recipe, block, held_out = self._recipe, self._recipe.evaluate, self._given.held_out
        self._say("measuring the saved model")
        if not self._parts:
            model = self._reloaded(folder)
        elif held_out is None and not block.prompt:
            return
        else:
            model, _ = load(str(folder), dtype=recipe.dtype, device=recipe.device, quiet=True, shard=True)
        if held_out is not None:
            self._metrics["perplexity"]["tuned"] = perplexity(model, held_out)
            if self._given.prompted:
                self._metrics["perplexity_of"] = "whole rows, prompts included"
        if block.tasks and not self._parts:
            self._tasks(folder, model)
        if block.prompt:
            asked = Chat(model, self._given.tokenizer)
            self._metrics["answers"]["after"] = asked.answer(block.prompt, block.answer_tokens)

    def _reloaded(self, folder: Path) -> PreTrainedModel:
        return reload(folder, self._recipe.dtype, self._recipe.device)

    def _tasks(self, folder: Path, model: PreTrainedModel) -> None:
        block = self._recipe.evaluate
        scores = harness.run(model, self._given.tokenizer, block.tasks, block.tasks_data or "", limit=block.tasks_limit)
        harness.write(folder / "harness.json", {self._metrics["output"]: scores})
        self._metrics["tasks"] = {f"{s.task} {s.metric}": [s.value, s.stderr, len(s.items)] for s in scores}

    def _together(self, call: Callable[[], None]) -> None:
        """By all processes where each has a part, else by the first alone."""
        if self._parts:
            call()
        else:
            processes.first(call)
