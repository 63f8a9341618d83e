"""What every trainer of ours has besides its loss, as a mixin over one of TRL's or transformers' trainers.

Parameter groups (scales have their own learning rate and no decay), checkpoints that hold trainable tensors and optimizer
state only, rates that are the recipe's when a run continues, and a stop at the first loss that is not a number.
"""

import math
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback

from trimtab import processes
from trimtab.errors import Diverged, UserError
from trimtab.layers.rates import param_groups
from trimtab.recipe.recipe import Recipe
from trimtab.training.checkpoints import CHECKPOINT, load_trainable, trainable, whole, whole_checkpoint
from trimtab.training.compiling import CompilationFailed, Compiling
from trimtab.training.parted import part_moments, whole_moments
from trimtab.training.saving import WRITING, writing
from trimtab.words import beyond

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object


@contextmanager
def old_names() -> Iterator[None]:
    """Without the warnings that TRL calls transformers by names of yesterday, which are nothing to our users."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


class _BeforeTheStep(TrainerCallback):
    """Calls before every optimizer step."""

    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Gradients are there, and clipped."""
        self._call()


class Ours(_Base):
    """Before a trainer among the bases of a class; see the top of this file."""

    model: Any
    args: Any
    accelerator: Any
    groups: list[dict[str, Any]]
    lower: str = "Lower train.lr (or train.lr_scale)"
    """What to do about a loss that is not a number."""
    recipe_text: str = ""
    """The resolved recipe, which goes into every checkpoint."""
    compiling: Compiling | None = None
    """What compiles the layers, while they train."""
    _total_train_tokens: int
    _losses: Tensor | float = 0.0
    """Of the micro-steps since the last look at them, summed up."""

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on: TRL counts them in one of two places."""
        return self._total_train_tokens or int(self.state.num_input_tokens_seen)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does."""
        look = _BeforeTheStep(self._look)
        self.add_callback(look)
        with old_names():
            done = super().train(*args, **kwargs)
        self.remove_callback(look)
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # autocast, under loss scaling
        return done

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the groups of `layers.rates`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self.groups, **options)
        return self.optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """One micro-step."""
        loss = self._micro_step(*args, **kwargs)
        self._losses = self._losses + loss
        return loss

    def _look(self) -> None:
        """Stop the run at a loss that is not a number, before the step that it gives: once a step a GPU is waited for."""
        loss, self._losses = float(self._losses), 0.0
        bad = not math.isfinite(loss)
        if not processes.any_of(bad):
            return
        # A checkpoint of this very step holds the parameters that gave this loss.
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}", ignore_errors=True)
        processes.barrier()
        if not bad:
            raise processes.Elsewhere(1)
        narrow = beyond("float16" if self.args.fp16 else None)
        raise self._stop(f"the loss became {loss} in step {self.state.global_step + 1}{narrow}")

    def _micro_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """A micro-step; if a layer could not be compiled, once more without."""
        if self.compiling is None or not self.compiling.active:
            return super().training_step(*args, **kwargs)
        before = _gradients(self.model)
        try:
            return super().training_step(*args, **kwargs)
        except CompilationFailed as failed:
            if _gradients(self.model) != before:
                raise UserError(
                    f"train.compile: a layer could not be compiled in backward ({failed}); set train.compile: false, and "
                    "continue with --resume"
                ) from failed
            self.compiling.give_up(failed)
        return super().training_step(*args, **kwargs)

    def _stop(self, what: str) -> Diverged:
        last = whole_checkpoint(Path(self.args.output_dir))
        if last is None:
            return Diverged(f"train: {what}; there is no good checkpoint yet. {self.lower}")
        return Diverged(f"train: {what}; the last good checkpoint is {last}. {self.lower} and continue with --resume")

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As transformers does, into a folder apart, which becomes the checkpoint when it is whole."""
        args = self.args
        with writing(Path(args.output_dir), self.state.global_step, self.recipe_text, args.save_total_limit):
            super()._save_checkpoint(model, trial)

    def _get_output_dir(self, trial: Any) -> str:
        """Where checkpoints are written, and where transformers looks for those that it removes: none."""
        return str(Path(self.args.output_dir) / WRITING)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainable tensors only, and none that is not finite: the first process, which has them, finds that out."""
        tensors = whole(self.model)
        processes.first(lambda: self._check_finite(tensors))
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / CHECKPOINT)

    def _check_finite(self, tensors: dict[str, Tensor]) -> None:
        for name, tensor in tensors.items():
            if not torch.isfinite(tensor).all():
                raise self._stop(f"{name} is no longer finite after step {self.state.global_step}")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Read trainable tensors back into the model."""
        load_trainable(self.model, Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Moments and step of the checkpoint, but rates, betas and decay of the recipe: it may have been corrected."""
        assert self.optimizer is not None
        assert self.lr_scheduler is not None
        given = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "group" not in str(error):
                raise
            raise UserError(
                f"--resume: {checkpoint}: rates meant something else when it was written, so its parameters are in other "
                "groups; set train.parametrization as it was then (relative, where the recipe named no rate)"
            ) from error
        if checkpoint is None:
            return
        part_moments(self)
        self.lr_scheduler.base_lrs = [group["initial_lr"] for group in given]
        factors = [factor(self.lr_scheduler.last_epoch) for factor in self.lr_scheduler.lr_lambdas]
        for group, ours, factor in zip(self.optimizer.param_groups, given, factors, strict=True):
            group.update(ours, lr=ours["initial_lr"] * factor)
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        """Nothing is put off where a model is sharded: gradients are few, and summed at once they stay sharded, too."""
        yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As transformers does, of whole tensors."""
        with whole_moments(self):
            super()._save_optimizer_and_scheduler(output_dir)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """None: a checkpoint is not a model to publish."""


def _gradients(model: nn.Module) -> list[tuple[int, int] | None]:
    """Changes when anything is added to a gradient."""
    return [None if p.grad is None else (id(p.grad), p.grad._version) for p in trainable(model).values()]


def groups_of(model: nn.Module, recipe: Recipe) -> list[dict[str, Any]]:
    """Parameter groups with a recipe's rates."""
    block = recipe.train
    return param_groups(
        model,
        *recipe.rates,
        parametrization=recipe.parametrization,
        weight_decay=block.weight_decay,
        scale_bits=block.lr_scale_bits,
    )


def silence(trainer: Any) -> None:
    """Take away the callbacks that print: our own display shows the steps."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
