"""A text's tokens: begun once and ended once, for training, measuring and asking alike; and those that TRL would make."""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny
from trimtab.data.conversations import end_of_turns, left_out, rendered
from trimtab.data.learned import tokens_of_row
from trimtab.data.rows import load_rows
from trimtab.data.sequences import text_of, token_windows
from trimtab.data.tokens import head_of, tokens_of
from trimtab.errors import UserError

BOS = 257
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = (
    "{% if tools %}tools: {{ tools | tojson }}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: "
    "{% if m.reasoning_content and (loop.last or keep_thoughts) %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{% if m.role == 'assistant' and not loop.last %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}"
    "\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def tokenizer(
    template: str | None = tiny.TEMPLATE, *, begins: bool = True, ends: bool = False
) -> PreTrainedTokenizerFast:
    """tiny's byte tokenizer with a beginning-of-sequence token, which it puts before a text or not."""
    made = tiny.tokenizer(template)
    made.add_special_tokens({"bos_token": "<s>"})
    single = f"{'<s> ' if begins else ''}$A{' <eos>' if ends else ''}"
    special = [("<s>", BOS), ("<eos>", tiny.EOS)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=special)
    return made


def loaded(folder: Path, *rows: Any) -> Any:
    return load_rows(str(tiny.jsonl(folder / "rows.jsonl", *rows)))


def chat(asked: str, answer: str, **keys: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer, **keys}]}


def ids_of(rows: Any, made: Any) -> list[list[int]]:
    texts = [
        rendered(row, made, "row") if "text" not in row and isinstance(row["prompt"], list) else None for row in rows
    ]
    head = head_of(made)
    return [tokens_of_row(row, made, "row", head, text).ids for row, text in zip(rows, texts, strict=True)]


@pytest.mark.parametrize("begins", [True, False])
@pytest.mark.parametrize("ends", [True, False])
@pytest.mark.parametrize("text", ["once", "<s>once", "<s><s>once"])
def test_a_text_begins_and_ends_once(tmp_path: Path, text: str, begins: bool, ends: bool) -> None:
    """A beginning-of-sequence token twice: text that has one written out was trained with two and measured with one."""
    made = tokenizer(begins=begins, ends=ends)
    letters = made("once", add_special_tokens=False)["input_ids"]
    before = [BOS] if begins else [BOS] * text.count("<s>")
    whole = [*before, *letters, tiny.EOS]
    assert tokens_of(text, made) == whole[:-1]
    rows = loaded(tmp_path, {"text": text}, {"text": text + "<eos>"}, {"text": ""}, {"text": text})
    assert ids_of(rows, made) == [whole, whole, [], whole]
    windows = token_windows(rows, made, block_tokens=len(whole))
    assert windows.tolist() == [whole] * 3
    pairs = loaded(tmp_path, {"prompt": text[:-2], "completion": "ce"}, {"prompt": "", "completion": text})
    assert ids_of(pairs, made) == [whole, whole]


@pytest.mark.parametrize("begins", [True, False])
def test_a_conversation_begins_as_its_template_says(tmp_path: Path, begins: bool) -> None:
    """Servers add nothing to it; a first message that begins with the token, too, adds no second one."""
    none, written = tokenizer("{{ messages[0].content }}x", begins=begins), tokenizer(begins=begins)
    written.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    rows = loaded(tmp_path, chat("a", "b"), chat("<s>a", "b"))
    assert [made[:2] for made in ids_of(rows, written)] == [
        [BOS, written("a", add_special_tokens=False)["input_ids"][0]]
    ] * 2
    assert BOS not in ids_of(rows, none)[0]


