"""Chat templates for tokenizers that have none."""

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

import tiny
from trimtab.data.conversations import rendered
from trimtab.data.learned import tokens_of_row
from trimtab.data.rows import load_rows
from trimtab.data.templates import set_template
from trimtab.data.tokens import head_of
from trimtab.errors import UserError

TALK = [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def learned(made: Any, folder: Path, talk: list[tuple[str, str]]) -> str:
    """A conversation with ⟦ and ⟧ around what is learned."""
    messages = [{"role": role, "content": content} for role, content in talk]
    [row] = load_rows(str(tiny.jsonl(folder / "rows.jsonl", {"messages": messages})))
    found = tokens_of_row(row, made, "row 1", head_of(made), rendered(row, made, "row 1"))
    text, at = "", 0
    for start, end in found.spans:
        text += made.decode(found.ids[at:start]) + "⟦" + made.decode(found.ids[start:end]) + "⟧"
        at = end
    return text


def test_alpaca(tmp_path: Path) -> None:
    made = tiny.tokenizer(None)
    assert set_template(made, "alpaca") is None
    turn = "\n\n### Instruction:\n{}\n\n### Response:\n⟦{}<eos>⟧"
    assert learned(made, tmp_path, TALK) == "S" + turn.format("a", "b") + turn.format("c", "d")
    first = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    assert learned(made, tmp_path, TALK[1:3]) == first + turn.format("a", "b")
    asked = made.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)
    assert asked == first + "\n\n### Instruction:\na\n\n### Response:\n"
    with pytest.raises(
        UserError, match=r"refuses it \(the template has system, user and assistant, but no role tool\)"
    ):
        learned(made, tmp_path, [*TALK[:2], ("tool", "x"), ("assistant", "b")])


@pytest.mark.parametrize("end", ["<|im_end|>", "<eos>"])
def test_chatml_ends_with_a_token_that_is_there(tmp_path: Path, end: str) -> None:
    """As real ChatML where the token is; a base model that lacks it stops at its own end."""
    made = tiny.tokenizer(None)
    if end == "<|im_end|>":
        made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    set_template(made, "chatml")
    turn = f"<|im_start|>user\n{{}}{end}\n<|im_start|>assistant\n⟦{{}}{end}\n⟧"
    assert learned(made, tmp_path, TALK) == f"<|im_start|>system\nS{end}\n" + turn.format("a", "b") + turn.format(
        "c", "d"
    )


@pytest.mark.parametrize("name", ["alpaca", "chatml"])
def test_a_conversation_begins_as_texts_do(tmp_path: Path, name: str) -> None:
    made = tiny.tokenizer(None)
    made.add_special_tokens({"bos_token": "<s>"})
    set_template(made, name)
    assert not learned(made, tmp_path, TALK).startswith("<s>")  # the tokenizer adds none to a text
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 257)])
    set_template(made, name)
    assert learned(made, tmp_path, TALK).startswith("<s>")
    assert learned(made, tmp_path, TALK).count("<s>") == 1


def test_a_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = tiny.tokenizer(None)
    set_template(made, "alpaca")
    made.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").chat_template == made.chat_template


def test_a_file(tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.content }}é{% endfor %}", encoding="utf-8")
    made = tiny.tokenizer()
    assert "own.jinja takes the place of the tokenizer's own chat template" in str(set_template(made, str(file)))
    assert set_template(made, str(file)) is None
    assert made.chat_template.endswith("é{% endfor %}")
    assert set_template(made, None) is None
    file.write_bytes(b"\xe9")
    with pytest.raises(UserError, match=r"own\.jinja: is not UTF-8"):
        set_template(made, str(file))


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("alpacca", r"'alpacca' is not a template \(did you mean 'alpaca'\?\)"),
        ("away.jinja", "away.jinja: no such file"),
    ],
)
def test_names_of_none(name: str, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"data\.template: {complaint}"):
        set_template(tiny.tokenizer(), name)


def test_a_tokenizer_that_cannot_end_a_turn() -> None:
    made = tiny.tokenizer(None)
    made.eos_token = None
    with pytest.raises(UserError, match="alpaca ends turns with the end-of-sequence token, and the tokenizer has none"):
        set_template(made, "alpaca")
