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
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import Diverged, UserError
from trimtab.training.checkpoints import whole_checkpoint

if TYPE_CHECKING:
    from transformers import Trainer as _Base
else:
    _Base = object

CHECKPOINT = "trainable.safetensors"
"""Trainable tensors of a checkpoint, by parameter name."""
_SCALES = ("adapter.scale", "adapter.offset")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that want gradients, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


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
    lr_scale: float = 0.0
    lr_scale_bits: int | None = None
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


def silence(trainer: Any) -> None:
    """Take away the callbacks that print: our own display shows the steps."""
    for callback in list(trainer.callback_handler.callbacks):
        if type(callback).__name__ in ("PrinterCallback", "ProgressCallback"):
            trainer.remove_callback(type(callback))
