"""Training: TRL's SFTTrainer on accelerate, with what our models need of their own.

`labelled` makes token ids and labels of the rows; TRL cuts, packs and batches them, accelerate brings the devices,
transformers the loop, schedules, loggers and resuming. This file adds parameter groups (scales have their own learning rate
and no decay), a loss for heads that have no `.weight`, checkpoints that hold trainable tensors and optimizer state only, a
stop at the first loss that is not a number, and meters.
"""

import os
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from trimtab.errors import Diverged, UserError
from trimtab.kernels import tuning, workspace
from trimtab.models.transformers_bridge import attach
from trimtab.recipe import texts
from trimtab.recipe.fields import DistillBlock
from trimtab.recipe.recipe import Recipe
from trimtab.training import teacher_cache
from trimtab.training.checkpoints import last_checkpoint, step_of, whole_checkpoint
from trimtab.training.divergence import Distillation
from trimtab.training.labelled import Labelled, check_learned, label, packing_of
from trimtab.training.loss import IGNORED, loss_of_logits, summed_loss
from trimtab.training.stopping import stop_at
from trimtab.training.teacher import LiveTeacher
from trimtab.training.teacher_cache import NUMBER, CachedTeacher

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
from trl import SFTConfig, SFTTrainer

CHECKPOINT = "trainable.safetensors"
"""Trainable tensors of a checkpoint, by parameter name."""
_SCALES = ("adapter.scale", "adapter.offset")
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "adamw-paged": "paged_adamw_32bit",
    "adamw-8bit-paged": "paged_adamw_8bit",
}
"""Ours to transformers' names."""


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


