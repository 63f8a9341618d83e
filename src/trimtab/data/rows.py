"""From what a recipe calls data (files, folders, Python's manual, a dataset of the hub) to rows in TRL's forms.

How files hold rows is in `files`, what one row may hold and what becomes of it in `forms`. Every row is checked here, with
its file and line, rather than failing hours later inside a tokenizer. They are converted one at a time; few stay in memory,
many go into a file of the cache, which is mapped (`stored`).
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.data.columns import check_columns, renamed
from trimtab.data.digests import joined, of_code
from trimtab.data.files import READERS, SUFFIXES, Located, data_files, file_rows, folder_rows, of_table, one_line
from trimtab.data.forms import RENDERING, Converted, convert
from trimtab.data.hashes import digest
from trimtab.data.portions import batches
from trimtab.data.stored import Stored, collect, find, sought, store
from trimtab.errors import UserError, nearest
from trimtab.extras import require_library

if TYPE_CHECKING:
    from datasets import Dataset

PYDOC_TOPICS = "pydoc-topics"
HELD_OUT_SPLITS = ("heldout", "test", "validation")


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


def _hub_set(path: str, split: str, subset: str | None, stream: bool) -> Any:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    repo, _, commit = path.partition("@")
    options: dict[str, Any] = ({"revision": commit} if commit else {}) | ({"name": subset} if subset else {})
    options |= {"streaming": True} if stream else {}
    try:
        return load_dataset(repo, split=split, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # unknown, offline, bad split, needs a script
        of = f" of {subset!r}" if subset else ""
        raise UserError(
            f"{path}: not a local file, and the hub did not give the split {split!r}{of} of it ({one_line(error)}); check "
            f"the name, the split and the network, or download it and give a local file ({SUFFIXES})"
        ) from error


def _hub_rows(path: str, dataset: Any) -> Iterator[Located]:
    from datasets import ClassLabel

    classes = {key: of for key, of in (getattr(dataset, "features", None) or {}).items() if isinstance(of, ClassLabel)}
    for number, row in enumerate(_unbroken(path, dataset), start=1):
        found = of_table(row)
        # A class is its name, which is what a model can be taught to say; -1 is how the hub writes that there is none.
        named = {k: of.int2str(found[k]) for k, of in classes.items() if isinstance(found[k], int) and found[k] >= 0}
        yield f"{path}, row {number}", found | named


def _unbroken(path: str, dataset: Any) -> Iterator[Any]:
    """Its rows; a stream may break off."""
    from datasets.exceptions import DatasetsError

    try:
        yield from dataset
    except (DatasetsError, OSError, RuntimeError) as error:
        raise UserError(f"{path}: the hub broke off ({one_line(error)}); try again, or download it") from error


class Opened(NamedTuple):
    """A source that is there."""

    rows: Iterator[Located]
    """Every row of it, as it stands there."""
    mark: Callable[[], Any]
    """What changes with anything in it."""
    many: bool
    """Whether there may be so many that they were stored."""


def opened(path: str, split: str = "train", subset: str | None = None, stream: bool = False) -> Opened:
    """A source; arguments as of `load_rows`."""
    local = Path(path).expanduser()
    here = local.is_file() or local.is_dir()
    if subset is not None and (here or path == PYDOC_TOPICS):
        raise UserError(f"{path}: has no subsets ({subset!r}); only a data set of the hub has")
    if path == PYDOC_TOPICS:
        return Opened(_pydoc_rows(split), lambda: [path, sys.version], many=False)
    if here:
        if split != "train":
            # Handing out the same rows under another name would evaluate on the training data.
            raise UserError(f"{path}: local data has no split {split!r}; give those rows as a file of their own")
        files = data_files(local) if local.is_dir() else [local]
        rows = folder_rows(local) if local.is_dir() else file_rows(local)
        many = sought(sum(file.stat().st_size for file in files))
        return Opened(rows, lambda: [[file.suffix, digest(file, keep=True)] for file in files], many)
    if not on_hub(path):
        raise UserError(f"{path}: no such file or directory; check the path (a hub dataset is named owner/name)")
    dataset = _hub_set(path, split, subset, stream)
    if stream:  # a commit holds the same whenever it is read; what is not pinned may be another tomorrow
        pinned = re.fullmatch(r"[0-9a-f]{40}", path.partition("@")[2]) is not None
        return Opened(_hub_rows(path, dataset), lambda: [path] if pinned else [path, time.time()], pinned)
    fetched = [Path(file["filename"]) for file in getattr(dataset, "cache_files", ())]
    mark = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in fetched]
    return Opened(_hub_rows(path, dataset), lambda: mark, bool(mark))


def located_rows(path: str, split: str = "train", subset: str | None = None, stream: bool = False) -> Iterator[Located]:
    """Every row of a source, as it stands there; arguments as of `load_rows`."""
    return opened(path, split, subset, stream).rows


def on_hub(path: str) -> bool:
    """Whether a path is the id of a data set of the hub, with or without a revision."""
    local = Path(path).expanduser()
    if local.is_file() or local.is_dir() or local.suffix.lower() in READERS or path.startswith((".", "/", "~")):
        return False
    # One slash exactly: without an owner, `load_dataset` takes "json" or "text" for a loader of the working directory.
    return path.partition("@")[0].count("/") == 1


def _converted(rows: Iterable[Located], ignore: Sequence[str], columns: Mapping[str, str]) -> Iterator[Converted]:
    """Every row in TRL's form, held to the form of the first one."""
    first_form = first_where = ""
    for where, row in rows:
        found = convert(renamed(row, columns, where, ignore) if columns else row, where, ignore)
        if not first_form:
            first_form, first_where = found.form, where
        elif found.form != first_form:
            raise UserError(f"{where}: the form is {found.form}, but {first_form} at {first_where}; keep to one form")
        yield found


