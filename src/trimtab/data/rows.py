"""From what a recipe calls data (files, folders, Python's manual, a dataset of the hub) to rows in TRL's forms.

How files hold rows is in `files`, what one row may hold and what becomes of it in `forms`. Every row is checked here, with
its file and line, rather than failing hours later inside a tokenizer; hence rows are read into memory (`limit` bounds them)
instead of being mapped from disk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.data.columns import check_columns, renamed
from trimtab.data.files import READERS, SUFFIXES, Located, file_rows, folder_rows, of_table, one_line
from trimtab.data.forms import RENDERING, Converted, convert
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


def _hub_rows(path: str, split: str, subset: str | None) -> Iterator[Located]:
    from datasets import ClassLabel, load_dataset
    from datasets.exceptions import DatasetsError

    repo, _, commit = path.partition("@")
    options = ({"revision": commit} if commit else {}) | ({"name": subset} if subset else {})
    try:
        dataset = load_dataset(repo, split=split, **options)
    except (DatasetsError, OSError, ValueError, RuntimeError) as error:  # unknown, offline, bad split, needs a script
        of = f" of {subset!r}" if subset else ""
        raise UserError(
            f"{path}: not a local file, and the hub did not give the split {split!r}{of} of it ({one_line(error)}); check "
            f"the name, the split and the network, or download it and give a local file ({SUFFIXES})"
        ) from error
    classes = {key: of for key, of in (getattr(dataset, "features", None) or {}).items() if isinstance(of, ClassLabel)}
    for number, row in enumerate(dataset, start=1):
        found = of_table(row)
        # A class is its name, which is what a model can be taught to say; -1 is how the hub writes that there is none.
        named = {k: of.int2str(found[k]) for k, of in classes.items() if isinstance(found[k], int) and found[k] >= 0}
        yield f"{path}, row {number}", found | named


def located_rows(path: str, split: str = "train", subset: str | None = None) -> Iterator[Located]:
    """Every row of a source, as it stands there; arguments as of `load_rows`."""
    local = Path(path).expanduser()
    here = local.is_file() or local.is_dir()
    if subset is not None and (here or path == PYDOC_TOPICS):
        raise UserError(f"{path}: has no subsets ({subset!r}); only a data set of the hub has")
    if path == PYDOC_TOPICS:
        return _pydoc_rows(split)
    if here:
        if split != "train":
            # Handing out the same rows under another name would evaluate on the training data.
            raise UserError(f"{path}: local data has no split {split!r}; give those rows as a file of their own")
        return folder_rows(local) if local.is_dir() else file_rows(local)
    # One slash exactly: without an owner, `load_dataset` takes "json" or "text" for a loader of the working directory.
    if local.suffix.lower() in READERS or path.startswith((".", "/", "~")) or path.partition("@")[0].count("/") != 1:
        raise UserError(f"{path}: no such file or directory; check the path (a hub dataset is named owner/name)")
    return _hub_rows(path, split, subset)


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
) -> Dataset:
    """The rows of `path` in TRL's forms: `{"text"}`, `{"prompt", "completion"}` or `{"prompt", "chosen", "rejected"}`.

    `path` is a file of JSON lines or a JSON array (`.jsonl`, `.json`), of `.csv` or `.tsv`, a `.parquet` file, a text
    (`.txt`, `.md`: one document a file), a directory of such files of one kind (all of them, sorted by name),
    `pydoc-topics`, or the id of a hub dataset (with `@` and a commit, tag or branch for one state of it).
    `split` is for the last two, `subset` (its configuration) for the last; `pydoc-topics` has `train` and `heldout`.
    At most `limit` rows are read and checked. `ignore` are keys of rows that belong neither to prompt nor to answer; see
    `forms` for those that are known. `columns` gives a row's own keys the names of a form, see `columns`.
    """
    require_library(f"reading {path}", "datasets")
    check_columns(columns or {})
    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} rows asked of {path}; give at least 1, or leave it out for all rows")
    found = list(_converted(islice(located_rows(path, split, subset), limit), ignore, columns or {}))
    if not found:  # a file says so itself, with its name; what is left is an empty split of a hub dataset
        raise UserError(f"{path}: no rows in the split {split!r}; choose another split")
    return _dataset(found)


def _dataset(found: list[Converted]) -> Dataset:
    from datasets import Dataset, DatasetInfo, Features, Value

    # Stated, not inferred: the schema must not depend on the rows that happen to come first.
    message_list = [{"role": Value("string"), "content": Value("string")}]
    kinds = {list: message_list, bool: Value("bool"), str: Value("string")}
    features = {key: kinds[type(value)] for key, value in found[0].row.items()}
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
    subset: str | None = None

    def __str__(self) -> str:
        rows = islice(located_rows(self.path, self.split, self.subset), self.number - 1, None)
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
