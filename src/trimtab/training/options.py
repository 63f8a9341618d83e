"""What a recipe asks of training that this machine may not have: found out before a model is loaded."""

import os
from importlib.util import find_spec

import torch
from transformers.integrations import get_available_reporting_integrations
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from trimtab import processes
from trimtab.errors import UserError, nearest
from trimtab.recipe.recipe import Recipe
from trimtab.training.rewards import reward


def check_training(recipe: Recipe) -> None:
    """Raise a `UserError` for what the trainer would only complain of later: a missing logger, optimizer or GPU."""
    _check_logger(recipe.train.report_to)
    _check_processes(recipe)
    if recipe.train.objective == "grpo" and recipe.train.steps:
        reward(recipe)
    if recipe.train.optimizer != "adamw" and find_spec("bitsandbytes") is None:
        raise UserError(f"train.optimizer: {recipe.train.optimizer} is bitsandbytes', which is not installed")
    device = recipe.device
    if device.type not in ("cuda", "xpu"):
        why = f"and model.device is {device}"
        if "paged" in recipe.train.optimizer:
            raise UserError(f"train.optimizer: pages between a GPU's memory and the computer's, {why}")
        if recipe.train.offload_activations:
            raise UserError(f"train.offload_activations: moves from a GPU's memory, {why}")
    _check_float16(recipe)


def _check_float16(recipe: Recipe) -> None:
    """Refuse training in float16 where gradients cannot be scaled: the small ones would be zero."""
    if recipe.dtype != torch.float16 or not recipe.train.steps or recipe.device.type == "cuda":
        return
    raise UserError(
        f"model.dtype: float16 on {recipe.device.type} trains without loss scaling, so small gradients would be lost; use "
        "bfloat16 or float32"
    )


def _check_processes(recipe: Recipe) -> None:
    """Raise a `UserError` for what several processes do not share: a wrapper, one device, a batch that does not divide."""
    count, block, wanted = processes.count(), recipe.data, recipe.train.processes
    if wanted is not None and wanted != count:
        raise UserError(
            f"train.processes: {wanted}, and there {'is one' if count == 1 else f'are {count}'}; `trimtab run` starts "
            f"them, and so does: torchrun --nproc_per_node {wanted} -m trimtab run {recipe.file or 'recipe.yaml'}"
        )
    if count > 1 and ":" in recipe.model.device:
        kind = recipe.model.device.partition(":")[0]
        raise UserError(
            f"model.device: {recipe.model.device} names one device, and there are {count} processes; use {kind} or auto, "
            "and each takes its own"
        )
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        raise UserError(
            f"DeepSpeed{f' (ZeRO-{stage})' if stage else ''}: trimtab trains by DDP or FSDP2, not by DeepSpeed, which "
            "casts and flattens what it shards; start by torchrun or an accelerate configuration without it, and set "
            "train.shard=fsdp to shard the model"
        )
    if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        raise UserError(
            "FSDP: accelerate's configuration would wrap the model itself; leave FSDP out of it (distributed_type: "
            "MULTI_GPU) and set train.shard=fsdp"
        )
    if count == 1 or block is None or not recipe.train.steps:
        return
    _check_shard(recipe, count)
    micro, sequences = recipe.train.micro_batch, recipe.train.batch_tokens // block.block_tokens
    if sequences % (micro * count) == 0:
        return
    whole = micro * count * block.block_tokens
    below, above = sequences * block.block_tokens // whole * whole, -(-recipe.train.batch_tokens // whole) * whole
    batch = f"train.batch_tokens={above}" if not below else f"train.batch_tokens={below} or {above}"
    divisors = [m for m in range(micro, 0, -1) if sequences % (m * count) == 0]
    smaller = f", or train.micro_batch={divisors[0]}" if divisors else ""
    raise UserError(
        f"train.batch_tokens: {recipe.train.batch_tokens} is the batch of all {count} processes, and no multiple of "
        f"processes x micro_batch x block_tokens = {whole}; set {batch}{smaller}"
    )


def _check_shard(recipe: Recipe, count: int) -> None:
    """Raise a `UserError` for what several processes do not do."""
    shard = recipe.train.shard
    if shard == "none":
        raise UserError(f"train.shard: none, and {count} processes were started; set ddp or fsdp, or start one")
    if recipe.train.objective not in ("sft", "dpo") or (shard == "fsdp" and recipe.train.objective != "sft"):
        how = "by one process, or train.shard=ddp" if recipe.train.objective == "dpo" else "by one process"
        raise UserError(f"train.objective: {recipe.train.objective} trains {how}")
    if shard == "fsdp" and recipe.train.compile is True:
        raise UserError("train.compile: layers that train.shard=fsdp shards are not compiled; set it to false or auto")
    if shard == "fsdp" and recipe.train.optimizer != "adamw":
        raise UserError(
            f"train.optimizer: {recipe.train.optimizer} keeps moments that FSDP2 cannot shard; set adamw, whose moments "
            "are sharded, or train.shard=ddp"
        )


_PACKAGES = {"azure_ml": "azureml-mlflow", "comet_ml": "comet-ml", "flyte": "flytekit"}
"""What installs a logger, where that is not its name."""


def _check_logger(name: str) -> None:
    """Raise a `UserError` for a logger that transformers does not know, or whose package is not installed."""
    known, here = ["none", "all", *INTEGRATION_TO_CALLBACK], ["none", "all", *get_available_reporting_integrations()]
    if name in here:
        return
    if name not in known:
        raise UserError(f"train.report_to: no logger {name!r}{nearest(name, known)}; known are {', '.join(known)}")
    raise UserError(
        f"train.report_to: {name} needs a package that is not installed here: pip install {_PACKAGES.get(name, name)} (or "
        "none, to log nothing)"
    )
