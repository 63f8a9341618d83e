"""A tiny Llama with a tied head, a byte tokenizer, data and recipes for it: whole runs in seconds."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS = 256
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
RULES: list[dict[str, Any]] = [
    {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
    {"match": "*", "grid": {"bits": 3, "group": 32, "zero": "integer"}},
]


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Every byte is a token; 256 is the end of sequence."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    byte_level = Tokenizer(models.BPE(vocab={**vocabulary, "<eos>": EOS}, merges=[]))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    byte_level.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_level, eos_token="<eos>", pad_token="<eos>")
    fast.chat_template = template
    return fast


def model(path: Path, *, template: str | None = TEMPLATE, tied: bool = True, layers: int = 2) -> Path:
    """Writes a random model directory: hidden 64, MLP 128, two layers unless told, bfloat16."""
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        bos_token_id=EOS,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(path)
    tokenizer(template).save_pretrained(path)
    return path


def jsonl(path: Path, *rows: Any) -> Path:
    """Writes rows as JSON lines; a row given as a string is written as it is."""
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def text(path: Path, rows: int = 40) -> Path:
    """Writes text rows that are easy to learn."""
    lines = (f"{i} plus {i + 1} is {2 * i + 1}, and {i} times two is {2 * i}." for i in range(rows))
    return jsonl(path, *({"text": line} for line in lines))


def recipe(model_path: Path, data_path: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A recipe of six quick steps; `changes` replace whole keys, or keys of a block where both are mappings."""
    values: dict[str, Any] = {
        "name": "tiny",
        "model": {"path": str(model_path)},
        "method": {"name": "lr-qat", "rank": 4, "alpha": 64.0},  # so that a few steps move codes
        "rules": RULES,
        "data": {"path": str(data_path), "block_tokens": 32, "eval_path": str(data_path), "eval_tokens": 256},
        "train": {"steps": 6, "batch_tokens": 128, "micro_batch": 2, "lr": 1e-2, "lr_scale": 1e-4, "save_steps": 3},
        "evaluate": {"parity_tokens": 64},
        "output": str(output),
    }
    for key, value in changes.items():
        merge = isinstance(value, dict) and isinstance(values.get(key), dict) and key != "method"
        values[key] = {**values[key], **value} if merge else value
    return values


def write(path: Path, values: dict[str, Any]) -> Path:
    """Writes a recipe as YAML."""
    path.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    return path
