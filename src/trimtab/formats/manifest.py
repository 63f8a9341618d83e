"""`manifest.json`: what a folder of ours is, and which files in it are ours. Nothing is ever removed that it does not list.

    kind      run (`trimtab run`), model (`save`), export, pruned, search, comparison, checkpoint, teacher (its cache), or
              unfinished (a run's folder while it is made)
    files     bytes and SHA-256 of what the folder must hold: `verify` reads it again
    also      names of what is ours too, but may be missing or change: checkpoints, exports in a run's folder, reports

A folder may be replaced by one of its own kind, and only if every file in it is listed and none was changed since: a file
that somebody put there, or edited, is theirs.
"""

import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, Literal

from trimtab.data.hashes import digest, sha256
from trimtab.disk import is_unfinished, replace_text
from trimtab.errors import UserError
from trimtab.models.whole import MANIFEST, listed, strangers, wrong
from trimtab.models.whole import read as _read
from trimtab.reading import read_mapping
from trimtab.words import and_more

_log = logging.getLogger("trimtab")
Kind = Literal["run", "model", "export", "pruned", "search", "comparison", "unfinished", "checkpoint", "teacher"]
_CALLED = {
    "run": "a run",
    "model": "a saved model",
    "export": "an export",
    "pruned": "a pruned model",
    "search": "a search",
    "comparison": "a comparison",
    "unfinished": "a run that is not finished",
    "checkpoint": "a checkpoint",
    "teacher": "a teacher's cache",
}


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file's mapping; {} where there is none."""
    return read_mapping(file) if file.exists() else {}


def write_json(file: Path, values: Any) -> None:
    """Values as indented JSON with sorted keys."""
    file.write_text(json_text(values), encoding="utf-8")


def json_text(values: Any) -> str:
    """The same, as it will be written."""
    return json.dumps(values, indent=2, sort_keys=True) + "\n"


def entries(folder: Path) -> Iterator[str]:
    """Everything in a folder that could be lost: files and links, by relative name, the manifest left out."""
    for above, folders, files in os.walk(folder):
        here = Path(above)
        for name in sorted([*files, *(f for f in folders if (here / f).is_symlink())]):
            relative = (here / name).relative_to(folder).as_posix()
            if relative != MANIFEST and not is_unfinished(name):  # that another process writes, or was killed at
                yield relative


def write_manifest(folder: Path, kind: Kind, also: Iterable[str] = ()) -> None:
    """List every file of the folder.

    Args:
        folder: its files are hashed; those of folders in it that have manifests of their own are listed by name.
        kind: what the folder is.
        also: further names that will be in it.
    """
    files: dict[str, Any] = {}
    for name in entries(folder):
        if _of_an_own(folder, name):
            also = {*also, name}
        else:
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)}
    _write(folder, {"version": 2, "kind": kind, "files": files, "also": sorted(also)})


def _write(folder: Path, values: dict[str, Any]) -> None:
    replace_text(folder / MANIFEST, json_text(values))


def add(folder: Path, names: Iterable[str]) -> None:
    """List what was written into a folder of ours later (a report, an export); nothing where it has no manifest."""
    if not (folder / MANIFEST).is_file():
        return
    names, values = set(names), _read(folder)
    values["files"] = {name: file for name, file in values["files"].items() if name not in names}
    _write(folder, values | {"also": sorted({*values.get("also", ()), *names})})


def others(folder: Path) -> list[str]:
    """Names of what is ours in a folder, too, but may be missing or change."""
    return [str(name) for name in _read(folder).get("also", ())]


def kind_of(folder: Path) -> str | None:
    """What the folder's manifest says that it is; None without one, or for one from before it said so."""
    return _read(folder).get("kind") if (folder / MANIFEST).is_file() else None


def verify(folder: Path) -> int:
    """Read every file again and compare it with the manifest; what is there besides is named by the logger `trimtab`.

    Returns:
        The number of files that were read.

    Raises:
        UserError: naming the first file that is missing or changed, or foreign and taken for a part by some reader.
    """
    whole = listed(folder)
    for name, what in wrong(folder, whole, sha256):
        raise UserError(f"{folder / name}: {what}; save, export or copy the model again")
    foreign = unlisted(folder)
    for name in strangers(foreign, whole):
        raise UserError(
            f"{folder / name}: does not belong to this model, and readers would take it for a part; remove it"
        )
    if foreign:
        _log.warning(
            "%s: %s: not of this model, and nothing that a reader takes for a part of it", folder, and_more(foreign)
        )
    return len(whole)


def unlisted(folder: Path) -> list[str]:
    """What is in a folder and no file of ours: names that its manifest does not have."""
    values = _read(folder)
    ours = {*values["files"], *values.get("also", ())}
    return [name for name in entries(folder) if name not in ours and not _of_an_own(folder, name)]


def _of_an_own(folder: Path, name: str) -> bool:
    """Whether a file in a folder inside this one belongs to a manifest there."""
    return any((folder / above / MANIFEST).is_file() for above in PurePath(name).parents if above != PurePath())


def damage(folder: Path) -> str:
    """What differs between a folder and its manifest: a file that is missing or changed; "" for nothing.

    As `verify`, but a file that this process has read and that has not changed since is not read again.

    Raises:
        UserError: if there is no manifest, or it is none.
    """
    return next((f"{name} {what}" for name, what in wrong(folder, listed(folder), digest)), "")


def keeps(folder: Path, kind: Kind) -> str:
    """Why a folder may not be replaced by one of `kind`: what in it is not ours. "" if nothing is in the way."""
    found = list(entries(folder))
    if not (folder / MANIFEST).is_file():
        return f"holds {and_more(found)}, which trimtab did not write" if found else ""
    values = _read(folder)
    if values.get("kind") != kind:
        is_ = _CALLED.get(values.get("kind", ""), "something that an earlier version wrote")
        return f"holds {is_}, which is not replaced by {_CALLED[kind]}"
    foreign = [name for name in found if name not in values["files"] and name not in values["also"]]
    if foreign:
        return f"holds {and_more(foreign)}, which trimtab did not write"
    there = ((name, folder / name, *about) for name, about in listed(folder).items() if (folder / name).is_file())
    changed = [name for name, file, size, known in there if file.stat().st_size != size or digest(file) != known]
    return f"holds {and_more(changed)}, which somebody changed since trimtab wrote it" if changed else ""


def remove(folder: Path, also: Iterable[str] = ()) -> None:
    """Remove what the folder's manifest lists, and the folders that are empty then; what is left stays.

    Args:
        folder: with its manifest, which goes last: a process that is killed in between leaves a folder that is known.
        also: names of more that goes with it.
    """
    if (folder / MANIFEST).is_file():
        values = _read(folder)
        for name in (*values["files"], *values.get("also", ()), *also, MANIFEST):
            if not (folder / name).is_dir():
                (folder / name).unlink(missing_ok=True)
    for above, _, files in os.walk(folder, topdown=False):
        for name in filter(is_unfinished, files):
            Path(above, name).unlink(missing_ok=True)
        if not os.listdir(above):
            os.rmdir(above)
