"""The one path: recipe in, model out.

    load (quantizing while it reads) -> measure -> train -> fold -> save -> reload -> measure what will be served

Everything that can be wrong is checked before anything is written. All of it is written beside the output, which it becomes
when it is whole (see `output`).
"""

import gc
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab.data.sequences import describe
from trimtab.data.split import SHARE
from trimtab.evaluation import harness, parity
from trimtab.evaluation.chat import answer
from trimtab.evaluation.parity import Parity
from trimtab.evaluation.perplexity import perplexity
from trimtab.formats import get
from trimtab.formats.export import write
from trimtab.formats.native.write import disk_bytes, write_into
from trimtab.kernels import tuning
from trimtab.layers.movement import total
from trimtab.memory.process import peak_bytes, reset_peak
from trimtab.models.load import load_float
from trimtab.models.prepare import LayerFold, fitted_starts, fold
from trimtab.models.share import shares
from trimtab.pages import report
from trimtab.pipeline import checks
from trimtab.pipeline.measured import Measured
from trimtab.pipeline.output import Work
from trimtab.pipeline.reading import written_down
from trimtab.pipeline.record import Record
from trimtab.recipe import inputs
from trimtab.recipe.recipe import Recipe
from trimtab.training import teacher_cache
from trimtab.training.build import RunContext, build, simulate

if TYPE_CHECKING:
    from trimtab.training.trainer import Step


_TOLD = ("rewards/accuracies", "rewards/margins", "kl", "reward", "completions/mean_length")
"""What is said of TRL's measures of an objective; `metrics.json` has all."""


class Observer(Protocol):
    """Whoever watches a run."""

    def say(self, text: str) -> None:
        """A line about a stage."""

    def step(self, step: "Step") -> None:
        """An optimizer step was taken."""

    def finish(self, metrics: Mapping[str, Any], parities: Sequence[Parity]) -> None:
        """The run is over."""


class Quiet:
    """Watches in silence."""

    def say(self, text: str) -> None:
        """Nothing."""

    def step(self, step: "Step") -> None:
        """Nothing."""

    def finish(self, metrics: Mapping[str, Any], parities: Sequence[Parity]) -> None:
        """Nothing."""


def run(
    recipe: Recipe, *, overwrite: bool = False, resume: bool = False, show: Observer | None = None
) -> dict[str, Any]:
    """Carry out a recipe.

    Args:
        recipe: from `recipe.read` or `recipe.from_dict`.
        overwrite: replace what an earlier run left in the output directory.
        resume: continue from its last checkpoint.
        show: told what happens; None for silence.

    Returns:
        The metrics, as written to `<output>/metrics.json`.

    Raises:
        UserError: for anything the user can mend; nothing is then left half-written.
    """
    watch, work, began = show or Quiet(), Work.of(recipe), time.monotonic()
    given = checks.gather(recipe, overwrite, resume)
    for line in given.notes:
        watch.say(line)
    recipe = _resolved(recipe, given)
    down = written_down(recipe)
    _compare(recipe, down, work.recorded() if resume else None, watch)
    with work.begun(down, overwrite, resume):
        metrics, parities = _carry_out(recipe, work, given, resume, watch, began)
        work.finish()
    watch.finish(metrics, parities)
    return metrics


def _resolved(recipe: Recipe, given: RunContext) -> Recipe:
    """The recipe with what only its data could tell: steps in place of epochs, and whether a share of it is held out."""
    if given.overview is not None:
        recipe = recipe.model_copy(
            update={"train": recipe.train.model_copy(update={"steps": given.overview.steps, "epochs": None})}
        )
    block = recipe.data
    if block is None or block.holdout is not None or block.eval_path is not None or given.texts is None:
        return recipe
    share = 0.0 if given.texts.held_out is None else SHARE
    return recipe.model_copy(update={"data": block.model_copy(update={"holdout": share})})


def _compare(recipe: Recipe, down: Recipe, begun: Recipe | None, watch: Observer) -> None:
    """Refuse to go on with other files than a run began with; say which have changed since a recipe was saved."""
    now = down.inputs or {}
    if begun is not None:
        inputs.check_same(begun.inputs or {}, now, "--resume")
        inputs.check_same_data(begun, down, "--resume")
    for key, before in (recipe.inputs or {}).items():
        changed = inputs.changes(before, now[key]) if begun is None and key in now else ""
        if changed:
            watch.say(f"{key}: {changed} since this recipe was saved")


