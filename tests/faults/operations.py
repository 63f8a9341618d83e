"""What is interrupted: seven commands on a tiny model, each with what is there before it, and what a person does after it.

All of an operation's files are below one folder, of one name, so that paths written into them are the same every time.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tiny
import trimtab as tt
from gguf_models import byte_level_tokenizer
from trimtab.formats.manifest import verify, write_manifest
from trimtab.methods import Rtn
from trimtab.pipeline import run as running
from trimtab.pipeline import stages
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training import teacher_cache
from trimtab.training.checkpoints import whole_checkpoint

TIMES = ("metrics.json", "report.json", "report.html", "manifest.json", "search.json", "pruning.json")
"""Files that hold seconds, peaks of memory, or hashes of those."""
STEPS = {"steps": 4, "save_steps": 2, "evaluate_steps": 2}


@dataclass(frozen=True)
class Operation:
    """A command."""

    given: Callable[[Path], None]
    """Makes what is there before, in a folder."""
    do: Callable[[Path], Any]
    """The command."""
    again: Callable[[Path], Any]
    """What goes on after it was interrupted: the same command, or the one that it names."""
    whole: tuple[str, ...] = ("out",)
    """Folders that are whole whenever they are there: `verify` and a load say so."""
    loads: bool = True
    """Whether they hold a model."""
    stays: bool = False
    """Whether an earlier one is there from the beginning, so that one is there at any moment."""
    results: Callable[[Path], dict[str, str]] = field(default=lambda folder: hashes(folder / "out"))
    """What it left, to be compared with what it leaves when nothing interrupts it."""


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, but for those that hold times."""
    files = (f for f in sorted(folder.rglob("*")) if f.is_file() and f.name not in TIMES)
    return {str(f.relative_to(folder)): hashlib.sha256(_content(f)).hexdigest() for f in files}


def _content(file: Path) -> bytes:
    """Bytes of a file; of safetensors with the metadata in one order, which the library draws again in each process."""
    held = file.read_bytes()
    if file.suffix != ".safetensors":
        return held
    end = 8 + int.from_bytes(held[:8], "little")
    return json.dumps(json.loads(held[8:end]), sort_keys=True).encode() + held[end:]


def _model(folder: Path) -> None:
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")


def _recipe(folder: Path, **changes: Any) -> Recipe:
    made: dict[str, Any] = {"train": STEPS, "evaluate": {"parity": False}, "data": {"eval_tokens": 64}, **changes}
    return from_dict(tiny.recipe(folder / "model", folder / "data.jsonl", folder / "out", **made))


# ---- a run, over an earlier one -----------------------------------------------------------------------------------------

_EARLIER: dict[str, Any] = {"method": "rtn", "train": {"steps": 0}, "data": {"eval_path": None}}


def _earlier(folder: Path) -> None:
    _model(folder)
    running.run(_recipe(folder, **_EARLIER))


def _train(folder: Path) -> Any:
    return running.run(_recipe(folder, export=["native", "dense"]), overwrite=True)


def _train_again(folder: Path) -> Any:
    if whole_checkpoint(folder / "out.unfinished" / "checkpoints") is not None:
        return running.run(_recipe(folder, export=["native", "dense"]), resume=True)
    if not (folder / "out" / "checkpoints").exists():
        return _train(folder)
    return None


# ---- folding, of a run whose training is over ---------------------------------------------------------------------------


