"""`report.json`: what a run knows beside its metrics, so that its page can be made again from the folder alone.

history    what the trainer logged: step, loss, rate, held-out loss where it was measured
layers     of each layer its shape and width, the error of its rounding, the codes that training moved
example    the first training sequence, in pieces that are learned and pieces that are not
plan       the memory that was planned, by what it is for, and what the process held before the model came
versions   of the libraries, and the machine
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

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
from trimtab.training.versions import versions

_PLANNED = ("codes", "float_parameters", "adapters", "gradients", "optimizer", "activations", "temporary", "teacher")


@dataclass
class Record:
    """A run's, as it grows."""

    values: dict[str, Any] = field(default_factory=lambda: {"versions": versions()})
    errors: dict[str, float] = field(default_factory=dict)
    """What rounding did to each layer, as loading filled it in."""

    def before(self, recipe: Recipe, given: RunContext) -> None:
        """What is known before the model is loaded: the plan, and the first sequence."""
        if recipe.train.steps:
            planned = plan(recipe, given.source.layout())
            reset_peak()  # what is measured later has the pages of libraries in it, too
            self.values["plan"] = {"process": peak_bytes(), "total": planned.total, **_parts(planned)}
        if given.overview is not None:
            self.values["example"] = [list(part) for part in given.overview.example]

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
