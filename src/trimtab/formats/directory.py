"""A directory that looks whole only if it is: staged beside its destination, sharded, and with a manifest of hashes.

Everything is written into `.<name>-<random>` next to the destination and put in place at the end, so a killed export
leaves nothing under the final name. `manifest.json` lists the SHA-256 of every file; `verify` reads them again.

    model.safetensors                                 up to max_shard_size, else
    model-00001-of-00003.safetensors, ...             with model.safetensors.index.json

Tensors are given one at a time and leave memory with their shard, so a dense export never holds the dense model.
"""

import copy
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.errors import UserError

MANIFEST = "manifest.json"


@contextmanager
def replacing(target: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one step when the block ends without an error.

    Raises:
        UserError: if `target` exists and may not be replaced.
    """
    target = target.absolute()
    if target.exists():
        if not target.is_dir():
            raise UserError(f"{target}: is a file, not a directory; choose another output")
        if any(target.iterdir()):
            if not overwrite:
                raise UserError(f"{target}: is not empty; pass --overwrite to replace it, or choose another output")
            if not (target / MANIFEST).exists():
                raise UserError(f"{target}: holds something that trimtab did not write; remove it yourself")
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        for file in staging.rglob("*"):
            file.chmod(0o777 & ~_umask() if file.is_dir() else 0o666 & ~_umask())  # safetensors makes private files
        write_manifest(staging)
        staging.chmod(0o777 & ~_umask())
        old = None
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}-old-", dir=target.parent))
            os.replace(target, old)
        os.replace(staging, target)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_manifest(folder: Path) -> None:
    """List every file of the folder with its size and hash in `manifest.json`."""
    names = sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    files = {name: {"bytes": (folder / name).stat().st_size, "sha256": digest(folder / name)} for name in names}
    write_json(folder / MANIFEST, {"version": 1, "files": files})


def verify(folder: Path) -> int:
    """Read every file again and compare it with the manifest.

    Returns:
        The number of files that were read.

    Raises:
        UserError: naming the first file that is missing, changed or foreign.
    """
    whole = listed(folder)
    for name, (size, sha256) in whole.items():
        file = folder / name
        if not file.is_file():
            raise UserError(f"{file}: is missing; save, export or copy the model again")
        if file.stat().st_size != size or digest(file) != sha256:
            raise UserError(f"{file}: is not what was written (its SHA-256 differs); save, export or copy it again")
    for file in sorted(folder.glob("*.safetensors")):
        if file.name not in whole:
            raise UserError(f"{file}: does not belong to this model, and readers would take it for a part; remove it")
    return len(whole)


def listed(folder: Path) -> dict[str, tuple[int, str]]:
    """Bytes and SHA-256 of every file that the folder's manifest lists.

    Raises:
        UserError: if there is none, or it is none.
    """
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise UserError(f"{folder}: no {MANIFEST} in it, so nothing says what it should hold; save or export it again")
    try:
        files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
        return {str(name): (int(f["bytes"]), str(f["sha256"])) for name, f in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{manifest}: not a manifest ({error!r}); save or export the model again") from error


def write_json(file: Path, values: Any) -> None:
    """Values as indented JSON with sorted keys."""
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class Shards:
    """Safetensors written as tensors come, in files of at most `max_bytes` (a single larger tensor has its own).

    Args:
        folder: where to write.
        max_bytes: size of a shard.
        stem: name of the file without its ending.
    """

    def __init__(self, folder: Path, max_bytes: int, stem: str = "model") -> None:
        self._folder, self._max, self._stem = folder, max_bytes, stem
        self._held: dict[str, Tensor] = {}
        self._held_bytes = 0
        self._shards: list[tuple[Path, list[str]]] = []
        self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, now or with the next shard."""
        size = tensor.numel() * tensor.element_size()
        if self._held and self._held_bytes + size > self._max:
            self._flush()
        self._held[name] = tensor.detach().contiguous().cpu()
        self._held_bytes += size
        self._total += size

    def _flush(self) -> None:
        file = self._folder / f"{self._stem}-{len(self._shards) + 1:05d}.part"
        save_file(self._held, file, metadata={"format": "pt"})
        self._shards.append((file, list(self._held)))
        self._held, self._held_bytes = {}, 0

    def close(self) -> None:
        """Write what is left, and the index if there are several files."""
        if self._held or not self._shards:
            self._flush()
        count = len(self._shards)
        names = [f"{self._stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else [f"{self._stem}.safetensors"]
        weight_map: dict[str, str] = {}
        for name, (file, tensors) in zip(names, self._shards, strict=True):
            file.rename(self._folder / name)
            weight_map |= dict.fromkeys(tensors, name)
        if count > 1:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            write_json(self._folder / f"{self._stem}.safetensors.index.json", index)


def write_surroundings(
    folder: Path, model: Any, tokenizer: Any, dtype: torch.dtype, quantization_config: dict[str, Any] | None
) -> None:
    """config.json, generation_config.json and the tokenizer's files.

    Args:
        folder: where to write.
        model: the model whose config is taken, its own `quantization_config` replaced.
        tokenizer: None to write none.
        dtype: written as the model's dtype.
        quantization_config: None for a model of plain floats.
    """
    values = copy.copy(model.config)
    vars(values).pop("quantization_config", None)
    config = values.to_dict()
    config.pop("_name_or_path", None)
    config["architectures"] = [type(model).__name__]
    config["dtype"] = str(dtype).removeprefix("torch.")
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    write_json(folder / "config.json", config)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def float_tensors(model: Any, ours: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Name and value of every tensor that belongs to none of our layers, in `dtype` where floating, ties left out."""
    tied = set(getattr(model, "all_tied_weights_keys", {}) or {})
    prefixes = tuple(f"{name}." for name in ours)
    for name, tensor in model.state_dict().items():
        if name in tied or name.startswith(prefixes):
            continue
        yield name, tensor.to(dtype) if tensor.is_floating_point() else tensor
