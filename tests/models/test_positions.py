"""How long a text a model can be shown, against what transformers' models do with a longer one."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import trimtab as tt
from trimtab.bit_search.searching import Search
from trimtab.errors import UserError
from trimtab.models.positions import check_length
from trimtab.models.sources import layout
from trimtab.recipe import recipe

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


@pytest.mark.parametrize("who", ["eval", "compare", "prune", "search"])
def test_whoever_shows_a_model_longer_texts_says_so(who: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tiny.model(tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps(config | {"max_position_embeddings": LIMIT}))
    text, model = str(tiny.text(tmp_path / "t.jsonl")), str(tmp_path / "m")
    sizes: dict[str, Any] = {"tokens": 64, "block_tokens": 32}
    if who == "eval":
        tt.evaluate(model, text, **sizes)
    elif who == "compare":
        tt.compare(model, model, text, out=tmp_path / "out", **sizes)
    elif who == "prune":
        tt.prune(model, tmp_path / "out", ratio=0.3, multiple_of=32, data=text, **sizes)
    else:
        blocks = {"search": {"bits": [2, 4], "trials": 1}}
        Search(recipe.from_dict(tiny.recipe(tmp_path / "m", tmp_path / "t.jsonl", tmp_path / "out", **blocks)))
    assert "block_tokens: 32 tokens are more than the 16 that the model's config names" in caplog.text
