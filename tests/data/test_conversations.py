"""Conversations as people hold them: ShareGPT's, questions and answers, calls of tools, keys of their own, preferences."""

import json
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab.data.forms import RENDERING
from trimtab.data.rows import conversational, judged, load_rows, unused_keys
from trimtab.data.sequences import describe, text_of
from trimtab.errors import UserError

USER, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}
WORSE = {"role": "assistant", "content": "d"}
CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": {"city": "Ulm"}}}


def rows_of(folder: Path, *rows: Any, **options: Any) -> Any:
    return load_rows(str(tiny.jsonl(folder / "rows.jsonl", *rows)), **options)


def said(speaker: str, value: str, **more: Any) -> dict[str, Any]:
    return {"from": speaker, "value": value, **more}


def test_sharegpt(tmp_path: Path) -> None:
    talk = [said("system", "s"), said("human", "a b"), said("gpt", "c"), said("human", "d"), said("gpt", "e")]
    [row] = rows_of(tmp_path, {"conversations": talk, "id": 3})
    assert [(m["role"], m["content"]) for m in (*row["prompt"], *row["completion"])] == [
        ("system", "s"), ("user", "a b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"),
    ]  # fmt: skip
    assert RENDERING not in row
    [row] = rows_of(tmp_path, {"conversations": [USER, ANSWER], "system": "s"})
    assert row["prompt"][0] == {"role": "system", "content": "s"}


