"""What every trainer of ours has besides its loss, as a mixin over one of TRL's or transformers' trainers.

Parameter groups (scales have their own learning rate and no decay), checkpoints that hold trainable tensors and optimizer
state only, rates that are the recipe's when a run goes on, and a stop at the first loss that is not a number.
"""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import Diverged
from trimtab.layers.rates import param_groups
from trimtab.recipe.recipe import Recipe
from trimtab.training.checkpoints import CHECKPOINT, load_trainable, trainable, whole_checkpoint

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


class Ours(_Base):
    """Before a trainer among the bases of a class; see the top of this file."""

    model: Any
    args: Any
    groups: list[dict[str, Any]]
    _total_train_tokens: int

    @property
    def tokens_seen(self) -> int:
        """Tokens trained on: TRL counts them in one of two places."""
        return self._total_train_tokens or int(self.state.num_input_tokens_seen)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers does."""
        with old_names():
            return super().train(*args, **kwargs)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW over the groups of `layers.rates`."""
        if self.optimizer is None:
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            self.optimizer = kind(self.groups, **options)
        return self.optimizer

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
