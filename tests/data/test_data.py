"""Data: every form of row, every complaint with its file and line, and blocks against a hand-computed example."""

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import datasets
import pyarrow
import pytest
import torch
from pyarrow import parquet
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from trimtab.data import sequences as data
from trimtab.data.rows import conversational, load_rows
from trimtab.data.sequences import describe, text_of, token_windows
from trimtab.data.sources import Source, mixed
from trimtab.errors import UserError

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' and not loop.first %}{{ raise_exception('system must be first') }}{% endif %}"
    "{{ '<' + m['role'] + '> ' + m['content'] + ' <eos> ' }}{% endfor %}"
)


def tiny_tokenizer(*, template: str | None = TEMPLATE, eos: str | None = "<eos>") -> PreTrainedTokenizerFast:
    """Words a, b, c, d are 2, 3, 4, 5; the end of sequence is 1; anything else, a role's mark included, is 0."""
    vocabulary = {"<unk>": 0, "<eos>": 1, "a": 2, "b": 3, "c": 4, "d": 5}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token=eos, model_max_length=2)
    tokenizer.chat_template = template
    return tokenizer


def jsonl(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    """A file of JSON lines; a row given as a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def rows_of(dataset: datasets.Dataset) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]


SYSTEM, USER, ANSWER = message("system", "be brief"), message("user", "a b"), message("assistant", "c")

FORMS = [
    ("text", {"text": "a b"}, {"text": "a b"}),
    ("instruction", {"instruction": "a b", "output": "c"}, {"prompt": [USER], "completion": [ANSWER]}),
    ("no input", {"instruction": "a b", "input": "", "output": "c"}, {"prompt": [USER], "completion": [ANSWER]}),
    ("null input", {"instruction": "a b", "input": None, "output": "c"}, {"prompt": [USER], "completion": [ANSWER]}),
    (
        "input",
        {"instruction": "a", "input": "b", "output": "c"},
        {"prompt": [message("user", "a\n\nb")], "completion": [ANSWER]},
    ),
    ("messages", {"messages": [SYSTEM, USER, ANSWER]}, {"prompt": [SYSTEM, USER], "completion": [ANSWER]}),
    (
        "turns",
        {"messages": [USER, ANSWER, USER, {**ANSWER, "weight": 1}]},
        {"prompt": [USER, ANSWER, USER], "completion": [ANSWER]},
    ),
    ("strings", {"prompt": "a ", "completion": "b"}, {"prompt": "a ", "completion": "b"}),
    ("lists", {"prompt": [USER], "completion": [ANSWER]}, {"prompt": [USER], "completion": [ANSWER]}),
    ("extra keys", {"id": 7, "text": "a", "source": None}, {"text": "a"}),
    (
        "most structured wins",
        {"text": "a b c", "instruction": "a b", "output": "c"},
        {"prompt": [USER], "completion": [ANSWER]},
    ),
]


@pytest.mark.parametrize(("row", "expected"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_forms(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    dataset = load_rows(jsonl(tmp_path, row, "", row))
    assert rows_of(dataset) == [expected, expected]
    assert conversational(dataset) == isinstance(expected.get("prompt"), list)


@pytest.mark.parametrize(("row", "expected"), [form[1:] for form in FORMS], ids=[form[0] for form in FORMS])
def test_forms_in_parquet(tmp_path: Path, row: dict[str, Any], expected: dict[str, Any]) -> None:
    parquet.write_table(pyarrow.Table.from_pylist([row, row]), tmp_path / "rows.parquet")
    assert rows_of(load_rows(str(tmp_path / "rows.parquet"))) == [expected, expected]


def test_trl_agrees_on_what_is_a_conversation(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl.data_utils")
    for _, row, _ in FORMS:
        dataset = load_rows(jsonl(tmp_path, row))
        assert trl.is_conversational(dataset[0]) == conversational(dataset)


def test_schema_does_not_depend_on_the_rows(tmp_path: Path) -> None:
    """So that a training set and a held-out set can be concatenated."""
    one = load_rows(jsonl(tmp_path, {"messages": [USER, ANSWER]}))
    two = load_rows(jsonl(tmp_path, {"instruction": "", "output": ""}))
    assert one.features == two.features
    assert len(datasets.concatenate_datasets([one, two])) == 2


BAD_ROWS = [
    ("null text", {"text": None}, "'text' is null"),
    ("number", {"text": 3}, "'text' is int"),
    ("null output", {"instruction": "a", "output": None}, "'output' is null"),
    ("bad input", {"instruction": "a", "input": ["b"], "output": "c"}, "'input' is list"),
    (
        "unknown keys",
        {"sentence": "a", "label": 1},
        r"keys: sentence, label\); accepted are .*\"messages\".*data.columns",
    ),
    ("no keys", {}, r"keys: none"),
    ("half a form", {"instruction": "a"}, "keys: instruction"),
    ("invalid JSON", '{"text": "a"', r"invalid JSON \(Expecting.*column"),
    ("array", '[{"text": "a"}]', "list where an object is needed.*jq"),
    ("surrogate", '{"text": "\\ud800"}', "not valid Unicode"),
    ("messages null", {"messages": None}, "'messages' is null"),
    ("messages empty", {"messages": []}, "'messages' is an empty list"),
    ("not a message", {"messages": [USER, "c"]}, r"'messages\[1\]' is str"),
    ("no content", {"messages": [USER, {"role": "assistant"}]}, r"'messages\[1\].content' is null"),
    ("role", {"messages": [{"role": 1, "content": ""}, ANSWER]}, r"'messages\[0\].role' is int"),
    ("parts", {"messages": [message("user", ["a"]), ANSWER]}, r"'messages\[0\].content' is list"),
    ("tool calls", {"messages": [USER, {**message("assistant", ""), "tool_calls": [{}]}]}, "tool_calls"),
    ("no assistant", {"messages": [SYSTEM, USER]}, r"no message with the role 'assistant' \(roles: system, user\)"),
    ("user last", {"messages": [USER, ANSWER, USER]}, "ends with the role 'user'"),
    ("answer alone", {"messages": [ANSWER]}, "nothing before the answer"),
    ("null completion", {"prompt": "a", "completion": None}, "'completion' is null"),
    ("string and list", {"prompt": [USER], "completion": "c"}, "'completion' is str"),
    ("empty prompt list", {"prompt": [], "completion": [ANSWER]}, "'prompt' is an empty list"),
]


@pytest.mark.parametrize(("row", "complaint"), [bad[1:] for bad in BAD_ROWS], ids=[bad[0] for bad in BAD_ROWS])
def test_bad_rows_are_located(tmp_path: Path, row: Any, complaint: str) -> None:
    """The blank line counts: the number is the one an editor shows."""
    path = jsonl(tmp_path, {"text": "fine"}, "", row)
    with pytest.raises(UserError, match=rf"rows\.jsonl, line 3: .*{complaint}") as caught:
        load_rows(path)
    assert "\n" not in str(caught.value)
    assert len(load_rows(path, limit=1)) == 1  # what is past the limit is not read


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"text": "a"}, {"prompt": "a", "completion": "b"}),
        ({"messages": [USER, ANSWER]}, {"instruction": "a", "output": "b"}),
        ({"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [ANSWER]}),
    ],
)
def test_mixed_forms(tmp_path: Path, first: Any, second: Any) -> None:
    path = jsonl(tmp_path, first, first, second, first)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 3: .* at .*rows\.jsonl, line 1"):
        load_rows(path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "note.txt", "note.md"])
@pytest.mark.parametrize("content", ["", "\n  \n\n"])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=rf"{name}: empty file"):
        load_rows(str(tmp_path / name))


def test_parquet_errors_carry_the_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(UserError, match=r"rows\.parquet, row 2: 'text' is null"):
        load_rows(str(path))
    parquet.write_table(pyarrow.table({"text": pyarrow.array([], pyarrow.string())}), path)
    with pytest.raises(UserError, match=r"rows\.parquet: empty file"):
        load_rows(str(path))
    path.write_bytes(b"no parquet at all")
    with pytest.raises(UserError, match=r"rows\.parquet: cannot be read as parquet"):
        load_rows(str(path))


def test_a_text_is_one_document(tmp_path: Path) -> None:
    for name in ("note.txt", "NOTE.MD"):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbfone\r\n\r\ntwo\n")
        assert rows_of(load_rows(str(tmp_path / name))) == [{"text": "one\n\ntwo\n"}]


def test_encodings(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('\ufeff{"text": "é\u2028b"}\r\n{"text": "c"}'.encode())
    assert rows_of(load_rows(str(path))) == [{"text": "é\u2028b"}, {"text": "c"}]
    path.write_bytes(b'{"text": "a"}\n{"text": "\xe9"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: not UTF-8"):
        load_rows(str(path))


def test_directory(tmp_path: Path) -> None:
    jsonl(tmp_path, {"text": "b"}, name="2.json")
    jsonl(tmp_path, {"text": "a"}, name="1.jsonl")
    (tmp_path / "LICENSE").write_text("not data")
    assert rows_of(load_rows(str(tmp_path))) == [{"text": "a"}, {"text": "b"}]
    jsonl(tmp_path, {"prompt": "a", "completion": "b"}, name="3.jsonl")
    with pytest.raises(UserError, match=r"3\.jsonl, line 1: .* at .*1\.jsonl, line 1"):
        load_rows(str(tmp_path))
    (tmp_path / "README.md").write_text("words")
    with pytest.raises(UserError, match=r"different kinds \(1\.jsonl and README\.md\)"):
        load_rows(str(tmp_path))
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match=r"none: no data files"):
        load_rows(str(tmp_path / "none"))


@pytest.mark.parametrize("path", ["absent.jsonl", "a/ABSENT.TXT", "./absent", "/absent", "~/absent", "a/b/c", "json"])
def test_missing_files(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("asked the hub for a file"))
    with pytest.raises(UserError, match=rf"^{path}: no such file or directory"):
        load_rows(path)


def test_local_data_is_not_split(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"text": "a"})
    for place in (path, str(tmp_path)):
        with pytest.raises(UserError, match="no split 'heldout'; give those rows as a file of their own"):
            load_rows(place, split="heldout")


def test_unknown_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "rows.xlsx").write_text("text\na\n")
    with pytest.raises(UserError, match=r"rows\.xlsx: unknown kind of file '\.xlsx'; give one of \.jsonl"):
        load_rows(str(tmp_path / "rows.xlsx"))


def test_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *({"text": str(index)} for index in range(5)))
    assert rows_of(load_rows(path, limit=2)) == [{"text": "0"}, {"text": "1"}]
    assert len(load_rows(path, limit=9)) == 5
    with pytest.raises(UserError, match="limit: 0 rows"):
        load_rows(path, limit=0)


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, *, split: str) -> datasets.Dataset:
        asked.append((path, split))
        return datasets.Dataset.from_dict({"text": ["a", "b", None]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert rows_of(load_rows("owner/name", split="test", limit=2)) == [{"text": "a"}, {"text": "b"}]
    assert asked == [("owner/name", "test")]
    with pytest.raises(UserError, match="owner/name, row 3: 'text' is null"):
        load_rows("owner/name")
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict({"text": []}))
    with pytest.raises(UserError, match="owner/name: no rows in the split 'train'"):
        load_rows("owner/name")


@pytest.mark.parametrize(
    "failure",
    [
        datasets.exceptions.DatasetNotFoundError("Dataset 'owner/name' doesn't exist"),
        ConnectionError("no route\nto host"),
        ValueError("Unknown split"),
        RuntimeError("Dataset scripts are no longer supported"),
    ],
)
def test_hub_failures(failure: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(path: str, *, split: str) -> datasets.Dataset:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(
        UserError, match=rf"^owner/name: .*split 'train'.*{type(failure).__name__}.*or download it"
    ) as caught:
        load_rows("owner/name")
    assert "\n" not in str(caught.value)


def test_pydoc_topics_are_split_by_topic() -> None:
    names = sorted(topics)
    train, held_out = load_rows("pydoc-topics")["text"], load_rows("pydoc-topics", split="heldout")["text"]
    assert len(train) + len(held_out) == len(topics)
    assert list(held_out) == [topics[name] for name in names[7::8]]
    # A training text is its topic, less the paragraphs that a held-out topic has as well.
    for text, name in zip(train, [name for name in names if name not in names[7::8]], strict=True):
        kept, whole = text.split("\n\n"), topics[name].split("\n\n")
        assert set(kept) <= set(whole)
        assert text
    assert sum(map(len, train)) > 0.95 * sum(len(topics[name]) for name in names if name not in names[7::8])
    for split in ("test", "validation"):
        assert load_rows("pydoc-topics", split=split)["text"] == held_out
    with pytest.raises(UserError, match=r"pydoc-topics: no split 'trian'.*did you mean 'train'"):
        load_rows("pydoc-topics", split="trian")


def test_pydoc_held_out_text_is_not_in_training() -> None:
    """Whole sections of the manual appear under two names; without the cut about 18 % of these would be found."""

    def grams(text: str) -> set[tuple[str, ...]]:
        words = text.split()
        return {tuple(words[start : start + 13]) for start in range(len(words) - 12)}

    train = set().union(*map(grams, load_rows("pydoc-topics")["text"]))
    held_out = set().union(*map(grams, load_rows("pydoc-topics", split="heldout")["text"]))
    assert len(held_out & train) < 0.01 * len(held_out)


def test_text_of(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    assert list(text_of(load_rows(jsonl(tmp_path, {"text": "a"}, {"text": ""})), tokenizer)) == ["a", ""]
    pairs = load_rows(jsonl(tmp_path, {"prompt": "a ", "completion": "b"}))
    assert list(text_of(pairs, tiny_tokenizer(template=None))) == ["a b"]
    chats = load_rows(jsonl(tmp_path, {"messages": [USER, ANSWER]}))
    assert list(text_of(chats, tokenizer)) == ["<user> a b <eos> <assistant> c <eos> "]
    with pytest.raises(UserError, match=r'no chat template; give plain \{"text"\}'):
        text_of(chats, tiny_tokenizer(template=None))  # at once, not at the first row


def test_template_refusal_names_the_row(tmp_path: Path) -> None:
    rows = load_rows(jsonl(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, SYSTEM, ANSWER]}))
    with pytest.raises(UserError, match=r"data, row 2: .*refuses it \(system must be first\)"):
        list(text_of(rows, tiny_tokenizer()))


def test_a_row_that_was_split_off_is_named_as_its_file_numbers_it(tmp_path: Path) -> None:
    good = jsonl(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, ANSWER]}, name="good.jsonl")
    bad = jsonl(tmp_path, {"messages": [USER, ANSWER]}, {"messages": [USER, SYSTEM, ANSWER]}, name="bad.jsonl")
    rows = mixed([Source(good), Source(bad)]).rows.select([3])
    with pytest.raises(UserError, match=r"data, row 2 of data\.path\.1: "):
        list(text_of(rows, tiny_tokenizer()))


def test_token_windows_by_hand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Stream: a b c E | d E | a E (written out by the row) | (no tokens) | b b c E."""
    texts = ["a b c", "d", "a <eos>", "", "b b c"]
    rows = load_rows(jsonl(tmp_path, *({"text": text} for text in texts)))
    tokenizer = tiny_tokenizer()
    blocks = token_windows(rows, tokenizer, block_tokens=5)
    assert blocks.dtype == torch.int64
    assert blocks.tolist() == [[2, 3, 4, 1, 5], [1, 2, 1, 3, 3]]  # the tail, c E, is dropped
    assert token_windows(rows, tokenizer, block_tokens=4).tolist() == [[2, 3, 4, 1], [5, 1, 2, 1], [3, 3, 4, 1]]
    assert token_windows(rows, tokenizer, block_tokens=4, limit_tokens=11).shape == (2, 4)
    assert token_windows(rows, tokenizer, block_tokens=4, limit_tokens=4).tolist() == [[2, 3, 4, 1]]
    spread = [
        token_windows(rows, tokenizer, block_tokens=2, limit_tokens=n, spread=True).tolist() for n in (None, 8, 4)
    ]
    every = token_windows(rows, tokenizer, block_tokens=2).tolist()
    assert len(every) == 6
    assert spread == [every, [every[i] for i in (0, 1, 3, 4)], [every[0], every[3]]]
    assert "longer than" not in caplog.text  # the tokenizer's model_max_length is 2


def test_windows_from_all_of_very_many_rows_read_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = load_rows(jsonl(tmp_path, *({"text": "a" if i < 50 else "b"} for i in range(100))))
    read: list[str] = []
    monkeypatch.setattr(data, "text_of", lambda *given: (read.append(text) or text for text in text_of(*given)))
    blocks = token_windows(rows, tiny_tokenizer(), block_tokens=2, limit_tokens=4, spread=True)
    assert read == ["a"] * 8 + ["b"] * 8
    assert blocks.tolist() == [[2, 1], [3, 1]]


def test_token_windows_of_conversations(tmp_path: Path) -> None:
    rows = load_rows(jsonl(tmp_path, {"messages": [USER, ANSWER]}))
    # The template ends in the end-of-sequence token itself: it is not doubled.
    assert token_windows(rows, tiny_tokenizer(), block_tokens=7).tolist() == [[0, 2, 3, 1, 0, 4, 1]]
    with pytest.raises(UserError, match="7 tokens, not one block"):
        token_windows(rows, tiny_tokenizer(), block_tokens=8)


def test_each_block_begins_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    """A Gemma or a Llama was never shown a window without its first token; a template may have written it already."""
    tokenizer = tiny_tokenizer(template="d a <eos> b")
    tokenizer.bos_token = "d"
    rows = load_rows(jsonl(tmp_path, {"text": "a b c"}, {"text": "d a"}))
    assert token_windows(rows, tokenizer, block_tokens=3).tolist() == [[2, 3, 4], [1, 5, 2]]  # it adds none: nor do we
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="d $A", special_tokens=[("d", 5)])
    assert token_windows(rows, tokenizer, block_tokens=3).tolist() == [[5, 2, 3], [5, 4, 1], [5, 2, 1]]
    assert token_windows(rows, tokenizer, block_tokens=3, limit_tokens=8).shape == (2, 3)
    with pytest.raises(UserError, match="block_tokens: 1 leaves no token of text"):
        token_windows(rows, tokenizer, block_tokens=1)
    chats = load_rows(jsonl(tmp_path, {"messages": [USER, ANSWER]}))
    assert token_windows(chats, tokenizer, block_tokens=5).tolist() == [[5, 2, 1, 3, 1]]


