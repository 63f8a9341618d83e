"""What a run says of its data before it trains, and that a tuned model stops where its answers ended in training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from trimtab.api import evaluate
from trimtab.errors import UserError
from trimtab.pipeline import checks
from trimtab.pipeline.run import run
from trimtab.recipe import texts
from trimtab.recipe.recipe import from_dict, read

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_END = 258


class Heard:
    """Keeps what a run says."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, text: str) -> None:
        self.lines.append(text)

    def step(self, step: Any) -> None:
        self.lines.append("step")

    def finish(self, metrics: Mapping[str, Any], parities: Sequence[Any]) -> None:
        self.lines.append("end")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model whose tokenizer and generation config stop at <eos>, with a template that ends turns with <|im_end|>."""
    made = tiny.tokenizer(CHATML)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    path = tiny.model(tmp_path / "model")
    made.save_pretrained(path)
    return path


def recipe(model: Path, rows: list[Any], folder: Path, **changes: Any) -> Any:
    file = tiny.jsonl(folder / "rows.jsonl", *rows)
    held_out = tiny.text(folder / "text.jsonl")
    return from_dict(tiny.recipe(model, file, folder / "run", **changes, data={"eval_path": str(held_out)}))


def test_a_tuned_model_stops(model: Path, tmp_path: Path) -> None:
    """The end of turns: a template ends them with <|im_end|>, generation stopped at <eos>, and went on after it."""
    rows: list[Any] = [{"instruction": f"{i}?", "output": "ok", "id": i} for i in range(8)]
    rows.append({"instruction": "?" * 43, "output": "ok"})
    heard = Heard()
    training = {"steps": 20, "lr": 4e-2, "lr_scale": 1e-3, "save_steps": 50, "activation_checkpointing": False}
    options = {"rules": [{"match": "*", "grid": {"bits": 8, "group": 32}}], "evaluate": {"parity": False}}
    wide = recipe(model, rows, tmp_path, train=training, **options)
    run(wide.model_copy(update={"data": wide.data.model_copy(update={"block_tokens": 64})}), show=heard)
    before = heard.lines[: heard.lines.index("step")]
    said = [line for line in before if line.startswith(("data:", "trained answers"))]
    assert [part in line for line, part in zip(said, ["not used: id", "1 lose", "<|im_end|>"], strict=True)] == [
        True
    ] * 3
    kept = json.loads((tmp_path / "run" / "generation_config.json").read_text())
    assert kept["eos_token_id"] == [tiny.EOS, IM_END]
    tuned, tokenizer = (kind.from_pretrained(tmp_path / "run") for kind in (AutoModelForCausalLM, AutoTokenizer))
    asked = tokenizer.apply_chat_template([{"role": "user", "content": "3?"}], add_generation_prompt=True)["input_ids"]
    answer = tuned.generate(input_ids=torch.tensor([asked]), max_new_tokens=20, do_sample=False)[0, len(asked) :]
    assert tokenizer.decode(answer) == "ok<|im_end|>"


def test_nothing_is_loaded_for_nothing_to_learn(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training on nothing: refused before a weight is read, and nothing is written."""
    monkeypatch.setattr(checks.RunContext, "__init__", lambda *_: pytest.fail("went on"))
    rows = [{"prompt": "word " * 60, "completion": " answer"}] * 8
    with pytest.raises(
        UserError, match=r"nothing to learn in 8 rows: of 8 the prompt alone fills data\.block_tokens = 32"
    ):
        run(recipe(model, rows, tmp_path))
    with pytest.raises(UserError, match=r"tools.*would be dropped; remove it"):
        run(recipe(model, [{"instruction": "a", "output": "b", "tools": [{"name": "f"}]}], tmp_path))
    config = {**json.loads((model / "config.json").read_text()), "vocab_size": 256}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="pad_token_id is 256, but the model has 256 tokens"):
        run(recipe(model, [{"text": "a"}], tmp_path))
    (model / "config.json").write_text(json.dumps({**config, "pad_token_id": 0}))
    with pytest.raises(UserError, match=r"row 1 \(.*line 1\): holds '<eos>', token 256 of the tokenizer, .* 256 rows"):
        run(recipe(model, [{"text": "a"}], tmp_path))
    with pytest.raises(UserError, match=r"data\.eval_path: holds '<eos>', token 256"):
        run(recipe(model, [{"text": "a"}], tmp_path, train={"steps": 0}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "prompted"),
    [({"holdout": 0.3}, True), ({"holdout": 0.3, "loss": "full"}, False), ({"eval_path": "text.jsonl"}, False)],
    ids=["held out", "learned in full", "another text"],
)
def test_held_out_prompts_that_are_not_learned_are_known(
    data: dict[str, Any], prompted: bool, model: Path, tmp_path: Path
) -> None:
    """Of them the perplexity is one of more than what training learns; of a text it is not, whatever is trained on."""
    tiny.text(tmp_path / "text.jsonl")
    file = tiny.jsonl(tmp_path / "rows.jsonl", *({"instruction": f"{i}?", "output": f"{i} is it"} for i in range(12)))
    data = {key: str(tmp_path / value) if key == "eval_path" else value for key, value in data.items()}
    values = tiny.recipe(model, file, tmp_path / "run")
    values["data"] = {"path": str(file), "block_tokens": 64, **data}
    assert checks.gather(from_dict(values), False, False).prompted == prompted


