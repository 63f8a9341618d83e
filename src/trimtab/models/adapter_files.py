"""Output adapters as files of PEFT: ordinary LoRAs, y = x W^T + (alpha / r) x A'^T B'^T, with a rank and alpha a layer.

    adapter_config.json            adapter_model.safetensors

A file of an adapter is small because it leaves its base out. So it is the whole model only where PEFT can make that base
itself: a float checkpoint by its name, as it is or in NF4 as bitsandbytes rounds it. `belongs_to` says whether that is so.
"""

import json
from pathlib import Path
from statistics import mode
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.layers.adapter import Adapter
from trimtab.layers.linear import QuantLinear
from trimtab.models.kv_cache import current
from trimtab.models.origin import rounded_from
from trimtab.models.prepared import quant_layers
from trimtab.models.transposed import is_linear
from trimtab.quant.grid import CodebookGrid

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREFIX = "base_model.model."
_BITSANDBYTES = ("nf4", "fp4")


def belongs_to(model: "PreTrainedModel") -> str | None:
    """The float checkpoint that this model is an adapter of, for PEFT as well; None where it is more than that."""
    layers = list(quant_layers(model).values())
    adapters = [x.adapter for x in layers if isinstance(x, QuantLinear) and x.adapter is not None]
    if not adapters or any(not a.stays(merge=False) or a.fitted is not None for a in adapters):
        return None
    if not _made_by_peft(model) or any(getattr(x, "inputs", None) is not None for x in layers) or current(model):
        return None
    ours = {id(p) for a in adapters for p in a.parameters()}
    if any(p.requires_grad and id(p) not in ours for p in model.parameters()):
        return None
    return rounded_from(model)


def _made_by_peft(model: "PreTrainedModel") -> bool:
    """Whether all weights are float, or those of every linear layer but the head are rounded as bitsandbytes does."""
    rounded = {name: x.base.grid for name, x in quant_layers(model).items() if x.base.grid is not None}
    if not rounded:
        return True
    head, grids = model.get_output_embeddings(), set(rounded.values())
    (grid, *others) = grids
    if others or not isinstance(grid, CodebookGrid) or grid.codebook not in _BITSANDBYTES or grid.group != 64:
        return False
    linear = {n for n, m in model.named_modules() if (isinstance(m, QuantLinear) or is_linear(m)) and m is not head}
    return set(rounded) == linear


def write_adapter(folder: Path, model: "PreTrainedModel", base: str) -> None:
    """Write a model's adapters, for PEFT to load on `base`."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {
        n: x.adapter for n, x in quant_layers(model).items() if isinstance(x, QuantLinear) and x.adapter is not None
    }
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for name, adapter in found.items():
        (a, b), ranks[name], alphas[name] = factors(adapter)
        tensors |= {tensor_name(name, "A"): a, tensor_name(name, "B"): b}
    save_file({k: t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors", {"format": "pt"})
    text = json.dumps(config(ranks, alphas, base, any_transposed(model)), indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def tensor_name(layer: str, factor: str) -> str:
    """Of a factor, A or B, in PEFT's files."""
    return f"{_PREFIX}{layer}.lora_{factor}.weight"


@torch.no_grad()
def factors(adapter: Adapter) -> tuple[tuple[Tensor, Tensor], int, float]:
    """A' (R, K) and B' (N, R) in the dtype that they act in, their rank, and alpha."""
    delta = adapter.delta
    assert delta is not None, "what is a LoRA has an update"
    a, b = delta.as_plain()
    dtype = getattr(torch, delta.shape.dtype)
    return (a.to(dtype), b.to(dtype)), a.shape[0], a.shape[0] * delta.shape.gain


def any_transposed(model: "PreTrainedModel") -> bool:
    """Whether the base of any adapter keeps its matrix as (K, N): PEFT's `fan_in_fan_out`, which it puts right by layer."""
    layers = (x for x in quant_layers(model).values() if isinstance(x, QuantLinear))
    return any(layer.transposed and layer.adapter is not None for layer in layers)


def config(ranks: dict[str, int], alphas: dict[str, float], base: str, transposed: bool) -> dict[str, Any]:
    """`adapter_config.json` of layers with these ranks and alphas."""
    rank, alpha = mode(ranks.values()), mode(alphas.values())
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.partition("@")[0],
        "revision": base.partition("@")[2] or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "fan_in_fan_out": transposed,
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": {n: r for n, r in ranks.items() if r != rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != alpha},
    }
