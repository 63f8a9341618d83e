"""What a run says of its data before it trains, and that a tuned model stops where its answers ended in training."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from trimtab.errors import UserError
from trimtab.pipeline import checks
from trimtab.pipeline.run import run
from trimtab.recipe.recipe import from_dict

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
