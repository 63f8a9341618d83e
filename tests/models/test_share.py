"""The line that says what share of a model is in how many bits, what stayed in float and why."""

import logging
import re
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedModel

import trimtab as tt
from trimtab.methods import Lora, Rtn
from trimtab.models.share import Shares, shares

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
FOUR: dict[str, Any] = {"match": "*", "grid": {"bits": 4, "group": 32}}
EIGHT: dict[str, Any] = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
PROJECTIONS = 2 * (4 * 32 * 32 + 3 * 32 * 64)


def made(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def test_every_parameter_counts_once() -> None:
    """Against a count by hand, with a tied head, without, and in float."""
    for tied in (True, False):
        config = LlamaConfig(**SIZES, tie_word_embeddings=tied)
        total = sum(p.numel() for p in made(config).parameters())
        found = shares(tt.prepare(made(config), Lora(rank=2), [EIGHT, FOUR]))
        assert found.total == total
        assert found.bits == {4: PROJECTIONS, 8: 64 * 32}
        rest = {part.what: part.parameters for part in found.floats}
        assert rest == {"norms and biases": 5 * 32} | ({} if tied else {"head": 64 * 32})
        assert shares(made(config)).total == total
        assert shares(made(config)).low_bit == 0


def test_few_low_bits_are_a_warning_once(caplog: pytest.LogCaptureFixture) -> None:
    """Of a mixture whose experts a rule leaves out 10 % is in 4 bits."""
    config = MixtralConfig(**SIZES, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
    rules = [{"match": "*.experts.*", "grid": None}, FOUR]
    with caplog.at_level(logging.INFO, "trimtab"):
        for _ in range(2):
            model = tt.prepare(made(config), Rtn(), rules)
    lines = [r for r in caplog.records if "parameters in 4 bits" in r.message]
    assert [r.levelname for r in lines] == ["WARNING", "INFO"]
    assert re.search(r"float: experts [\d.]+ % \(no rule gives them a grid\)", lines[0].message)
    assert "a router, whose outputs choose experts" in lines[0].message
    assert shares(model).low_bit < 0.2


def test_the_line() -> None:
    line = Shares({4: 92_100_000, 8: 200_000}, ()).line()
    assert line == "99.8 % of 92 M parameters in 4 bits, 0.2 % in 8"
