"""From what a recipe calls data (files, folders, Python's manual, a dataset of the hub) to rows in TRL's forms.

What one row may hold, and what becomes of it, is in `forms`. Every row is checked here, with its file and line, rather than
failing hours later inside a tokenizer; hence rows are read into memory (`limit` bounds them) instead of being mapped from
disk.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.data.forms import RENDERING, Converted, convert, kind
from trimtab.errors import UserError, nearest
from trimtab.extras import require_library

if TYPE_CHECKING:
    from datasets import Dataset

PYDOC_TOPICS = "pydoc-topics"
HELD_OUT_SPLITS = ("heldout", "test", "validation")

Located = tuple[str, Any]
"""A raw row behind the words that say where it stands, such as `alpaca.jsonl, line 3`."""


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows tools like to start a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}: {error.reason}); save the file as UTF-8") from error


def _object(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    """A JSON object; a key that stands in it twice has two values, of which Python would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise UserError(f"{where}: the key {twice!r} stands in one object twice; remove one of them")
    return found


def _of_table(row: dict[str, Any]) -> dict[str, Any]:
    """A table's row: a struct has every field of its column, null where the row had none."""

    def without(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: without(v) for k, v in value.items() if v is not None}
        return [without(v) for v in value] if isinstance(value, list) else value

    return {key: without(value) for key, value in row.items()}


def _json_rows(file: Path) -> Iterator[Located]:
    with file.open("rb") as lines:  # in bytes only "\n" ends a line: a raw U+2028 inside a JSON string does not
        for number, raw in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            line = _decoded(raw, where).strip()
            if not line:
                continue
            remedy = "put one JSON object on each line (an array becomes lines with: jq -c '.[]')"
            try:
                row = json.loads(line, object_pairs_hook=partial(_object, where=where))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: invalid JSON ({error.msg}, column {error.colno}); {remedy}") from error
            if not isinstance(row, dict):
                raise UserError(f"{where}: {kind(row)} where an object is needed; {remedy}")
            yield where, row


def _parquet_rows(file: Path) -> Iterator[Located]:
    import pyarrow  # type: ignore[import-untyped, unused-ignore]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            for batch in table.iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield f"{file}, row {number}", _of_table(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as parquet after row {number}: {_one_line(error)}") from error


def _text_rows(file: Path) -> Iterator[Located]:
    text = _decoded(file.read_bytes(), str(file)).replace("\r\n", "\n")
    if text.strip():
        yield str(file), {"text": text}


_READERS: dict[str, Callable[[Path], Iterator[Located]]] = {
    ".jsonl": _json_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".txt": _text_rows,
    ".md": _text_rows,
}
_SUFFIXES = ", ".join(_READERS)


def _file_rows(file: Path) -> Iterator[Located]:
    reader = _READERS.get(file.suffix.lower())
    if reader is None:
        raise UserError(f"{file}: unknown kind of file {file.suffix!r}; give one of {_SUFFIXES}")
    empty = True
    for located in reader(file):
        empty = False
        yield located
    if empty:
        raise UserError(f"{file}: empty file; give at least one row")


