"""A recipe's `train` block in the words of transformers' `TrainingArguments`: what all of TRL's trainers take."""

from pathlib import Path
from typing import Any

import torch

from trimtab import processes
from trimtab.recipe.recipe import Recipe

_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw-8bit": "adamw_bnb_8bit",
    "adamw-paged": "paged_adamw_32bit",
    "adamw-8bit-paged": "paged_adamw_8bit",
}
"""Ours to transformers' names."""


def block_tokens(recipe: Recipe) -> int:
    """Length of a training sequence."""
    assert recipe.data is not None
    return recipe.data.block_tokens


def arguments(recipe: Recipe, checkpoints: Path) -> dict[str, Any]:
    """Everything but the size of a micro-batch, which trainers count in rows of their own."""
    block = recipe.train
    return {
        "output_dir": str(checkpoints),
        "max_steps": block.steps,
        "gradient_accumulation_steps": max(
            1, block.batch_tokens // (block.micro_batch * block_tokens(recipe) * processes.count())
        ),
        "learning_rate": recipe.rates.delta,
        "lr_scheduler_type": "constant_with_warmup" if block.schedule == "constant" else block.schedule,
        "warmup_steps": round(block.warmup * block.steps),
        "adam_beta1": block.betas[0],
        "adam_beta2": block.betas[1],
        "weight_decay": block.weight_decay,
        "max_grad_norm": block.clip,
        "optim": _OPTIMIZERS[block.optimizer],
        "seed": block.seed,
        "use_cpu": recipe.device.type == "cpu",
        "bf16": False,  # the model computes in its own dtype; autocast would only add casts
        "fp16": recipe.dtype == torch.float16,  # for its loss scaling; elsewhere than on CUDA it is refused (`options`)
        "gradient_checkpointing": block.activation_checkpointing,
        "save_steps": block.save_steps,
        "save_total_limit": block.keep_checkpoints,
        "logging_steps": block.log_steps,
        "logging_nan_inf_filter": False,
        "report_to": block.report_to,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        **({"activation_offloading": True} if block.offload_activations else {}),  # GRPO's trainer has none
    }
