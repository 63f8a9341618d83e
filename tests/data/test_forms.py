"""Every key of a row is used, named as unused, or refused with its file and line: none is dropped without a word."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from trimtab.data.forms import RENDERING
from trimtab.data.rows import Place, load_rows, unused_keys
from trimtab.errors import UserError

USER, ANSWER = {"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}
ASKED: dict[str, Any] = {"instruction": "a b", "output": "c"}
CHAT: dict[str, Any] = {"messages": [USER, ANSWER]}


def rows_of(folder: Path, *rows: Any, **options: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return load_rows(str(file), **options)


def prompt_of(folder: Path, row: dict[str, Any]) -> list[tuple[str, str]]:
    """Role and content of a row's prompt, from JSON lines and from a table alike."""
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), folder / "rows.parquet")
    found = [rows_of(folder, row)[0], load_rows(str(folder / "rows.parquet"))[1]]
    first, second = ([(m["role"], m["content"]) for m in one["prompt"]] for one in found)
    assert first == second
    assert [m["content"] for m in found[0]["completion"]] == ["c"]
    return first


def test_system_and_history_become_messages(tmp_path: Path) -> None:
    """Keys of a row dropped: an Alpaca row's `system` and `history` were, without a word."""
    turns = [("user", "Paris?"), ("assistant", "cold")]
    row = {**ASKED, "system": "Be a pirate", "history": [["Paris?", "cold"]]}
    assert prompt_of(tmp_path, row) == [("system", "Be a pirate"), *turns, ("user", "a b")]
    assert prompt_of(tmp_path, {**CHAT, "system": "Be brief"}) == [("system", "Be brief"), ("user", "a b")]
    lists = {"prompt": [USER], "completion": [ANSWER], "system": "Be brief"}
    assert prompt_of(tmp_path, lists) == [("system", "Be brief"), ("user", "a b")]
    empty = {**ASKED, "system": "", "history": [], "tools": None}
    assert rows_of(tmp_path, empty).column_names == ["prompt", "completion"]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "system of two strings": ({"prompt": "a", "completion": "b", "system": "s"}, "'system' would be dropped"),
    "system of a text": ({"text": "a", "system": "s"}, "'system' would be dropped: rows like this are trained on text"),
    "system twice": ({"messages": [{"role": "system", "content": "s"}, *CHAT["messages"]], "system": "t"}, "keep one"),
    "system of a wrong type": ({**ASKED, "system": {"a": 1}}, "'system' is dict"),
    "history of a conversation": ({**CHAT, "history": [["a", "b"]]}, "'history' would be dropped"),
    "history of words": ({**ASKED, "history": ["a", "b"]}, "not a list of .question, answer. pairs"),
    "history of three": ({**ASKED, "history": [["a", "b", "c"]]}, "not a list of .question, answer. pairs"),
    "history of numbers": ({**ASKED, "history": [[1, "b"]]}, r"'history\[0\]' is int"),
    "tools of two strings": ({"prompt": "a", "completion": "b", "tools": [{}]}, "'tools' would be dropped"),
    "tools of a wrong type": ({**CHAT, "tools": {"a": 1}}, "'tools' is dict where a list"),
    "tools no JSON": ({**CHAT, "tools": "[{"}, "'tools' is a string that is not JSON"),
    "arguments of a wrong type": ({**CHAT, "chat_template_kwargs": ["a"]}, "'chat_template_kwargs' is list"),
    "images": ({**CHAT, "images": ["a.png"]}, "'images' would be dropped"),
    "a label": ({"text": "a", "label": 1}, "'label' would be dropped"),
    "a label that is zero": ({"text": "a", "label": 0}, "'label' would be dropped"),
    "context": ({**ASKED, "context": "d"}, "'context' would be dropped.*data.ignore"),
    "a rejected answer": ({"prompt": "a", "completion": "b", "rejected": "c"}, "'rejected' would be dropped"),
    "another text": ({**ASKED, "text": "d"}, "'text' would be dropped"),
    "another prompt": ({**CHAT, "prompt": "d"}, "'prompt' would be dropped"),
    "reasoning beside the answer": ({**ASKED, "reasoning_content": "hm"}, "'reasoning_content' would be dropped"),
    "a weight": ({**CHAT, "weight": 0.5}, "'weight' is 0.5, but every row counts alike"),
    "no weight": ({"text": "a", "weight": 0}, "'weight' is 0"),
    "weights": ({**CHAT, "weights": [1, 0]}, r"'weights' is \[1, 0\]"),
    "a row that is not trained": ({"text": "a", "train": False}, "'train' is False"),
    "a weight that is not a number": ({"text": "a", "weight": "1"}, "'weight' is '1'"),
    "an earlier answer with a weight": (
        {"messages": [USER, {**ANSWER, "weight": 0.5}, USER, ANSWER]},
        "'weight' of message 2 is 0.5, but an answer is learned whole or not at all; make it 0 or 1",
    ),
    "a question with a weight": (
        {"messages": [{**USER, "weight": 1}, ANSWER]},
        "'weight' of message 1 is 1, but only an assistant's answers are learned; make it 0",
    ),
    "a question as a completion": (
        {"prompt": [USER], "completion": [USER, ANSWER]},
        r"'completion\[0\]' has the role 'user'",
    ),
}


