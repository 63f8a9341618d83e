"""Which tokens are learned under the chat templates of fifteen model families: against marks made by hand, and TRL's."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import tiny
from trimtab.data.conversations import rendered
from trimtab.data.learned import Loss, tokens_of_row
from trimtab.data.rows import load_rows
from trimtab.data.tokens import head_of
from trimtab.errors import UserError

FOLDER = Path(__file__).parent / "templates"
BAR = "\uff5c"
"""DeepSeek's tokens are written with it."""
_SPECIAL = re.compile(rf"<[|{BAR}][^|{BAR}]+[|{BAR}]>|</?s>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|<bos>")


def message(role: str, content: str, **keys: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **keys}


SYSTEM = message("system", "Be brief.")
TALK = [
    message("user", "Hi there"),
    message("assistant", "Hello!"),
    message("user", "Name two colours."),
    message("assistant", "Blue.\n\nRed."),
]
TOOLS = [{"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object"}}}]
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Ulm"}}}
CALLS = [
    message("user", "Weather?"),
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    message("tool", "cold", tool_call_id="abcdefghi", name="look_up"),
    message("assistant", "It is cold."),
]
THOUGHT = [
    message("user", "Hi there"),
    message("assistant", "<think>\nhm\n</think>\n\nHello!"),
    message("user", "Again"),
    message("assistant", "<think>\nyes\n</think>\n\nHello, again!"),
]


def marked(what: str) -> dict[str, str]:
    """Renderings by a template's name: made by hand, ⟦ and ⟧ around what a model is to write, its turn's end included."""
    files = sorted(FOLDER.glob(f"*.{what}.txt"))
    return {file.name.partition(".")[0]: file.read_text(encoding="utf-8").removesuffix("\n") for file in files}


MARKED = marked("talk")
_SENTENCE = f"<{BAR}end▁of▁sentence{BAR}>"
ENDS = {
    "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "gemma2": "<eos>",
    "llama3_1": "<|eot_id|>", "phi3": "<|endoftext|>", "deepseek_v3": _SENTENCE, "deepseek_r1_distill": _SENTENCE,
    "gpt_oss": "<|return|>", "command_r": "<|END_OF_TURN_TOKEN|>", "granite": "<|end_of_text|>",
}  # fmt: skip
_SENTENCE = f"<{BAR}begin▁of▁sentence{BAR}>"
BEGINS = {
    "llama2": "<s>", "mistral_v3": "<s>", "llama3": "<|begin_of_text|>", "llama3_1": "<|begin_of_text|>",
    "gemma2": "<bos>", "deepseek_v3": _SENTENCE, "deepseek_r1_distill": _SENTENCE, "command_r": "<BOS_TOKEN>",
}  # fmt: skip


def tokenizer(name: str, template: str, text: str) -> PreTrainedTokenizerFast:
    """Bytes, and the special tokens that stand in a text."""
    made = tiny.tokenizer(template)
    special = {"eos_token": ENDS.get(name, "</s>")}
    if name in BEGINS:
        special["bos_token"] = BEGINS[name]
    made.add_special_tokens(special)
    made.add_special_tokens({"additional_special_tokens": sorted(set(_SPECIAL.findall(text)) - set(special.values()))})
    return made


def row_of(folder: Path, messages: list[Any], **more: Any) -> Any:
    return load_rows(str(tiny.jsonl(folder / "rows.jsonl", {"messages": messages, **more})))[0]


def learned(made: Any, row: Any, loss: Loss = "all") -> str:
    """The rendering with ⟦ and ⟧ around what is learned."""
    found = tokens_of_row(row, made, "row 1", head_of(made), rendered(row, made, "row 1"), loss)
    text, at = "", 0
    for start, end in found.spans:
        text += made.decode(found.ids[at:start]) + "⟦" + made.decode(found.ids[start:end]) + "⟧"
        at = end
    return text + made.decode(found.ids[at:])


def source(name: str) -> str:
    return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def only_the_last(marked: str) -> str:
    parts = re.split("[⟦⟧]", marked)
    return "".join(parts[:-2]) + f"⟦{parts[-2]}⟧{parts[-1]}"


@pytest.mark.parametrize(("name", "text"), MARKED.items(), ids=MARKED)
def test_every_answer_is_learned(tmp_path: Path, name: str, text: str) -> None:
    made = tokenizer(name, source(name), text)
    row = row_of(tmp_path, TALK if name == "gemma2" else [SYSTEM, *TALK])
    assert learned(made, row) == text
    assert learned(made, row, "last") == only_the_last(text)
    assert learned(made, row, "full") == "⟦" + re.sub("[⟦⟧]", "", text) + "⟧"


@pytest.mark.parametrize(("name", "text"), MARKED.items(), ids=MARKED)
def test_an_answer_with_a_weight_of_zero_is_not_learned(tmp_path: Path, name: str, text: str) -> None:
    made = tokenizer(name, source(name), text)
    for turn, expected in ((3, re.sub("[⟦⟧]", "", text, count=2)), (1, only_the_last(text))):
        talk = [{**m, "weight": 0} if i == (1 if turn == 3 else turn) else m for i, m in enumerate(TALK)]
        row = row_of(tmp_path, talk if name == "gemma2" else [SYSTEM, *talk])
        assert learned(made, row) == expected


