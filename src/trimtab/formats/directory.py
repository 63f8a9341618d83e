"""A directory that looks whole only if it is: staged beside its destination, sharded, and with a manifest of hashes.

Whatever writes a folder (a run, `save`, every export, pruning) writes it through here: into a folder of its own next to the
destination, which it replaces at the end, so a killed export leaves nothing under the final name and the earlier one stays
until then. What may be replaced is in `manifest`, who may write in `holding`.

    model.safetensors                                 up to max_shard_size, else
    model-00001-of-00003.safetensors, ...             with model.safetensors.index.json

Tensors are given one at a time and leave memory with their shard, so a dense export never holds the dense model.
"""

import copy
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from glob import escape
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from trimtab.disk import WRITING, sync
from trimtab.errors import UserError
from trimtab.faults import writing
from trimtab.formats.card import card
from trimtab.formats.holding import holding
from trimtab.formats.manifest import Kind, entries, keeps, remove, write_json, write_manifest
from trimtab.models.finite import require_finite
from trimtab.models.origin import processor_files
from trimtab.outputs import output
from trimtab.words import and_more

_NO_MODELS = ("checkpoint", "teacher")
"""Kinds of folders that need no card."""


@contextmanager
def replacing(target: Path, kind: Kind, *, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which becomes `target` in one step when the block ends without an error.

    Args:
        target: where; nobody else writes it meanwhile.
        kind: what is written; only a folder of the same kind, with nothing in it that is not ours, is replaced.
        overwrite: whether one may be replaced at all.

    Raises:
        UserError: if `target` may not be replaced, or another process is writing it.
    """
    target = output(target)
    check_replaceable(target, kind, overwrite)
    with to_oneself(target):
        check_replaceable(target, kind, overwrite)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}{WRITING}", dir=target.parent))
        try:
            yield staging
            put_in_place(staging, target, kind)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def to_oneself(target: Path, waits: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold an output, after mending what a process left that was killed while it wrote one, or put it in place.

    Args:
        target: the output.
        waits: told that another process holds it, which is waited for then.

    Raises:
        UserError: if another process holds it, and is not waited for.
    """
    with writing(target), holding(target, waits) as alone:
        mend(target)
        if alone:  # so what began these is dead; a process's number would not say so, which may be another machine's
            for left in target.parent.glob(f"{escape(f'.{target.name}{WRITING}')}*"):
                shutil.rmtree(left, ignore_errors=True)
        yield


def mend(target: Path) -> None:
    """What a process left that was killed while it put a folder in place: the earlier one, where there is no other."""
    aside = _aside(target)
    if aside.is_dir() and not target.exists():
        os.replace(aside, target)
    elif aside.is_dir():
        remove(aside)
        if aside.exists():
            raise UserError(
                f"{aside}: holds {and_more(list(entries(aside)))} of an earlier {target.name}; move it away"
            )


def check_replaceable(target: Path, kind: Kind, overwrite: bool, remedy: str = "choose another output") -> None:
    """Raise a `UserError` if something that is not ours to replace is where a folder is to be written.

    Args:
        target: the folder.
        kind: what is to be written there.
        overwrite: whether an earlier one of that kind may be replaced.
        remedy: the end of the message.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise UserError(f"{target}: is a file, not a directory; {remedy}")
    if target == Path.cwd() or target in Path.cwd().parents:
        raise UserError(f"{target}: is the working directory, which cannot be replaced as a whole; {remedy}")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{target}: is not empty; pass --overwrite to replace it, or {remedy}")
    why = keeps(target, kind)
    if why:
        raise UserError(f"{target}: {why}; move or remove it yourself, or {remedy}")


def put_in_place(staging: Path, target: Path, kind: Kind, also: Iterable[str] = ()) -> None:
    """Make a whole folder the one under its final name; the one that was there goes then, file by file of its manifest.

    Args:
        staging: on the same disk as `target`.
        target: held (`to_oneself`) and looked at (`check_replaceable`) by the caller; looked at once more here.
        kind: what it is.
        also: names that will be in it later.
    """
    about = None if kind in _NO_MODELS else card(staging, target.name)
    if about is not None and not (staging / "README.md").exists():
        (staging / "README.md").write_text(about, encoding="utf-8")
    for file in staging.rglob("*"):
        file.chmod(0o777 & ~_umask() if file.is_dir() else 0o666 & ~_umask())  # safetensors makes private files
    write_manifest(staging, kind, also)
    staging.chmod(0o777 & ~_umask())
    _sync_all(staging)  # before the name says that it is whole, and before the earlier one goes
    check_replaceable(target, kind, overwrite=True)  # somebody may have put a file there meanwhile
    aside = _aside(target)
    if target.exists():
        os.replace(target, aside)
    os.replace(staging, target)
    sync(target.parent)
    if aside.exists():
        remove(aside)


def _sync_all(folder: Path) -> None:
    """Have every file of a folder on the disk, and the names in it: what a loss of power would leave."""
    for above, _, files in os.walk(folder, topdown=False):
        for name in files:
            sync(Path(above, name))
        sync(Path(above))


def _aside(target: Path) -> Path:
    """Where the earlier folder is for the moment in which the new one takes its place."""
    return target.with_name(f".{target.name}.old")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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
        """Write one tensor, now or with the next shard; a `UserError` if it holds what is not a finite number."""
        require_finite(tensor, name)
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
    """config.json, generation_config.json and the files of the tokenizer and other processors.

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
    write_processors(folder, model, tokenizer)


def write_processors(folder: Path, model: Any, tokenizer: Any) -> None:
    """The tokenizer's files, or those of a processor that is given for it; and, of a model that sees or hears, those of
    its base's processors.
    """
    for file in processor_files(model):
        shutil.copyfile(file, folder / file.name)
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
