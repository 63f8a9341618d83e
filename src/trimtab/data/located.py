"""Where a data set lies: the files behind a path."""

from pathlib import Path

from trimtab.data.files import data_files
from trimtab.data.rows import PYDOC_TOPICS
from trimtab.errors import UserError


def files_of(path: str) -> list[Path]:
    """The files that `load_rows` reads of a path; none for a data set of the hub, which its commit pins.

    Raises:
        UserError: if a local path is not there.
    """
    if path == PYDOC_TOPICS:
        from pydoc_data import topics

        return [Path(topics.__file__)]
    local = Path(path).expanduser()
    if local.is_dir():
        return data_files(local)
    if local.is_file():
        return [local]
    if local.is_absolute():
        raise UserError(f"{path}: no such file or directory; check the path")
    return []