@pytest.mark.parametrize(("name", "text"), MARKED.items(), ids=MARKED)
def test_tokenizers_that_do_not_say_where_tokens_stand(tmp_path: Path, name: str, text: str) -> None:
    """Slow ones: there the tokens before a place are counted instead."""

    class Slow:
        is_fast = False

        def __init__(self, made: PreTrainedTokenizerFast) -> None:
            self.made = made

        def __getattr__(self, key: str) -> Any:
            return getattr(self.made, key)

        def __call__(self, *args: Any, **options: Any) -> Any:
            assert "return_offsets_mapping" not in options
            return self.made(*args, **options)

    made = tokenizer(name, source(name), text)
    row = row_of(tmp_path, TALK if name == "gemma2" else [SYSTEM, *TALK])
    assert learned(Slow(made), row) == text


CALLED = marked("calls")


@pytest.mark.parametrize(("name", "text"), CALLED.items(), ids=CALLED)
@pytest.mark.parametrize("tools", [True, False])
def test_calls_of_tools_are_learned(tmp_path: Path, name: str, text: str, tools: bool) -> None:
    """And what a tool answers is not; tools themselves stand before, and are not looked at here."""
    if tools and name == "deepseek_v3":
        pytest.skip("its template has no place for tools")
    made = tokenizer(name, source(name), text + "<|im_start|><|begin_of_text|>[AVAILABLE_TOOLS][/AVAILABLE_TOOLS]")
    row = row_of(tmp_path, CALLS, **({"tools": TOOLS} if tools else {}))
    found = learned(made, row)
    assert ("look_up" in found.partition("Weather?")[0]) == tools
    assert found.endswith(text.partition("Weather?")[2])


THINKING = marked("thoughts")


@pytest.mark.parametrize(("name", "text"), THINKING.items(), ids=THINKING)
def test_thoughts_as_the_template_leaves_them(tmp_path: Path, name: str, text: str) -> None:
    assert learned(tokenizer(name, source(name), text), row_of(tmp_path, THOUGHT)) == text


def test_turns_that_end_otherwise_before_the_last_one(tmp_path: Path) -> None:
    """gpt-oss ends the last turn with <|return|> and every earlier one with <|end|>."""
    [text] = marked("turns").values()
    assert learned(tokenizer("gpt_oss", source("gpt_oss"), text), row_of(tmp_path, TALK)).endswith(text)


TRL = {
    "llama3": ("llama3", ""), "gemma2": ("gemma", ""), "phi3": ("phi3", ""), "command_r": ("cohere", ""),
    "qwen2_5": ("qwen2_5", "\n"), "gpt_oss": ("gptoss", "<|start|>assistant"),
    "deepseek_v3": ("deepseekv3", f"<{BAR}Assistant{BAR}>"),
    "deepseek_r1_distill": ("deepseek_r1_distill", f"<{BAR}Assistant{BAR}>"),
}  # fmt: skip
"""TRL's name, and what its marks have a model learn of what it is given when it is asked."""


@pytest.mark.parametrize(("name", "theirs", "more"), [(k, *v) for k, v in TRL.items()], ids=TRL)
def test_trl_marks_the_same(tmp_path: Path, name: str, theirs: str, more: str) -> None:
    """An oracle: TRL's own copies of these templates, with `{% generation %}`, by which transformers makes the mask."""
    trl = pytest.importorskip("trl.chat_template_utils")
    folder = Path(trl.__file__).parent / "chat_templates"
    template_of_trl = (folder / f"{theirs}_training.jinja").read_text(encoding="utf-8")
    text = MARKED.get(name, CALLED.get(name, ""))
    ours, made = (tokenizer(name, template, text) for template in (source(name), template_of_trl))
    system = [] if name == "gemma2" else [SYSTEM]
    row = row_of(tmp_path, [*system, *TALK])
    whole = [*row["prompt"], *row["completion"]]
    mask = made.apply_chat_template(whole, return_dict=True, return_assistant_tokens_mask=True)
    by_mask = [i if m else -100 for i, m in zip(mask["input_ids"], mask["assistant_masks"], strict=True)]
    found = tokens_of_row(row, made, "row 1", head_of(made), rendered(row, made, "row 1"))
    assert found.labels(-100) == by_mask  # where a template has marks, they are gone by
    assert learned(made, row) == learned(ours, row).replace(f"{more}⟦", f"⟦{more}")
    talk = [*TALK[:1], {**TALK[1], "weight": 0}, *TALK[2:]]  # then the marks are told apart by where the turns are
    for some, loss in ((row, "last"), (row_of(tmp_path, [*system, *talk]), "all")):
        assert learned(made, some, loss) == learned(ours, some, loss)


def test_a_template_in_which_turns_cannot_be_told(tmp_path: Path) -> None:
    scrambled = "{% for m in messages[::-1] %}{{ m.content | length }}{{ m.content }}{% endfor %}"
    made = tiny.tokenizer(scrambled)
    row = row_of(tmp_path, TALK)
    with pytest.raises(UserError, match=r"where the answer in message 2 begins.*data\.loss: last"):
        learned(made, row)
