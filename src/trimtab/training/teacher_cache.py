"""A teacher on disk: its k likeliest tokens at every counted position, so that training needs none of its memory.

One pass over the packed training sequences, before the student is loaded; peak memory is the larger of the two phases,
not their sum. The arrays are mapped, not read: a step touches only the rows of its own sequences.

    sequence 0       sequence 1    sequence 2            first = [0, 5, 8, 14]
    p p p p p        p p p         p p p p p p           a row for every position that counts, k + 1 float16 logarithms
    0                5             8                     and k int32 tokens; batches find theirs by sequence number

    teacher.json     what it was made of (hashes of the model and of the rows, packing, seed ...), and how far it is
    first.npy  log_probs.npy  ids.npy

A cache made of anything else is made anew, with a message that names what differs. An interrupted one goes on.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import UserError
from trimtab.formats.holding import holding
from trimtab.models.located import files_of
from trimtab.models.sources import ModelSource
from trimtab.recipe.inputs import digest
from trimtab.recipe.recipe import Recipe
from trimtab.training.divergence import TopTargets, chunks, top_of
from trimtab.training.loss import IGNORED
from trimtab.training.teacher import LiveTeacher, load_teacher

_FLUSH_SECONDS = 20.0
"""Time between records of how far an unfinished cache is."""
_ARRAYS = ("first", "log_probs", "ids")
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
        words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else json.dumps(tokenizer.get_vocab())
        return cls(
            model=_hash(*(digest(f).encode() for f in files_of(recipe.model.path) if _of_weights(f))),
            rows=_hash(*(json.dumps(row, sort_keys=True).encode() for row in rows)),
            tokenizer=_hash(words.encode(), str(tokenizer.chat_template).encode()),
            block_tokens=recipe.data.block_tokens,
            loss=recipe.data.loss,
            packing=recipe.data.packing,
            packer=f"trl {version('trl')}, on our tokens",
            seed=recipe.train.seed,
            dtype=recipe.model.dtype,
            temperature=recipe.distill.temperature,
            top_k=recipe.distill.top_k,
        )


def _of_weights(file: Path) -> bool:
    return file.name == "config.json" or file.suffix in (".safetensors", ".gguf")


def _hash(*parts: bytes) -> str:
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


def _state(record: Path) -> dict[str, Any]:
    """What a cache's record says."""
    try:
        state = json.loads(record.read_text(encoding="utf-8"))
        known = {"key", "sequences", "count", "width", "done"} <= state.keys()
    except (ValueError, AttributeError):
        known = False
    if not known:
        raise UserError(f"distill.cache: {record} is no record of a cache; name another directory")
    return dict(state)


