"""Files of rows: JSON lines and arrays, CSV, Parquet and plain texts, each row with the words that say where it is."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from trimtab.data.messages import kind
from trimtab.errors import UserError
from trimtab.reading import DEEPEST, first_line, require_regular

Located = tuple[str, Any]
"""A raw row behind the words that say where it stands, such as `alpaca.jsonl, line 3`."""


def one_line(error: Exception) -> str:
    """An error of another library, for the end of one of ours."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows tools like to start a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}: {error.reason}); save the file as UTF-8") from error


def _whole(file: Path) -> str:
    require_regular(file, _MOST_AS_A_WHOLE, "make it JSON lines (.jsonl), which are read one after another")
    return _decoded(file.read_bytes(), str(file))


# --- JSON ------------------------------------------------------------------------------------------------------------

_MOST_OF_A_LINE, _MOST_AS_A_WHOLE = 2**28, 2**30
"""Bytes of a row, and of a file that is read as a whole: a hole of terabytes takes no room on a disk."""
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[\]{}]')
_REMEDY = "put one JSON object on each line (an array becomes lines with: jq -c '.[]')"
_ARRAY = "correct the array: its objects stand between [ and ], with a comma after each but the last"


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """A JSON object; a key that stands in it twice has two values, of which Python would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"{where}: the key {twice!r} stands in one object twice; remove one of them")
    return found


def _json_rows(file: Path) -> Iterator[Located]:
    with file.open("rb") as lines:
        head = lines.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"[") and (file.suffix.lower() == ".json" or head[1:].lstrip()[:1] in (b"", b"{")):
        yield from _array_rows(file)
    else:
        yield from _line_rows(file)


def _line_rows(file: Path) -> Iterator[Located]:
    with file.open("rb") as lines:  # in bytes only "\n" ends a line: a raw U+2028 inside a JSON string does not
        for number, raw in enumerate(iter(partial(lines.readline, _MOST_OF_A_LINE + 1), b""), start=1):
            where = f"{file}, line {number}"
            if len(raw) > _MOST_OF_A_LINE:
                raise UserError(f"{where}: longer than {_MOST_OF_A_LINE:,} bytes; {_REMEDY}")
            line = _decoded(raw, where).strip()
            if not line:
                continue
            _check_depth(line, where, _REMEDY)
            try:
                with _digits(where, _REMEDY):
                    row = json.loads(line, object_pairs_hook=partial(_object, where=where))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: invalid JSON ({error.msg}, column {error.colno}); {_REMEDY}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: {kind(row)} where an object is needed; {_REMEDY}")
            yield where, row


def _check_depth(text: str, where: str, remedy: str) -> None:
    """Refuse objects in one another without end, which are JSON, and which nobody means."""
    if (text.count("[") > DEEPEST or text.count("{") > DEEPEST) and _deepest(text) > DEEPEST:
        raise UserError(f"{where}: more than {DEEPEST} objects and arrays in one another; {remedy}")


@contextmanager
def _digits(where: str, remedy: str) -> Iterator[None]:
    """Refuse an integer of thousands of digits, which Python's parser answers with a plain ValueError."""
    try:
        yield
    except (UserError, json.JSONDecodeError):
        raise
    except ValueError as error:
        raise UserError(f"{where}: invalid JSON ({first_line(error)}); {remedy}") from error


def _deepest(text: str) -> int:
    """How many brackets are open at once, at most, without those in strings."""
    depth = deepest = 0
    for part in _BRACKET.findall(text):
        depth += (part in "[{") - (part in "]}")
        deepest = max(deepest, depth)
    return deepest