@pytest.mark.parametrize(("row", "complaint"), REFUSED.values(), ids=REFUSED)
def test_keys_that_would_be_dropped(tmp_path: Path, row: dict[str, Any], complaint: str) -> None:
    good: Any = {"text": "fine"} if "text" in row and "instruction" not in row else ""
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 2: .*{complaint}") as caught:
        rows_of(tmp_path, good, row)
    assert "\n" not in str(caught.value)


def test_keys_about_a_row_are_named(tmp_path: Path) -> None:
    found = rows_of(tmp_path, {"text": "a", "id": 7, "source": "web"}, {"text": "b", "url": "u", "weight": 1.0})
    assert unused_keys(found) == "id, source, url"
    assert unused_keys(found.select([0])) == "id, source, url"
    assert unused_keys(rows_of(tmp_path, {"text": "a"})) == ""
    assert unused_keys(rows_of(tmp_path, {"messages": [{**USER, "id": 3}, {**ANSWER, "weight": 1}]})) == "id"


def test_a_row_in_two_forms(tmp_path: Path) -> None:
    """The prompt of the messages, or a text that holds them, says nothing that is not trained."""
    assert unused_keys(rows_of(tmp_path, {**CHAT, "prompt": "a b"})) == "prompt"
    assert unused_keys(rows_of(tmp_path, {**ASKED, "text": "### a b\n### c"})) == "text"


def test_the_user_may_say_which_keys_belong_to_nothing(tmp_path: Path) -> None:
    row = {"text": "a", "grade": 3, "weight": 2}
    assert unused_keys(rows_of(tmp_path, row, ignore=("grade", "weight"))) == "grade, weight"
    with pytest.raises(UserError, match="'weight'"):
        rows_of(tmp_path, row, ignore=("grade",))


def test_what_a_template_is_given(tmp_path: Path) -> None:
    """As JSON beside the row, from an object and from a table's string alike."""
    tools, arguments = [{"name": "f"}], {"enable_thinking": False}
    row = {"messages": [USER, {**ANSWER, "reasoning_content": "hm", "name": None}], "chat_template_kwargs": arguments}
    for given in (tools, json.dumps(tools)):
        found = rows_of(tmp_path, {**row, "tools": given}, CHAT)
        assert json.loads(found[0][RENDERING]) == {
            "keys": {"1": {"reasoning_content": "hm"}},
            "tools": tools,
            "chat_template_kwargs": arguments,
        }
        assert json.loads(found[1][RENDERING]) == {}


def test_a_key_that_stands_twice(tmp_path: Path) -> None:
    for row in ('{"text": "a", "text": "b"}', '{"messages": [{"role": "user", "content": "a", "content": "b"}]}'):
        with pytest.raises(
            UserError, match=r"rows\.jsonl, line 2: the key '(text|content)' stands in one object twice"
        ):
            rows_of(tmp_path, {"text": "fine"}, row)


def test_where_a_row_stands(tmp_path: Path) -> None:
    rows_of(tmp_path, {"text": "a"}, "", {"text": "b"})
    path = str(tmp_path / "rows.jsonl")
    assert f"{Place(path, 'train', 2)}" == f"row 2 ({path}, line 3)"
    assert str(Place(path, "train", 9)) == "row 9"