class Cache:
    """A directory with a teacher's predictions.

    Args:
        folder: made if need be.
        key: what the predictions must have been made of.

    Raises:
        UserError: for a directory that holds something else.
    """

    def __init__(self, folder: Path, key: Key) -> None:
        self.folder, self.key = folder, key
        self._state: dict[str, Any] = {}
        if folder.exists() and not folder.is_dir():
            raise UserError(f"distill.cache: {folder} is a file; name a directory")
        ours = {self._record.name, self._record.with_suffix(".new").name, *(f"{name}.npy" for name in _ARRAYS)}
        foreign = [f.name for f in folder.iterdir() if f.name not in ours] if folder.is_dir() else []
        if self._record.is_file():
            self._state = _state(self._record)
        elif folder.is_dir() and any(f.name.endswith(".npy") for f in folder.iterdir()):
            foreign = sorted(f.name for f in folder.iterdir())
        if foreign:
            raise UserError(f"distill.cache: {folder} holds {foreign[0]}, which is no cache's; name another directory")

    @property
    def _record(self) -> Path:
        return self.folder / "teacher.json"

    @property
    def differs(self) -> list[str]:
        """In what the cache that is there differs from what is needed."""
        found = self._state.get("key", {})
        return [name for name, value in asdict(self.key).items() if self._state and found.get(name) != value]

    @property
    def done(self) -> int:
        """Sequences that are there and usable."""
        return 0 if self.differs else int(self._state.get("done", 0))

    @property
    def complete(self) -> bool:
        """Whether nothing is missing."""
        return bool(self._state) and not self.differs and self.done == self._state["count"]

    def fill(self, live: LiveTeacher, sequences: Sequences, collate: Collate, *, at_once: int) -> None:
        """Ask the teacher about every sequence that is not there yet.

        Args:
            live: with the whole distribution.
            sequences: as they will be trained on.
            collate: makes the trainer's batch of some of them.
            at_once: sequences in one forward pass.
        """
        content = hash_of(sequences)
        if self.differs or self._state.get("sequences") != content:
            self._start(
                sequences, collate, content, min(self.key.top_k, live.model.config.get_text_config().vocab_size)
            )
        arrays = self._arrays("r+")
        first, log_probs, ids = arrays
        flushed = perf_counter()
        try:
            for start in range(self.done, len(sequences), at_once):
                batch = collate([sequences[i] for i in range(start, min(start + at_once, len(sequences)))])
                found = self._ask(live, batch)
                rows = slice(first[start], first[min(start + at_once, len(sequences))])
                log_probs[rows], ids[rows] = found.log_probs.numpy(), found.ids.numpy()
                self._state["done"] = min(start + at_once, len(sequences))
                if perf_counter() - flushed > _FLUSH_SECONDS:
                    self._write(arrays)
                    flushed = perf_counter()
        finally:
            self._write(arrays)

    def _ask(self, live: LiveTeacher, batch: dict[str, Any]) -> TopTargets:
        device = next(live.model.parameters()).device
        targets = live.targets({k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()})
        width, temperature = self._state["width"], self.key.temperature
        with torch.no_grad():
            parts = [top_of(targets.logits(chunk), width, temperature) for chunk in chunks(len(targets))]
        empty = TopTargets(torch.empty(0, width + 1).half(), torch.empty(0, width).int())
        return TopTargets(
            torch.cat([empty.log_probs, *(p.log_probs.cpu() for p in parts)]),
            torch.cat([empty.ids, *(p.ids.cpu() for p in parts)]),
        )

    def _start(self, sequences: Sequences, collate: Collate, content: str, width: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        counts = [int((collate([s])["labels"][:, 1:] != IGNORED).sum()) for s in _each(sequences)]
        first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._state = {"key": asdict(self.key), "sequences": content, "count": len(counts), "width": width, "done": 0}
        self._save_state()
        np.save(self.folder / "first.npy", first)
        for name, columns, dtype in (("log_probs", width + 1, np.float16), ("ids", width, np.int32)):
            np.lib.format.open_memmap(self.folder / f"{name}.npy", "w+", dtype, (int(first[-1]), columns))

    def _arrays(self, mode: str) -> tuple[Any, Any, Any]:
        maps = (np.load(self.folder / f"{name}.npy", mmap_mode=mode) for name in ("log_probs", "ids"))  # type: ignore[arg-type]
        return np.load(self.folder / "first.npy"), *maps

    def _write(self, arrays: tuple[Any, Any, Any]) -> None:
        for array in arrays[1:]:
            array.flush()
        self._save_state()

    def _save_state(self) -> None:
        new = self._record.with_suffix(".new")
        new.write_text(json.dumps(self._state, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self._record)

    def teacher(self, sequences: Sequences) -> "CachedTeacher":
        """The teacher that a complete cache stands for.

        Raises:
            UserError: if it was made of other sequences than these.
        """
        if not self.complete:
            raise UserError(f"distill.cache: {self.folder} is not complete; a run with `teacher: cached` makes it")
        if self._state["sequences"] != hash_of(sequences):
            raise UserError(f"distill.cache: {self.folder} is of other training sequences; remove it, it is made anew")
        return CachedTeacher(*self._arrays("r"))


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
        rows = [slice(self._first[i], self._first[i + 1]) for i in batch[NUMBER].tolist()]
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
        """The trainer's batch, and `NUMBER`, int64 (sequences,)."""
        return {**self._collate(examples), NUMBER: torch.tensor([example[NUMBER] for example in examples])}


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
        UserError: for a directory that holds something else or that another process fills, or a model that is no float
            model.
    """
    folder = recipe.teacher_cache
    if folder is None or not recipe.train.steps:
        return
    key = Key.of(recipe, tokenizer, rows)
    if Cache(folder, key).complete:
        say(f"learning from the float model's predictions in {folder}")
        return
    with holding(folder):
        cache = Cache(folder, key)
        if cache.differs:
            say(f"{folder}: was made with another {', '.join(cache.differs)}; made anew")
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
        model: Any = load_teacher(recipe)
        trainer.teacher = LiveTeacher(model.to(trainer.args.device))
        return
    trainer.teacher = Cache(folder, Key.of(recipe, tokenizer, rows)).teacher(trainer.train_dataset)
    trainer.train_dataset = trainer.train_dataset.add_column(NUMBER, list(range(len(trainer.train_dataset))))
    trainer._signature_columns = ["input_ids", "labels", "seq_lengths", NUMBER]
    trainer.data_collator = Numbered(trainer.data_collator)