def _array_rows(file: Path) -> Iterator[Located]:
    """The objects of one array, one after another, so that each is known by the line that it begins in."""
    text = _whole(file)
    _check_depth(text, str(file), _ARRAY)
    at = text.index("[") + 1
    line, seen = 1, 0
    separator = ""  # what must stand before the next object
    while True:
        at = _behind_space(text, at)
        line, seen = line + text.count("\n", seen, at), at
        where = f"{file}, line {line}"
        token = text[at : at + 1]
        if token == "]":
            if text[at + 1 :].strip():
                raise UserError(f"{where}: something stands behind the array's end; {_ARRAY}")
            return
        if separator:
            if token != separator:
                raise UserError(f"{where}: invalid JSON (no ',' or ']' behind an object of the array); {_ARRAY}")
            at = _behind_space(text, at + 1)
            line, seen = line + text.count("\n", seen, at), at
            where = f"{file}, line {line}"
        try:
            with _digits(where, _ARRAY):
                row, at = json.JSONDecoder(object_pairs_hook=partial(_object, where=where)).raw_decode(text, at)
        except json.JSONDecodeError as error:
            raise UserError(
                f"{file}, line {error.lineno}: invalid JSON ({error.msg}, column {error.colno}); {_ARRAY}"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{where}: {kind(row)} where an object is needed; {_ARRAY}")
        separator = ","
        yield where, row


def _behind_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


# --- tables and texts ------------------------------------------------------------------------------------------------


def of_table(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row: a struct has every field of its column, null where the row had none."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if v is not None}
        return [without(v) for v in value] if isinstance(value, list) else value

    return {key: without(value) for key, value in row.items()}


def _csv_rows(file: Path) -> Iterator[Located]:
    """Rows of a CSV or TSV file, by the names in its first line; every cell is a string."""
    text = _whole(file)
    first = text.partition("\n")[0]
    between = next((d for d in ("\t", ",", ";") if d in first), ",")
    limit = csv.field_size_limit(
        max(len(text), 1)
    )  # an answer may be longer than what the csv module takes for a mistake
    try:
        found = list(_cells(file, csv.reader(io.StringIO(text, newline=""), delimiter=between, strict=True)))
    finally:
        csv.field_size_limit(limit)
    yield from found


def _cells(file: Path, reader: Any) -> Iterator[Located]:
    try:
        names: list[str] = next(reader, [])
        twice = [name for name, count in Counter(names).items() if count > 1]
        if twice or "" in names:
            what = f"the column {twice[0]!r} stands there twice" if twice else "a column has no name"
            raise UserError(f"{file}, line 1: {what}; correct the first line, which names the columns")
        for cells in reader:
            where = f"{file}, line {reader.line_num}"
            if cells and len(cells) != len(names):
                raise UserError(
                    f"{where}: {len(cells)} cells where the first line names {len(names)} columns; put a cell with a "
                    'comma, a quote or a line break into double quotes (quotes in it doubled: "")'
                )
            if cells:
                yield where, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num}: not valid CSV ({error}); correct the quotes") from error


def _parquet_rows(file: Path) -> Iterator[Located]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", of_table(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as parquet after row {number}: {one_line(error)}") from error


def _text_rows(file: Path) -> Iterator[Located]:
    text = _whole(file).replace("\r\n", "\n")
    if text.strip():
        yield str(file), {"text": text}


# --- files and folders -----------------------------------------------------------------------------------------------

READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".txt": _text_rows,
    ".md": _text_rows,
}
"""Readers by a file's suffix."""
SUFFIXES = ", ".join(READERS)


def file_rows(file: Path) -> Iterator[Located]:
    """Every row of a file; an empty one is refused."""
    reader = READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: unknown kind of file {file.suffix!r}; give one of {SUFFIXES}")
    empty = True
    for located in reader(file):
        empty = False
        yield located
    if empty:
        raise UserError(f"{file}: empty file; give at least one row")


def data_files(folder: Path) -> list[Path]:
    """The files of a directory that are read as data, sorted."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in READERS)


def folder_rows(folder: Path) -> Iterator[Located]:
    """Every row of a directory's files, which are of one kind."""
    files = data_files(folder)
    if not files:
        raise UserError(f"{folder}: no data files in this directory; it must hold one of {SUFFIXES}")
    for file in files:
        if READERS[file.suffix.lower()] is not READERS[files[0].suffix.lower()]:
            names = f"{files[0].name} and {file.name}"
            raise UserError(f"{folder}: files of different kinds ({names}); give a directory of one kind, or one file")
    for file in files:
        yield from file_rows(file)
