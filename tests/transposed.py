"""Tiny models of the families that keep the matrices of their layers transposed, in transformers' `Conv1D`."""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config, OpenAIGPTConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from trimtab.layers.linear import QuantLinear
from trimtab.methods import Method
from trimtab.models.load import load
from trimtab.models.sources import SafetensorsSource
from trimtab.models.transformers_bridge import quant_layers

SIZES: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 96,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CONFIGS: dict[str, Any] = {"gpt2": GPT2Config, "openai-gpt": OpenAIGPTConfig}
IDS = torch.arange(24).view(2, 12) * 3 % 96
FIRST = "transformer.h.0.attn.c_attn"
FOUR: list[dict[str, Any]] = [{"match": "*", "grid": {"bits": 4, "group": 32}}]


def turned(name: str = "gpt2", dtype: torch.dtype = torch.float32, **more: Any) -> PreTrainedModel:
    """A random model, its biases not zero."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](**SIZES | more), dtype=dtype)
    with torch.no_grad():
        for own, p in model.named_parameters():
            if own.endswith("bias"):
                p.normal_(0, 0.1)
            elif p.dim() == 2:
                p.mul_(4)
    return model.eval()


def saved(folder: Path, name: str = "gpt2", **more: Any) -> Path:
    turned(name, **more).save_pretrained(folder)
    return folder


def read(folder: Path, method: Method, rules: Any = FOUR, **options: Any) -> Any:
    """Loaded tensor by tensor."""
    source = SafetensorsSource(folder)
    source.tokenizer = lambda: None  # type: ignore[method-assign]
    return load(str(folder), method, rules, **{"dtype": torch.float32, "source": source, "quiet": True, **options})[0]


def logits(model: Any) -> Tensor:
    """Of some tokens."""
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found


def shake(model: PreTrainedModel) -> None:
    """Move what is trained."""
    torch.manual_seed(1)
    for p in model.parameters():
        if p.requires_grad:
            p.data.add_(0.05 * torch.randn_like(p) * p.abs().mean() + 0.01 * torch.randn_like(p))


def plain(model: Any, name: str = "gpt2", **more: Any) -> PreTrainedModel:
    """transformers' own model with the matrices that one of ours multiplies with, turned back."""
    made = turned(name, **more)
    for own, layer in quant_layers(model).items():
        theirs: Any = made.get_submodule(own)
        if isinstance(layer, QuantLinear) and not layer.tied:
            adapter = layer.adapter
            matrix_NK = layer.base.dequantize(torch.float32)
            matrix_NK = matrix_NK if adapter is None else adapter.merged(layer.base, torch.float32)
            theirs.weight.data = (matrix_NK.T if type(theirs) is Conv1D else matrix_NK).detach().clone()
        elif not isinstance(layer, QuantLinear):
            theirs.weight.data = layer.base.dequantize(torch.float32)
    return made


def close(found: Tensor, wanted: Tensor) -> None:
    """The same but for the order in which products are added up."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())


class Subclass(Conv1D):
    """Of the same arithmetic today, which nobody promises."""


def with_other_classes(model: Any) -> PreTrainedModel:
    """All layers a subclass of Conv1D's, but for one that another library has its own class of that name for."""
    for module in model.modules():
        if type(module) is Conv1D:
            module.__class__ = Subclass
    alike = type("Conv1D", (torch.nn.Module,), {"forward": Conv1D.forward})
    other: Any = alike()
    first = model.get_submodule(FIRST)
    vars(other).update(copy.copy(vars(first)))
    model.set_submodule(FIRST, other)
    found: PreTrainedModel = model
    return found
