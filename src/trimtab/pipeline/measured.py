"""What a run measures before it trains, kept beside its checkpoints: a run that continues does not measure it again.

    <output>.unfinished/checkpoints/measured.json
    {"of": SHA-256 of what decides it, "float": perplexity, "rounded": perplexity, "before": an answer}

The files that a run reads are the same when it continues, or it is refused (`recipe.inputs`); what else decides the numbers
is in the recipe, and hashed here. The file moves with the checkpoints into the output, so a finished run that is trained
further has it, too.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from trimtab import processes
from trimtab.pipeline.output import Work
from trimtab.recipe.fields import Block
from trimtab.recipe.recipe import Recipe

FILE = "measured.json"
_DECIDES = ("model", "start", "activations", "kv", "data")
"""Blocks of a recipe that decide what is measured before training, beside its method and rules."""
_NAMES = ("path", "eval_path", "adapter")
"""Keys of files: a run's own recipe, from which it may continue, has the same files by absolute paths."""


@dataclass(frozen=True)
class Measured:
    """Numbers and answers by name, each measured once."""

    file: Path | None
    """None where nothing is trained, so that there is nothing to continue with."""
    of: str
    values: dict[str, Any] = field(default_factory=dict)
    """What is known already."""

    @classmethod
    def before(cls, recipe: Recipe, work: Work, resume: bool) -> "Measured":
        """What a run has measured before training, which is nothing yet unless it continues."""
        file, of = work.checkpoints / FILE if recipe.train.steps else None, _hash(recipe)
        known: dict[str, Any] = {}
        if resume and file is not None and file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            known = found if found.get("of") == of else {}
        return cls(file, of, {key: value for key, value in known.items() if key != "of"})

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """The value of this name, measured if it is not known."""
        if name not in self.values:
            self.values[name] = measure()
            self._write()
        return self.values[name]

    def _write(self) -> None:
        """In one move: a finished run may share the file that was there."""
        if self.file is None or not processes.is_first():
            return
        self.file.parent.mkdir(exist_ok=True)
        new = self.file.with_name(f"{FILE}.new")
        new.write_text(json.dumps({"of": self.of, **self.values}, indent=2) + "\n", encoding="utf-8")
        os.replace(new, self.file)


def _hash(recipe: Recipe) -> str:
    """Of all in a recipe that decides the rounded model and the text that it is measured on, but for the files' names."""
    blocks = {key: _plain(getattr(recipe, key)) for key in _DECIDES}
    asked = [recipe.evaluate.prompt, recipe.evaluate.answer_tokens, recipe.train.seed]
    text = json.dumps([blocks, repr(recipe.method), repr(recipe.rules), asked], sort_keys=True)
    return sha256(text.encode()).hexdigest()


def _plain(block: Any) -> Any:
    if not isinstance(block, Block):
        return repr(block)
    return _nameless(block.model_dump(mode="json", exclude={"num_proc"}))


def _nameless(value: Any) -> Any:
    """Without names of files, wherever they stand; a list of sources says more than names."""
    if isinstance(value, list):
        return [_nameless(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {k: _nameless(v) for k, v in value.items() if k not in _NAMES or isinstance(v, list)}
