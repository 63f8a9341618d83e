"""Training: TRL's SFTTrainer on accelerate, with what our models need of their own.

`labelled` makes token ids and labels of the rows; TRL cuts, packs and batches them, accelerate brings the devices,
transformers the loop, schedules, loggers and resuming. `ours` adds what all our trainers share: parameter groups,
checkpoints of what is trained, a stop at the first loss that is not a number. This file adds a loss that makes the logits
of a frozen head once, and meters. Other objectives than the answers themselves are in `preference_trainers` and `grpo`.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback

from trimtab import processes
from trimtab.devices import peak_bytes
from trimtab.kernels import tuning, workspace
from trimtab.models.attention import attending
from trimtab.models.head import Head
from trimtab.models.through import through
from trimtab.models.transformers_bridge import attach
from trimtab.recipe import texts
from trimtab.recipe.fields import DistillBlock
from trimtab.recipe.recipe import Recipe
from trimtab.training import teacher_cache
from trimtab.training.arguments import arguments, block_tokens
from trimtab.training.batches import COUNTED, Known, counted_of
from trimtab.training.best import Evaluations
from trimtab.training.checkpoints import (
    CHECKPOINT,
    last_checkpoint,
    load_trainable,
    losses_of,
    state_of,
    step_of,
    trainable,
)
from trimtab.training.compiling import Compiling
from trimtab.training.divergence import Distillation
from trimtab.training.during import During
from trimtab.training.held_out import HeldOut
from trimtab.training.labelled import Labelled, check_learned, label, packing_of
from trimtab.training.loss import loss_of_logits, summed_loss
from trimtab.training.ours import Ours, groups_of, old_names, silence
from trimtab.training.parted import part
from trimtab.training.placing import placed
from trimtab.training.preferred import Preferred, prefer
from trimtab.training.stopping import stop_at
from trimtab.training.streaming import at_one_commit, streamed
from trimtab.training.teacher import LiveTeacher
from trimtab.training.teacher_cache import NUMBER, CachedTeacher
from trimtab.training.watch import LossWatch, lower

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl import SFTConfig, SFTTrainer


@dataclass(frozen=True)
class Step:
    """What the meters read after an optimizer step."""

    step: int
    steps: int
    loss: float
    tokens: int
    """Tokens trained on since the start of this process."""
    seconds: float
    """Time since the first step of this process began."""
    held_out: float | None = None
    """Loss on held-out text, where it was measured after this step."""
    device_bytes: int | None = None
    """Most memory of the device so far, where that is not the CPU."""


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    steps: int
    tokens: int
    seconds: float
    losses: list[float]
    """Training loss of each logged step, those before the checkpoint that it continued from among them."""
    measures: dict[str, float] = field(default_factory=dict)
    """What else the objective says of the last logged step: `rewards/accuracies`, `rewards/margins`, `kl`, ..."""
    held_out: Evaluations | None = None
    """What was measured on held-out text, where `train.evaluate_steps` asks for it."""


class _Trainer(Ours, SFTTrainer):
    """SFTTrainer for models whose layers are ours."""

    teacher: LiveTeacher | CachedTeacher | None = None
    distill: DistillBlock | None = None
    _counted: Tensor | int = 0
    """Tokens that are not yet in the total."""
    _before: float | None = None
    """Tokens that the run was trained on by processes before this one."""

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of the counted tokens, with the teacher's divergence, in chunks where the head is frozen."""
        labels = inputs["labels"]
        counted = counted_of(inputs)
        # Before the student's forward: the teacher's activations are gone then.
        distillation = self._distillation(inputs)
        arguments = {k: v for k, v in inputs.items() if k not in ("labels", NUMBER, COUNTED)} | {"use_cache": False}
        outputs, targets = None, labels[:, 1:].flatten()
        if return_outputs or self._needs_logits():
            outputs = model(**arguments)
            total = loss_of_logits(outputs.logits[:, :-1].flatten(0, 1), targets, distillation, counted)
        else:
            loss_of = partial(summed_loss, self.model, labels, distillation, counted)
            total = through(model, self.model, loss_of, **arguments)
        self._count_tokens(inputs)  # after the forward, which may be made again (`train.compile`)
        count = num_items_in_batch if num_items_in_batch is not None else len(counted)
        loss = total / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is of all devices, and they average gradients
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, inputs: dict[str, Any]) -> Distillation | None:
        if self.distill is None or self.teacher is None:
            return None
        return Distillation(self.distill.weight, self.distill.temperature, self.teacher.targets(inputs))

    def _needs_logits(self) -> bool:
        """Whether the chunked loss cannot serve: a trained head, or one whose logits are made in a way of its own."""
        trained = any(p.requires_grad for p in self.model.get_output_embeddings().parameters())
        return trained or not Head.fits(self.model)

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        if self.model.training:
            self._counted = self._counted + (inputs["input_ids"].numel() if mask is None else mask.sum())

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on, by all processes, which all have to ask: counted where they are, and read here."""
        counted, self._counted = int(self._counted), 0
        self._total_train_tokens += counted
        return processes.total(super().tokens_seen)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL does, with the tokens so far."""
        if self.model.training:
            if self._before is None:
                told = (line["num_tokens"] for line in reversed(self.state.log_history) if "num_tokens" in line)
                self._before = float(next(told, 0.0))
            self._metrics["train"]["num_tokens"] = [self._before + self.tokens_seen]
        super().log(logs, start_time)


