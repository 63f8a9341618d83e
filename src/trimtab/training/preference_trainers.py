"""DPO and KTO: answers that are better than others, or good or bad, measured against the model at step 0.

    dpo    -log sigmoid( beta ( log p(chosen) / p0(chosen) - log p(rejected) / p0(rejected) ) )         arXiv 2305.18290
    kto    1 - sigmoid( +- beta ( log p(answer) / p0(answer) - KL ) )                                   arXiv 2402.01306

p0 is the reference. TRL would load a model of that name again, which is the float one: not the model at step 0, and a whole
model in memory. Here it is `models.reference`: the same codes with the adapters as they are now, or, where the recipe names
one, a float model. Losses, metrics and batches are TRL's; rows come with token ids (`preferred`).

Both count sequences: `train.micro_batch` of them are in a forward pass, two for each row of DPO. KTO runs as many again
without gradients, each prompt with another row's answer, to estimate KL.
"""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from trimtab.models.load import load_float
from trimtab.models.reference import chosen_for, reference
from trimtab.recipe.recipe import Recipe
from trimtab.training.arguments import arguments, block_tokens
from trimtab.training.ours import Ours
from trimtab.training.placing import placed
from trimtab.training.preferred import Preferred


class Dpo(Ours, DPOTrainer):
    """DPOTrainer for models whose layers are ours, and rows that have token ids."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


class Kto(Ours, KTOTrainer):
    """KTOTrainer for models whose layers are ours, and rows that have token ids, in an order of their own."""

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """With the answers of a micro-batch turned by one, which is what KL is estimated from."""

        def turned(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
            ids = rows["completion_ids"]
            return {"KL_completion_ids": [ids[-1], *ids[:-1]]}

        return dataset.map(turned, batched=True, batch_size=args.per_device_train_batch_size)


def reference_of(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel:
    """What a recipe keeps to: the model as it is now, or the float model that it names."""
    if recipe.train.reference is None:
        return reference(model)
    named = load_float(recipe.train.reference, dtype=recipe.dtype, device=recipe.device).requires_grad_(False).eval()
    chosen_for(model, named)
    return named


def _weights(labels: list[bool]) -> dict[str, float]:
    """What makes good and bad answers weigh alike, as arXiv 2402.01306 (eq. 8) recommends."""
    good, bad = sum(labels), len(labels) - sum(labels)
    if not good or not bad:
        return {}
    return {"desirable_weight": max(1.0, bad / good), "undesirable_weight": max(1.0, good / bad)}


def trainer(model: PreTrainedModel, tokenizer: Any, recipe: Recipe, given: Preferred, callbacks: list[Any]) -> Ours:
    """The trainer of a recipe whose objective is dpo or kto."""
    block, folder = recipe.train, recipe.out / "checkpoints"
    options: dict[str, Any] = arguments(recipe, Path(folder)) | {"max_length": block_tokens(recipe)}
    options |= {} if block.beta is None else {"beta": block.beta}
    kind: Any = Dpo if block.objective == "dpo" else Kto
    size = block.micro_batch // 2 if kind is Dpo else block.micro_batch
    options |= {} if kind is Dpo else _weights(given.sequences["label"])
    config: Any = (DPOConfig if kind is Dpo else KTOConfig)(**options, per_device_train_batch_size=size)
    made: Ours = kind(
        model=model,
        ref_model=reference_of(recipe, model),
        args=placed(config, recipe.device),
        train_dataset=given.sequences,
        processing_class=tokenizer,
        callbacks=callbacks,
    )
    return made