def test_a_base_model_learns_conversations_from_several_files(tmp_path: Path) -> None:
    """No chat template, no held-out text, no number of steps: all three follow from the recipe and are saved."""
    model = tiny.model(tmp_path / "base", template=None)
    one = [{"question": f"{i}?", "answer": f"{i}! " * (i % 5 + 1), "id": i} for i in range(16)]
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}, {"from": "human", "value": "c"}]
    two = [{"conversations": [*talk, {"from": "gpt", "value": f"d {i}"}]} for i in range(4)]
    files = [tiny.jsonl(tmp_path / f"{name}.jsonl", *rows) for name, rows in (("one", one), ("two", two))]
    data = {
        "path": [str(files[0]), {"path": str(files[1]), "weight": 2}], "template": "chatml", "holdout": 0.2,
        "block_tokens": 128, "packing": "none",
    }  # fmt: skip
    values = tiny.recipe(model, files[0], tmp_path / "run")
    values |= {
        "data": data,
        "train": {
            "epochs": 1,
            "batch_tokens": 512,
            "micro_batch": 4,
            "save_steps": 5,
            "activation_checkpointing": False,
        },
    }
    heard = Heard()
    metrics = run(from_dict(values), show=heard)
    said = [line for line in heard.lines if line.startswith(("held out", "training data", "first example"))]
    assert ["held out: " in said[0], "of 2 sources" in said[1], "assistant\n⟦0! <eos>\n⟧" in said[2]] == [True] * 3
    saved = read(tmp_path / "run" / "recipe.yaml")
    assert saved.data is not None
    assert (saved.train.epochs, saved.data.holdout) == (None, 0.2)
    read_again = texts.training(saved.data)
    assert saved.train.steps == -(-len(read_again.rows) // 4) == len(metrics["losses"])
    assert sorted(key for key in saved.inputs or {} if key.startswith("data")) == ["data.path.0", "data.path.1"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    assert "<|im_start|>" in tokenizer.chat_template
    assert json.loads((tmp_path / "run" / "parity.json").read_text())["text"] == "held-out"
    found = evaluate(str(tmp_path / "run"))
    assert found.perplexity == pytest.approx(metrics["perplexity"]["tuned"], rel=1e-3)
    assert metrics["perplexity_of"] == "whole rows, prompts included"  # while training learns the answers alone
    assert found.data.startswith("rows held out of ")
    with pytest.raises(UserError, match=r"split: .* is measured on rows held out of .*; pass --data with the split"):
        evaluate(str(tmp_path / "run"), split="test")
    with pytest.raises(UserError, match=r"is past train\.steps = \d+"):  # before any weight is read
        run(from_dict(values | {"train": {**values["train"], "epochs": 0.1}}), resume=True, show=Heard())
    more = values | {"train": {**values["train"], "epochs": 2}, "evaluate": {"parity": False}}
    assert len(run(from_dict(more), resume=True, show=Heard())["losses"]) == 2 * saved.train.steps  # all of them
    assert read(tmp_path / "run" / "recipe.yaml").train.steps == 2 * saved.train.steps
