"""Files of rows beside JSON lines and Parquet: arrays, CSV and TSV, each row known by its line."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from trimtab.data.files import file_rows
from trimtab.data.rows import load_rows
from trimtab.errors import UserError


def located(folder: Path, name: str, content: str | bytes) -> list[tuple[str, Any]]:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return [(where.removeprefix(f"{file}, "), row) for where, row in file_rows(file)]


ARRAY = '\n[\n  {"text": "a, ]"},\n  {\n    "text": "b"\n  }, {"text": "c"}\n]\n'


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_an_array_is_its_objects(tmp_path: Path, name: str) -> None:
    expected = [("line 3", {"text": "a, ]"}), ("line 4", {"text": "b"}), ("line 6", {"text": "c"})]
    assert located(tmp_path, name, ARRAY) == expected
    assert located(tmp_path, name, "\ufeff" + json.dumps([{"text": "a"}])) == [("line 1", {"text": "a"})]
    assert load_rows(str(tmp_path / name))["text"] == ["a"]


def test_an_array_longer_than_what_is_looked_at_first(tmp_path: Path) -> None:
    rows = [{"text": f"{i} " * 999} for i in range(9)]
    assert [row for _, row in located(tmp_path, "a.json", " " * 9 + json.dumps(rows, indent=2))] == rows


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("[]", "empty file"),
        ("[\n1]", "line 2: int where an object is needed"),
        ('[{"a": 1}\n {"a": 2}]', "line 2: invalid JSON .no ',' or ']' behind an object"),
        ('[{"a": 1},\n]', "line 2: invalid JSON"),
        ('[{"a": 1}', "line 1: invalid JSON"),
        ('[\n\n{"a": }]', r"line 3: invalid JSON \(Expecting value, column 7\)"),
        ('[{"a": 1}]\n{"a": 1}', "line 1: something stands behind the array's end"),
        ('[\n{"a": 1, "a": 2}]', "line 2: the key 'a' stands in one object twice"),
    ],
)
def test_arrays_that_are_none(tmp_path: Path, content: str, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.json(, |: ){complaint}"):
        located(tmp_path, "rows.json", content)


@pytest.mark.parametrize(("name", "between"), [("rows.csv", ","), ("rows.tsv", "\t"), ("rows.csv", ";")])
def test_cells_by_the_names_of_the_first_line(tmp_path: Path, name: str, between: str) -> None:
    content = f'\ufeffquestion{between}answer\r\n"a{between}\n""b"""{between}c\r\n\r\nd{between}\r\n'
    found = located(tmp_path, name, content)
    assert found == [
        ("line 3", {"question": f'a{between}\n"b"', "answer": "c"}),
        ("line 5", {"question": "d", "answer": ""}),
    ]
    rows = load_rows(str(tmp_path / name))
    assert rows[0]["completion"] == [{"role": "assistant", "content": "c"}]


def test_a_long_cell(tmp_path: Path) -> None:
    """The csv module takes more than 128 kB for a mistake; the limit is put back for others."""
    with (tmp_path / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["a" * 200_000]])
    before = csv.field_size_limit()
    assert len(load_rows(str(tmp_path / "rows.csv"))[0]["text"]) == 200_000
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a,b\n1\n", "line 2: 1 cells where the first line names 2 columns"),
        ("a,b\n1,2\n1,2,3\n", "line 3: 3 cells where the first line names 2 columns"),
        ("a,a\n1,2\n", "line 1: the column 'a' stands there twice"),
        ("a,\n1,2\n", "line 1: a column has no name"),
        ('a,b\n1,"2"3\n', "line 2: not valid CSV"),
        ('a,b\n1,"2\n', "line 2: not valid CSV"),
        (b"a,b\n1,\xe9\n", "not UTF-8"),
        ("a,b\n", "empty file"),
    ],
)
def test_csv_that_is_none(tmp_path: Path, content: str | bytes, complaint: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.csv(, |: ){complaint}"):
        located(tmp_path, "rows.csv", content)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": ' + "[" * 90 + "]" * 90 + "}", "line 2: more than 64 objects and arrays"),
        ("a.jsonl", '{"text": ' + "[" * 10**5, "line 1: more than 64 objects and arrays"),
        ("a.jsonl", '{"text": ' + "1" * 5000 + "}", r"line 1: invalid JSON \(.*4300 digits"),
        ("a.json", '[{"text": ' + '{"a":' * 90 + "1" + "}" * 90 + "}]", "more than 64 objects and arrays"),
        ("a.json", '[{"text": ' + "1" * 5000 + "}]", r"line 1: invalid JSON \(.*4300 digits"),
    ],
)
def test_json_that_nobody_means_in_a_row(tmp_path: Path, name: str, content: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        located(tmp_path, name, content)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_brackets_in_a_text_are_text(tmp_path: Path, name: str) -> None:
    row = {"text": "[{" * 500 + '\\" ]'}
    assert [r for _, r in located(tmp_path, name, json.dumps([row] if name == "a.json" else row))] == [row]


@pytest.mark.parametrize(
    ("name", "said"), [("a.jsonl", "line 1: longer than"), ("a.csv", "has 1,"), ("a.txt", "has 1,")]
)
def test_a_hole_is_not_read(tmp_path: Path, name: str, said: str) -> None:
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(UserError, match=said):
        list(file_rows(tmp_path / name))
