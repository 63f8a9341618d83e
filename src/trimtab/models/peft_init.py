"""Go on from a LoRA that PEFT trained: its factors become the start of our output adapters.

PEFT computes y = x W^T + (alpha / r) x A^T B^T; ours has its own gain, so B is scaled by the quotient of the two. What is
not an ordinary LoRA (DoRA, biases, whole modules) is refused, and so is a rank that the method does not have.
"""

import json
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
from trimtab.models.transformers_bridge import quant_layers

_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.default)?\.weight")
_PLAIN = {
    "use_dora": (None, False),
    "bias": (None, "none"),
    "modules_to_save": (None, []),
    "fan_in_fan_out": (None, False),
}


def start_from(model: nn.Module, directory: str) -> None:
    """Set the output adapters of a prepared model to those of a PEFT LoRA directory, in place.

    Raises:
        UserError: naming the file, key or layer that does not fit.
    """
    folder = Path(directory)
    config, tensors = _read(folder)
    layers = quant_layers(model)
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
        with torch.no_grad():
            adapter.delta.A.copy_(a)
            adapter.delta.B.copy_(b * (_scaling(config, name, a.shape[0]) / shape.gain))


def _read(folder: Path) -> tuple[dict[str, Any], dict[tuple[str, str], torch.Tensor]]:
    file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for needed in (file, weights):
        if not needed.is_file():
            raise UserError(
                f"model.adapter: {needed}: no such file; a PEFT LoRA directory has one (safetensors, not .bin)"
            )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        stored = load_file(weights)
    except (ValueError, SafetensorError) as error:
        raise UserError(f"model.adapter: {folder}: damaged ({error}); save the adapter again") from error
    if config.get("peft_type") != "LORA":
        raise UserError(f"model.adapter: {file}: is of type {config.get('peft_type')}, only LORA can be continued")
    for key, plain in _PLAIN.items():
        if config.get(key) not in plain:
            raise UserError(f"model.adapter: {file}: {key} is {config[key]!r}; only an ordinary LoRA can be continued")
    tensors = {}
    for name, tensor in stored.items():
        found = _TENSOR.fullmatch(name)
        if found is None:
            raise UserError(f"model.adapter: {weights}: {name} is no factor of an ordinary LoRA of a linear layer")
        tensors[found[1], found[2]] = tensor
    return config, tensors


def _scaling(config: dict[str, Any], name: str, rank: int) -> float:
    """alpha / r (or / sqrt(r)) of a layer, with PEFT's patterns for the ends of names."""
    patterns = config.get("alpha_pattern") or {}
    key = next((k for k in patterns if re.match(rf"(.*\.)?({k})$", name)), None)
    alpha = float(config["lora_alpha"] if key is None else patterns[key])
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
