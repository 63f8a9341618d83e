"""What is loaded is what was written: a folder of ours against its manifest, before anything in it is read.

    sizes        of all that a reader takes of it: weights, configs, the tokenizer, the recipe
    hashes       of the same; of a large file once on a machine, as long as it does not change (`data.hashes`)
    strangers    a file that is not listed and that a reader would take for one of the model's

Of several processes on a machine the first reads hashes, the others look at sizes. A folder without a manifest (of other
makers, of old versions, fetched from the hub, whose client compares hashes itself) is read as it is. What people may write
as they please (README.md, reports) does not concern a reader; `trimtab verify` compares all of it.

What the manifest is, and what may be removed by it, is in `formats.manifest`, which stands above the readers.
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path, PurePath
from typing import Any

from trimtab.data.hashes import digest
from trimtab.errors import UserError
from trimtab.ranks import is_first_here
from trimtab.reading import read_mapping

MANIFEST = "manifest.json"
OFF = "TRIMTAB_VERIFY"
"""Environment: 0 reads folders without a look at their manifests, as `load(verify=False)` does."""
SETTINGS = ("config.json", "generation_config.json")
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*", "*.jinja"),
    "*.model",
)  # fmt: skip
_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.gguf")
_ADAPTER = ("adapter_config.json", "adapter_model.*")
_READ = (*SETTINGS, *TOKENIZER, *_WEIGHTS, *_ADAPTER, "quantize_config.json", "recipe.yaml")
"""Names that readers take: ours, transformers and the engines."""
_OTHERS_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*quant*config*.json")
"""What some reader would take, too, though nothing of ours is called so."""
_OURS = ("export.json", "pruning.json")
"""What only a folder of ours holds."""
_off: ContextVar[bool] = ContextVar("trimtab_unchecked", default=False)


@contextmanager
def checking(wanted: bool) -> Iterator[None]:
    """Whether manifests are looked at while the block runs."""
    before = _off.set(not wanted)
    try:
        yield
    finally:
        _off.reset(before)


def read(folder: Path) -> dict[str, Any]:
    """A folder's manifest, as `formats.manifest` wrote it.

    Raises:
        UserError: if there is none, or it is none.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it, so nothing says what it should hold; save or export it again")
    values = read_mapping(manifest, "save or export the model again")
    try:
        for file in values["files"].values():
            int(file["bytes"]), str(file["sha256"])
        for name in (*values["files"], *values.get("also", ())):
            if not isinstance(name, str):
                raise TypeError(f"{name!r} is not a name")
            _require_inside(manifest, name)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
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
        UserError: as `read`.
    """
    return {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in read(folder)["files"].items()}


def wrong(
    folder: Path, files: dict[str, tuple[int, str]], hash_of: Callable[[Path], str] | None
) -> Iterator[tuple[str, str]]:
    """Files that differ from what a manifest says of them, and what is wrong with each.

    Args:
        folder: that holds them.
        files: of `listed`, or some of them.
        hash_of: gives a file's SHA-256; None compares sizes alone.
    """
    for name, (size, expected) in files.items():
        file = folder / name
        if not file.is_file():
            yield name, "is missing"
        elif file.stat().st_size != size:
            yield name, f"is not what was written (it has {file.stat().st_size:,} bytes, and had {size:,})"
        elif hash_of is not None and hash_of(file) != expected:
            yield name, "is not what was written (its SHA-256 differs)"


def strangers(names: Collection[str], files: Collection[str]) -> list[str]:
    """Names that are not listed though a reader would take them for the model's.

    Args:
        names: in a folder, and not listed.
        files: that are listed. A tokenizer is a stranger only where the model has one: another may be put beside it.
    """
    has_one = any(_is(name, TOKENIZER) for name in files)
    taken = (*SETTINGS, *_WEIGHTS, *_ADAPTER, *_OTHERS_WEIGHTS, *(TOKENIZER if has_one else ()))
    homes = {PurePath(name).parent for name in files} | {PurePath()}
    return sorted(name for name in names if PurePath(name).parent in homes and _is(name, taken))


def check(path: Path) -> None:
    """Refuse a folder of ours, or a file in one, that is not what was written; nothing where there is no manifest.

    Args:
        path: a folder, a part of one (the base of an export to peft), or a GGUF file.

    Raises:
        UserError: naming the first file that is missing, changed or foreign.
    """
    if _off.get() or os.environ.get(OFF) == "0":
        return
    whole_folder = path.is_dir()
    path = path.resolve() if whole_folder else path  # a file in the hub's cache is a link to another folder
    folder, files, also = _written(path)
    hash_of = partial(digest, keep=True) if is_first_here() else None
    for name, what in wrong(folder, files, hash_of):
        raise UserError(
            f"{folder / name}: {what}; save, export or copy the model again (or, if you changed it on purpose, remove "
            f"{folder / MANIFEST})"
        )
    if whole_folder and files and folder == path:
        here = [file.name for file in folder.iterdir() if file.is_file()]
        unlisted = [name for name in here if name not in files and name not in also and not _is(name, _LEFT)]
        for name in strangers(unlisted, files):
            raise UserError(
                f"{folder / name}: does not belong to this model, and would be read with it; take it out of the folder "
                f"(or, if it is there on purpose, remove {folder / MANIFEST})"
            )


_LEFT = (*_WEIGHTS, *_OTHERS_WEIGHTS)
"""Strangers that no reader of ours takes: named by `trimtab verify` alone."""


def forget(folder: Path) -> None:
    """Remove the manifest of a folder of ours into which something else is about to be written."""
    if folder.is_dir() and _ours(folder) is not None:
        (folder / MANIFEST).unlink()


def _written(path: Path) -> tuple[Path, dict[str, tuple[int, str]], list[str]]:
    """The folder whose manifest speaks of a path, the files there that are read with it, and what else is ours."""
    for folder in (path, path.parent):
        values = _ours(folder) if folder.is_dir() else None
        if values is None:
            continue
        inside = "" if folder == path else path.name
        files = {
            name: (int(file["bytes"]), str(file["sha256"]))
            for name, file in values["files"].items()
            if _is(name, _READ) and (not inside or name == inside or name.startswith(f"{inside}/"))
        }
        return folder, files, list(values.get("also", ()))
    return path, {}, []


def _ours(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder; None where there is none, or it is another program's."""
    if not (folder / MANIFEST).is_file():
        return None
    try:
        return read(folder)
    except UserError:
        if _is_ours(folder):
            raise
        return None


def _is_ours(folder: Path) -> bool:
    """Whether the files of a folder show that we wrote it, whatever its manifest says."""
    if any((folder / name).is_file() for name in _OURS):
        return True
    config = folder / "config.json"
    return config.is_file() and b'"quant_method": "trimtab"' in config.read_bytes()


def _is(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(PurePath(name).name, pattern) for pattern in patterns)
