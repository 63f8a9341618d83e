"""What models make of their head's product: found by asking them, and counted wherever a loss is made of hidden states."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconH1Config,
    Gemma2Config,
    GraniteConfig,
    LlamaConfig,
    NanoChatConfig,
    VaultGemmaConfig,
)
from transformers.models.hyperclovax import HyperCLOVAXConfig
from transformers.models.minicpm3 import MiniCPM3Config

from trimtab.bit_search import sensitivity
from trimtab.bit_search.space import units
from trimtab.errors import UserError
from trimtab.models.head import AfterHead, Head, after_head
from trimtab.pruning.importance import taylor
from trimtab.pruning.structures import layout
from trimtab.quant.grid import Grid
from trimtab.training.loss import summed_loss
from trimtab.training.teacher import LiveTeacher

SIZES: dict[str, Any] = {
    "vocab_size": 90,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
}
MAMBA: dict[str, Any] = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
EXPECTED: dict[str, tuple[Any, AfterHead]] = {
    "granite divides": (GraniteConfig(**SIZES, logits_scaling=4.0), AfterHead(0.25)),
    "hyperclovax multiplies by the same key": (HyperCLOVAXConfig(**SIZES, logits_scaling=4.0), AfterHead(4.0)),
    "minicpm3 divides the hidden states": (MiniCPM3Config(**SIZES | LATENT, dim_model_base=8), AfterHead(0.25)),
    "cohere multiplies": (CohereConfig(**SIZES, logit_scale=0.5), AfterHead(0.5)),
    "falcon h1 multiplies": (FalconH1Config(**SIZES, **MAMBA, lm_head_multiplier=0.5), AfterHead(0.5)),
    "vault gemma caps": (
        VaultGemmaConfig(**SIZES, head_dim=8, final_logit_softcapping=2.0),
        AfterHead(softcap=2.0),
    ),
    "nanochat caps": (NanoChatConfig(**SIZES, final_logit_softcapping=2.0), AfterHead(softcap=2.0)),
    "gemma 2 caps": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0), AfterHead(softcap=2.0)),
    "llama does nothing": (LlamaConfig(**SIZES), AfterHead()),
}
IDS = torch.arange(24).view(2, 12) * 7 % 90
each = pytest.mark.parametrize("name", EXPECTED)


def random_model(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    config = type(EXPECTED[name][0]).from_dict(EXPECTED[name][0].to_dict())
    config.tie_word_embeddings = False
    model = AutoModelForCausalLM.from_config(config).eval()
    for p in model.parameters():
        p.data = torch.randn_like(p) * 0.3
    return model.to(dtype)


def loss_of(model: Any, ids: Tensor = IDS) -> Tensor:
    """The sum of next-token losses, from the model's own logits."""
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits.float(), ids[:, 1:].flatten(), reduction="sum")


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_what_follows_the_head_is_found(name: str, dtype: torch.dtype) -> None:
    model = random_model(name, dtype).train()
    assert after_head(model) == EXPECTED[name][1]
    assert model.training


@each
def test_the_loss_of_hidden_states_is_that_of_the_model(name: str) -> None:
    """Training and pruning use it: value, and gradient in every parameter below the head."""
    model = random_model(name)
    below = [p for p in model.base_model.parameters() if p.ndim == 2][1:]
    expected = torch.autograd.grad(loss_of(model), below, allow_unused=True)
    ours = summed_loss(model, IDS, input_ids=IDS, use_cache=False)
    torch.testing.assert_close(ours, loss_of(model))
    for found, wanted in zip(torch.autograd.grad(ours, below, allow_unused=True), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)


@each
def test_a_teacher_says_what_the_model_says(name: str) -> None:
    model = random_model(name)
    with torch.no_grad():
        logits = model(input_ids=IDS, use_cache=False).logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        LiveTeacher(model).targets({"input_ids": IDS, "labels": IDS}).logits(slice(None)), logits
    )


SEARCHED = ["granite divides", "cohere multiplies", "gemma 2 caps"]


@pytest.mark.parametrize("name", SEARCHED)
def test_sensitivities_count_what_the_model_does_with_its_logits(name: str) -> None:
    model, grid = random_model(name), Grid(2, 16)
    unit = units(model, "layer")[0]
    found = sensitivity.exact(model, [unit], [grid], IDS).cost_UC[0, 0]
    with torch.no_grad():
        plain = model(input_ids=IDS).logits.double().log_softmax(-1)
        with sensitivity.on_grids(model, dict.fromkeys(unit.layers, grid)):
            moved = model(input_ids=IDS).logits.double().log_softmax(-1)
    expected = (plain.exp() * (plain - moved)).sum().item() / IDS.numel()
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_pruning_counts_what_the_model_does_with_its_logits() -> None:
    """Importance is a gradient of the loss: of a Granite whose logits are divided by 4, not of one whose are not."""
    model = random_model("granite divides")
    scores = taylor(model, layout(model), IDS)
    down = model.model.layers[0].mlp.down_proj.weight
    windows = [torch.autograd.grad(loss_of(model, ids[None]), down)[0] * down for ids in IDS]
    expected = torch.stack([w.sum(0).abs() for w in windows]).mean(0).double()
    torch.testing.assert_close(scores[0].channels, expected, rtol=1e-3, atol=1e-5)


def test_logits_of_another_form_are_taken_from_the_model() -> None:
    """A family that nobody described, whose logits are shifted: the loss is right, and a sensitivity is refused."""
    model = random_model("granite divides")
    forward = type(model).forward

    def shifted(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits + torch.linspace(0, 3, out.logits.shape[-1])
        return out

    model.forward = shifted.__get__(model)
    assert after_head(model) is None
    assert not Head.fits(model)
    torch.testing.assert_close(summed_loss(model, IDS, input_ids=IDS, use_cache=False), loss_of(model))
    with pytest.raises(UserError, match="granite: its logits are not its head's product"):
        sensitivity.exact(model, units(model, "layer")[:1], [Grid(2, 16)], IDS)
