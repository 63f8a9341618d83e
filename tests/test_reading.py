"""Files from an untrusted source: what is opened, how much of it is believed, and what is said."""

import json
import os
from pathlib import Path

import pytest

from trimtab import reading
from trimtab.errors import UserError, in_one_line


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "file.json"


def test_json_is_what_json_is(file: Path) -> None:
    values = {"a": [1, 2.5, None, True, "ü"], "b": {"c": -(10**30)}}
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(values).encode())
    assert reading.read_json(file) == values
    assert reading.read_mapping(file) == values


def nested(levels: int) -> str:
    return "[" * levels + "]" * levels


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON"),
        ("1" * 5000, "not valid JSON .*4300 digits"),
        (nested(reading.DEEPEST + 1), "more than 64 lists"),
        (nested(100_000), "not valid JSON"),
        ('{"a":' * 100_000, "not valid JSON"),
        (b"\xff", "is not UTF-8"),
    ],
)
def test_json_that_nobody_means(file: Path, text: str | bytes, said: str) -> None:
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=rf"file\.json: .*{said}.*; fix it$"):
        reading.read_json(file, "fix it")


def test_as_deep_as_it_may_be(file: Path) -> None:
    file.write_text(nested(reading.DEEPEST))
    assert reading.read_json(file)
    with pytest.raises(UserError, match="no mapping of keys"):
        reading.read_mapping(file)


def fifo(file: Path) -> None:
    os.mkfifo(file)


def hole(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(2**40)


PLACES = {
    "a pipe, socket or device": fifo,
    "a folder": Path.mkdir,
    "1,099,511,627,776 bytes": hole,
    "a link to nothing": lambda file: file.symlink_to("nowhere"),
    "pipe, socket or device": lambda file: file.symlink_to("/dev/zero"),
    "cannot be read": lambda file: file.symlink_to(file.name),
    "No such file": lambda file: None,
}


@pytest.mark.parametrize("said", PLACES)
def test_what_lies_there_is_a_file(file: Path, said: str) -> None:
    PLACES[said](file)
    with pytest.raises(UserError, match=rf"file\.json: .*{said}"):
        reading.read_text(file)


def test_what_is_not_there_may_be_looked_at(file: Path) -> None:
    reading.require_regular(file)


class PanicException(BaseException):
    """As Rust's pyo3 names it, and where it stands."""


class StrictDataclassError(Exception):
    """As huggingface_hub's."""


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("a\n  b"), "a b"),
        (TypeError(), "TypeError"),
        (RecursionError("deep"), "RecursionError: deep"),
        (Exception("no variant"), "no variant"),
        (PanicException("index"), "PanicException: index"),
        (StrictDataclassError("field"), "StrictDataclassError: field"),
    ],
)
def test_what_a_library_fails_with_is_told(error: BaseException, said: str) -> None:
    with pytest.raises(UserError) as raised, reading.told(lambda words: f"<{words}>"):
        raise error
    assert str(raised.value) == f"<{said}>"
    assert raised.value.__cause__ is error


class Own(Exception):
    """Of somebody who did not mean a file."""


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError(), UserError("mine"), Own()])
def test_what_is_not_about_the_file_passes(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, reading.told(lambda words: "told"):
        raise error
    assert raised.value is error


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a: b; ü 漢 «c»", "a: b; ü 漢 «c»"),
        ("a\n  b\r\nc", "a b c"),
        ("\x1b[31mred\x00", "\\x1b[31mred\\x00"),
        ("\ud800 \u202e", "\\ud800 \\u202e"),
    ],
)
def test_a_message_is_one_printable_line(text: str, shown: str) -> None:
    assert str(UserError(text)) == shown
    assert in_one_line(shown) == shown


def test_a_long_message_keeps_its_ends() -> None:
    said = str(UserError("x.json: " + "y" * 10**6 + "; fetch it again"))
    assert len(said) < 1300
    assert said.startswith("x.json: yyy")
    assert said.endswith("; fetch it again")
