"""A teacher on disk: its k likeliest tokens at every counted position, so that training needs none of its memory.

One pass over the packed training sequences, before the student is loaded; peak memory is the larger of the two phases,
not their sum. The arrays are mapped, not read: a step touches only the rows of its own sequences.

    sequence 0       sequence 1    sequence 2            first = [0, 5, 8, 14]
    p p p p p        p p p         p p p p p p           a row for every position that counts, k + 1 float16 logarithms
    0                5             8                     and k int32 tokens; batches find theirs by sequence number

    teacher.json     what it was made of (hashes of the model and of the rows, packing, seed ...)
    first.npy  log_probs.npy  ids.npy
    manifest.json    the SHA-256 of each, as in every folder of ours

A cache made of anything else, or damaged, is made again, with a message that names why. One that is being made lies beside
it (`filling`) and takes its place when it is whole, so readers of the old one read on; an interrupted one is continued. Of
several runs that need the same, one asks and the others wait for it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab import processes
from trimtab.data.digests import of_tokenizer
from trimtab.disk import is_unfinished
from trimtab.errors import UserError
from trimtab.formats.directory import put_in_place, to_oneself
from trimtab.formats.manifest import MANIFEST, damage, listed
from trimtab.models.contents import of_weights
from trimtab.models.sources import ModelSource
from trimtab.outputs import output, resolved
from trimtab.recipe.recipe import Recipe
from trimtab.training import filling
from trimtab.training.divergence import TopTargets, chunks, top_of
from trimtab.training.filling import RECORD, Filling
from trimtab.training.loss import IGNORED
from trimtab.training.teacher import LiveTeacher, load_teacher

_RECORD_SECONDS = 20.0
"""Time between records of how far an unfinished cache is."""
_FILES = (RECORD, "first.npy", "log_probs.npy", "ids.npy")
_NEW = f"{RECORD}.new"
_OURS = (*_FILES, _NEW, MANIFEST)
NUMBER = "sequence"
"""Column and batch key: which of the training sequences."""

Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Sequences(Protocol):
    """The packed training sequences in their order: token ids, labels, lengths of the documents in them."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Key:
    """All that the numbers in a cache depend on."""

    model: str
    rows: str
    tokenizer: str
    block_tokens: int
    loss: str
    packing: str
    packer: str
    seed: int
    dtype: str
    temperature: float
    top_k: int

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any, rows: Sequence[Any]) -> "Key":
        """The key of a recipe's cache; the whole model is hashed for it, once in a process."""
        assert recipe.distill is not None
        assert recipe.data is not None
        return cls(
            model=_hash(*(digest.encode() for digest in of_weights(recipe.model.path).values())),
            rows=_hash_each(json.dumps(row, sort_keys=True).encode() for row in rows),
            tokenizer=of_tokenizer(tokenizer),
            block_tokens=recipe.data.block_tokens,
            loss=recipe.data.loss,
            packing=recipe.data.packing,
            packer=f"trl {version('trl')}, on our tokens",
            seed=recipe.train.seed,
            dtype=recipe.model.dtype,
            temperature=recipe.distill.temperature,
            top_k=recipe.distill.top_k,
        )


def _hash(*parts: bytes) -> str:
    return _hash_each(parts)


def _hash_each(parts: Iterable[bytes]) -> str:
    made = hashlib.blake2b(digest_size=16)
    for part in parts:
        made.update(len(part).to_bytes(8, "little") + part)
    return made.hexdigest()


def hash_of(sequences: Sequences) -> str:
    """Of token ids, labels and document lengths, in order."""
    made = hashlib.blake2b(digest_size=16)
    for row in _each(sequences):
        for name in ("input_ids", "labels", "seq_lengths"):
            values = np.asarray(row.get(name, ()), dtype=np.int64)
            made.update(len(values).to_bytes(8, "little") + values.tobytes())
    return made.hexdigest()


def _each(sequences: Sequences) -> Iterator[dict[str, Any]]:
    return (sequences[i] for i in range(len(sequences)))


def _state(record: Path) -> dict[str, Any] | None:
    """What a cache's record says; None if it says nothing that a cache's would."""
    try:
        state = json.loads(record.read_text(encoding="utf-8"))
        known = {"key", "sequences", "count", "width", "done"} <= state.keys()
    except (OSError, ValueError, AttributeError):
        return None
    return dict(state) if known else None


