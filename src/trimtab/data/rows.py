"""From what a recipe calls data (files, folders, Python's manual, a dataset of the hub) to rows in TRL's forms.

`SFTTrainer` derives the loss mask from the form of a row: `{"text"}` learns every token, `{"prompt", "completion"}` only
the completion. People hold their data in four forms, told apart by their keys:

    {"text"}                              ->  {"text"}                                      language modelling
    {"instruction", ("input"), "output"}  ->  {"prompt": [user], "completion": [assistant]}
    {"messages": [..., assistant]}        ->  {"prompt": messages[:-1], "completion": messages[-1:]}
    {"prompt", "completion"}              ->  as they are: two strings, or two lists of messages

So a conversation is trained on its last answer only. TRL's `assistant_only_loss` would train every answer, but needs
`{% generation %}` marks, which most chat templates lack; a prompt and a completion work with every template. Where a
row fits several forms (alpaca has `instruction`, `output` *and* a rendered `text`), the most structured one wins:
messages, prompt, instruction, text. Other keys (ids, sources) are dropped.

Every row is checked here, with its file and line, rather than failing hours later inside a tokenizer; hence rows are
read into memory (`limit` bounds them) instead of being mapped from disk.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.errors import UserError, nearest
from trimtab.extras import require_library

if TYPE_CHECKING:
    from datasets import Dataset

PYDOC_TOPICS = "pydoc-topics"
HELD_OUT_SPLITS = ("heldout", "test", "validation")

Located = tuple[str, Any]
"""A raw row behind the words that say where it stands, such as `alpaca.jsonl, line 3`."""


def _kind(value: object) -> str:
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
                raise UserError(f"{where}: {_kind(row)} where an object is needed; {remedy}")
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
        yield f"{path}, row {number}", row


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


ACCEPTED_FORMS = '{"text"}, {"instruction", "output"} (and "input"), {"messages"} or {"prompt", "completion"}'

Message = dict[str, str]
TrainingRow = dict[str, str | list[Message]]


# --- checking and converting one row ---------------------------------------------------------------------------------


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {_kind(value)} where a string is needed; correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; Arrow and tokenizers fail on it
        raise UserError(f"{where}: {key!r} is not valid Unicode ({error.reason}); correct or remove the row") from error
    return value


def _messages(value: object, key: str, where: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else _kind(value)
        raise UserError(f"{where}: {key!r} is {found} where a list of {{role, content}} messages is needed")
    messages = []
    for index, message in enumerate(value):
        name = f"{key}[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: {name!r} is {_kind(message)} where a {{role, content}} message is needed")
        if message.get("tool_calls"):  # dropping them would teach the model to answer with their empty content
            raise UserError(f"{where}: {name!r} has tool_calls, which are not supported; write the call into 'content'")
        fields = ("role", "content")
        messages.append({field: _string(message.get(field), f"{name}.{field}", where) for field in fields})
    return messages


def _from_text(row: Mapping[str, Any], where: str) -> TrainingRow:
    return {"text": _string(row["text"], "text", where)}


def _from_instruction(row: Mapping[str, Any], where: str) -> TrainingRow:
    prompt = _string(row["instruction"], "instruction", where)
    # A table (parquet, hub) has the column in every row: there null is how "no input" is written.
    extra = "" if row.get("input") is None else _string(row["input"], "input", where)
    answer = _string(row["output"], "output", where)
    return {
        "prompt": [{"role": "user", "content": prompt + ("\n\n" + extra if extra else "")}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _from_messages(row: Mapping[str, Any], where: str) -> TrainingRow:
    messages = _messages(row["messages"], "messages", where)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: 'messages' has no message with the role 'assistant' (roles: {', '.join(roles)})")
    if roles[-1] != "assistant":
        raise UserError(f"{where}: 'messages' ends with the role {roles[-1]!r}; end it with the assistant's answer")
    if len(messages) == 1:
        raise UserError(f"{where}: 'messages' has nothing before the answer; add the user's message, or use 'text'")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _from_prompt(row: Mapping[str, Any], where: str) -> TrainingRow:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return {key: _messages(row[key], key, where) for key in ("prompt", "completion")}
    return {key: _string(row[key], key, where) for key in ("prompt", "completion")}


class _Form(NamedTuple):
    keys: tuple[str, ...]
    """Keys a row must have to be of this form; other keys are allowed."""
    convert: Callable[[Mapping[str, Any], str], TrainingRow]


_FORMS = (  # most structured first: the first whose keys are all there wins
    _Form(("messages",), _from_messages),
    _Form(("prompt", "completion"), _from_prompt),
    _Form(("instruction", "output"), _from_instruction),
    _Form(("text",), _from_text),
)


def _convert(row: Mapping[str, Any], where: str) -> tuple[str, TrainingRow]:
    """The name of the row's form, and the row in TRL's form."""
    for form in _FORMS:
        if all(key in row for key in form.keys):
            converted = form.convert(row, where)
            lists = form.keys[0] == "prompt" and isinstance(converted["prompt"], list)
            return "{" + ", ".join(form.keys) + "}" + (" with message lists" if lists else ""), converted
    found = ", ".join(map(str, row)) or "none"
    raise UserError(f"{where}: unknown form of row (keys: {found}); accepted are {ACCEPTED_FORMS}")


def _converted(rows: Iterable[Located]) -> Iterator[TrainingRow]:
    """Every row in TRL's form, held to the form of the first one."""
    first_form = first_where = ""
    for where, row in rows:
        form, converted = _convert(row, where)
        if not first_form:
            first_form, first_where = form, where
        elif form != first_form:
            raise UserError(f"{where}: the form is {form}, but {first_form} at {first_where}; keep to one form")
        yield converted


# --- the public functions --------------------------------------------------------------------------------------------


def load_rows(path: str, *, split: str = "train", limit: int | None = None) -> Dataset:
    """The rows of `path` in TRL's forms: `{"text"}` or `{"prompt", "completion"}`.

    `path` is a file of JSON lines (`.jsonl`, `.json`), a `.parquet` file, a text (`.txt`, `.md`: one document a file),
    a directory of such files of one kind (all of them, sorted by name), `pydoc-topics`, or the id of a hub dataset (with
    `@commit` for one state of it).
    `split` is for the last two; `pydoc-topics` has `train` and `heldout`. At most `limit` rows are read and checked.
    """
    require_library(f"reading {path}", "datasets")
    from datasets import Dataset, Features, Value

    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} rows asked of {path}; give at least 1, or leave it out for all rows")
    rows = list(_converted(islice(_located_rows(path, split), limit)))
    if not rows:  # a file says so itself, with its name; what is left is an empty split of a hub dataset
        raise UserError(f"{path}: no rows in the split {split!r}; choose another split")
    # Stated, not inferred: the schema must not depend on the rows that happen to come first.
    message_list = [{"role": Value("string"), "content": Value("string")}]
    features = {key: message_list if isinstance(value, list) else Value("string") for key, value in rows[0].items()}
    return Dataset.from_dict({key: [row[key] for row in rows] for key in features}, features=Features(features))


def conversational(dataset: Dataset) -> bool:
    """Whether the rows are lists of messages, which need a chat template, rather than plain strings."""
    from datasets import Value

    return "prompt" in dataset.features and not isinstance(dataset.features["prompt"], Value)
