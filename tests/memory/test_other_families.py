"""Plans of families that no description names: their blocks are found where transformers keeps them."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, BloomConfig, FalconConfig, GPT2Config, OPTConfig, PreTrainedConfig

import tiny
import trimtab

SIZES: dict[str, Any] = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, PreTrainedConfig] = {
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64),
    "opt, projected": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=32, do_layer_norm_before=False),
    "falcon": FalconConfig(**SIZES),
    "falcon, new": FalconConfig(**SIZES, new_decoder_architecture=True, num_kv_heads=2),
    "bloom": BloomConfig(vocab_size=260, hidden_size=64, n_layer=2, n_head=4),
    "gpt2": GPT2Config(vocab_size=260, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_one_micro_batch_needs_no_more_than_several(tmp_path: Path, name: str) -> None:
    """The plan of OPT or Falcon with one micro-batch a step: gradients and activations are then apart."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).bfloat16().save_pretrained(tmp_path / "m")
    tiny.tokenizer().save_pretrained(tmp_path / "m")
    rules = [{"match": "*", "grid": {"bits": 4, "group": 32}}]
    values = tiny.recipe(tmp_path / "m", tiny.text(tmp_path / "t.jsonl"), tmp_path / "out", rules=rules)
    for micro_batch in (1, 2):
        train = {**values["train"], "micro_batch": micro_batch}
        one, several = (
            trimtab.plan({**values, "train": {**train, "batch_tokens": 32 * micro_batch * n}}) for n in (1, 2)
        )
        assert 0 < one.total <= several.total