@dataclass(frozen=True)
class Trained:
    """A finished training."""

    steps: int
    tokens: int
    seconds: float
    losses: list[float]
    """Training loss of each logged step."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class _Trainer(SFTTrainer):
    """SFTTrainer for models whose layers are ours."""

    model: Any
    args: Any
    lr_scale: float = 0.0
    lr_scale_bits: int | None = None
    teacher: LiveTeacher | CachedTeacher | None = None
    distill: DistillBlock | None = None

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over groups: deltas and master weights; scales and offsets, by width where widths are mixed."""
        if self.optimizer is None:
            named, args = trainable(self.model), self.args
            others = [p for name, p in named.items() if not name.endswith(_SCALES)]
            groups = [{"params": others, "lr": args.learning_rate, "weight_decay": args.weight_decay}]
            groups += [
                {"params": some, "lr": self.lr_scale * factor, "weight_decay": 0.0}
                for factor, some in self._scales(named).items()
            ]
            kind, options = self.get_optimizer_cls_and_kwargs(args, self.model)
            self.optimizer = kind([g for g in groups if g["params"]], **options)
        return self.optimizer

    def _scales(self, named: dict[str, nn.Parameter]) -> dict[float, list[nn.Parameter]]:
        """Scales and offsets by what multiplies their rate.

        The largest weight of b bits moves by (2^b - 1) ds, so one absolute rate, as Adam's is, suits one width only.
        """
        found: dict[float, list[nn.Parameter]] = {}
        for name, p in named.items():
            if name.endswith(_SCALES):
                factor = 1.0
                if self.lr_scale_bits is not None and name.endswith(".scale"):
                    layer = self.model.get_submodule(name.removesuffix(".adapter.scale"))
                    factor = (2**self.lr_scale_bits - 1) / layer.base.grid.top
                found.setdefault(factor, []).append(p)
        return found

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Mean loss of the counted tokens, with the teacher's divergence, in chunks where the head is frozen."""
        labels = inputs["labels"]
        self._count_tokens(inputs)
        distillation = self._distillation(
            inputs
        )  # before the student's forward: the teacher's activations are gone then
        arguments = {k: v for k, v in inputs.items() if k not in ("labels", NUMBER)} | {"use_cache": False}
        outputs, targets = None, labels[:, 1:].flatten()
        if return_outputs or self._needs_logits(model):
            outputs = model(**arguments)
            total = loss_of_logits(outputs.logits[:, :-1].flatten(0, 1), targets, distillation)
        else:
            total = summed_loss(model, labels, distillation, **arguments)
        count = num_items_in_batch if num_items_in_batch is not None else (targets != IGNORED).sum()
        loss = total / torch.as_tensor(count).clamp(min=1)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the count is of all devices, and they average gradients
        return (loss, outputs) if return_outputs else loss

    def _distillation(self, inputs: dict[str, Any]) -> Distillation | None:
        if self.distill is None or self.teacher is None:
            return None
        return Distillation(self.distill.weight, self.distill.temperature, self.teacher.targets(inputs))

    def _needs_logits(self, model: Any) -> bool:
        """Whether the chunked loss cannot serve: a trained head, or a wrapper whose forward must run."""
        if model is not self.model or self.accelerator.num_processes > 1:
            return True
        return any(p.requires_grad for p in model.get_output_embeddings().parameters())

    def _count_tokens(self, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        count = int(mask.sum()) if mask is not None else inputs["input_ids"].numel()
        if self.model.training:
            self._total_train_tokens += count
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-step; stops the run at a loss that is not a number."""
        loss: Tensor = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            # A checkpoint of this very step holds the parameters that gave this loss.
            if self.args.should_save:
                shutil.rmtree(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", ignore_errors=True)
            raise self._stop(f"the loss became {loss.item()} in step {self.state.global_step + 1}")
        return loss

    def _stop(self, what: str) -> Diverged:
        last = whole_checkpoint(Path(self.args.output_dir))
        if last is None:
            return Diverged(f"train: {what}; there is no good checkpoint yet. Lower train.lr (or train.lr_scale)")
        return Diverged(
            f"train: {what}; the last good checkpoint is {last}. "
            "Lower train.lr (or train.lr_scale) and go on with --resume"
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainable tensors only, and none that is not finite."""
        tensors = {name: p.detach().contiguous() for name, p in trainable(self.model).items()}
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise self._stop(f"{name} is no longer finite after step {self.state.global_step}")
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / CHECKPOINT)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read trainable tensors back into the model."""
        load_trainable(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and step of the checkpoint, but rates, betas and decay of the recipe: it may have been mended."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in given]
        factors = [factor(self.lr_scheduler.last_epoch) for factor in self.lr_scheduler.lr_lambdas]
        for group, ours, factor in zip(self.optimizer.param_groups, given, factors, strict=True):
            group.update(ours, lr=ours["initial_lr"] * factor)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a checkpoint is not a model to publish."""


def load_trainable(model: nn.Module, checkpoint: Path) -> None:
    """Copy a checkpoint's trainable tensors into a prepared model.

    Raises:
        UserError: if the checkpoint belongs to another recipe.
    """
    named = trainable(model)
    with safe_open(checkpoint / CHECKPOINT, framework="pt") as file:
        if set(file.keys()) != set(named):
            odd = sorted(set(file.keys()) ^ set(named))[0]
            raise UserError(f"{checkpoint}: {odd} is in only one of checkpoint and model; resume with the same recipe")
        for name, parameter in named.items():
            tensor = file.get_tensor(name)
            if tensor.shape != parameter.shape:
                raise UserError(f"{checkpoint}: {name} has another shape there; resume with the same recipe")
            with torch.no_grad():
                parameter.copy_(tensor)


class _Meter(TrainerCallback):
    """Feeds the caller after every logged step."""

    def __init__(self, on_step: Callable[[Step], None] | None, trainer: list[_Trainer]) -> None:
        self.on_step, self.trainer, self.losses = on_step, trainer, list[float]()
        self.began = perf_counter()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.began = perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """A step was logged."""
        if not logs or "loss" not in logs:
            return
        loss = float(logs["loss"])
        self.losses.append(loss)
        if self.on_step is not None:
            tokens, seconds = self.trainer[0]._total_train_tokens, perf_counter() - self.began
            self.on_step(Step(state.global_step, state.max_steps, loss, tokens, seconds))