# --- the public functions --------------------------------------------------------------------------------------------


def load_rows(
    path: str,
    *,
    split: str = "train",
    subset: str | None = None,
    limit: int | None = None,
    ignore: Sequence[str] = (),
    columns: Mapping[str, str] | None = None,
    stream: bool = False,
) -> Dataset:
    """The rows of `path` in TRL's forms: `{"text"}`, `{"prompt", "completion"}` or `{"prompt", "chosen", "rejected"}`.

    `path` is a file of JSON lines or a JSON array (`.jsonl`, `.json`), of `.csv` or `.tsv`, a `.parquet` file, a text
    (`.txt`, `.md`: one document a file), a directory of such files of one kind (all of them, sorted by name),
    `pydoc-topics`, or the id of a hub dataset (with `@` and a commit, tag or branch for one state of it).
    `split` is for the last two, `subset` (its configuration) for the last; `pydoc-topics` has `train` and `heldout`.
    At most `limit` rows are read and checked. `ignore` are keys of rows that belong neither to prompt nor to answer; see
    `forms` for those that are known. `columns` gives a row's own keys the names of a form, see `columns`. `stream` takes
    rows of the hub as they come, without fetching all of them first.
    """
    reading = _Reading(path, split, subset, limit, ignore, columns or {}, stream)
    found = find(reading.key(limit)) if reading.source.many else None
    found = _collected(reading.rows(), reading.key) if found is None else found
    return found.rows if found.about["rendered"] else found.rows.remove_columns(RENDERING)


def rows_until(enough: Callable[[dict[str, Any]], bool], of: Callable[[], Any], path: str, **options: Any) -> int:
    """How many rows of a source there have to be: they are stored, and `load_rows` finds them by that `limit`.

    Args:
        enough: told of every row, and says when there are enough.
        of: what its answer follows from; asked where they are many.
        path: as of `load_rows`.
        options: the same.
    """
    reading = _Reading(path, **options)
    key = joined("until", reading.key(options["limit"]), of()) if reading.source.many else ""
    known = find(key) if key else None
    if known is not None:
        return int(known.rows[0]["rows"][0])
    count = 0

    def some() -> Iterator[Converted]:
        nonlocal count
        for row in reading.rows():
            count += 1
            yield row
            if enough({**row.row, RENDERING: json.dumps(row.rendering)}):
                return

    _collected(some(), lambda: reading.key(count), few_bytes=0 if reading.source.many else None)
    if key:
        store(key, {"rows": [count]}, {})
    return count


