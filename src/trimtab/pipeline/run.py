"""The one path: recipe in, model out.

    load (quantizing while it reads) -> measure -> train -> fold -> save -> reload -> measure what will be served

Everything that can be wrong is checked before anything is written. All of it is written beside the output, which it becomes
when it is whole (see `output`).
"""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab import processes
from trimtab.data.sequences import describe
from trimtab.devices import CPU, described
from trimtab.evaluation import parity
from trimtab.evaluation.parity import Parity
from trimtab.formats import get
from trimtab.formats.export import write
from trimtab.formats.native.write import disk_bytes, write_into
from trimtab.kernels import tuning
from trimtab.layers.movement import total
from trimtab.models.block_start import Blockwise
from trimtab.models.prepare import LayerFold, fitted_starts, fold
from trimtab.models.sharding import gather
from trimtab.models.share import shares
from trimtab.pages import report
from trimtab.pipeline import checks, metering
from trimtab.pipeline.going_on import begun_or_gone_on, resolved
from trimtab.pipeline.measured import Measured
from trimtab.pipeline.measuring import Measuring
from trimtab.pipeline.output import Work
from trimtab.pipeline.record import Record
from trimtab.recipe.recipe import Recipe
from trimtab.training import teacher_cache
from trimtab.training.build import RunContext, build, simulate
from trimtab.training.checkpoints import check_reached
from trimtab.training.streaming import at_one_commit

if TYPE_CHECKING:
    from trimtab.training.trainer import Step


_TOLD = ("rewards/accuracies", "rewards/margins", "kl", "reward", "completions/mean_length")
"""What is said of TRL's measures of an objective; `metrics.json` has all."""


class Observer(Protocol):
    """The observer of a run."""

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
        UserError: for anything the user can fix; nothing is then left half-written.
    """
    with processes.together(recipe.model.device):
        return _run(recipe, overwrite, resume, show if show is not None and processes.is_first() else Quiet())


def _run(recipe: Recipe, overwrite: bool, resume: bool, watch: Observer) -> dict[str, Any]:
    """One process of those that carry it out. All of them load and train; the first alone does all else."""
    work, began = Work.of(recipe), time.monotonic()
    recipe = processes.first(partial(at_one_commit, recipe))
    given = processes.first_before(partial(checks.gather, recipe, overwrite, resume))
    for line in given.notes:
        watch.say(line)
    recipe = resolved(recipe, given)
    if resume and (last := work.last()) is not None:
        check_reached(last, recipe)  # epochs are steps only now
    down = processes.first(partial(begun_or_gone_on, recipe, work, resume, watch.say))
    with work.begun(down, overwrite, resume) if processes.is_first() else nullcontext():
        processes.barrier()
        metrics, parities = _carry_out(recipe, work, given, resume, watch, began)
        processes.first(work.finish)
    watch.finish(metrics, parities)
    return metrics


def _carry_out(
    given_recipe: Recipe, work: Work, given: RunContext, resume: bool, watch: Observer, began: float
) -> tuple[dict[str, Any], list[Parity]]:
    """Everything between the checks and the end: the model is then whole in the folder of the run."""
    recipe = given_recipe.moved(work.folder)
    output, record = str(given_recipe.out), Record()
    metrics: dict[str, Any] = {"perplexity": {}, "answers": {}, "output": output, "method": recipe.method.name}
    metrics["device"] = described(recipe.device)
    before = processes.first(partial(Measured.before, recipe, work, resume))
    if before.values:
        watch.say("what was measured before training is known from when this run began")
    measuring = Measuring(recipe, given, metrics, watch.say)
    measuring.float_model(before)

    def ahead() -> dict[str, int]:
        record.before(recipe, given)
        return _ask_teacher(recipe, given, watch)

    asking = processes.first(ahead)
    if isinstance(given.start, Blockwise):
        given = replace(given, start=replace(given.start, kept=work.blocks, say=watch.say))
    model = _load(recipe, given, metrics, record, watch)
    _simulate(recipe, model, given, watch)
    measuring.rounded(model, before)
    metrics |= _tune(recipe, model, given, resume, watch)
    whole = gather(model)
    del model
    metrics |= {name: max(most, asking[name]) for name, most in metering.peaks(recipe.device).items()}

    def written() -> list[Parity]:
        nonlocal whole
        assert whole is not None, "the first process has all of it"
        record.trained(work.checkpoints)
        parities = _fold_and_save(recipe, work, whole, given, metrics, record, watch)
        whole = None
        return parities

    parities = processes.first(written)
    metering.begin(recipe.device)
    measuring.saved(work.model)

    def told() -> dict[str, Any]:
        metrics["seconds"] = time.monotonic() - began
        (work.model / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
        record.write(work.model)
        report.make(work.model, watch.say, name=recipe.name)
        return metrics

    return processes.first(told), parities


def _ask_teacher(recipe: Recipe, given: RunContext, watch: Observer) -> dict[str, int]:
    """Fill the teacher's cache where the recipe has one; the peaks of memory that took."""
    metering.begin(recipe.device)
    sequences = partial(_packed, given)
    teacher_cache.ask(recipe, given.tokenizer, given.rows, sequences, source=given.source, say=watch.say)
    return metering.peaks(recipe.device)


