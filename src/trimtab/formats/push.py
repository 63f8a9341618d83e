"""`trimtab push`: a folder of ours, its card first, into a model repository of the hub.

Only what the manifest lists goes, after every hash was compared: neither checkpoints, nor what lies in a run's folder
beside its model, nor anything that somebody put there.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path

from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.formats.card import card
from trimtab.models.hub import upload
from trimtab.words import size

_MODELS = ("run", "model", "export", "pruned")
_TEXTS = (".json", ".yaml", ".md", ".html")
_ABSOLUTE = re.compile(r"""(?:path|cache|output|storage|tasks_data|model)["']?: ["']?/\w""")
"""A path from the root as the value of a key that names one."""


def push(
    path: str | os.PathLike[str],
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str = "Upload by trimtab",
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Upload a run, a saved model or an export to the hub.

    Args:
        path: the folder. Of a run, its own model is uploaded; an export is uploaded by its own folder (`DIR/gguf`).
        repo: owner/name; the repository is created if it does not exist.
        private: whether a created repository is private.
        revision: branch; None for the main one.
        message: commit message.
        say: called with a line for each thing that is uploaded.

    Returns:
        The repository's address.

    Raises:
        UserError: for a folder that trimtab did not write or that was changed since, and with what the hub said.

    Examples:
        >>> tt.push("runs/small/gguf", "owner/small-gguf", private=True)
    """
    folder = Path(path)
    kind = manifest.kind_of(folder) if folder.is_dir() else None
    if kind not in _MODELS:
        raise UserError(f"{path}: holds no model that trimtab wrote (a run, a saved model, an export); nothing to push")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"push: {repo!r} is not a repository's name; write owner/name")
    manifest.verify(folder)
    whole = sorted(manifest.listed(folder))
    also = [name for name in manifest.others(folder) if _belongs(folder, name, kind)]
    if "README.md" not in whole and (about := card(folder, folder.resolve().name)):  # of an earlier release
        (folder / "README.md").write_text(about, encoding="utf-8")
        manifest.add(folder, ("README.md",))
        also.append("README.md")
    files = [*whole, *also]
    held = sum((folder / name).stat().st_size for name in files)
    say(f"uploading {len(files)} files, {size(held)}, to {repo}")
    if told := [name for name in files if _names_paths(folder, name)]:
        say(f"{', '.join(told)}: named paths of this machine are in what is uploaded")
    return upload(folder, repo, files, private=private, revision=revision, message=message)


def _names_paths(folder: Path, name: str) -> bool:
    """Whether a file of text holds the path of this folder, where it is pushed from, or another from the root."""
    if Path(name).suffix not in _TEXTS:
        return False
    places = {str(folder.resolve().parent), str(Path.cwd()), str(Path.home())} - {"/"}
    text = (folder / name).read_text(encoding="utf-8", errors="replace")
    return any(f"{place}{os.sep}" in text for place in places) or _ABSOLUTE.search(text) is not None


def _belongs(folder: Path, name: str, kind: str) -> bool:
    """Whether a file that may come and go is a part of the model: an export's base is, a run's exports are not."""
    return (folder / name).is_file() and (kind == "export" or "/" not in name)