class _Meter(TrainerCallback):
    """Feeds the caller after every logged step."""

    def __init__(self, on_step: Callable[[Step], None] | None, trainer: list[Ours]) -> None:
        self.on_step, self.trainer, self.measures = on_step, trainer, dict[str, float]()
        self.began = perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A step was logged."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.measures = {k: float(v) for k, v in logs.items() if k == "kl" or k.startswith(("reward", "completions/"))}
        tokens, seconds = self.trainer[0].tokens_seen, perf_counter() - self.began  # every process asks for tokens
        if self.on_step is not None:
            before = state.log_history[-2] if len(state.log_history) > 1 else {}  # a step's measurement is logged first
            held_out = before.get("eval_loss") if before.get("step") == state.global_step else None
            most = peak_bytes(args.device)
            self.on_step(Step(state.global_step, state.max_steps, loss, tokens, seconds, held_out, most))


def _config(recipe: Recipe, checkpoints: Path, packing: str) -> SFTConfig:
    return SFTConfig(
        **arguments(recipe, checkpoints),
        per_device_train_batch_size=recipe.train.micro_batch,
        max_length=block_tokens(recipe),
        packing=packing != "none",
        packing_strategy="bfd" if packing == "none" else packing,
        shuffle_dataset=True,
    )


def fit(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    rows: Any = None,
    held_out: HeldOut | None = None,
    recipe_text: str = "",
    say: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train a prepared model by a recipe, in place.

    Args:
        model: from `trimtab.load` or `trimtab.prepare`.
        tokenizer: the model's.
        recipe: `train` and `data` are read; checkpoints go to `<output>/checkpoints`.
        resume: continue from the last checkpoint there.
        on_step: called after every logged step.
        rows: the data set, if it was read already; or `ready` of it.
        held_out: what `train.evaluate_steps` measures on, if it was read already.
        recipe_text: the recipe as it was saved, with hashes of what it reads, for every checkpoint; else `recipe` as it is.
        say: told what is to be known before training, and what ended it early.

    Raises:
        UserError: for unusable data, a loss that is not a number, or nothing to resume from.
        Interrupted: after Ctrl-C, with a checkpoint of the step that was then at work.
    """
    assert recipe.data is not None, "the recipe was checked to have data"
    assert recipe.train.epochs is None, "a run has counted the rows, and put steps in their place"
    if rows is None:
        rows = texts.training_of(recipe := _streamed(recipe, tokenizer)).rows
    vocabulary = model.config.get_text_config().vocab_size
    given = _read(model, tokenizer, recipe, rows, say)
    last = processes.first(lambda: last_checkpoint(recipe)) if resume else None
    during = During(recipe, tokenizer, vocabulary, held_out, say)
    if last is not None and during.over(last):
        load_trainable(model, last)  # the trainer would take one step more
        return Trained(step_of(last), 0, 0.0, losses_of(state_of(last)), held_out=during.end_of(model, last))
    slot: list[Ours] = []
    meter = _Meter(on_step, slot)
    attach(model)
    model.config.use_cache = False
    trainer = _trainer_for(model, tokenizer, recipe, given, [*during.callbacks, meter, *_watch(recipe, say)])
    trainer.groups, trainer.lower = groups_of(model, recipe), lower(recipe)
    trainer.recipe_text = recipe_text or recipe.to_yaml()
    slot.append(part(trainer, recipe))
    if isinstance(given, Labelled):
        teacher_cache.attach(trainer, recipe, tokenizer, given.rows)
    tuning.for_training()
    began, attention = perf_counter(), attending(model, recipe.train.attention)
    with during.watching(trainer), attention, _compiling(model, recipe, given, say) as trainer.compiling:
        result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = perf_counter() - began
    workspace.clear()
    model.config.use_cache = True
    model.eval()
    measured = during.end(model, trainer.state)
    return Trained(result.global_step, trainer.tokens_seen, seconds, losses_of(trainer.state), meter.measures, measured)


def _streamed(recipe: Recipe, tokenizer: Any) -> Recipe:
    """The recipe with the rows that a stream gives, at the commit that the first process was told."""
    return streamed(processes.first(partial(at_one_commit, recipe)), tokenizer)


def _read(
    model: PreTrainedModel, tokenizer: Any, recipe: Recipe, rows: Any, say: Callable[[str], None]
) -> Labelled | Preferred:
    """The rows with their token ids, and what is to be said of them."""
    given = ready(recipe, tokenizer, rows, model.config.get_text_config().vocab_size)
    for line in () if given is rows else given.notes:
        say(line)
    if (end := stop_at(model, tokenizer, given.end)) is not None:
        say(end)
    return given


def _compiling(model: Any, recipe: Recipe, given: Labelled | Preferred, say: Callable[[str], None]) -> Compiling:
    """Compiles the decoder layers; texts that are joined and cut make batches of one length."""
    even = isinstance(given, Labelled) and packing_of(recipe, given.rows) == "wrapped"
    return Compiling(model, recipe, say, even=even)


def _watch(recipe: Recipe, say: Callable[[str], None]) -> list[TrainerCallback]:
    """A look at the loss; of other objectives it begins where it may stay."""
    return [LossWatch(recipe, say)] if recipe.train.objective == "sft" else []


def ready(recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int) -> Labelled | Preferred:
    """The rows with their token ids, and looked at, by `labelled.label` or `preferred.prefer`; given back if they are."""
    if recipe.train.objective == "sft":
        return label(recipe, tokenizer, rows, vocabulary)
    return prefer(recipe, tokenizer, rows, vocabulary)


def _trainer_for(model: Any, tokenizer: Any, recipe: Recipe, given: Labelled | Preferred, callbacks: list[Any]) -> Ours:
    """The trainer of a recipe's objective."""
    if isinstance(given, Labelled):
        return _trainer(model, tokenizer, recipe, given, callbacks)
    if recipe.train.objective == "grpo":
        from trimtab.training.grpo import trainer
    else:
        from trimtab.training.preference_trainers import trainer
    with old_names():
        made: Ours = trainer(model, tokenizer, recipe, given, callbacks)
    silence(made)
    return made


def _trainer(model: PreTrainedModel, tokenizer: Any, recipe: Recipe, given: Labelled, callbacks: list[Any]) -> _Trainer:
    """A trainer, and with it the packed sequences in the order that the seed gives them."""
    with old_names():
        args = placed(_config(recipe, recipe.out / "checkpoints", packing_of(recipe, given.rows)), recipe.device)
        trainer = _Trainer(
            model=model, args=args, train_dataset=given.sequences, processing_class=tokenizer, callbacks=callbacks
        )
    silence(trainer)
    trainer.data_collator = Known(trainer.data_collator)
    check_learned(recipe, trainer.train_dataset)
    return trainer


def packed(model: PreTrainedModel, tokenizer: Any, recipe: Recipe, rows: Any) -> tuple[Any, Any]:
    """The training sequences as they will be packed and ordered, and what makes batches of them.

    Args:
        model: takes the sequences' tokens.
        tokenizer: the model's.
        recipe: `data` and `train` are read.
        rows: the data set, or `labelled.label` of it.
    """
    given = label(recipe, tokenizer, rows, model.config.get_text_config().vocab_size)
    trainer = _trainer(model, tokenizer, recipe, given, [])
    return trainer.train_dataset, trainer.data_collator


__all__ = [
    "CHECKPOINT", "Step", "Trained", "fit", "load_trainable", "packed", "ready", "trainable",
]  # fmt: skip