def test_token_windows_errors(tmp_path: Path) -> None:
    rows = load_rows(jsonl(tmp_path, {"text": "a b"}))
    with pytest.raises(UserError, match="3 tokens, not one block of block_tokens = 4; give more text"):
        token_windows(rows, tiny_tokenizer(), block_tokens=4)
    with pytest.raises(UserError, match="limit_tokens is 1, not one block"):
        token_windows(rows, tiny_tokenizer(), block_tokens=2, limit_tokens=1)
    with pytest.raises(UserError, match="block_tokens: 0"):
        token_windows(rows, tiny_tokenizer(), block_tokens=0)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        token_windows(rows, tiny_tokenizer(eos=None), block_tokens=2)


def test_describe(tmp_path: Path) -> None:
    assert describe(load_rows(jsonl(tmp_path, {"text": "é"}))) == "1 document, 2 B of text"
    assert describe(load_rows(jsonl(tmp_path, *[{"text": "x" * 600}] * 2))) == "2 documents, 1.2 kB of text"
    assert describe(load_rows(jsonl(tmp_path, {"text": "x" * 465_200}))) == "1 document, 465.2 kB of text"
    pairs = load_rows(jsonl(tmp_path, {"prompt": "ab", "completion": "c"}))
    assert describe(pairs) == "1 prompt-completion pair, 3 B of text"
    chats = load_rows(jsonl(tmp_path, *[{"messages": [SYSTEM, USER, ANSWER]}] * 3))
    assert describe(chats) == "3 conversations, 36 B of text"
    judged = [{"prompt": "a", "completion": "bc", "label": good} for good in (True, False)]
    assert describe(load_rows(jsonl(tmp_path, *judged))) == "2 judged answers, 6 B of text"
    pair = {"prompt": "a", "chosen": "bc", "rejected": "def"}
    assert describe(load_rows(jsonl(tmp_path, pair, pair))) == "2 pairs of answers, 12 B of text"