class _Reading:
    """A source that is read; arguments as of `load_rows`."""

    def __init__(
        self, path: str, split: str, subset: str | None, limit: int | None, ignore: Sequence[str],
        columns: Mapping[str, str], stream: bool,
    ) -> None:  # fmt: skip
        require_library(f"reading {path}", "datasets")
        check_columns(columns)
        if limit is not None and limit < 1:
            raise UserError(f"limit: {limit} rows asked of {path}; give at least 1, or leave it out for all rows")
        self.source = opened(path, split, subset, stream)
        self._path, self._split, self._subset, self._limit = path, split, subset, limit
        self._ignore, self._columns = ignore, columns

    def key(self, limit: int | None = None) -> str:
        """What its first rows, or all, are stored under."""
        kept: list[Any] = [self._split, self._subset, self._limit if limit is None else limit]
        kept += [sorted(self._ignore), sorted(self._columns.items())]
        return joined("rows", self.source.mark(), kept, of_code())

    def rows(self) -> Iterator[Converted]:
        """Every row; at least one."""
        found = _converted(islice(self.source.rows, self._limit), self._ignore, self._columns)
        first = next(found, None)
        if first is None:  # a file says so itself, with its name; what is left is an empty split of a hub dataset
            raise UserError(f"{self._path}: no rows in the split {self._split!r}; choose another split")
        yield from chain([first], found)


def _collected(found: Iterator[Converted], key: Callable[[], str], few_bytes: int | None = None) -> Stored:
    """Converted rows, all with the column `RENDERING`; `about` says whether it says anything."""
    from datasets import Features, Value

    first = next(found)

    # Stated, not inferred: the schema must not depend on the rows that happen to come first.
    message_list = [{"role": Value("string"), "content": Value("string")}]
    kinds = {list: message_list, bool: Value("bool"), str: Value("string")}
    features = {key: kinds[type(value)] for key, value in first.row.items()} | {RENDERING: Value("string")}
    unused, rendered = set[str](), False

    def rows() -> Iterator[dict[str, Any]]:
        nonlocal rendered
        for row in chain([first], found):
            unused.update(row.unused)
            rendered = rendered or bool(row.rendering)
            yield {**row.row, RENDERING: json.dumps(row.rendering)}

    def about() -> dict[str, Any]:
        return {"unused": ", ".join(sorted(unused)), "rendered": rendered}

    return collect(Features(features), batches(rows()), key, about, few_bytes)


def unused_keys(dataset: Dataset) -> str:
    """The keys of its rows that nothing is done with, as `load_rows` noted them: `id, source`."""
    return str(dataset.info.description)


class Place(NamedTuple):
    """A row's number, and where in its source it stands, found when asked for: `row 2 (alpaca.jsonl, line 3)`."""

    path: str
    split: str
    number: int
    """From 1."""
    subset: str | None = None
    stream: bool = False
    """Whether what is behind it stays where it is."""

    def __str__(self) -> str:
        rows = islice(located_rows(self.path, self.split, self.subset, self.stream), self.number - 1, None)
        return f"row {self.number}" + "".join(f" ({where})" for where, _ in islice(rows, 1))


def conversational(dataset: Dataset) -> bool:
    """Whether the rows are lists of messages, which need a chat template, rather than plain strings."""
    from datasets import Value

    return "prompt" in dataset.features and not isinstance(dataset.features["prompt"], Value)


def judged(dataset: Dataset) -> bool:
    """Whether the rows are preferences, which DPO and KTO train on, rather than answers to learn."""
    return "chosen" in dataset.features or "label" in dataset.features


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars of the library datasets within: what is done there is over in a moment."""
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
