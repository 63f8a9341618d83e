"""`trimtab push`: a folder of ours, its card first, into a model repository of the hub.

Only what the manifest lists goes, after every hash was compared: neither checkpoints, nor what lies in a run's folder
beside its model, nor anything that somebody put there.
"""

import os
from collections.abc import Callable
from pathlib import Path

from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.formats.card import card
from trimtab.models.hub import upload

_MODELS = ("run", "model", "export", "pruned")


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
        path: its folder; of a run its own model goes, and each export by its own folder (`trimtab push DIR/gguf ...`).
        repo: owner/name; made if there is none.
        private: of a repository that is made.
        revision: branch; None for the main one.
        message: of the commit.
        say: told what is uploaded.

    Returns:
        The repository's address.

    Raises:
        UserError: for a folder that trimtab did not write or that was changed since, and with what the hub said.
    """
    folder = Path(path)
    kind = manifest.kind_of(folder) if folder.is_dir() else None
    if kind not in _MODELS:
        raise UserError(f"{path}: holds no model that trimtab wrote (a run, a saved model, an export); nothing to push")
    if repo.count("/") != 1 or not all(repo.split("/")):
        raise UserError(f"push: {repo!r} is no repository's name; write owner/name")
    manifest.verify(folder)
    whole = sorted(manifest.listed(folder))
    also = [name for name in manifest.others(folder) if _belongs(folder, name, kind)]
    if "README.md" not in whole and (about := card(folder, folder.resolve().name)):  # of an earlier release
        (folder / "README.md").write_text(about, encoding="utf-8")
        manifest.add(folder, ("README.md",))
        also.append("README.md")
    files = [*whole, *also]
    size = sum((folder / name).stat().st_size for name in files)
    say(f"uploading {len(files)} files, {size / 1e6:.1f} MB, to {repo}")
    told = [name for name in ("recipe.yaml", "report.html") if name in files]
    if told:
        say(f"{' and '.join(told)} name paths of this machine, and go with it")
    return upload(folder, repo, files, private=private, revision=revision, message=message)


def _belongs(folder: Path, name: str, kind: str) -> bool:
    """Whether a file that may come and go is a part of the model: an export's base is, a run's exports are not."""
    return (folder / name).is_file() and (kind == "export" or "/" not in name)
