"""`manifest.json`: what a folder of ours is, and which files in it are ours. Nothing is ever removed that it does not list.

    kind      run (`trimtab run`), model (`save`), export, pruned, search, comparison, or unfinished (a run's folder while
              it is made)
    files     bytes and SHA-256 of what the folder must hold: `verify` reads it again
    also      names of what is ours too, but may be missing or change: checkpoints, exports in a run's folder, reports

A folder may be replaced by one of its own kind, and only if every file in it is listed and none was changed since: a file
that somebody put there, or edited, is theirs.
"""

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Any, Literal

from trimtab.errors import UserError
from trimtab.recipe.inputs import digest, sha256

MANIFEST = "manifest.json"
Kind = Literal["run", "model", "export", "pruned", "search", "comparison", "unfinished"]
_CALLED = {
    "run": "a run",
    "model": "a saved model",
    "export": "an export",
    "pruned": "a pruned model",
    "search": "a search",
    "comparison": "a comparison",
    "unfinished": "a run that is not finished",
}
_NAMED = 3
"""Files of somebody else that a message names; more are counted."""


def write_json(file: Path, values: Any) -> None:
    """Values as indented JSON with sorted keys."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def entries(folder: Path) -> Iterator[str]:
    """Everything in a folder that could be lost: files and links, by relative name, the manifest left out."""
    for above, folders, files in os.walk(folder):
        here = Path(above)
        for name in sorted([*files, *(f for f in folders if (here / f).is_symlink())]):
            relative = (here / name).relative_to(folder).as_posix()
            if relative != MANIFEST and not relative.startswith(f".{MANIFEST}-"):  # another process is writing it
                yield relative


def write_manifest(folder: Path, kind: Kind, also: Iterable[str] = ()) -> None:
    """List every file of the folder.

    Args:
        folder: its files are hashed; those of folders in it, which have manifests of their own, are listed by name.
        kind: what the folder is.
        also: further names that will be in it.
    """
    files: dict[str, Any] = {}
    for name in entries(folder):
        if "/" in name:
            also = {*also, name}
        else:
            files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    _write(folder, {"version": 2, "kind": kind, "files": files, "also": sorted(also)})


def _write(folder: Path, values: dict[str, Any]) -> None:
    new = folder / f".{MANIFEST}-{os.getpid()}"
    write_json(new, values)
    os.replace(new, folder / MANIFEST)


def add(folder: Path, names: Iterable[str]) -> None:
    """List what was written into a folder of ours later (a report, an export); nothing where it has no manifest."""
    if not (folder / MANIFEST).is_file():
        return
    names, values = set(names), _read(folder)
    values["files"] = {name: file for name, file in values["files"].items() if name not in names}
    _write(folder, values | {"also": sorted({*values.get("also", ()), *names})})


def _read(folder: Path) -> dict[str, Any]:
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it, so nothing says what it should hold; save or export it again")
    try:
        values: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))
        for file in values["files"].values():
            int(file["bytes"]), str(file["sha256"])
        for name in (*values["files"], *values.get("also", ())):
            _require_inside(manifest, str(name))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: not a manifest ({error!r}); save or export the model again") from error
    return values


def _require_inside(manifest: Path, name: str) -> None:
    """A manifest may come from anywhere, and what it lists is removed: only names in its own folder are listed."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise UserError(f"{manifest}: lists {name!r}, which is outside its folder; save or export the model again")


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file that the folder's manifest says it must hold.

    Raises:
        UserError: if there is none, or it is none.
    """
    return {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in _read(folder)["files"].items()}


def others(folder: Path) -> list[str]:
    """Names of what is ours in a folder, too, but may be missing or change."""
    return [str(name) for name in _read(folder).get("also", ())]


def kind_of(folder: Path) -> str | None:
    """What the folder's manifest says that it is; None without one, or for one from before it said so."""
    return _read(folder).get("kind") if (folder / MANIFEST).is_file() else None


def verify(folder: Path) -> int:
    """Read every file again and compare it with the manifest.

    Returns:
        The number of files that were read.

    Raises:
        UserError: naming the first file that is missing, changed or foreign.
    """
    whole = listed(folder)
    for name, (size, expected) in whole.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; save, export or copy the model again")
        if file.stat().st_size != size or sha256(file) != expected:
            raise UserError(f"{file}: is not what was written (its SHA-256 differs); save, export or copy it again")
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in whole:
            raise UserError(f"{file}: does not belong to this model, and readers would take it for a part; remove it")
    return len(whole)


def keeps(folder: Path, kind: Kind) -> str:
    """Why a folder may not be replaced by one of `kind`: what in it is not ours. "" if nothing is in the way."""
    found = list(entries(folder))
    if not (folder / MANIFEST).is_file():
        return f"holds {some(found)}, which trimtab did not write" if found else ""
    values = _read(folder)
    if values.get("kind") != kind:
        is_ = _CALLED.get(values.get("kind", ""), "something that an earlier version wrote")
        return f"holds {is_}, which is not replaced by {_CALLED[kind]}"
    foreign = [name for name in found if name not in values["files"] and name not in values["also"]]
    if foreign:
        return f"holds {some(foreign)}, which trimtab did not write"
    there = ((name, folder / name, *about) for name, about in listed(folder).items() if (folder / name).is_file())
    changed = [name for name, file, size, known in there if file.stat().st_size != size or digest(file) != known]
    return f"holds {some(changed)}, which somebody changed since trimtab wrote it" if changed else ""


def some(names: list[str]) -> str:
    """Names for a message."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def remove(folder: Path) -> None:
    """Remove what the folder's manifest lists, and the folders that are empty then; what is left stays."""
    if (folder / MANIFEST).is_file():
        values = _read(folder)
        for name in (*values["files"], *values.get("also", ()), MANIFEST):
            (folder / name).unlink(missing_ok=True)
    for above, _, _ in os.walk(folder, topdown=False):
        if not os.listdir(above):
            os.rmdir(above)
