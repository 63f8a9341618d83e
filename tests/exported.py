"""Tiny models to export: random Llamas whose layers lie on given grids, and what is read back from a folder."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

import trimtab as tt
from trimtab.formats import export as exporting
from trimtab.layers.linear import QuantLinear
from trimtab.methods import Method, Rtn
from trimtab.models.transformers_bridge import quant_layers

IDS = torch.arange(24).view(2, 12) * 5 % 64
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}


def everywhere(**grid: Any) -> dict[str, Any]:
    return {"match": "*", "grid": grid}


def llama(*, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Hidden 64, MLP 128, two layers, biases in attention."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_bias=True,
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(p, std=0.1)
    return model.eval()


def prepared(
    *rules: dict[str, Any], method: Method | None = None, tied: bool = True, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    return tt.prepare(llama(tied=tied, dtype=dtype), method or Rtn(), list(rules) or None)


def shake(model: PreTrainedModel, scale: float = 0.02) -> None:
    """Move what is trained."""
    torch.manual_seed(1)
    for layer in quant_layers(model).values():
        if isinstance(layer, QuantLinear) and layer.adapter is not None:
            with torch.no_grad():
                for p in layer.adapter.parameters():
                    p.add_(scale * torch.randn_like(p))


def write(model: PreTrainedModel, name: str, out: Path, **options: Any) -> exporting.Report:
    return exporting.write(model, None, name, out, source=out, options=exporting.Options(**options))


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


def linears(model: PreTrainedModel) -> dict[str, QuantLinear]:
    return {n: x for n, x in quant_layers(model).items() if isinstance(x, QuantLinear) and not x.tied}