def _trained(folder: Path) -> None:
    def stops(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    _model(folder)
    fold, running.fold = running.fold, stops  # type: ignore[assignment]
    try:
        running.run(_recipe(folder))
    except KeyboardInterrupt:
        running.fold = fold


def _fold(folder: Path) -> Any:
    return running.run(_recipe(folder), resume=True)


def _fold_again(folder: Path) -> Any:
    return _fold(folder) if (folder / "out.unfinished").exists() else None


# ---- saving, exporting, pruning -----------------------------------------------------------------------------------------


def _quantized(folder: Path, bits: int) -> tuple[Any, Any]:
    rules = [tiny.RULES[0], {"match": "*", "grid": {"bits": bits, "group": 32, "zero": "integer"}}]
    return tt.load(str(folder / "model"), Rtn(), rules)


def _saved(folder: Path) -> None:
    _model(folder)
    model, _ = _quantized(folder, 2)
    tt.save(model, folder / "out", byte_level_tokenizer())  # which GGUF can hold


def _save(folder: Path) -> None:
    model, tokenizer = _quantized(folder, 3)
    tt.save(model, folder / "out", tokenizer, max_shard_size=60_000)


def _exported(folder: Path) -> None:
    _saved(folder)
    tt.export(folder / "out", "dense", folder / "dense")


_FORMATS = ("dense", "gguf", "compressed-tensors")


def _export(folder: Path) -> None:
    for name in _FORMATS:
        tt.export(folder / "out", name, folder / name, overwrite=True)


def _prune(folder: Path) -> None:
    tt.prune(str(folder / "model"), folder / "out", ratio=0.3, importance="magnitude")


def _prune_again(folder: Path) -> None:
    if not (folder / "out").exists():
        _prune(folder)


# ---- a search -----------------------------------------------------------------------------------------------------------

_SEARCH = {"units": "layer", "bits": [2, 4, 8], "trials": 2, "tokens": 64, "sensitivity_tokens": 64}


def _search(folder: Path) -> None:
    stages.search(_recipe(folder, search=_SEARCH))


def _front(folder: Path) -> dict[str, str]:
    """Widths and quality of every finished trial, and the recipes of the front."""
    found = hashes(folder / "out" / "search" / "points")
    lines = (folder / "out" / "search" / "trials.csv").read_text(encoding="utf-8").splitlines()
    head = lines[0].split(",")
    finished = (dict(zip(head, line.split(","), strict=True)) for line in lines[1:])
    left = ("number", "kind", "seconds", "where", "reason")
    rows = sorted(
        str({k: v for k, v in row.items() if k not in left}) for row in finished if row["state"] == "complete"
    )
    return found | dict.fromkeys(rows, "")


# ---- a teacher's cache --------------------------------------------------------------------------------------------------


def _teach(folder: Path) -> None:
    from trimtab.data.rows import load_rows
    from trimtab.models.sources import open_source
    from trimtab.training.trainer import packed

    teacher_cache._RECORD_SECONDS = -1.0  # a record after every batch
    recipe = _recipe(folder, distill={"teacher": "cached", "top_k": 8, "cache": str(folder / "x")})
    assert recipe.distill is not None
    distill = recipe.distill.model_copy(update={"cache": str(folder / "out")})  # where all have their results
    recipe = recipe.model_copy(update={"distill": distill, "output": str(folder / "run")})
    tokenizer = open_source(recipe.model.path).tokenizer()
    teacher_cache.ask(recipe, tokenizer, load_rows(str(folder / "data.jsonl")), packed)


OPERATIONS = {
    "train": Operation(_earlier, _train, _train_again, stays=True),
    "fold": Operation(_trained, _fold, _fold_again),
    "save": Operation(_saved, _save, _save, stays=True),
    "export": Operation(
        _exported, _export, _export, whole=_FORMATS, results=lambda f: {n: str(hashes(f / n)) for n in _FORMATS}
    ),
    "search": Operation(_model, _search, _search, whole=(), results=_front),
    "prune": Operation(_model, _prune, _prune_again),
    "teacher": Operation(_model, _teach, _teach, loads=False),
}


def _careless(folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (folder / "out" / name).write_text("whole " * 99)
        write_manifest(folder / "out", "export")
    (folder / "out" / "a").write_text("other " * 99)
    write_manifest(folder / "out", "export")
    beside = folder / f"beside-{os.getpid()}"
    beside.write_text("x")
    beside.unlink()


CARELESS = Operation(lambda folder: folder.mkdir(), _careless, _careless, loads=False)
"""Writes in place, which no command does: what it leaves has to be found."""


def is_whole(folder: Path, operation: Operation) -> str:
    """What is under a final name and not whole; "" for nothing."""
    for name in operation.whole:
        there, aside = folder / name, folder / f".{name}.old"
        if not there.exists():
            if operation.stays and not aside.exists():
                return f"neither {name} nor the earlier one is there"
            there = aside
        if not there.exists():
            continue
        try:
            verify(there)
            if operation.loads and name != "gguf":
                _load(there)
        except Exception as error:  # noqa: BLE001
            return f"{there.name}: {type(error).__name__}: {error}"
    return ""


def _load(folder: Path) -> None:
    if "compressed" in folder.name:
        return  # transformers needs the library; `verify` has read it
    tt.load(str(folder))


def left_over(folder: Path, names: set[str]) -> list[str]:
    """What an operation left beside its results, when it was done at last."""
    return sorted(f.name for f in folder.iterdir() if f.name not in names and not re.fullmatch(r"\..*\.lock", f.name))


def shown(values: dict[str, str], expected: dict[str, str]) -> str:
    """In what two results differ."""
    return json.dumps(sorted(k for k in {*values, *expected} if values.get(k) != expected.get(k))[:3])