def _packed(given: RunContext, model: PreTrainedModel, tokenizer: Any, recipe: Recipe, rows: Any) -> tuple[Any, Any]:
    """`trainer.packed` of the rows that are tokenized already."""
    from trimtab.training.trainer import packed

    return packed(model, tokenizer, recipe, given.labelled or rows)


def _load(
    recipe: Recipe, given: RunContext, metrics: dict[str, Any], record: Record, watch: Observer
) -> PreTrainedModel:
    """The model, quantized and with adapters."""
    metering.begin(recipe.device)
    how = ""
    if given.start is not None:
        name = "GPTQ" if recipe.start.name == "gptq" else "block-wise training"
        how = f" by {name} on {given.start.tokens.numel():,} tokens"
    on = "" if recipe.device == CPU else f" onto {described(recipe.device)}"
    watch.say(f"loading {recipe.model.path}{on} for {recipe.method.name}, quantizing{how} while it reads")
    model = build(recipe, given, record.errors)
    metrics |= {f"load_{name}": most for name, most in metering.peaks(recipe.device).items()}
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
    watch.say(f"training {count:,} parameters for {recipe.train.steps} steps on {describe(_seen(recipe, given))}")
    rows = given.labelled or given.rows
    text = (recipe.out / "recipe.yaml").read_text(encoding="utf-8") if processes.is_first() else ""
    options: dict[str, Any] = {"rows": rows, "held_out": given.while_training, "recipe_text": text}
    done = fit(model, given.tokenizer, recipe, resume=resume, on_step=watch.step, say=watch.say, **options)
    _announce(watch)
    if done.measures:
        told = [f"{name} {value:.3g}" for name, value in done.measures.items() if name in _TOLD]
        watch.say(f"{recipe.train.objective}, in the last step: {', '.join(told)}")
    found = {"train_seconds": done.seconds, "tokens": done.tokens, "trainable": count, "losses": done.losses}
    if recipe.train.objective != "sft":
        found |= {"objective": recipe.train.objective, "measures": done.measures}
    return found if done.held_out is None else found | {"held_out": asdict(done.held_out)}


def _seen(recipe: Recipe, given: RunContext) -> Any:
    """The rows that training sees: of preferences both answers, the good and the bad ones."""
    return given.texts.rows if given.texts is not None and recipe.train.objective in ("dpo", "kto") else given.rows


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
    where = model.device  # the CPU, of a model that was sharded
    watch.say(f"comparing trained, folded, and reloaded in a fresh process, all on {where}{on}")
    parities = parity.report(trained, parity.logits_of(model, some), work.model, some, recipe.dtype, where)
    metrics["max_logit_difference"] = max(p.max_difference for p in parities)
    content = {
        "tokens": some.numel(),
        "text": "random" if held_out is None else "held-out",
        "device": str(where),
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
