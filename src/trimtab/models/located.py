"""Where a model lies: the files behind a path, and the path as it is found from any directory."""

import re
from pathlib import Path

from trimtab.models import checkpoint
from trimtab.models.sources import resolve

_BESIDE = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
           "vocab.*", "merges.txt", "*.jinja", "*.model", "*.safetensors.index.json")  # fmt: skip
"""Files of a directory that say what its tensors mean."""


def files_of(path: str) -> list[Path]:
    """The files that are read of a model: a GGUF file, or config, tokenizer and the safetensors that its index names."""
    found = resolve(path)
    if found.is_file():
        return [found]
    tensors, _ = checkpoint.files_of(found)
    beside = {file for pattern in _BESIDE for file in found.glob(pattern)}
    return sorted(
        file for file in {*beside, *tensors} if file.is_file()
    )  # one that is missing is named by who reads it


def pinned(path: str) -> str:
    """A path that means the same from any directory: absolute, or a model of the hub at the commit that was fetched."""
    local = Path(path).expanduser()
    if local.exists():
        return str(local.resolve())
    found = resolve(path)
    fetched = found.parent.name == "snapshots" and "@" not in path and path.count("/") == 1
    return f"{path}@{found.name}" if fetched else path


def is_commit(revision: str) -> bool:
    """Whether a revision is a whole commit, which holds the same whenever it is read; a shorter one may be a branch."""
    return re.fullmatch("[0-9a-f]{40}", revision) is not None


def pinned_data(path: str) -> str:
    """The same of a data set: absolute, or one of the hub at the commit that it, or its branch or tag, is at now.

    A path stays as it is where the hub is not reached.
    """
    local = Path(path).expanduser()
    if local.exists():
        return str(local.resolve())
    name, _, revision = path.partition("@")
    if name.count("/") != 1 or is_commit(revision):
        return path
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        found = HfApi().dataset_info(name, revision=revision) if revision else HfApi().dataset_info(name)
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError):
        return path
    return f"{name}@{found.sha}"