def _config(recipe: Recipe, checkpoints: Path, packing: str) -> SFTConfig:
    block = recipe.train
    assert recipe.data is not None
    micro_tokens = block.micro_batch * recipe.data.block_tokens
    return SFTConfig(
        output_dir=str(checkpoints),
        max_steps=block.steps,
        per_device_train_batch_size=block.micro_batch,
        gradient_accumulation_steps=block.batch_tokens // micro_tokens,
        learning_rate=recipe.lr,
        lr_scheduler_type="constant_with_warmup" if block.schedule == "constant" else block.schedule,
        warmup_steps=round(block.warmup * block.steps),
        adam_beta1=block.betas[0],
        adam_beta2=block.betas[1],
        weight_decay=block.weight_decay,
        max_grad_norm=block.clip,
        optim=_OPTIMIZERS[block.optimizer],
        activation_offloading=block.offload_activations,
        seed=block.seed,
        bf16=False,  # the model computes in its own dtype; autocast would only add casts
        gradient_checkpointing=block.activation_checkpointing,
        max_length=recipe.data.block_tokens,
        packing=packing != "none",
        packing_strategy="bfd" if packing == "none" else packing,
        shuffle_dataset=True,
        save_steps=block.save_steps,
        save_total_limit=block.keep_checkpoints,
        logging_steps=block.log_steps,
        logging_nan_inf_filter=False,
        report_to=block.report_to,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )


def fit(
    model: PreTrainedModel,
    tokenizer: Any,
    recipe: Recipe,
    *,
    resume: bool = False,
    on_step: Callable[[Step], None] | None = None,
    rows: Any = None,
    say: Callable[[str], None] = lambda _: None,
) -> Trained:
    """Train a prepared model by a recipe, in place.

    Args:
        model: from `trimtab.load` or `trimtab.prepare`.
        tokenizer: the model's.
        recipe: `train` and `data` are read; checkpoints go to `<output>/checkpoints`.
        resume: go on from the last checkpoint there.
        on_step: called after every logged step.
        rows: the data set, if it was read already; or `labelled.label` of it.
        say: told what is to be known before training.

    Raises:
        UserError: for unusable data, a loss that is not a number, or nothing to resume from.
    """
    assert recipe.data is not None, "the recipe was checked to have data"
    if rows is None:
        rows = texts.training(recipe.data).rows
    given = label(recipe, tokenizer, rows, model.config.get_text_config().vocab_size)
    for line in () if given is rows else given.notes:
        say(line)
    if (end := stop_at(model, tokenizer, given.end)) is not None:
        say(end)
    last = last_checkpoint(recipe) if resume else None
    if last is not None and step_of(last) == recipe.train.steps:
        load_trainable(model, last)  # the trainer would take one step more
        return Trained(recipe.train.steps, 0, 0.0, [])
    slot: list[_Trainer] = []
    meter = _Meter(on_step, slot)
    attach(model)
    model.config.use_cache = False
    trainer = _trainer(model, tokenizer, recipe, given, [meter])
    trainer.lr_scale, trainer.lr_scale_bits = recipe.lr_scale, recipe.train.lr_scale_bits
    slot.append(trainer)
    teacher_cache.attach(trainer, recipe, tokenizer, given.rows)
    tuning.for_training()
    began = perf_counter()
    result = trainer.train(resume_from_checkpoint=None if last is None else str(last))
    seconds = perf_counter() - began
    workspace.clear()
    model.config.use_cache = True
    model.eval()
    return Trained(result.global_step, trainer._total_train_tokens, seconds, meter.losses)


def _trainer(model: PreTrainedModel, tokenizer: Any, recipe: Recipe, given: Labelled, callbacks: list[Any]) -> _Trainer:
    """A trainer, and with it the packed sequences in the order that the seed gives them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        args = _config(recipe, recipe.out / "checkpoints", packing_of(recipe, given.rows))
        trainer = _Trainer(
            model=model, args=args, train_dataset=given.sequences, processing_class=tokenizer, callbacks=callbacks
        )
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
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
