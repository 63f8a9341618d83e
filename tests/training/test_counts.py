"""Losses and perplexity are means over the tokens that have labels: against sums and counts made by hand, row by row."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import tiny
from trimtab.bit_search import held_out
from trimtab.data.rows import load_rows
from trimtab.evaluation.parity import compare
from trimtab.evaluation.perplexity import perplexity
from trimtab.models.load import load
from trimtab.recipe import recipe
from trimtab.training import trainer as train

ROWS = [
    {"prompt": "a long question about nothing at all? ", "completion": "yes"},
    {"prompt": "why? ", "completion": "because of it"},
    {"prompt": "and where, if one may ask, is it? ", "completion": "here"},
    {"prompt": "who? ", "completion": "I"},
]


def by_hand(model: Any, tokenizer: Any) -> tuple[float, int, int]:
    """Sum of -log p over the answers' tokens, their number, and the number of all tokens that are predicted."""
    total, answers, every = 0.0, 0, 0
    model.eval()
    for row in ROWS:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([prompt + tokenizer(row["completion"])["input_ids"] + [tiny.EOS]])
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double()
        losses = F.cross_entropy(logits, ids[0, 1:], reduction="none")[len(prompt) - 1 :]
        total, answers, every = total + losses.sum().item(), answers + len(losses), every + ids.shape[1] - 1
    return total, answers, every


def made(folder: Path, **data: Any) -> tuple[Any, Any, Any]:
    tiny.model(folder / "model")
    tiny.jsonl(folder / "data.jsonl", *ROWS)
    changes = {"data": {"block_tokens": 64, "eval_path": None, **data}, "train": {"steps": 1, "batch_tokens": 256}}
    values = tiny.recipe(folder / "model", folder / "data.jsonl", folder / "out", **changes)
    parsed = recipe.from_dict(values)
    model, tokenizer = load(str(folder / "model"), parsed.method, parsed.rules, dtype=torch.float32)
    return parsed, model, tokenizer


@pytest.mark.parametrize("packing", ["none", "bfd"])
def test_the_loss_of_a_step_is_the_mean_over_labelled_tokens(tmp_path: Path, packing: str) -> None:
    """Four sequences in two micro-batches (or fewer, packed) whose answers are of different lengths: one mean over all."""
    parsed, model, tokenizer = made(tmp_path, packing=packing)
    total, answers, every = by_hand(model, tokenizer)
    done = train.fit(model, tokenizer, parsed)
    assert answers == sum(len(row["completion"]) + 1 for row in ROWS)
    assert done.losses == pytest.approx([total / answers], rel=2e-3)
    assert every > 3 * answers


def test_the_held_out_loss_of_answers_is_the_mean_over_labelled_tokens(tmp_path: Path) -> None:
    parsed, model, tokenizer = made(tmp_path)
    total, answers, _ = by_hand(model, tokenizer)
    rows = load_rows(str(tmp_path / "data.jsonl"))
    assert held_out.loss(parsed, tokenizer, rows, 10_000)(model) == pytest.approx(total / answers, rel=2e-3)


def test_perplexity_counts_every_token_but_the_first_of_a_window(tmp_path: Path) -> None:
    _, model, _ = made(tmp_path)
    windows = torch.arange(3 * 8).view(3, 8) * 7 % 200
    total, count = 0.0, 0
    with torch.no_grad():
        logits = model.eval()(input_ids=windows, use_cache=False).logits
    for window, predicted in zip(windows, logits.double(), strict=True):
        for place in range(1, 8):
            total -= predicted[place - 1].log_softmax(0)[window[place]].item()
            count += 1
    assert count == 21
    assert perplexity(model, windows) == pytest.approx(math.exp(total / count), rel=1e-5)
    assert compare("", logits, logits, windows).perplexity == pytest.approx(math.exp(total / count), rel=1e-9)