def _check_ours(folder: Path, whole: bool = True) -> None:
    """Refuse a directory that holds anything that no cache has; an unfinished cache is known by its record alone."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"distill.cache: {folder} is a file; name a directory")
    names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    foreign = [name for name in names if name not in _OURS and not is_unfinished(name)]
    if not foreign and names and not {MANIFEST, RECORD, _NEW} & {*names}:
        foreign = sorted(names)  # arrays of somebody else
    if foreign:
        raise UserError(f"distill.cache: {folder} holds {foreign[0]}, which no cache has; name another directory")
    if whole and RECORD in names and MANIFEST not in names and _state(folder / RECORD) is None:
        raise UserError(f"distill.cache: {folder / RECORD} is not a record of a cache; name another directory")


class Cache:
    """A directory with a teacher's predictions.

    Args:
        folder: made if need be.
        key: what the predictions must have been made of.
        read: whether its files are read, to see that they are what was written; their sizes are looked at always.

    Raises:
        UserError: for a directory that holds something else.
    """

    def __init__(self, folder: Path, key: Key, *, read: bool = True) -> None:
        self.folder, self.key = folder, key
        self._beside = folder.with_name(f"{folder.name}.unfinished")
        _check_ours(folder)
        self.damage = self._damage(read)
        """Why what is there cannot be used; "" where it can, or nothing is."""
        self._state = (_state(folder / RECORD) or {}) if not self.damage and (folder / MANIFEST).is_file() else {}
        self._begun = _state(self._beside / RECORD) or {}

    def _damage(self, read: bool) -> str:
        if not self.folder.is_dir() or not any(self.folder.iterdir()):
            return ""
        if not (self.folder / MANIFEST).is_file():
            return "it has no hashes, so an earlier version made it"
        try:
            for name, (size, _) in listed(self.folder).items():
                if not (self.folder / name).is_file() or (self.folder / name).stat().st_size != size:
                    return f"{name} is not what was written"
            missing = [name for name in _FILES if name not in listed(self.folder)]
            return f"{missing[0]} is missing" if missing else damage(self.folder) if read else ""
        except UserError as error:
            return str(error)

    @property
    def differs(self) -> list[str]:
        """In what the cache that is there differs from what is needed."""
        return self._other(self._state)

    def _other(self, state: dict[str, Any]) -> list[str]:
        found = state.get("key", {})
        return [name for name, value in asdict(self.key).items() if state and found.get(name) != value]

    @property
    def done(self) -> int:
        """Sequences that are there and usable."""
        if self.complete:
            return int(self._state["done"])
        return 0 if self._other(self._begun) else int(self._begun.get("done", 0))

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return bool(self._state) and not self.differs

    def fill(self, live: LiveTeacher, sequences: Sequences, collate: Collate, *, at_once: int) -> None:
        """Ask the teacher about every sequence that is missing; only the holder of the cache may call this.

        Args:
            live: with the whole distribution.
            sequences: as they will be trained on.
            collate: makes the trainer's batch of some of them.
            at_once: sequences in one forward pass.

        Raises:
            UserError: if the disk is full; what was written is kept.
        """
        width = min(self.key.top_k, live.model.config.get_text_config().vocab_size)
        try:
            rows = self._opened(sequences, collate, width)
            try:
                self._ask_all(rows, live, sequences, collate, at_once)
            finally:
                rows.close()
            self._put()
        except OSError as error:
            raise UserError(
                f"distill.cache: {self._beside}: {error.strerror or error}; make room, or name a directory on another disk "
                "(what was asked is kept, and the same command continues)"
            ) from error

    def _opened(self, sequences: Sequences, collate: Collate, width: int) -> Filling:
        """The files that rows are added to, those of an earlier process if they are of these sequences."""
        content = hash_of(sequences)
        _check_ours(self._beside, whole=False)
        if self._begun and not self._other(self._begun) and self._begun["sequences"] == content:
            found = filling.go_on(self._beside, self._begun)
            if found is not None:
                found.check_space()
                return found
        counts = [int((collate([s])["labels"][:, 1:] != IGNORED).sum()) for s in _each(sequences)]
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        state = {"key": asdict(self.key), "sequences": content, "count": len(counts), "width": width}
        return filling.begin(self._beside, state, first)

    def _ask_all(self, rows: Filling, live: LiveTeacher, sequences: Sequences, collate: Collate, at_once: int) -> None:
        recorded = perf_counter()
        try:
            for start in range(rows.done, len(sequences), at_once):
                end = min(start + at_once, len(sequences))
                found = self._ask(live, collate([sequences[i] for i in range(start, end)]), rows.state["width"])
                rows.add(end - start, found.log_probs.numpy(), found.ids.numpy())
                if perf_counter() - recorded > _RECORD_SECONDS:
                    rows.record()
                    recorded = perf_counter()
        finally:
            rows.record()

    def _ask(self, live: LiveTeacher, batch: dict[str, Any], width: int) -> TopTargets:
        device, temperature = next(live.model.parameters()).device, self.key.temperature
        targets = live.targets({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        with torch.no_grad():
            parts = [top_of(targets.logits(chunk), width, temperature) for chunk in chunks(len(targets))]
        empty = TopTargets(torch.empty(0, width + 1).half(), torch.empty(0, width).int())
        return TopTargets(
            torch.cat([empty.log_probs, *(p.log_probs.cpu() for p in parts)]),
            torch.cat([empty.ids, *(p.ids.cpu() for p in parts)]),
        )

    def _put(self) -> None:
        """What is whole takes the place of what was there, whose readers have it open."""
        if self.damage:  # it is ours, by its names, and no manifest says so any more
            for name in _OURS:
                (self.folder / name).unlink(missing_ok=True)
        for file in self._beside.iterdir():
            if file.name not in _FILES:  # what a killed process was writing
                file.unlink()
        put_in_place(self._beside, self.folder, "teacher")
        self.damage, self._state, self._begun = "", _state(self.folder / RECORD) or {}, {}

    def teacher(self, sequences: Sequences) -> "CachedTeacher":
        """The teacher that a complete cache stands for.

        Raises:
            UserError: if it was made of other sequences than these, or was made again for another run meanwhile.
        """
        if not self.complete:
            other = f" (another run made it again, with another {', '.join(self.differs)})" if self.differs else ""
            raise UserError(
                f"distill.cache: {self.folder} is not complete{other}; a run with `teacher: cached` makes it, and runs on "
                "other sequences have one of their own"
            )
        if self._state["sequences"] != hash_of(sequences):
            raise UserError(f"distill.cache: {self.folder} is of other training sequences; remove it, it is made again")
        maps = (np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in filling.ARRAYS)
        return CachedTeacher(np.load(self.folder / "first.npy"), *maps)


class CachedTeacher:
    """A teacher on disk.

    Args:
        first: (sequences + 1,) first row of each.
        log_probs: (rows, k + 1), mapped.
        ids: (rows, k), mapped.
    """

    def __init__(self, first: Any, log_probs: Any, ids: Any) -> None:
        self._first, self._log_probs, self._ids = first, log_probs, ids

    def targets(self, batch: dict[str, Any]) -> TopTargets:
        """What it said of the counted tokens of a batch that names its sequences."""
        rows = [slice(self._first[i], self._first[i + 1]) for i in batch[NUMBER]]
        log_probs, ids = (np.concatenate([array[r] for r in rows]) for array in (self._log_probs, self._ids))
        device = batch["input_ids"].device
        return TopTargets(torch.from_numpy(log_probs).to(device), torch.from_numpy(ids).to(device))


class Numbered:
    """A collator whose batches name their sequences.

    Args:
        collate: the trainer's own.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The trainer's batch, and `NUMBER`: plain numbers, which stay on the host."""
        return {**self._collate(examples), NUMBER: [example[NUMBER] for example in examples]}


def ask(
    recipe: Recipe,
    tokenizer: Any,
    rows: Any,
    packed: Callable[[Any, Any, Recipe, Any], tuple[Sequences, Collate]],
    *,
    source: ModelSource | None = None,
    say: Callable[[str], None] = lambda _: None,
) -> None:
    """Where a recipe wants a cached teacher, see that it is there; to be called before the student is loaded.

    Args:
        recipe: its model is the teacher; `data` and `train.seed` say which sequences it is asked about.
        tokenizer: the model's.
        rows: the data set.
        packed: `trainer.packed`.
        source: an already opened source of the model.
        say: told what happens.

    Raises:
        UserError: for a directory that holds something else, a full disk, or a model that is not a float model.
    """
    folder = recipe.teacher_cache
    if folder is None or not recipe.train.steps:
        return
    folder, key = output(folder, "distill.cache"), Key.of(recipe, tokenizer, rows)
    if Cache(folder, key).complete:
        say(f"learning from the float model's predictions in {folder}")
        return
    with to_oneself(folder, waits=say):
        cache = Cache(folder, key)
        if cache.complete:
            say(f"learning from the float model's predictions in {folder}, which another run has asked for")
            return
        if cache.damage:
            say(f"{folder}: cannot be used: {cache.damage}; made again")
        if cache.differs:
            say(f"{folder}: was made with another {', '.join(cache.differs)}; made again")
        say(f"asking the float model about the training sequences, into {folder}")
        model = load_teacher(recipe, source)
        sequences, collate = packed(model, tokenizer, recipe, rows)
        cache.fill(LiveTeacher(model), sequences, collate, at_once=recipe.train.micro_batch)


def attach(trainer: Any, recipe: Recipe, tokenizer: Any, rows: Any) -> None:
    """Give a trainer (ours, in `trainer`) the teacher that its recipe asks for, if any."""
    trainer.distill, folder = recipe.distill, recipe.teacher_cache
    if recipe.distill is None:
        return
    if folder is None:
        trainer.teacher = LiveTeacher(load_teacher(recipe))
        return
    folder = resolved(folder, "distill.cache")
    cache = Cache(folder, Key.of(recipe, tokenizer, rows), read=processes.is_first())
    trainer.teacher = cache.teacher(trainer.train_dataset)
    trainer.train_dataset = trainer.train_dataset.add_column(NUMBER, list(range(len(trainer.train_dataset))))
    trainer._signature_columns = ["input_ids", "labels", "seq_lengths", NUMBER]
    trainer.data_collator = Numbered(trainer.data_collator)
