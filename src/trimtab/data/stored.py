"""Rows that are too many for memory: written once to a file of the cache, and mapped by every process that reads them.

    <cache>/data/<key>/rows.arrow      the rows, in Arrow's stream format, as `datasets` maps it
                       about.json      what else was found while they were made
                       cache-*.arrow   what `datasets` makes of them: packed sequences

`<key>` is a hash of all that they were made of (see `digests`), so that nothing there is ever out of date. A folder is
written under another name, and renamed when it is whole: a run that is killed leaves nothing that another one would read,
and of two that make the same at once the second throws its own away. What nobody has used for a month goes when something
new comes; what a process has mapped stays there for it. What is damaged is moved out of the way, said, and made again.

What lies there is believed, so the folders have to be the user's own (see `cache`).

Few rows stay in memory: they are read faster than they are looked for.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
import uuid
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab.disk import sync
from trimtab.errors import UserError
from trimtab.kernels.cache import cache_folder, own_folder, trusted

if TYPE_CHECKING:
    from datasets import Dataset, Features

LARGE_BYTES = 16 << 20
"""Rows of fewer bytes stay in memory."""
SOUGHT_BYTES = 1 << 20
"""See `sought`."""
_ROWS, _ABOUT = "rows.arrow", "about.json"
_NEW, _GONE, _DAMAGED = ".new", ".gone", ".damaged"
"""Ends of names: being written, being removed, moved out of the way."""
_MONTH, _DAY = 30 * 86400.0, 86400.0
_READ = 64
"""Rows that are read at once."""

Columns = Mapping[str, Sequence[Any]]
"""Values by column: of some rows, all of them of one length."""


class Stored(NamedTuple):
    """Rows, in memory or mapped."""

    rows: Dataset
    about: dict[str, Any]
    """What else was found while they were made."""


def folder() -> Path:
    """Where they are; it may not be there yet."""
    return cache_folder() / "data"


def find(key: str) -> Stored | None:
    """What is stored under a key; None if nothing is, or nothing that is whole, which is said and moved out of the way.

    Raises:
        UserError: where others may write there.
    """
    place = folder() / key
    with _room(folder()):
        try:
            for part in (cache_folder(), folder(), place):
                trusted(part)
            os.utime(place)
        except FileNotFoundError:
            return None
    try:
        return _read(place)
    except (OSError, ValueError, KeyError, TypeError) as error:  # Arrow's errors are ValueErrors
        aside = place.with_name(f"{key}-{uuid.uuid4().hex[:8]}{_DAMAGED}")
        try:
            place.rename(aside)
        except OSError:  # another run has removed or replaced it
            return None
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        warnings.warn(f"{place}: is damaged ({said}), so it is made again; it lies in {aside.name} now", stacklevel=2)
        return None


def _read(place: Path) -> Stored:
    from datasets import Dataset, DatasetInfo

    kept = json.loads((place / _ABOUT).read_text(encoding="utf-8"))
    about, count = kept["about"], kept["rows"]
    rows = Dataset.from_file(str(place / _ROWS), info=DatasetInfo(description=about.get("unused", "")))
    if len(rows) != count:  # Arrow takes a stream that ends between two batches for a whole one
        raise ValueError(f"{_ROWS} holds {len(rows)} rows of {count}")
    return Stored(rows, about)


def sought(size: int) -> bool:
    """Whether what is made of so many bytes is looked for: of fewer it is made sooner than they are hashed."""
    return size >= SOUGHT_BYTES


def mapped(rows: Dataset) -> bool:
    """Whether rows are in a file rather than in memory."""
    return bool(rows.cache_files)


def each(rows: Dataset) -> Iterator[dict[str, Any]]:
    """The rows one after another, read some at a time: ten times as quick as asking for each."""
    for columns in rows.iter(_READ):
        names = list(columns)
        yield from (dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True))


@contextmanager
def scratch() -> Iterator[Callable[[int, Any], Any]]:
    """Makes arrays of one dimension, by length and dtype, that live as long as the block: large ones are in a file."""
    with ExitStack() as stack:

        def room(length: int, dtype: Any) -> Any:
            size = length * np.dtype(dtype).itemsize
            if size < LARGE_BYTES:
                return np.empty(length, dtype)
            with _room(folder()):
                file = stack.enter_context(tempfile.TemporaryFile(suffix=_NEW, dir=own_folder("data")))
                if hasattr(os, "posix_fallocate"):  # else a disk that fills up ends the process where it is written to
                    os.posix_fallocate(file.fileno(), 0, size)
                return np.memmap(file, dtype, "w+", shape=(length,))

        yield room


def collect(
    features: Features,
    parts: Iterable[Columns],
    key: Callable[[], str],
    about: Callable[[], dict[str, Any]] = dict,
    few_bytes: int | None = None,
) -> Stored:
    """Rows as they come: in memory if they are few, else in a file of the cache.

    Args:
        features: of their columns.
        parts: the rows, some at a time, in order.
        key: asked at the end, where they are many: what they are stored under.
        about: asked at the end for what else is to be kept; `unused` becomes the description of the rows.
        few_bytes: fewer of them stay in memory; None for `LARGE_BYTES`.

    Raises:
        UserError: where the cache has no room.
    """
    import pyarrow  # type: ignore[import-untyped, unused-ignore]

    made = (pyarrow.RecordBatch.from_pydict(dict(part), schema=features.arrow_schema) for part in parts)
    few, size = list[Any](), 0
    for batch in made:
        few.append(batch)
        size += batch.nbytes
        if size >= (LARGE_BYTES if few_bytes is None else few_bytes):
            return _in_file(features, chain(few, made), key, about)
    return _in_memory(features, few, about())


def store(key: str, arrays: Mapping[str, Any], about: dict[str, Any]) -> Stored:
    """Arrays of integers, as one row of lists, stored whatever their size."""
    import pyarrow
    from datasets import Features, List, Value

    features = Features({name: List(Value("int64")) for name in arrays})
    columns = {name: [np.asarray(values, np.int64)] for name, values in arrays.items()}
    part = pyarrow.RecordBatch.from_pydict(columns, schema=features.arrow_schema)
    return _in_file(features, iter([part]), lambda: key, lambda: about)


def _in_memory(features: Features, parts: list[Any], about: dict[str, Any]) -> Stored:
    import pyarrow
    from datasets import Dataset, DatasetInfo

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, features.arrow_schema) as stream:
        for part in parts:
            stream.write_batch(part)
    info = DatasetInfo(description=about.get("unused", ""))
    return Stored(Dataset.from_buffer(sink.getvalue(), info=info), about)


def _in_file(
    features: Features, parts: Iterator[Any], key: Callable[[], str], about: Callable[[], dict[str, Any]]
) -> Stored:
    with _room(folder()):
        place = own_folder("data")
        _clear(place)
        made = tempfile.TemporaryDirectory(suffix=_NEW, dir=place, ignore_cleanup_errors=True)
    with made as name:
        new = Path(name)
        count = _write(new / _ROWS, features, parts)
        whole = place / key()
        kept = json.dumps({"rows": count, "about": about()})
        with _room(place):
            (new / _ABOUT).write_text(kept, encoding="utf-8")
            for path in (new / _ROWS, new / _ABOUT, new):
                sync(path)
        for _ in range(2):  # what was there before may be damaged
            with _room(place):
                _rename(new, whole)
            if (found := find(whole.name)) is not None:
                return found
    raise UserError(f"{whole}: was stored just now, and is gone or damaged; look after the disk")


def _write(file: Path, features: Features, parts: Iterator[Any]) -> int:
    """All parts; how many rows they have."""
    import pyarrow

    count = 0
    with _room(folder()):
        sink = pyarrow.OSFile(str(file), "wb")
    try:
        with _room(folder()):
            stream = pyarrow.ipc.new_stream(sink, features.arrow_schema)
        for part in parts:
            count += part.num_rows
            with _room(folder()):
                stream.write_batch(part)
        with _room(folder()):
            stream.close()  # writes the mark of its end
            sink.close()
    finally:
        with suppress(OSError):  # closed already, or of no use
            sink.close()
    return count


def _rename(new: Path, whole: Path) -> None:
    try:
        new.rename(whole)
        sync(whole.parent)
    except OSError as error:  # another run was first
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise


@contextmanager
def _room(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{place}: the rows cannot be stored there ({error.strerror or error}); make room, or name another folder in "
            "the environment variable TRIMTAB_CACHE"
        ) from error


def _clear(place: Path) -> None:
    """Remove what nobody has used for a month, and what a killed run left behind."""
    now = time.time()
    for entry in place.iterdir():
        gone = entry
        if not entry.name.endswith(_GONE):
            limit = _DAY if entry.name.endswith(_NEW) else _MONTH
            try:
                if now - _touched(entry) <= limit:
                    continue
                # Under another name first: a kill in between leaves nothing that another run would take for whole.
                gone = entry.rename(entry.with_name(f"{entry.name}-{uuid.uuid4().hex[:8]}{_GONE}"))
            except FileNotFoundError:  # another run has renamed or removed it
                continue
        shutil.rmtree(gone, ignore_errors=True)


def _touched(entry: Path) -> float:
    """When anything in it was last written: what is still being written changes its files, not its folder."""
    return max(path.stat().st_mtime for path in (entry, *(entry.iterdir() if entry.is_dir() else ())))
