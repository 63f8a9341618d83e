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
_SPECIAL = re.compile(r"<[|｜][^|｜]+[|｜]>|</?s>|\[/?[A-Z_]+\]|<(?:start|end)_of_turn>|<bos>")


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

# What a model is to write stands between ⟦ and ⟧, its turn's end included; all of it made by hand.
MARKED = {
    "qwen2_5": """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi there<|im_end|>
<|im_start|>assistant
⟦Hello!<|im_end|>
⟧<|im_start|>user
Name two colours.<|im_end|>
<|im_start|>assistant
⟦Blue.

Red.<|im_end|>
⟧""",
    "qwen3": """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi there<|im_end|>
<|im_start|>assistant
⟦Hello!<|im_end|>
⟧<|im_start|>user
Name two colours.<|im_end|>
<|im_start|>assistant
⟦<think>

</think>

Blue.

Red.<|im_end|>
⟧""",
    "smollm2": """<|im_start|>system
Be brief.<|im_end|>
<|im_start|>user
Hi there<|im_end|>
<|im_start|>assistant
⟦Hello!<|im_end|>
⟧<|im_start|>user
Name two colours.<|im_end|>
<|im_start|>assistant
⟦Blue.

Red.<|im_end|>
⟧""",
    "llama2": "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi there [/INST]⟦ Hello! </s>⟧<s>[INST] Name two colours. [/INST]⟦ Blue."
    "\n\nRed. </s>⟧",
    "llama3": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧"
    "<|start_header_id|>user<|end_header_id|>\n\nName two colours.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    "⟦Blue.\n\nRed.<|eot_id|>⟧",
    "llama3_1": "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n"
    "Today Date: 26 Jul 2024\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nHi there<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n⟦Hello!<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\n"
    "Name two colours.<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Blue.\n\nRed.<|eot_id|>⟧",
    # It shows a system prompt only where a question is last: a conversation to learn loses it (and a run says so).
    "mistral_v3": "<s>[INST] Hi there[/INST]⟦ Hello!</s>⟧[INST] Name two colours.[/INST]⟦ Blue.\n\nRed.</s>⟧",
    "gemma2": "<bos><start_of_turn>user\nHi there<end_of_turn>\n<start_of_turn>model\n⟦Hello!<end_of_turn>\n⟧<start_of_turn>user\n"
    "Name two colours.<end_of_turn>\n<start_of_turn>model\n⟦Blue.\n\nRed.<end_of_turn>\n⟧",
    "phi3": "<|system|>\nBe brief.<|end|>\n<|user|>\nHi there<|end|>\n<|assistant|>\n⟦Hello!<|end|>\n⟧<|user|>\n"
    "Name two colours.<|end|>\n<|assistant|>\n⟦Blue.\n\nRed.<|end|>\n<|endoftext|>⟧",
    "zephyr": "<|system|>\nBe brief.</s>\n<|user|>\nHi there</s>\n<|assistant|>\n⟦Hello!</s>\n⟧<|user|>\nName two colours.</s>\n"
    "<|assistant|>\n⟦Blue.\n\nRed.</s>\n⟧",
    "deepseek_v3": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi there<｜Assistant｜>⟦Hello!<｜end▁of▁sentence｜>⟧<｜User｜>"
    "Name two colours.<｜Assistant｜>⟦Blue.\n\nRed.<｜end▁of▁sentence｜>⟧",
    "deepseek_r1_distill": "<｜begin▁of▁sentence｜>Be brief.<｜User｜>Hi there<｜Assistant｜>⟦Hello!<｜end▁of▁sentence｜>⟧<｜User｜>"
    "Name two colours.<｜Assistant｜>⟦Blue.\n\nRed.<｜end▁of▁sentence｜>⟧",
    "command_r": "<BOS_TOKEN><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Be brief.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|>"
    "<|USER_TOKEN|>Hi there<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>⟦Hello!<|END_OF_TURN_TOKEN|>⟧"
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>Name two colours.<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>"
    "⟦Blue.\n\nRed.<|END_OF_TURN_TOKEN|>⟧",
    "granite": "<|start_of_role|>system<|end_of_role|>Be brief.<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Hi there"
    "<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>⟦Hello!<|end_of_text|>\n⟧<|start_of_role|>user<|end_of_role|>"
    "Name two colours.<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>⟦Blue.\n\nRed.<|end_of_text|>\n⟧",
}
ENDS = {
    "qwen2_5": "<|im_end|>", "qwen3": "<|im_end|>", "smollm2": "<|im_end|>", "llama3": "<|eot_id|>", "llama3_1": "<|eot_id|>",
    "gemma2": "<eos>", "phi3": "<|endoftext|>", "deepseek_v3": "<｜end▁of▁sentence｜>", "gpt_oss": "<|return|>",
    "deepseek_r1_distill": "<｜end▁of▁sentence｜>", "command_r": "<|END_OF_TURN_TOKEN|>", "granite": "<|end_of_text|>",
}  # fmt: skip
BEGINS = {
    "llama2": "<s>", "mistral_v3": "<s>", "llama3": "<|begin_of_text|>", "llama3_1": "<|begin_of_text|>", "gemma2": "<bos>",
    "deepseek_v3": "<｜begin▁of▁sentence｜>", "deepseek_r1_distill": "<｜begin▁of▁sentence｜>", "command_r": "<BOS_TOKEN>",
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


@pytest.mark.parametrize(("name", "marked"), MARKED.items(), ids=MARKED)
def test_every_answer_is_learned(tmp_path: Path, name: str, marked: str) -> None:
    made = tokenizer(name, source(name), marked)
    row = row_of(tmp_path, TALK if name == "gemma2" else [SYSTEM, *TALK])
    assert learned(made, row) == marked
    assert learned(made, row, "last") == only_the_last(marked)
    assert learned(made, row, "full") == "⟦" + re.sub("[⟦⟧]", "", marked) + "⟧"


@pytest.mark.parametrize(("name", "marked"), MARKED.items(), ids=MARKED)
def test_an_answer_with_a_weight_of_zero_is_not_learned(tmp_path: Path, name: str, marked: str) -> None:
    made = tokenizer(name, source(name), marked)
    for turn, expected in ((3, re.sub("[⟦⟧]", "", marked, count=2)), (1, only_the_last(marked))):
        talk = [{**m, "weight": 0} if i == (1 if turn == 3 else turn) else m for i, m in enumerate(TALK)]
        row = row_of(tmp_path, talk if name == "gemma2" else [SYSTEM, *talk])
        assert learned(made, row) == expected


CALLED = {
    "qwen2_5": """<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
⟦<tool_call>
{"name": "look_up", "arguments": {"city": "Ulm"}}
</tool_call><|im_end|>
⟧<|im_start|>user
<tool_response>
cold
</tool_response><|im_end|>
<|im_start|>assistant
⟦It is cold.<|im_end|>
⟧""",
    "qwen3": """<|im_start|>user
Weather?<|im_end|>
<|im_start|>assistant
⟦<tool_call>
{"name": "look_up", "arguments": {"city": "Ulm"}}
</tool_call><|im_end|>
⟧<|im_start|>user
<tool_response>
cold
</tool_response><|im_end|>
<|im_start|>assistant
⟦<think>

</think>

It is cold.<|im_end|>
⟧""",
    "llama3_1": '<|start_header_id|>assistant<|end_header_id|>\n\n⟦{"name": "look_up", "parameters": {"city": "Ulm"}}<|eot_id|>⟧'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"cold"<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦It is cold.'
    "<|eot_id|>⟧",
    "mistral_v3": '[INST] Weather?[/INST]⟦[TOOL_CALLS] [{"name": "look_up", "arguments": {"city": "Ulm"}, "id": "abcdefghi"}]</s>⟧'
    '[TOOL_RESULTS] {"content": cold, "call_id": "abcdefghi"}[/TOOL_RESULTS]⟦ It is cold.</s>⟧',
    "deepseek_v3": "<｜User｜>Weather?<｜Assistant｜>⟦<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look_up\n```json\n"
    '{"city": "Ulm"}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜><｜end▁of▁sentence｜>⟧<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>cold'
    "<｜tool▁output▁end｜><｜tool▁outputs▁end｜>⟦It is cold.<｜end▁of▁sentence｜>⟧",
    "gpt_oss": "<|start|>user<|message|>Weather?<|end|><|start|>assistant⟦ to=functions.look_up<|channel|>commentary json<|message|>"
    '{"city": "Ulm"}<|call|>⟧<|start|>functions.look_up to=assistant<|channel|>commentary<|message|>"cold"<|end|><|start|>assistant'
    "⟦<|channel|>final<|message|>It is cold.<|return|>⟧",
}


@pytest.mark.parametrize(("name", "marked"), CALLED.items(), ids=CALLED)
@pytest.mark.parametrize("tools", [True, False])
def test_calls_of_tools_are_learned(tmp_path: Path, name: str, marked: str, tools: bool) -> None:
    """And what a tool answers is not; tools themselves stand before, and are not looked at here."""
    if tools and name == "deepseek_v3":
        pytest.skip("its template has no place for tools")
    made = tokenizer(name, source(name), marked + "<|im_start|><|begin_of_text|>[AVAILABLE_TOOLS][/AVAILABLE_TOOLS]")
    row = row_of(tmp_path, CALLS, **({"tools": TOOLS} if tools else {}))
    found = learned(made, row)
    assert ("look_up" in found.partition("Weather?")[0]) == tools
    assert found.endswith(marked.partition("Weather?")[2])


THINKING = {
    "qwen3": """<|im_start|>user
Hi there<|im_end|>
<|im_start|>assistant
⟦Hello!<|im_end|>
⟧<|im_start|>user
Again<|im_end|>
<|im_start|>assistant
⟦<think>
yes
</think>

Hello, again!<|im_end|>
⟧""",
    # What is asked for ends with <think> there, so the thoughts are the answer's and yet rendered by nobody.
    "deepseek_r1_distill": "<｜begin▁of▁sentence｜><｜User｜>Hi there<｜Assistant｜>⟦\n\nHello!<｜end▁of▁sentence｜>⟧<｜User｜>Again"
    "<｜Assistant｜>⟦\n\nHello, again!<｜end▁of▁sentence｜>⟧",
}


@pytest.mark.parametrize(("name", "marked"), THINKING.items(), ids=THINKING)
def test_thoughts_as_the_template_leaves_them(tmp_path: Path, name: str, marked: str) -> None:
    assert learned(tokenizer(name, source(name), marked), row_of(tmp_path, THOUGHT)) == marked


def test_turns_that_end_otherwise_before_the_last_one(tmp_path: Path) -> None:
    """gpt-oss ends the last turn with <|return|> and every earlier one with <|end|>."""
    marked = (
        "<|start|>user<|message|>Hi there<|end|><|start|>assistant⟦<|channel|>final<|message|>Hello!<|end|>⟧<|start|>user"
        "<|message|>Name two colours.<|end|><|start|>assistant⟦<|channel|>final<|message|>Blue.\n\nRed.<|return|>⟧"
    )
    assert learned(tokenizer("gpt_oss", source("gpt_oss"), marked), row_of(tmp_path, TALK)).endswith(marked)


TRL = {
    "llama3": ("llama3", ""), "gemma2": ("gemma", ""), "phi3": ("phi3", ""), "command_r": ("cohere", ""),
    "qwen2_5": ("qwen2_5", "\n"), "deepseek_v3": ("deepseekv3", "<｜Assistant｜>"), "gpt_oss": ("gptoss", "<|start|>assistant"),
    "deepseek_r1_distill": ("deepseek_r1_distill", "<｜Assistant｜>"),
}  # fmt: skip
"""TRL's name, and what its marks have a model learn of what it is given when it is asked."""


@pytest.mark.parametrize(("name", "theirs", "more"), [(k, *v) for k, v in TRL.items()], ids=TRL)
def test_trl_marks_the_same(tmp_path: Path, name: str, theirs: str, more: str) -> None:
    """An oracle: TRL's own copies of these templates, with `{% generation %}`, by which transformers makes the mask."""
    trl = pytest.importorskip("trl.chat_template_utils")
    marked = (Path(trl.__file__).parent / "chat_templates" / f"{theirs}_training.jinja").read_text(encoding="utf-8")
    text = MARKED.get(name, CALLED.get(name, ""))
    ours, made = (tokenizer(name, template, text) for template in (source(name), marked))
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
