"""What was read, by content: a pruned model, a study, a teacher's cache is told from others by that, never by a path.

    a model      SHA-256 of its files by their names in its folder: config, tokenizer, tensors
    an adapter   the same of PEFT's two files
    a text       how its rows are read, and SHA-256 of its files, or the commit of a set of the hub

So what was made of a base that somebody edited where it lies, or of a file with other rows, is not taken for what would be
made now; and what was moved, or read on another machine, is the same.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.data.located import files_of as files_of_data
from trimtab.data.rows import on_hub
from trimtab.data.sources import Source
from trimtab.models.located import files_of, pinned_data
from trimtab.models.sources import resolve
from trimtab.recipe import inputs, texts
from trimtab.recipe.fields import DataBlock
from trimtab.recipe.recipe import Recipe

Contents = dict[str, Any]
"""SHA-256 by name, in values of JSON."""
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
_WEIGHTS = (".safetensors", ".gguf")


def marks_of_model(path: str) -> dict[str, inputs.FileMark]:
    """Bytes and SHA-256 of a model's files, by their names in its folder."""
    return inputs.mark(files_of(path), resolve(path))


def marks_of_adapter(path: str) -> dict[str, inputs.FileMark]:
    """The same of a PEFT LoRA directory."""
    folder = Path(path).expanduser()
    return inputs.mark([folder / name for name in _ADAPTER if (folder / name).is_file()], folder)


def marks_of_text(path: str) -> dict[str, inputs.FileMark]:
    """The same of a data set; nothing of one of the hub, which its commit pins."""
    return inputs.mark(files_of_data(path), path)


def of_model(path: str) -> Contents:
    """What a model holds, wherever it lies."""
    return _hashes(marks_of_model(path), resolve(path))


def of_weights(path: str) -> Contents:
    """The same without its tokenizer: what it computes."""
    return {n: h for n, h in of_model(path).items() if n == "config.json" or n.endswith(_WEIGHTS)}


def of_adapter(path: str | None) -> Contents | None:
    """What a PEFT LoRA holds; None for none."""
    return None if path is None else _hashes(marks_of_adapter(path), Path(path).expanduser())


def of_text(source: Source) -> Contents:
    """What decides the rows of a source: how they are read, and what they are read from."""
    options = {k: v for k, v in source._asdict().items() if k not in ("path", "stream")}
    if on_hub(source.path):
        return _plain({"read": options, "from": pinned_data(source.path)})
    return _plain({"read": options, "from": _hashes(marks_of_text(source.path), Path(source.path).expanduser())})


def of_data(block: DataBlock, *, measured: bool = False) -> Contents:
    """What decides the rows of a recipe's data, and the tokens that they become.

    Args:
        block: names them.
        measured: whether rows of `eval_path` count.
    """
    found: Contents = {f"source {i}": of_text(source) for i, source in enumerate(block.sources)}
    found |= {"holdout": texts.share_of(block), "template": block.template}
    template = inputs.template_file(block)
    if template is not None:
        found["template"] = hashlib.sha256(template.read_bytes()).hexdigest()
    if measured and block.eval_path is not None:
        found["held out"] = of_text(block.measured)
    return found


def of_start(recipe: Recipe) -> Contents | None:
    """What decides the text that a start is calibrated on, where it names its own; None where it does not."""
    start, data = recipe.start, recipe.data
    if start.path is None:
        return None
    beside = data.beside(start.path, start.split, start.subset) if data is not None else None
    return of_text(beside or Source(start.path, start.split, start.subset))


def change(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The first difference between two contents, for a message: `model: model.safetensors has changed`; "" for none."""
    for key in (*before, *(key for key in now if key not in before)):
        if key not in now or key not in before:
            return f"{key} {'is gone' if key not in now else 'was added'}"
        one, other = before[key], now[key]
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            deeper = change(one, other)
            if deeper:
                return f"{key}: {deeper}"
        elif one != other:
            return f"{key} has changed" if _is_hash(other) else f"{key} is {other!r}, and was {one!r}"
    return ""


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def _hashes(marks: Mapping[str, inputs.FileMark], root: Path) -> Contents:
    """By name; a file that is all there is has none, but for its ending, which says how it is read."""
    if root.is_dir():
        return {name: mark.sha256 for name, mark in marks.items()}
    return {f"file{Path(name).suffix}": mark.sha256 for name, mark in marks.items()}


def _plain(values: Contents) -> Contents:
    made: Contents = json.loads(json.dumps(values))
    return made
