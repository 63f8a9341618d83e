"""GRPO: the model answers each prompt several times, and learns from the answers that a reward puts above their mean.

    advantage of an answer = (its reward - mean of the group) / deviation of the group         arXiv 2402.03300

The reward is a function of yours, named as `module:function`, which TRL calls with `prompts`, `completions` and the columns
of the data by name, and which returns a number for each completion. With `train.beta` above 0 answers are also held to the
reference, the model at step 0 (`models.reference`); TRL would load the float model of that name instead.

`train.micro_batch` counts answers in a forward pass. All answers of an optimizer step are made at once.
"""

from typing import Any

from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from trimtab.recipe.recipe import Recipe
from trimtab.training.arguments import arguments
from trimtab.training.ours import Ours
from trimtab.training.placing import placed
from trimtab.training.preference_trainers import reference_of
from trimtab.training.preferred import Preferred
from trimtab.training.rewards import reward


class ReferredGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer with a reference that it is given, as DPO's and KTO's trainers are.

    Args:
        ref_model: of `trimtab.reference(model)`; None at beta 0.
        args: its config.
        kwargs: what GRPOTrainer takes, by name.
    """

    def __init__(self, *, ref_model: PreTrainedModel | None, args: GRPOConfig, **kwargs: Any) -> None:
        beta, args.beta = args.beta, 0.0  # above 0 it would load a float model of the same name
        super().__init__(args=args, **kwargs)
        args.beta = self.beta = beta
        if ref_model is not None:
            add_fused_lm_head(ref_model, temperature=self.temperature)
            self.ref_model = self.accelerator.prepare_model(ref_model, evaluation_mode=True)


class Grpo(Ours, ReferredGRPOTrainer):
    """The same for a recipe."""


def trainer(model: PreTrainedModel, tokenizer: Any, recipe: Recipe, given: Preferred, callbacks: list[Any]) -> Ours:
    """The trainer of a recipe whose objective is grpo."""
    block, options = recipe.train, arguments(recipe, recipe.out / "checkpoints")
    config = GRPOConfig(
        **options,
        per_device_train_batch_size=block.micro_batch,
        num_generations=block.generations,
        max_completion_length=block.completion_tokens,
        beta=block.beta or 0.0,
        remove_unused_columns=False,
    )
    return Grpo(
        model=model,
        ref_model=reference_of(recipe, model) if block.beta else None,
        reward_funcs=reward(recipe),
        args=placed(config, recipe.device),
        train_dataset=given.sequences,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
