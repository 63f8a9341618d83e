"""What a study is of: trials under one mark compare with each other, and a recipe that says otherwise is refused."""

import hashlib
import json
from dataclasses import asdict
from typing import Any

from trimtab.bit_search.ledger import Ledger
from trimtab.bit_search.space import Space
from trimtab.errors import UserError
from trimtab.models import contents
from trimtab.recipe.recipe import Recipe

_HOW = {"workers", "storage", "devices", "engine", "resources"}
_MAY_CHANGE = {"trials", "budget", "budget_training", "uniform", "seed"} | _HOW
"""Of a search that continues."""
_NOT_OF_DATA = {"eval_tokens", "num_proc", "streaming", "path", "eval_path", "template"}
"""How data are read, not which, and where they lie; a search refuses streams."""
_OWN_LENGTH = {
    "steps",
    "epochs",
    "save_steps",
    "keep_checkpoints",
    "log_steps",
    "report_to",
    "compile",
    "evaluate_steps",
    "early_stop",
}
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
        ("model", recipe.model.model_dump(mode="json", exclude={"device", "path", "adapter"})),
        # Hashes of its files: pruned elsewhere alike, last bits may choose otherwise.
        ("what model.path holds", contents.of_model(recipe.model.path)),
        ("what model.adapter holds", contents.of_adapter(recipe.model.adapter)),
        ("method", [recipe.method.name, asdict(recipe.method), recipe.merge]),
        ("rules", [repr(rule) for rule in (*space.placements, *space.others)]),
        ("units", [space.bytes_UC.tolist(), space.fixed_bytes]),
        (
            "data",
            [recipe.data.model_dump(mode="json", exclude=_NOT_OF_DATA), "windows from all of the text, or answers"],
        ),
        ("what its data hold", _held(contents.of_data(recipe.data, measured=True))),
        ("search", recipe.search.model_dump(mode="json", exclude=_MAY_CHANGE)),
        ("train", _training(recipe) if tuned else None),
        ("start, distill, activations or kv", [repr(b) for b in _beside(recipe)] if tuned else None),
    ]


def _held(data: contents.Contents) -> contents.Contents:
    """Of data what their files hold: how they are read is in the recipe's own block."""
    found = {key: value["from"] if isinstance(value, dict) else value for key, value in data.items()}
    return {key: value for key, value in found.items() if key != "holdout"}


def _training(recipe: Recipe) -> dict[str, Any]:
    """With rates as they are given: a trial's own length decides those that are not. Attentions differ by roundings."""
    return recipe.train.model_dump(mode="json", exclude=_OWN_LENGTH | {"attention", "reference"}) | {
        "parametrization": recipe.parametrization,
        "reference": recipe.train.reference and contents.of_model(recipe.train.reference),
    }


def _beside(recipe: Recipe) -> tuple[Any, ...]:
    distill = recipe.distill and recipe.distill.model_copy(update={"cache": None})
    start = recipe.start.model_copy(update={"path": None})
    return start, contents.of_start(recipe), distill, recipe.activations, recipe.kv
