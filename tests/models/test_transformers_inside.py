"""What the bridge takes for granted of transformers (see docs/upgrades.md)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

import trimtab as tt
from exported import EMBEDDING, IDS, everywhere, prepared
from trimtab.errors import UserError
from trimtab.models.transformers_bridge import cast_floats, quant_layers

RULES = [EMBEDDING, everywhere(bits=4, group=32)]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A native directory with a tied head."""
    tt.save(prepared(*RULES), tmp_path / "saved")
    return tmp_path / "saved"


def test_the_marker_is_no_unexpected_tensor(saved: Path) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(saved, output_loading_info=True)
    assert "model.layers.0.mlp.up_proj.weight" in load_file(saved / "model.safetensors")
    wrong = {key: found for key, found in info.items() if found}
    assert not wrong, f"transformers no longer reads _keys_to_ignore_on_load_unexpected: {wrong}"


def test_a_parameter_that_was_not_read_is_known(saved: Path) -> None:
    """By plain `from_pretrained`, where trimtab has no look at the names beforehand."""
    plain = AutoModelForCausalLM.from_pretrained(saved)
    marked = {name for name, p in plain.named_parameters() if getattr(p, "_is_hf_initialized", False)}
    assert marked == dict(plain.named_parameters()).keys(), "transformers no longer marks what it read so"
    tensors = load_file(saved / "model.safetensors")
    (saved / "manifest.json").unlink()  # which would say more
    for name in ("model.norm.weight", "model.layers.0.mlp.up_proj.base.scale"):
        save_file({n: t for n, t in tensors.items() if n != name}, saved / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"no tensor {name} in the model's safetensors"):
            AutoModelForCausalLM.from_pretrained(saved)


class Careful(LlamaForCausalLM):
    """A model that declares what stays in float32."""

    _keep_in_fp32_modules = ["norm"]  # noqa: RUF012 - as transformers' own models do
    _keep_in_fp32_modules_strict = ["k_proj"]  # noqa: RUF012


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_modules_that_stay_in_float32(dtype: torch.dtype) -> None:
    """Those of the one list in float16 alone, those of the strict list in bfloat16, too."""
    message = (
        "transformers no longer declares modules that stay in float32 by _keep_in_fp32_modules and its strict list"
    )
    assert PreTrainedModel._keep_in_fp32_modules is None, message
    assert PreTrainedModel._keep_in_fp32_modules_strict is None, message
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    model = Careful(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1))
    cast_floats(model, dtype)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    parts = ("norm", "k_proj") if dtype == torch.float16 else ("k_proj",)
    assert kept == {name for name, _ in model.named_parameters() if any(part in name for part in parts)}, message
    assert kept


def test_ties_of_layers_that_are_ours_are_forgotten() -> None:
    """lm-evaluation-harness calls `tie_weights` on a model in memory."""
    model = prepared(*RULES)
    assert LlamaForCausalLM._tied_weights_keys, "transformers no longer declares ties by _tied_weights_keys"
    assert not model._tied_weights_keys
    before = model(input_ids=IDS).logits
    names = set(model.state_dict())
    model.tie_weights()
    assert not model.all_tied_weights_keys
    assert set(model.state_dict()) == names
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert quant_layers(model)["lm_head"] is model.get_output_embeddings()