FORMS: dict[str, list[Any]] = {
    "text": [{"text": "one two"}, {"text": "three<eos>"}, {"text": " "}],
    "strings": [{"prompt": "one ", "completion": "two"}, {"prompt": "one", "completion": ""}],
    "conversations": [chat("one", "two"), chat("three", "")],
    "system": [{"instruction": "a", "output": "b", "system": "c", "history": [["d", "e"]]}],
}


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("begins", [True, False])
def test_tokens_and_labels_are_those_of_trl(tmp_path: Path, rows: list[Any], begins: bool) -> None:
    """An oracle: its own tokens, where it does nothing twice."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    made, dataset = tokenizer(CHATML, begins=begins), loaded(tmp_path, *rows)
    small = LlamaConfig(vocab_size=300, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    args = sft.SFTConfig(
        output_dir=str(tmp_path / "trl"), shuffle_dataset=False, max_length=None, bf16=False, report_to="none"
    )
    trainer = sft.SFTTrainer(model=LlamaForCausalLM(small), args=args, train_dataset=dataset, processing_class=made)
    head = head_of(made)
    talk = isinstance(dataset[0].get("prompt"), list)
    ours = [tokens_of_row(r, made, "row", head, rendered(r, made, "row") if talk else None, "last") for r in dataset]
    assert [(t.ids, t.labels(-100)) for t in ours] == [(r["input_ids"], r["labels"]) for r in trainer.train_dataset]


def test_what_is_learned_of_a_row(tmp_path: Path) -> None:
    made = tokenizer(None)
    [row] = loaded(tmp_path, {"prompt": "abc", "completion": "de"})
    found = tokens_of_row(row, made, "row", head_of(made))
    assert (len(found.ids), found.learned_from) == (7, 4)  # <s> a b c | d e <eos>
    assert [found.learned(n) for n in (None, 99, 7, 6, 5, 4, 1)] == [3, 3, 3, 2, 1, 0, 0]
    [row] = loaded(tmp_path, {"text": "ab"})
    assert tokens_of_row(row, made, "row", head_of(made)).learned() == 3
    assert (
        tokens_of_row(row, tokenizer(None, begins=False), "row", []).learned() == 2
    )  # nothing stands before the first


def given(row: dict[str, Any], folder: Path, **more: Any) -> Any:
    return loaded(folder, {**row, **more})[0]


def test_what_a_template_reads_is_used(tmp_path: Path) -> None:
    made = tokenizer(THINKING)
    assert "<think>hm</think>b" in rendered(given(chat("a", "b", reasoning_content="hm"), tmp_path), made, "row 1")
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    row = given(chat("a", "b"), tmp_path, tools=tools, chat_template_kwargs={"keep_thoughts": False})
    text = rendered(row, made, "row 1")
    assert "look_up" in text
    assert list(text_of(loaded(tmp_path, {**chat("a", "b"), "tools": tools}), made)) == [
        text
    ]  # measured as it is trained
    found = tokens_of_row(row, made, "row 1", head_of(made), text)
    assert "look_up" in made.decode(found.ids[: found.learned_from])
    earlier = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "reasoning_content": "hm"}]
    row = given({"messages": [*earlier, *chat("c", "d")["messages"]]}, tmp_path)
    assert "hm" not in rendered(row, made, "row 1")  # as the template does when it is asked


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        ({"tools": [{"name": "f"}]}, "does not render 'tools'"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "'enable_thinking' of chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "has 'tokenize', which is not an argument of a template"),
        ({"messages": chat("a", "b", reasoning_content="hm")["messages"]}, "'reasoning_content' of message 2"),
        ({"messages": chat("a", "b", name="bob")["messages"]}, "'name' of message 2"),
    ],
)
def test_what_a_template_does_not_read_is_refused(tmp_path: Path, more: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=f"data, row 1: .*{complaint}"):
        rendered(given(chat("a", "b"), tmp_path, **more), tokenizer(CHATML), "row 1")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[9].content }}",
        "{{ 1 + 'a' }}",
        "{{ raise_exception('no') }}",
        "{% for %}",
        "{{ '\\ud800' }}",
        "\ud800",
    ],
)
def test_a_template_that_fails(tmp_path: Path, template: str) -> None:
    with pytest.raises(UserError, match="data, row 1: the tokenizer's chat template refuses it"):
        rendered(given(chat("a", "b"), tmp_path), tokenizer(template), "row 1")


def test_what_a_template_leaves_out(tmp_path: Path) -> None:
    made = tokenizer(THINKING)
    asked = [*chat("a", "<think>hm</think>b")["messages"], *chat("c", "  d \n e ")["messages"]]
    row = given({"messages": asked}, tmp_path)
    assert left_out(row, rendered(row, made, "row 1")) == (False, True)
    made.chat_template = "{{ messages[0].content }}{{ messages[1].content.split('</think>')[-1] | trim }}"
    row = given(chat("a", "<think>hm</think> b "), tmp_path)
    assert left_out(row, rendered(row, made, "row 1")) == (True, False)
    row = given(chat("a", " b "), tmp_path)
    assert left_out(row, rendered(row, made, "row 1")) == (False, False)


ENDS = {
    "ChatML": ("{{ m.content }}<|im_end|>\n", "<|im_end|>"),
    "after a space": ("{{ m.content }} \n<eos>", "<eos>"),
    "two": ("{{ m.content }}<|im_end|>\n{{ eos_token }}", "<|im_end|>"),
    "trimmed": ("{{ m.content | trim }}<|im_end|>", "<|im_end|>"),
    "behind words": ("{{ m.content }} (end)<|im_end|>", "<|im_end|>"),
    "no token": ("{{ m.content }}\n", None),
    "token that was only added": ("{{ m.content }}[/A]", "[/A]"),
}


@pytest.mark.parametrize(("turn", "end"), ENDS.values(), ids=ENDS)
@pytest.mark.parametrize("answer", ["b", "b b <eos> b", " b\n"])
def test_the_end_of_turns(tmp_path: Path, turn: str, end: str | None, answer: str) -> None:
    made = tokenizer("{% for m in messages %}" + turn + "{% endfor %}")
    made.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
    made.add_tokens([AddedToken("[/A]", special=False)])
    row = given(chat("a", answer), tmp_path)
    assert end_of_turns(row, rendered(row, made, "row 1"), made)[0] == (end and made.convert_tokens_to_ids(end))


def test_json_keeps_the_order_of_a_templates_arguments(tmp_path: Path) -> None:
    tools = [{"b": 1, "a": 2}]
    text = rendered(given(chat("a", "b"), tmp_path, tools=tools), tokenizer(THINKING), "row 1")
    assert json.dumps(tools) in text
