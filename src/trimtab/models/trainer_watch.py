"""What every trainer is asked that is given a model of ours: whether it goes by DeepSpeed, and what it is measured against.

DeepSpeed would cast and flatten codes: it is refused by name when the trainer is made. And there is
one warning where TRL measures a model of ours against another than it began as.

DPO's and KTO's trainers, and GRPO's with a beta, load their reference by the model's name if they are given none, and that
is the float model. Nothing asks us then, so a callback that every trainer has (`DEFAULT_CALLBACKS`) looks when training
begins: is the model ours, does the trainer keep to a reference, did anybody make one? It does nothing else.
"""

import logging
from typing import Any

from transformers import TrainerCallback

from trimtab.models.offloading import refuse_deepspeed
from trimtab.models.prepared import Prepared
from trimtab.models.reference import has_reference

_log = logging.getLogger("trimtab")
_REFERRING = {"DPOConfig": None, "KTOConfig": None, "GRPOConfig": "beta", "RLOOConfig": "beta"}
"""Configs of trainers that keep to a reference, and the field that has to be above 0 for it."""
_GRPO = "trimtab.training.grpo.ReferredGRPOTrainer takes ref_model=trimtab.reference(model)"


class ReferenceWatch(TrainerCallback):
    """Refuses when a trainer is made, warns when training begins."""

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """A trainer was made."""
        plugin = getattr(args, "deepspeed_plugin", None)
        if plugin is not None and isinstance(model, Prepared):
            refuse_deepspeed(getattr(plugin, "zero_stage", None))

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Training begins."""
        kind = next((c.__name__ for c in type(args).__mro__ if c.__name__ in _REFERRING), None)
        if kind is None or not isinstance(model, Prepared) or getattr(args, "precompute_ref_log_probs", False):
            return
        field = _REFERRING[kind]
        if (field is not None and not getattr(args, field)) or has_reference(model):
            return
        _log.warning(
            "the reference of this %s is not the model at step 0 but another, by default the float model of its name: "
            "%s",
            kind.removesuffix("Config"),
            "give ref_model=trimtab.reference(model)" if field is None else _GRPO,
        )


def install() -> None:
    """Have every trainer that is made from now on look."""
    from transformers import trainer

    if ReferenceWatch not in trainer.DEFAULT_CALLBACKS:
        trainer.DEFAULT_CALLBACKS.append(ReferenceWatch)  # type: ignore[arg-type]
