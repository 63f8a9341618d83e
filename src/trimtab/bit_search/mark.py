"""What a study is of: trials under one mark compare with each other, and a recipe that says otherwise is refused."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from trimtab.bit_search.ledger import Ledger
from trimtab.bit_search.space import Space
from trimtab.errors import UserError
from trimtab.formats.manifest import MANIFEST, listed
from trimtab.pruning.checkpoint import made_from
from trimtab.recipe.recipe import Recipe

_MAY_CHANGE = {"trials", "workers", "storage", "budget", "budget_training", "uniform", "seed"}
"""Of a search that goes on."""
_OWN_LENGTH = {"steps", "epochs", "save_steps", "keep_checkpoints", "log_steps", "report_to"}
"""Of the run's training, no trial's."""


def check_study(ledger: Ledger, recipe: Recipe, space: Space, where: str) -> None:
    """Mark a new study; refuse one that another recipe began.

    Args:
        ledger: of the study.
        recipe: with a `search` block.
        space: what it chooses from.
        where: the storage, for the message.

    Raises:
        UserError: naming what differs; all of it for trials that have no mark.
    """
    marks = {
        key: hashlib.sha256(json.dumps(v, sort_keys=True).encode()).hexdigest()[:16] for key, v in about(recipe, space)
    }
    noted = ledger.noted("marks") or {}
    if not noted and not ledger.trials():
        ledger.note("marks", marks)
    elif noted != marks:
        changed = ", ".join(key for key in sorted({*noted, *marks}) if noted.get(key) != marks.get(key))
        raise UserError(
            f"search: the study {recipe.name!r} in {where} was begun with other values of: {changed}; set them back, or "
            "set another `output`, `name` or `search.storage`"
        )


def about(recipe: Recipe, space: Space) -> list[tuple[str, Any]]:
    """All that the quality or the size of a trial depends on, by name of the recipe's block."""
    assert recipe.search is not None
    assert recipe.data is not None
    tuned = recipe.search.objective == "tuned"
    return [
        ("model", [recipe.model.model_dump(mode="json"), _weights(Path(recipe.model.path))]),
        ("method", [recipe.method.name, asdict(recipe.method), recipe.merge]),
        ("rules", [repr(rule) for rule in (*space.placements, *space.others)]),
        ("units", [space.bytes_UC.tolist(), space.fixed_bytes]),
        (
            "data",
            [recipe.data.model_dump(mode="json", exclude={"eval_tokens"}), "windows from all of the text, or answers"],
        ),
        ("search", recipe.search.model_dump(mode="json", exclude=_MAY_CHANGE)),
        ("train", _training(recipe) if tuned else None),
        ("start, distill, activations or kv", [repr(b) for b in _beside(recipe)] if tuned else None),
    ]


def _weights(folder: Path) -> Any:
    """How a pruned model was made, and the hashes of its files: pruned elsewhere alike, last bits may choose otherwise."""
    made = made_from(folder)
    return made and [made, listed(folder) if (folder / MANIFEST).is_file() else None]


def _training(recipe: Recipe) -> dict[str, Any]:
    """With rates resolved, as a recipe read back has them."""
    rates = {"lr": recipe.rates.delta, "lr_scale": recipe.rates.scale, "parametrization": recipe.parametrization}
    return recipe.train.model_dump(mode="json", exclude=_OWN_LENGTH) | rates


def _beside(recipe: Recipe) -> tuple[Any, ...]:
    distill = recipe.distill and recipe.distill.model_copy(update={"cache": None})
    return recipe.start, distill, recipe.activations, recipe.kv
