"""Continue from a LoRA that PEFT trained: its factors become the start of our output adapters.

PEFT computes y = x W^T + (alpha / r) x A^T B^T; ours has its own gain, so B is scaled by the quotient of the two. That is
what an adapter means only if nothing else in its config changes the base, the layers or the sum. So every field of the
config is either one of those that leave a plain LoRA (`FREE`, and the values in `_PLAIN`) or has to be unset: what is not
known here, of a newer PEFT too, is refused by its name, and so are tensors that are no factor and ranks that the method
does not have.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from trimtab.errors import UserError
from trimtab.layers.adapters import DeltaOutput
from trimtab.layers.linear import QuantLinear
from trimtab.models.sharding import like
from trimtab.models.transformers_bridge import quant_layers
from trimtab.models.whole import check
from trimtab.reading import read_mapping

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
FREE = frozenset(
    {
        # what the equation has, and which layers it stands in: the tensors say that, too
        *("peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
        # what acts in training alone, or names where things are from
        *("lora_dropout", "inference_mode", "runtime_config", "task_type", "auto_mapping", "peft_version"),
        *("base_model_name_or_path", "revision"),
        # how the base holds its matrices, which PEFT puts right by each layer's class; factors are the same either way
        "fan_in_fan_out",
        # read only together with a field that is refused (megatron_config, use_qalora)
        *("megatron_core", "qalora_group_size"),
    }
)
"""Fields of PEFT's LoraConfig that leave a plain LoRA, whatever they hold."""
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal"),  # these leave the base as it is
}
"""Values that leave a plain LoRA, of fields that may hold others; any other field has to be unset."""
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")
"""Starts that move a part of the base into the factors, and that PEFT can take back when it saves."""


def start_from(model: nn.Module, directory: str) -> None:
    """Set the output adapters of a prepared model to those of a PEFT LoRA directory, in place.

    Raises:
        UserError: naming the file, key or layer that does not fit.
    """
    folder = Path(directory)
    config, tensors = _read(folder)
    layers, found = quant_layers(model), []
    for name in dict.fromkeys(layer for layer, _ in tensors):
        if (name, "A") not in tensors or (name, "B") not in tensors:
            raise UserError(f"{folder}: {name}: has only one of lora_A and lora_B; save the adapter again")
        layer = layers.get(name)
        adapter = layer.adapter if isinstance(layer, QuantLinear) else None
        if not isinstance(adapter, DeltaOutput) or adapter.delta.A is None or adapter.delta.B is None:
            raise UserError(
                f"model.adapter: {name}: has no low-rank output adapter here to start from; "
                "use lora or qlora, and give the layer a grid (or `float`) in `rules`"
            )
        a, b, shape = tensors[name, "A"].float(), tensors[name, "B"].float(), adapter.delta.shape
        if a.shape != adapter.delta.A.shape or b.shape != adapter.delta.B.shape:
            raise UserError(
                f"model.adapter: {name}: its factors are {tuple(a.shape)} and {tuple(b.shape)}, the method's "
                f"{tuple(adapter.delta.A.shape)} and {tuple(adapter.delta.B.shape)}; set method.rank to {a.shape[0]}"
            )
        b = b * (_scaling(config, name, a.shape[0]) / shape.gain)
        if not all(factor.to(getattr(torch, shape.dtype)).isfinite().all() for factor in (a, b)):
            raise UserError(f"model.adapter: {name}: a factor has numbers beyond {shape.dtype}; save the adapter again")
        found += [(adapter.delta.A, a), (adapter.delta.B, b)]
    with torch.no_grad():
        for parameter, value in found:  # only now: what is refused leaves the model as it was
            parameter.copy_(like(parameter, value))


def ranks_of(directory: str) -> dict[str, int]:
    """The rank of each layer's factors in a PEFT LoRA directory, by the layer's name.

    Raises:
        UserError: as `start_from`.
    """
    _, tensors = _read(Path(directory).expanduser())
    return {layer: tensor.shape[0] for (layer, factor), tensor in tensors.items() if factor == "A"}


def _read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
    check(folder)
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (file, weights):
        if not needed.is_file():
            raise UserError(
                f"model.adapter: {needed}: no such file; a PEFT LoRA directory has one (safetensors, not .bin)"
            )
    config = read_mapping(file, "save the adapter again")
    try:
        stored = load_file(weights)
    except (ValueError, OSError, SafetensorError) as error:
        raise UserError(f"model.adapter: {folder}: damaged ({error}); save the adapter again") from error
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(f"model.adapter: {file}: is of type {kind}, only LORA can be continued")
    for key in ("rank_pattern", "alpha_pattern"):
        if not isinstance(config.get(key) or {}, dict) or not all(map(_is_pattern, config.get(key) or {})):
            raise UserError(
                f"model.adapter: {file}: {key} is not a mapping of patterns of names; save the adapter again"
            )
    for key, value in config.items():
        if not _is_plain(key, value):
            raise UserError(
                f"model.adapter: {file}: {key} is {value!r}, which is not a plain LoRA; {_remedy(key, value)}"
            )
    tensors = {}
    for name, tensor in stored.items():
        found = _TENSOR.fullmatch(name)
        if found is None or tensor.dim() != 2 or not tensor.is_floating_point():
            raise UserError(f"model.adapter: {weights}: {name} is not a factor of an ordinary LoRA of a linear layer")
        if not tensor.isfinite().all():
            raise UserError(f"model.adapter: {weights}: {name} holds NaN or infinite values; save the adapter again")
        tensors[found[1], found[2]] = tensor
    if not tensors:
        raise UserError(f"model.adapter: {weights}: holds no factor; save the adapter again")
    return config, tensors


def _is_pattern(text: str) -> bool:
    """Whether it can be looked for in a name; one that repeats what repeats may take longer than the world stands."""
    try:
        re.compile(text)
    except (re.error, OverflowError, RecursionError):
        return False
    return len(text) <= 1000 and re.search(r"\)[*+?{]", text) is None


def _is_plain(key: str, value: Any) -> bool:
    """Whether a field of a config leaves a plain LoRA: known to, or unset."""
    return key in FREE or not value or value in _PLAIN.get(key, ())


def _remedy(key: str, value: Any) -> str:
    if key == "init_lora_weights" and str(value).startswith(_CONVERTED):
        return (
            "this start moved a part of the base into the factors: let PEFT make a plain LoRA of it, with "
            "`save_pretrained(..., path_initial_model_for_weight_conversion=...)`, and start from that"
        )
    return "merge it into its base with PEFT (`merge_and_unload`) and start from that model, or train a plain LoRA"


def _of_layer(config: dict[str, Any], key: str, pattern: str, name: str) -> Any:
    """A layer's own value of a field that has a pattern for the ends of names, as PEFT looks it up."""
    patterns = config.get(pattern) or {}
    found = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", name)), None)
    value = config.get(key) if found is None else patterns[found]
    if not isinstance(value, int | float) or value <= 0:
        raise UserError(f"model.adapter: {key} of {name} is {value!r} in adapter_config.json; save the adapter again")
    return value


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r (or / sqrt(r)) of a layer."""
    said = _of_layer(config, "r", "rank_pattern", name)
    if said != rank:
        raise UserError(
            f"model.adapter: {name}: its factors have rank {rank}, adapter_config.json says {said}; save it again"
        )
    alpha = _of_layer(config, "lora_alpha", "alpha_pattern", name)
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
