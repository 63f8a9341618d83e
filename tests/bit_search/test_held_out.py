"""The loss that trials are ranked by: that of training, on other rows."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
from trimtab.bit_search import held_out, workers
from trimtab.bit_search.searching import Search
from trimtab.data.rows import conversational, load_rows
from trimtab.data.sequences import spread
from trimtab.errors import UserError
from trimtab.recipe import recipe

ASKED = [{"prompt": f"{i} and {i + 1}?", "completion": f" {2 * i + 1}" + "." * (i % 3)} for i in range(24)]
SAID = [
    {
        "messages": [
            {"role": "user", "content": f"{i} and one?"},
            {"role": "assistant", "content": f"{i + 1}" + "." * (i % 3)},
        ]
    }
    for i in range(24)
]


def made(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> recipe.Recipe:
    tiny.model(folder / "m")
    tiny.jsonl(folder / "t.jsonl", *rows)
    return recipe.from_dict(tiny.recipe(folder / "m", folder / "t.jsonl", folder / "out", **changes))


def alone(model: Any, tokenizer: Any, rows: Any) -> float:
    """Each row by itself, its labels made by hand: transformers' own loss, weighted by the answers' tokens."""
    total, count = 0.0, 0
    for row in rows:
        if conversational(rows):
            asked = tokenizer.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        else:
            asked, whole = row["prompt"], row["prompt"] + row["completion"] + tokenizer.eos_token
        ids = torch.tensor([tokenizer(whole)["input_ids"]])
        labels = ids.clone()
        begin = len(tokenizer(asked)["input_ids"])
        labels[:, :begin] = -100
        total += model(input_ids=ids, labels=labels).loss.item() * (ids.shape[1] - begin)
        count += ids.shape[1] - begin
    return total / count


@pytest.mark.parametrize("rows", [ASKED, SAID], ids=["strings", "conversations"])
def test_the_loss_of_answers_is_that_of_every_row_alone(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    used = made(tmp_path, rows, data={"block_tokens": 64})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    tokenizer, dataset = tiny.tokenizer(), load_rows(str(tmp_path / "t.jsonl"))
    found = held_out.loss(used, tokenizer, dataset, tokens=10_000)(model)
    with torch.no_grad():
        assert found == pytest.approx(alone(model, tokenizer, dataset), rel=1e-5)
        head = model.get_output_embeddings()
        head.weight.mul_(3.0)  # and it tells models apart
    assert held_out.loss(used, tokenizer, dataset, tokens=10_000)(model) != pytest.approx(found, rel=1e-2)


def test_the_loss_of_text_is_the_log_of_perplexity(tmp_path: Path) -> None:
    used = made(tmp_path, [{"text": row["prompt"] + row["completion"]} for row in ASKED])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    dataset = load_rows(str(tmp_path / "t.jsonl"))
    ids = held_out.windows(used, tiny.tokenizer(), dataset, 128)
    assert ids.shape == (4, 32)
    with torch.no_grad():
        reference = model(input_ids=ids, labels=ids).loss.item()
    assert held_out.loss(used, tiny.tokenizer(), dataset, 128)(model) == pytest.approx(reference, rel=1e-5)
    with torch.no_grad():
        model.model.norm.weight.fill_(1e6)  # what overflows is the worst there is, no error
    assert held_out.loss(used, tiny.tokenizer(), dataset, 128)(model) == math.inf


def test_rows_come_from_everywhere(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i:03}", "completion": "."} for i in range(24)]
    dataset = load_rows(str(tiny.jsonl(tmp_path / "t.jsonl", *rows)))
    assert spread(dataset, tiny.tokenizer(None), 8 * 4)["prompt"] == [f"{3 * i:03}" for i in range(8)]
    assert len(spread(dataset, tiny.tokenizer(None), 1)) == 1
    assert len(spread(dataset, tiny.tokenizer(None), 10_000)) == 24


def test_prompts_without_room_for_an_answer_are_named(tmp_path: Path) -> None:
    used = made(tmp_path, [{"prompt": "x" * 80, "completion": "y"}] * 4)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    with pytest.raises(UserError, match=r"raise data\.block_tokens"):
        held_out.loss(used, tiny.tokenizer(), load_rows(str(tmp_path / "t.jsonl")), 1000)(model)


def test_tuned_trials_are_ranked_by_their_answers(tmp_path: Path) -> None:
    """And so is the float model, which they are held against."""
    block = {"units": "layer", "bits": [4, 8], "trials": 1, "tokens": 400, "sensitivity_tokens": 64}
    changes = {"data": {"block_tokens": 64}, "train": {"batch_tokens": 128, "lr": 3e-2}}
    used = made(tmp_path, ASKED, search=block | {"objective": "tuned", "steps": 12}, **changes)
    found = workers.run(used)
    qualities = [t.quality for t in found.ledger.trials()]
    untuned = found.ledger.noted("float_quality")
    assert untuned == pytest.approx(Search(used).bench.loss(found.bench.float_model))
    assert untuned == pytest.approx(math.log(260), abs=0.3)  # a random model, and bytes
    assert all(q is not None and q < untuned - 0.05 for q in qualities)
    found.bench.__dict__["loss"] = lambda model: 7.0
    assert found.bench.objective()(found.space.rules((0, 0)), 1) == 7.0
