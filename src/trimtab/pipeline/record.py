"""`report.json`: what a run knows beside its metrics, so that its page can be made again from the folder alone.

history    what the trainer logged: step, loss, rate, held-out loss where it was measured
layers     of each layer its shape and width, the error of its rounding, the codes that training moved
example    the first training sequence, in pieces that are learned and pieces that are not
plan       the memory that was planned, by what it is for, and what the process held before the model came
versions   of the libraries, and the machine
"""

import json
import os
import platform
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from trimtab.evaluation.weight_error import weight_errors
from trimtab.formats.manifest import write_json
from trimtab.layers.linear import QuantLinear
from trimtab.memory.peak import Plan
from trimtab.memory.plan import plan
from trimtab.memory.process import peak_bytes, reset_peak
from trimtab.models.prepare import LayerFold
from trimtab.models.transformers_bridge import quant_layers
from trimtab.recipe.recipe import Recipe
from trimtab.training.build import RunContext
from trimtab.training.checkpoints import whole_checkpoint
from trimtab.training.labelled import Labelled

_EXAMPLE_TOKENS = 512
_LIBRARIES = (
    "trimtab",
    "torch",
    "transformers",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "peft",
    "bitsandbytes",
)
_PLANNED = ("codes", "float_parameters", "adapters", "gradients", "optimizer", "activations", "temporary", "teacher")


@dataclass
class Record:
    """A run's, as it grows."""

    values: dict[str, Any] = field(default_factory=lambda: {"versions": versions()})
    errors: dict[str, float] = field(default_factory=dict)

    def before(self, recipe: Recipe, given: RunContext) -> None:
        """What is known before the model is loaded: the plan, and the first sequence."""
        if recipe.train.steps:
            planned = plan(recipe, given.source.layout())
            reset_peak()  # what is measured later has the pages of libraries in it, too
            self.values["plan"] = {"process": peak_bytes(), "total": planned.total, **_parts(planned)}
        if isinstance(given.labelled, Labelled):
            self.values["example"] = pieces(given.tokenizer, given.labelled.sequences[0])

    def rounded(self, model: PreTrainedModel, given: RunContext) -> None:
        """What rounding did to each layer; before training."""
        self.errors = weight_errors(model, given.source)

    def trained(self, checkpoints: Path) -> None:
        """What the trainer logged, of a resumed run from its beginning: its last checkpoint knows it."""
        last = whole_checkpoint(checkpoints)
        if last is not None and (last / "trainer_state.json").is_file():
            state = json.loads((last / "trainer_state.json").read_text(encoding="utf-8"))
            self.values["history"] = [line for line in state["log_history"] if "loss" in line or "eval_loss" in line]

    def folded(self, model: PreTrainedModel, folds: Iterable[LayerFold]) -> None:
        """What training moved in each layer."""
        by_name = {fold.name: fold for fold in folds}
        rows = []
        for name, layer in quant_layers(model).items():
            if isinstance(layer, QuantLinear) and layer.tied:  # the embedding's weight is there already
                continue
            fold, grid = by_name.get(name), layer.base.grid
            rows.append(
                {
                    "name": name,
                    "shape": list(layer.base.shape),
                    "bits": None if grid is None else grid.bits,
                    "error": self.errors.get(name),
                    "fold_error": None if fold is None else fold.error,
                    **({} if fold is None else fold.moved._asdict()),
                }
            )
        self.values["layers"] = rows

    def write(self, folder: Path) -> None:
        """Write `report.json`."""
        write_json(folder / "report.json", self.values)


def _parts(planned: Plan) -> dict[str, int]:
    values = asdict(planned)
    return {name: values[name] for name in (*_PLANNED, "apart", "before")}


def pieces(tokenizer: Any, sequence: Mapping[str, Sequence[int]]) -> list[list[Any]]:
    """A training sequence as `[text, whether it is learned]`, cut after 512 tokens."""
    ids, labels = list(sequence["input_ids"])[:_EXAMPLE_TOKENS], list(sequence["labels"])[:_EXAMPLE_TOKENS]
    found: list[tuple[list[int], bool]] = []
    for token, label in zip(ids, labels, strict=True):
        learned = label >= 0
        if not found or found[-1][1] != learned:
            found.append(([], learned))
        found[-1][0].append(token)
    return [[tokenizer.decode(some), learned] for some, learned in found]


def versions() -> dict[str, str]:
    """Libraries that are installed, Python, and the machine."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    gpu = f", {torch.cuda.get_device_name(0)}" if torch.cuda.is_available() else ""
    return found | {"machine": f"{sys.platform} {platform.machine()}, {os.cpu_count()} processors{gpu}"}