def test_sharegpt_calls(tmp_path: Path) -> None:
    call = said("function_call", '{"name": "look_up", "arguments": {"city": "Ulm"}}')
    talk = [said("human", "a"), call, said("observation", "cold"), said("gpt", "c")]
    [row] = rows_of(tmp_path, {"conversations": talk, "tools": '[{"name": "look_up"}]'})
    assert [m["role"] for m in row["prompt"]] == ["user", "assistant", "tool"]
    function = {"name": "look_up", "arguments": {"city": "Ulm"}}
    assert json.loads(row[RENDERING]) == {
        "keys": {"1": {"tool_calls": [{"type": "function", "function": function}]}},
        "tools": [{"name": "look_up"}],
    }


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"conversations": [said("humn", "a"), said("gpt", "b")]}, r"\[0\].from' is 'humn' \(did you mean 'human'\?\)"),
        ({"conversations": [said("human", "a"), {"from": "gpt"}]}, r"\[1\].value' is null"),
        ({"conversations": [said("human", "a")]}, "'conversations' has no message with the role 'assistant'"),
        ({"conversations": [said("human", "a"), said("gpt", "b"), said("human", "c")]}, "ends with the role 'user'"),
        (
            {"conversations": [said("human", "a"), said("function_call", "{")]},
            r"\[1\].value' is a string that is not JSON",
        ),
        ({"conversations": [said("human", "a"), said("function_call", "{}")]}, "names no function"),
        (
            {"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": "[1"}]}]},
            "arguments' is a string that",
        ),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "arguments' is list"),
        ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "only an assistant calls"),
        (
            {"prompt": [USER], "completion": [ANSWER, {"role": "tool", "content": "x"}]},
            "'completion' ends with the role 'tool'",
        ),
        ({"question": "a", "answer": "b", "context": "c"}, "'context' would be dropped"),
        ({"question": 1, "answer": "b"}, "'question' is int"),
    ],
)
def test_what_is_refused(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 1: .*{complaint}"):
        rows_of(tmp_path, row)


def test_questions_and_answers(tmp_path: Path) -> None:
    [row] = rows_of(tmp_path, {"question": "a b", "answer": "c", "system": "s", "id": 1})
    assert row["prompt"] == [{"role": "system", "content": "s"}, USER]
    assert row["completion"] == [ANSWER]


def test_arguments_of_a_call_become_an_object(tmp_path: Path) -> None:
    """OpenAI's files hold them as text, which a template would quote a second time."""
    text = {**CALL, "function": {"name": "look_up", "arguments": '{"city": "Ulm"}'}}
    for calls in ([CALL], [text], json.dumps([text])):
        talk = [
            USER,
            {"role": "assistant", "content": None, "tool_calls": calls},
            {"role": "tool", "content": "x"},
            ANSWER,
        ]
        [row] = rows_of(tmp_path, {"messages": talk})
        assert json.loads(row[RENDERING])["keys"]["1"]["tool_calls"] == [CALL]
        assert row["prompt"][1] == {"role": "assistant", "content": ""}


def test_answers_that_are_not_learned(tmp_path: Path) -> None:
    """By their weight, and those of a prompt that is given as one."""
    talk = [USER, {**ANSWER, "weight": 0}, {**USER, "weight": 0}, {**ANSWER, "weight": 1}]
    assert json.loads(rows_of(tmp_path, {"messages": talk})[0][RENDERING]) == {"given": [1]}
    lists = {"prompt": [USER, ANSWER, USER], "completion": [ANSWER, {"role": "tool", "content": "x"}, ANSWER]}
    assert json.loads(rows_of(tmp_path, lists)[0][RENDERING]) == {"given": [1]}


# ---- keys of their own ----------------------------------------------------------------------------------------------


def test_columns(tmp_path: Path) -> None:
    row = {"sentence": "good", "label": 1, "idx": 7}
    [found] = rows_of(tmp_path, row, columns={"prompt": "sentence", "completion": "label"})
    assert found == {"prompt": "good", "completion": "1"}
    columns = {"prompt": "Review: {sentence}\nMood:", "completion": " {label}"}
    found = rows_of(tmp_path, row, columns=columns)
    assert found[0] == {"prompt": "Review: good\nMood:", "completion": " 1"}
    assert unused_keys(found) == "idx"
    [found] = rows_of(tmp_path, {"q": "a b", "a": "c"}, columns={"question": "q", "answer": "a"})
    assert found == {"prompt": [USER], "completion": [ANSWER]}
    kept = {"prompt": "good", "rejected": "bad", "chosen": "fine"}
    [found] = rows_of(tmp_path, kept, columns={"completion": "chosen"}, ignore=["rejected"])
    assert found == {"prompt": "good", "completion": "fine"}


@pytest.mark.parametrize(
    ("columns", "ignore", "complaint"),
    [
        ({"prompt": "sentense", "completion": "label"}, (), r"line 1: has no 'sentense', .*did you mean 'sentence'"),
        (
            {"prompt": "{sentence} {x}", "completion": "label"},
            (),
            "line 1: has no 'x', which data.columns takes for 'prompt'",
        ),
        ({"promt": "sentence"}, (), r"data\.columns: 'promt' is not a key of a row \(did you mean 'prompt'\?\)"),
        ({"text": "sentence"}, (), "line 1: the key 'label' would be dropped"),
        ({"label": "sentence"}, (), "makes 'sentence' its 'label', but the row has a 'label' of its own"),
    ],
)
def test_columns_that_are_not_there(tmp_path: Path, columns: dict[str, str], ignore: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        rows_of(tmp_path, {"sentence": "good", "label": "1"}, columns=columns, ignore=ignore)


# ---- preferences ----------------------------------------------------------------------------------------------------

PREFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "strings": ({"prompt": "a ", "chosen": "b", "rejected": "c"}, {"prompt": "a ", "chosen": "b", "rejected": "c"}),
    "strings without a prompt": (
        {"chosen": "Human: hi\n\nAssistant: yes sir", "rejected": "Human: hi\n\nAssistant: yes no"},
        {"prompt": "Human: hi\n\nAssistant: yes ", "chosen": "sir", "rejected": "no"},
    ),
    "lists": (
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    ),
    "whole conversations": (
        {"chosen": [USER, ANSWER], "rejected": [USER, WORSE]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    ),
    "UltraFeedback": (
        {
            "prompt": "a b", "prompt_id": "x", "chosen": [USER, ANSWER], "rejected": [USER, WORSE],
            "messages": [USER, ANSWER], "score_chosen": 9.0, "score_rejected": 4.0,
        },
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    ),
    "a question as text": (
        {"prompt": "a b", "chosen": [ANSWER], "rejected": [WORSE]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [WORSE]},
    ),
    "answers as text, with a system prompt": (
        {"prompt": [USER], "chosen": "c", "rejected": "d", "system": "s"},
        {"prompt": [{"role": "system", "content": "s"}, USER], "chosen": [ANSWER], "rejected": [WORSE]},
    ),
    "judged": ({"prompt": "a", "completion": "b", "label": True}, {"prompt": "a", "completion": "b", "label": True}),
    "judged lists": (
        {"prompt": [USER], "completion": [ANSWER], "label": False},
        {"prompt": [USER], "completion": [ANSWER], "label": False},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), PREFERENCES.values(), ids=PREFERENCES)
def test_preferences(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    """As TRL's DPO and KTO trainers take them."""
    trl = pytest.importorskip("trl.data_utils")
    rows = rows_of(tmp_path, row, row)
    assert [dict(found) for found in rows] == [expected] * 2
    assert judged(rows)
    assert conversational(rows) == isinstance(expected["prompt"], list) == trl.is_conversational(expected)
    if "prompt" not in row and "chosen" in row and isinstance(row["chosen"], list):
        assert trl.maybe_extract_prompt(row) == expected
    assert describe(rows).startswith("2 pairs of answers, " if "chosen" in expected else "2 judged answers, ")
    better = "c" if conversational(rows) else expected.get("chosen", expected.get("completion"))
    assert all(better in text for text in text_of(rows, tiny.tokenizer()))


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"chosen": "ab", "rejected": "cd"}, "no prompt in common"),
        ({"chosen": [ANSWER], "rejected": [WORSE]}, "no prompt in common"),
        ({"prompt": "x", "chosen": [USER, ANSWER], "rejected": [USER, WORSE]}, "'prompt' is none of the messages"),
        ({"prompt": [USER], "chosen": [ANSWER, USER], "rejected": [WORSE]}, r"'chosen\[1\]' has the role 'user'"),
        (
            {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [WORSE]},
            "only one of 'chosen' and 'rejected' begins",
        ),
        (
            {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER]},
            "'rejected' has no message behind the prompt",
        ),
        ({"prompt": [{**USER, "images": ["x"]}], "chosen": [ANSWER], "rejected": [WORSE]}, "a message has 'images'"),
        ({"prompt": "a", "chosen": "b", "rejected": None}, "'rejected' is null"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "context": "d"}, "'context' would be dropped"),
        ({"prompt": "a", "completion": "b", "label": 2}, "'label' would be dropped"),
    ],
)
def test_preferences_that_are_none(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=rf"line 1: .*{complaint}"):
        rows_of(tmp_path, row)
