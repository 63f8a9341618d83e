"""Rows that say which answer is better, or how good one is: what DPO, KTO and GRPO train on.

    dpo     {"prompt", "chosen", "rejected"}        two answers to one prompt
    kto     {"prompt", "completion", "label"}       an answer, and whether it is good
    grpo    {"prompt", ...}                         a prompt; the other columns are handed to the reward

The first two are read as all rows are (`forms`, `preferences`). Of the last only the prompt is checked here: what else a
row has is the reward's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from trimtab.data.columns import renamed
from trimtab.data.forms import RENDERING
from trimtab.data.rows import located_rows
from trimtab.data.sources import Source
from trimtab.errors import UserError
from trimtab.extras import require_library

if TYPE_CHECKING:
    from datasets import Dataset

FORMS = {
    "dpo": '{"prompt", "chosen", "rejected"}',
    "kto": '{"prompt", "completion", "label"}',
    "grpo": '{"prompt"} and the columns that the reward reads',
}
"""What a row has to hold, by objective."""
_COLUMNS = {"dpo": {"prompt", "chosen", "rejected"}, "kto": {"prompt", "completion", "label"}}


def check_form(rows: Dataset, objective: str, named: str) -> None:
    """Raise a `UserError` where rows of `load_rows` are not those of an objective, dpo or kto."""
    if not _COLUMNS[objective] <= set(rows.column_names):
        found = ", ".join(name for name in rows.column_names if name != RENDERING)
        raise UserError(f"{named}: rows of {{{found}}}; train.objective: {objective} takes {FORMS[objective]}")


def prompts(sources: Sequence[Source]) -> Dataset:
    """The rows of all sources for GRPO: a `prompt`, all strings or all lists of messages, and what the reward reads.

    Raises:
        UserError: naming the row that has no prompt, or one of another form.
    """
    require_library(f"reading {sources[0].path}", "datasets")
    from datasets import Dataset

    found: list[dict[str, Any]] = []
    first = ""
    for source in sources:
        if source.weight != 1:
            raise UserError(f"{source.path}: weight: grpo takes every prompt once; leave weights out")
        for where, row in islice(located_rows(source.path, source.split, source.subset), source.limit):
            made = {str(k): v for k, v in row.items()}
            made = renamed(made, source.columns, where, source.ignore) if source.columns else made
            _check_prompt(made, where)
            if found and isinstance(made["prompt"], str) != isinstance(found[0]["prompt"], str):
                raise UserError(
                    f"{where}: strings and lists of messages in one data set (see {first}); keep to one form"
                )
            first = first or where
            found.append(made)
    if not found:
        raise UserError(f"{sources[0].path}: no rows in the split {sources[0].split!r}; choose another split")
    keys = dict.fromkeys(key for row in found for key in row)
    try:
        return Dataset.from_dict({key: [row.get(key) for row in found] for key in keys})
    except (TypeError, ValueError) as error:  # Arrow's, of a column that holds values of two types
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{sources[0].path}: one type in a column, please: {said}") from error


def _check_prompt(row: Mapping[str, Any], where: str) -> None:
    prompt = row.get("prompt")
    if prompt is None:
        found = ", ".join(row) or "none"
        raise UserError(f"{where}: no 'prompt' (keys: {found}); train.objective: grpo takes rows of {FORMS['grpo']}")
    if not prompt or not isinstance(prompt, str | list):
        raise UserError(f"{where}: 'prompt' is neither a string nor a list of messages, or empty; correct the row")
    if isinstance(prompt, list) and prompt[-1].get("role") == "assistant":
        raise UserError(f"{where}: 'prompt' ends with an answer of the assistant; end it with what is asked")


def answers(rows: Dataset, objective: str) -> Dataset:
    """The same as prompts with their good answers (of grpo: as texts), for calibrating, measuring or describing."""
    names = rows.column_names
    if objective == "dpo":
        rows = rows.rename_column("chosen", "completion")
    elif objective == "kto":
        good = [i for i, label in enumerate(rows["label"]) if label]
        rows = rows.select(good) if good else rows
    elif isinstance(rows[0]["prompt"], str):
        return rows.select_columns(["prompt"]).rename_column("prompt", "text")
    else:
        return rows.map(lambda row: {"prompt": row["prompt"][:-1], "completion": row["prompt"][-1:]})
    kept = ["prompt", "completion", *([RENDERING] if RENDERING in names else [])]
    return rows.select_columns(kept)
