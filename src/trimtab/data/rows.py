"""Raw rows behind what a recipe calls data: files, folders, Python's manual, a dataset of the hub.

Each source yields located rows, still unchecked: `data` converts them, and names their place where they are wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trimtab.errors import UserError, nearest

PYDOC_TOPICS = "pydoc-topics"
HELD_OUT_SPLITS = ("heldout", "test", "validation")

Located = tuple[str, Any]
"""A raw row behind the words that say where it stands, such as `alpaca.jsonl, line 3`."""


def kind(value: object) -> str:
    """What a value is, for people."""
    return "null" if value is None else type(value).__name__


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _decoded(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8-sig")  # Windows tools like to start a file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}: {error.reason}); save the file as UTF-8") from error


def _json_rows(file: Path) -> Iterator[Located]:
    with file.open("rb") as lines:  # in bytes only "\n" ends a line: a raw U+2028 inside a JSON string does not
        for number, raw in enumerate(lines, start=1):
            where = f"{file}, line {number}"
            line = _decoded(raw, where).strip()
            if not line:
                continue
            remedy = "put one JSON object on each line (an array becomes lines with: jq -c '.[]')"
            try:
                row = json.loads(line)
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
                    yield f"{file}, row {number}", row
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


def _folder_rows(folder: Path) -> Iterator[Located]:
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.suffix.lower() in _READERS)
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

    try:
        dataset = load_dataset(path, split=split)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # unknown, offline, bad split, needs a script
        raise UserError(
            f"{path}: not a local file, and the hub did not give the split {split!r} of it ({_one_line(error)}); check "
            f"the name, the split and the network, or download it and give a local file ({_SUFFIXES})"
        ) from error
    for number, row in enumerate(dataset, start=1):
        yield f"{path}, row {number}", row


def located_rows(path: str, split: str) -> Iterator[Located]:
    """Every row of a source, as it stands there; arguments as of `data.load_rows`."""
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
