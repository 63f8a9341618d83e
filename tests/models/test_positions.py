"""How long a text a model can be shown, against what transformers' models do with a longer one."""

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trimtab.errors import UserError
from trimtab.models.positions import check_length
from trimtab.models.sources import layout

LIMIT = 16
_BERT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": LIMIT}
_LLAMA = {**_BERT, "intermediate_size": 16}
_GPT2 = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": LIMIT}
FAMILIES: dict[str, tuple[dict[str, Any], str]] = {
    "opt": ({**_BERT, "ffn_dim": 16, "word_embed_proj_dim": 16}, "refused"),
    "gpt2": (_GPT2, "refused"),
    "gpt_bigcode": (_GPT2, "refused"),
    "gpt_neo": ({**_BERT, "num_layers": 1, "num_heads": 2, "attention_types": [[["global"], 1]]}, "refused"),
    "gptj": ({**_GPT2, "rotary_dim": 4}, "refused"),
    "biogpt": (_LLAMA, "refused"),
    "mpt": ({"d_model": 16, "n_layers": 1, "n_heads": 2, "max_seq_len": LIMIT}, "refused"),
    "falcon": ({**_BERT, "alibi": True}, "said"),
    "llama": (_LLAMA, "said"),
    "gpt_neox": (_LLAMA, "said"),
    "bloom": ({"hidden_size": 16, "n_layer": 1, "n_head": 2}, "nothing"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_refused_is_what_fails(family: str) -> None:
    """`block_tokens` beyond learned positions: an IndexError in the middle of a run."""
    options, outcome = FAMILIES[family]
    config = AutoConfig.for_model(family, vocab_size=64, **options)
    model, skeleton = AutoModelForCausalLM.from_config(config).eval(), layout("m", config)
    assert check_length(skeleton, LIMIT, "data.block_tokens") is None
    for tokens in (LIMIT + 1, 3 * LIMIT):
        ids = torch.arange(tokens)[None] % 60 + 3
        if outcome == "refused":
            with pytest.raises((IndexError, RuntimeError)):
                model(input_ids=ids)
            with pytest.raises(UserError, match=rf"data.block_tokens: {tokens} .* the 16 positions .* to 16 or less"):
                check_length(skeleton, tokens, "data.block_tokens")
            continue
        model(input_ids=ids)
        line = check_length(skeleton, tokens, "data.block_tokens")
        assert (line is None) == (outcome == "nothing")
        assert line is None or f"{tokens} tokens are more than the 16 that the model's config names" in line
