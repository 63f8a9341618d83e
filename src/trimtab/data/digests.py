"""Hashes of what data are made of beside files: rows, tokenizers, and the code that reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache
from io import RawIOBase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from trimtab.data.hashes import sha256

if TYPE_CHECKING:
    from datasets import Dataset

_ROWS = 1000
"""Rows that are hashed at once."""


def joined(*parts: Any) -> str:
    """One short hash of anything that can be written as JSON."""
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Hashing(RawIOBase):
    """A file that keeps nothing but the hash of what is written to it."""

    def __init__(self) -> None:
        self.made = hashlib.blake2b(digest_size=16)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, part: Any) -> int:
        """Goes into the hash."""
        self.made.update(part)
        return len(part)


def of_rows(rows: Dataset, without: Sequence[str] = ()) -> str:
    """A hash of what rows hold, in order, wherever they lie; they are read a thousand at a time.

    Args:
        rows: of `load_rows` or `mixed`.
        without: columns that say nothing of it.
    """
    import pyarrow  # type: ignore[import-untyped, unused-ignore]

    kept = [name for name in sorted(rows.column_names) if name not in without]
    made = _Hashing()
    for batch in rows.select_columns(kept).with_format("arrow").iter(_ROWS):
        table = batch.combine_chunks()
        with pyarrow.ipc.new_stream(made, table.schema) as stream:
            stream.write_table(table)
    return made.made.hexdigest()


def of_tokenizer(tokenizer: Any) -> str:
    """A hash of all that a tokenizer's tokens depend on, its chat template among them, wherever it was read.

    It is of the files that transformers would save, so of a slow one's merges or pieces, too.
    """
    with TemporaryDirectory() as folder:
        try:
            tokenizer.save_pretrained(folder)
        except NotImplementedError:  # one of somebody's own, which has no files
            return joined(type(tokenizer).__name__, sorted(tokenizer.get_vocab().items()), str(tokenizer.chat_template))
        files = sorted(file for file in Path(folder).rglob("*") if file.is_file())
        return joined(type(tokenizer).__name__, [[file.relative_to(folder).as_posix(), sha256(file)] for file in files])


@lru_cache
def of_code(*files: Path) -> str:
    """A hash of the code of this room, and of other files: what another version has made may be other rows."""
    return joined(*(sha256(file) for file in (*sorted(Path(__file__).parent.glob("*.py")), *files)))