def _carry_out(
    given_recipe: Recipe, work: Work, given: RunContext, resume: bool, watch: Observer, began: float
) -> tuple[dict[str, Any], list[Parity]]:
    """Everything between the checks and the end: the model is then whole in the folder of the run."""
    recipe = given_recipe.moved(work.folder)
    output, record = str(given_recipe.out), Record()
    metrics: dict[str, Any] = {"perplexity": {}, "answers": {}, "output": output, "method": recipe.method.name}
    before = Measured.before(recipe, work, resume)
    if before.values:
        watch.say("what was measured before training is known from when this run began")
    _measure_float(recipe, given, metrics, before, watch)
    record.before(recipe, given)
    asking_bytes = _ask_teacher(recipe, given, watch)
    model = _load(recipe, given, metrics, watch)
    record.rounded(model, given)
    _simulate(recipe, model, given, watch)
    _measure_rounded(recipe, model, given, metrics, before, watch)
    metrics |= _tune(recipe, model, given, resume, watch)
    record.trained(work.checkpoints)
    metrics["peak_memory_bytes"] = max(peak_bytes(), asking_bytes)
    parities = _fold_and_save(recipe, work, model, given, metrics, record, watch)
    del model
    gc.collect()
    _measure_saved(recipe, work, given, metrics, watch)
    metrics["seconds"] = time.monotonic() - began
    (work.model / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    record.write(work.model)
    report.make(work.model, watch.say, name=recipe.name)
    return metrics, parities


def _measure_float(
    recipe: Recipe, given: RunContext, metrics: dict[str, Any], before: Measured, watch: Observer
) -> None:
    """Perplexity of the untuned float model where asked; it is gone before the next model comes."""
    if "float" not in recipe.evaluate.baselines:
        return

    def measure() -> float:
        watch.say("measuring the float model (untuned)")
        model = load_float(recipe.model.path, dtype=recipe.dtype, source=given.source)
        assert given.held_out is not None, "the recipe was checked to have held-out data"
        return perplexity(model, given.held_out)

    metrics["perplexity"]["float"] = before.once("float", measure)
    gc.collect()


def _measure_rounded(
    recipe: Recipe,
    model: PreTrainedModel,
    given: RunContext,
    metrics: dict[str, Any],
    before: Measured,
    watch: Observer,
) -> None:
    """Perplexity and an answer of the model before it is tuned, where asked."""
    held_out, block = given.held_out, recipe.evaluate

    def measure(windows_WL: Tensor) -> float:
        watch.say("measuring the rounded model, before tuning")
        return perplexity(model, windows_WL)

    if "rounded" in block.baselines and held_out is not None:
        metrics["perplexity"]["rounded"] = before.once("rounded", partial(measure, held_out))
    if block.prompt:
        ask = partial(answer, model, given.tokenizer, block.prompt, block.answer_tokens)
        metrics["answers"]["before"] = before.once("before", ask)


def _ask_teacher(recipe: Recipe, given: RunContext, watch: Observer) -> int:
    """Fill the teacher's cache where the recipe has one; returns the peak memory that took."""
    reset_peak()
    sequences = partial(_packed, given)
    teacher_cache.ask(recipe, given.tokenizer, given.rows, sequences, source=given.source, say=watch.say)
    gc.collect()
    return peak_bytes()


def _packed(given: RunContext, model: PreTrainedModel, tokenizer: Any, recipe: Recipe, rows: Any) -> tuple[Any, Any]:
    """`trainer.packed` of the rows that are tokenized already."""
    from trimtab.training.trainer import packed

    return packed(model, tokenizer, recipe, given.labelled or rows)


def _load(recipe: Recipe, given: RunContext, metrics: dict[str, Any], watch: Observer) -> PreTrainedModel:
    """The model, quantized and with adapters."""
    reset_peak()
    how = "" if given.start is None else f" by GPTQ on {given.start.tokens.numel():,} tokens"
    watch.say(f"loading {recipe.model.path} for {recipe.method.name}, quantizing{how} while it reads")
    model = build(recipe, given)
    metrics["load_peak_memory_bytes"] = peak_bytes()
    _announce(watch)
    for line in (shares(model).line(), *fitted_starts(model)):
        watch.say(line)
    return model


def _simulate(recipe: Recipe, model: PreTrainedModel, given: RunContext, watch: Observer) -> None:
    """Round activations and KV cache where asked."""
    kind, kv = recipe.activations, recipe.kv
    asked = [] if kind is None else [f"{kind.bits}-bit {kind.mode} activations"]
    asked += [] if kv is None else [f"a {kv.bits}-bit KV cache (which saves no memory here)"]
    if asked:
        watch.say(f"simulating {' and '.join(asked)}")
    simulate(recipe, model, given)


def _announce(watch: Observer) -> None:
    """Say once what was changed in this process."""
    for line in tuning.announcements():
        watch.say(line)


def _tune(recipe: Recipe, model: PreTrainedModel, given: RunContext, resume: bool, watch: Observer) -> dict[str, Any]:
    from trimtab.training.trainer import fit

    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not recipe.train.steps:
        return {"train_seconds": 0.0, "tokens": 0, "trainable": count, "losses": []}
    watch.say(f"training {count:,} parameters for {recipe.train.steps} steps on {describe(given.rows)}")
    rows = given.labelled or given.rows
    options: dict[str, Any] = {"rows": rows, "held_out": given.while_training}
    done = fit(model, given.tokenizer, recipe, resume=resume, on_step=watch.step, say=watch.say, **options)
    _announce(watch)
    if done.measures:
        told = [f"{name} {value:.3g}" for name, value in done.measures.items() if name in _TOLD]
        watch.say(f"{recipe.train.objective}, in the last step: {', '.join(told)}")
    found = {"train_seconds": done.seconds, "tokens": done.tokens, "trainable": count, "losses": done.losses}
    if recipe.train.objective != "sft":
        found |= {"objective": recipe.train.objective, "measures": done.measures}
    return found if done.held_out is None else found | {"held_out": asdict(done.held_out)}


def _fold_and_save(
    recipe: Recipe,
    work: Work,
    model: PreTrainedModel,
    given: RunContext,
    metrics: dict[str, Any],
    record: Record,
    watch: Observer,
) -> list[Parity]:
    """Fold, save, and compare the three stages unless told not to."""
    held_out, text = given.held_out, (work.folder / "recipe.yaml").read_text(encoding="utf-8")
    some = _compared_on(recipe, model, held_out) if recipe.evaluate.parity else None
    trained = None if some is None else parity.logits_of(model, some)
    formats = {name: get(name) for name in recipe.export if name != "native"}
    unfolded = [name for name, format_ in formats.items() if format_.adapters == "kept"]
    export = partial(_export, work.model, model, given.tokenizer, text, watch)
    export(unfolded)
    watch.say("folding and saving")
    folded = fold(model, merge=recipe.merge)
    record.folded(model, folded)
    metrics["fold"] = _summary(folded)
    metrics["weights_changed_by_fold"] = sum(layer.differing for layer in folded)
    metrics["moved_by_training"] = total(layer.moved for layer in folded)._asdict()
    metrics["fold_error"] = max((layer.error for layer in folded if layer.action == "merged"), default=0.0)
    write_into(work.model, model, given.tokenizer, text)
    metrics["disk_bytes"] = disk_bytes(work.model)
    export([name for name in formats if name not in unfolded])
    if some is None or trained is None:
        return []
    on = "" if held_out is not None else ", on random tokens for want of held-out data (data.eval_path, data.holdout)"
    watch.say(f"comparing trained, folded, and reloaded in a fresh process{on}")
    parities = parity.report(trained, parity.logits_of(model, some), work.model, some, recipe.dtype)
    metrics["max_logit_difference"] = max(p.max_difference for p in parities)
    content = {
        "tokens": some.numel(),
        "text": "random" if held_out is None else "held-out",
        "fold": metrics["fold"],
        "stages": parity.to_json(parities),
    }
    (work.model / "parity.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return parities


def _compared_on(recipe: Recipe, model: PreTrainedModel, held_out: Tensor | None) -> Tensor:
    """Tokens (W, L) that the three stages are compared on: held-out ones, or random ones, since every run is compared."""
    wanted, length = recipe.evaluate.parity_tokens, 256 if recipe.data is None else recipe.data.block_tokens
    if held_out is not None:
        return held_out[: max(1, wanted // length)]
    draw, length = torch.Generator().manual_seed(0), min(length, wanted)
    return torch.randint(model.config.get_text_config().vocab_size, (wanted // length, length), generator=draw)


def _export(
    folder: Path, model: PreTrainedModel, tokenizer: Any, text: str, watch: Observer, names: Sequence[str]
) -> None:
    """Write these formats into folders of a run's."""
    for name in names:
        watch.say(f"exporting to {name}")
        write(model, tokenizer, name, folder / name, source=folder, recipe_text=text)


def _summary(folded: list[LayerFold]) -> str:
    """For example `210 layers folded, bitwise`."""
    counts: dict[str, int] = {}
    for layer in folded:
        key = f"{layer.action}, {layer.kind}" if layer.action != "kept" else "kept as adapters"
        counts[key] = counts.get(key, 0) + 1
    return "; ".join(f"{count} layers {what}" for what, count in counts.items()) or "nothing to fold"


def _measure_saved(recipe: Recipe, work: Work, given: RunContext, metrics: dict[str, Any], watch: Observer) -> None:
    """Perplexity and an answer of what was saved: what is evaluated is what is served."""
    tokenizer, held_out = given.tokenizer, given.held_out
    if held_out is None and not recipe.evaluate.prompt and not recipe.evaluate.tasks:
        return
    watch.say("measuring the saved model")
    model = AutoModelForCausalLM.from_pretrained(work.model, dtype=recipe.dtype)
    if held_out is not None:
        metrics["perplexity"]["tuned"] = perplexity(model, held_out)
    if recipe.evaluate.tasks:
        block = recipe.evaluate
        scores = harness.run(model, tokenizer, block.tasks, block.tasks_data or "", limit=block.tasks_limit)
        harness.write(work.model / "harness.json", {metrics["output"]: scores})
        metrics["tasks"] = {f"{s.task} {s.metric}": [s.value, s.stderr, len(s.items)] for s in scores}
    if recipe.evaluate.prompt:
        metrics["answers"]["after"] = answer(model, tokenizer, recipe.evaluate.prompt, recipe.evaluate.answer_tokens)