def data_files(folder: Path) -> list[Path]:
    """The files of a directory that are read as data, sorted."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _READERS)


def _folder_rows(folder: Path) -> Iterator[Located]:
    files = data_files(folder)
    if not files:
        raise UserError(f"{folder}: no data files in this directory; it must hold one of {_SUFFIXES}")
    for file in files:
        if _READERS[file.suffix.lower()] is not _READERS[files[0].suffix.lower()]:
            names = f"{files[0].name} and {file.name}"
            raise UserError(f"{folder}: files of different kinds ({names}); give a directory of one kind, or one file")
    for file in files:
        yield from _file_rows(file)


def _pydoc_rows(split: str) -> Iterator[Located]:
    """Python's own reference manual: every 8th topic, in sorted order, is held out.

    The manual repeats itself: whole sections are topics of their own as well (`exceptions` is a part of `execmodel`),
    and 18 % of the held-out 13-grams would also stand in the training text. So training topics lose the paragraphs that
    a held-out topic has too: 0.4 % remain, for 1.4 % of the training text. The text differs between Python versions.
    """
    from pydoc_data.topics import topics

    if split not in ("train", *HELD_OUT_SPLITS):
        hint = nearest(split, ["train", *HELD_OUT_SPLITS])
        raise UserError(f"{PYDOC_TOPICS}: no split {split!r}{hint}; its splits are 'train' and 'heldout'")
    names = sorted(topics)
    held_out = names[7::8]
    if split != "train":
        yield from ((f"{PYDOC_TOPICS}, topic {name}", {"text": topics[name]}) for name in held_out)
        return
    seen = {" ".join(paragraph.split()) for name in held_out for paragraph in topics[name].split("\n\n")}
    leaks = {paragraph for paragraph in seen if len(paragraph) >= 40}  # shorter ones ("See also:") are stock phrases
    for name in names:
        if name not in held_out:
            kept = [part for part in topics[name].split("\n\n") if " ".join(part.split()) not in leaks]
            yield f"{PYDOC_TOPICS}, topic {name}", {"text": "\n\n".join(kept)}


def _hub_rows(path: str, split: str) -> Iterator[Located]:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repo, _, commit = path.partition("@")
    try:
        dataset = load_dataset(repo, split=split, **({"revision": commit} if commit else {}))
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # unknown, offline, bad split, needs a script
        raise UserError(
            f"{path}: not a local file, and the hub did not give the split {split!r} of it ({_one_line(error)}); check "
            f"the name, the split and the network, or download it and give a local file ({_SUFFIXES})"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{path}, row {number}", _of_table(row)


def _located_rows(path: str, split: str) -> Iterator[Located]:
    """Every row of a source, as it stands there; arguments as of `load_rows`."""
    if path == PYDOC_TOPICS:
        return _pydoc_rows(split)
    local = Path(path).expanduser()
    if local.is_file() or local.is_dir():
        if split != "train":
            # Handing out the same rows under another name would evaluate on the training data.
            raise UserError(f"{path}: local data has no split {split!r}; give those rows as a file of their own")
        return _folder_rows(local) if local.is_dir() else _file_rows(local)
    # One slash exactly: without an owner, `load_dataset` takes "json" or "text" for a loader of the working directory.
    if local.suffix.lower() in _READERS or path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(f"{path}: no such file or directory; check the path (a hub dataset is named owner/name)")
    return _hub_rows(path, split)


def _converted(rows: Iterable[Located], ignore: Sequence[str]) -> Iterator[Converted]:
    """Every row in TRL's form, held to the form of the first one."""
    first_form = first_where = ""
    for where, row in rows:
        found = convert(row, where, ignore)
        if not first_form:
            first_form, first_where = found.form, where
        elif found.form != first_form:
            raise UserError(f"{where}: the form is {found.form}, but {first_form} at {first_where}; keep to one form")
        yield found


# --- the public functions --------------------------------------------------------------------------------------------


def load_rows(path: str, *, split: str = "train", limit: int | None = None, ignore: Sequence[str] = ()) -> Dataset:
    """The rows of `path` in TRL's forms: `{"text"}` or `{"prompt", "completion"}`.

    `path` is a file of JSON lines (`.jsonl`, `.json`), a `.parquet` file, a text (`.txt`, `.md`: one document a file),
    a directory of such files of one kind (all of them, sorted by name), `pydoc-topics`, or the id of a hub dataset (with
    `@commit` for one state of it).
    `split` is for the last two; `pydoc-topics` has `train` and `heldout`. At most `limit` rows are read and checked.
    `ignore` are keys of rows that belong neither to prompt nor to answer; see `forms` for those that are known.
    """
    require_library(f"reading {path}", "datasets")
    from datasets import Dataset, DatasetInfo, Features, Value

    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} rows asked of {path}; give at least 1, or leave it out for all rows")
    found = list(_converted(islice(_located_rows(path, split), limit), ignore))
    if not found:  # a file says so itself, with its name; what is left is an empty split of a hub dataset
        raise UserError(f"{path}: no rows in the split {split!r}; choose another split")
    # Stated, not inferred: the schema must not depend on the rows that happen to come first.
    message_list = [{"role": Value("string"), "content": Value("string")}]
    features = {k: message_list if isinstance(value, list) else Value("string") for k, value in found[0].row.items()}
    columns: dict[str, list[Any]] = {key: [row.row[key] for row in found] for key in features}
    if any(row.rendering for row in found):
        features[RENDERING] = Value("string")
        columns[RENDERING] = [json.dumps(row.rendering) for row in found]
    unused = ", ".join(sorted(set().union(*(row.unused for row in found))))
    return Dataset.from_dict(columns, info=DatasetInfo(description=unused, features=Features(features)))


def unused_keys(dataset: Dataset) -> str:
    """The keys of its rows that nothing is done with, as `load_rows` noted them: `id, source`."""
    return str(dataset.info.description)


class Place(NamedTuple):
    """A row's number, and where in its source it stands, found when asked for: `row 2 (alpaca.jsonl, line 3)`."""

    path: str
    split: str
    number: int
    """From 1."""

    def __str__(self) -> str:
        rows = islice(_located_rows(self.path, self.split), self.number - 1, None)
        return f"row {self.number}" + "".join(f" ({where})" for where, _ in islice(rows, 1))


def conversational(dataset: Dataset) -> bool:
    """Whether the rows are lists of messages, which need a chat template, rather than plain strings."""
    from datasets import Value

    return "prompt" in dataset.features and not isinstance(dataset.features["prompt"], Value)
