"""Rows that say which answer is better, or how good one is: what DPO, KTO and GRPO train on.

    dpo     {"prompt", "chosen", "rejected"}        two answers to one prompt
    kto     {"prompt", "completion", "label"}       an answer, and whether it is good
    grpo    {"prompt", ...}                         a prompt; the other columns are handed to the reward

Prompts and answers are strings, or lists of messages, with all that `forms` knows of conversations (system, tools, keys
of messages), and are held to the same: a key that is neither used nor known to say nothing is refused. Two more forms are
common on the hub: the prompt stands at the head of both answers (whole conversations, or whole texts), with a column of
its own or without one. It is then what both begin with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from trimtab.data.forms import RENDERING, convert
from trimtab.data.rows import _located_rows
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
_SCORES = {
    "score_chosen",
    "score_rejected",
    "chosen_score",
    "rejected_score",
    "chosen_rating",
    "rejected_rating",
    "margin",
}
"""Columns of preference sets that say how much better an answer is, which DPO does not ask."""


def load_preferences(
    path: str, objective: str, *, split: str = "train", limit: int | None = None, ignore: Sequence[str] = ()
) -> Dataset:
    """The rows of `path`, in the columns of an objective; prompts and answers all strings, or all lists of messages.

    Args:
        path: as of `rows.load_rows`.
        objective: dpo, kto or grpo.
        split: of a hub data set.
        limit: rows at most.
        ignore: keys of rows that belong neither to prompt nor to answer.

    Raises:
        UserError: naming the row that is of another form, or has a key that would be dropped.
    """
    require_library(f"reading {path}", "datasets")
    from datasets import Dataset, DatasetInfo

    found: list[dict[str, Any]] = []
    unused: set[str] = set()
    first = ""
    for where, row in islice(_located_rows(path, split), limit):
        made, notes = _GATHER[objective]({str(k): v for k, v in row.items()}, where, ignore)
        if found and isinstance(made["prompt"], str) != isinstance(found[0]["prompt"], str):
            raise UserError(f"{where}: strings and lists of messages in one data set (see {first}); keep to one form")
        first = first or where
        found.append(made)
        unused |= notes
    if not found:
        raise UserError(f"{path}: no rows in the split {split!r}; choose another split")
    keys = dict.fromkeys(key for row in found for key in row)
    columns = {key: [row.get(key) for row in found] for key in keys}
    try:
        return Dataset.from_dict(columns, info=DatasetInfo(description=", ".join(sorted(unused))))
    except (TypeError, ValueError) as error:  # Arrow's, of a column that holds values of two types
        raise UserError(f"{path}: one type in a column, please: {' '.join(str(error).split())[:200]}") from error


def answers(rows: Dataset) -> Dataset:
    """The same as prompts with their good answers (of GRPO: as texts), for whoever calibrates or describes."""
    names = rows.column_names
    if "chosen" in names:
        rows = rows.rename_column("chosen", "completion")
    elif "label" in names:
        good = [i for i, label in enumerate(rows["label"]) if label]
        rows = rows.select(good) if good else rows
    elif isinstance(rows[0]["prompt"], str):
        return rows.select_columns(["prompt"]).rename_column("prompt", "text")
    else:
        return rows.map(lambda row: {"prompt": row["prompt"][:-1], "completion": row["prompt"][-1:]})
    kept = ["prompt", "completion", *([RENDERING] if RENDERING in names else [])]
    return rows.select_columns(kept)


def shuffled(rows: list[dict[str, Any]], seed: int) -> Dataset:
    """Rows of token ids as a data set, in the order that the seed gives them: KTO's trainer takes them as they come."""
    from datasets import Dataset

    return Dataset.from_list(rows).shuffle(seed=seed)


_Made = tuple[dict[str, Any], set[str]]


def _pair(row: dict[str, Any], where: str, ignore: Sequence[str]) -> _Made:
    _require(row, where, "dpo")
    chosen, rejected, prompt = row.pop("chosen"), row.pop("rejected"), row.get("prompt")
    if type(chosen) is not type(rejected) or not isinstance(chosen, str | list):
        raise UserError(f"{where}: 'chosen' and 'rejected' are two strings, or two lists of messages; correct the row")
    if row.get("messages") == chosen:
        del row["messages"]
    if isinstance(chosen, list) and isinstance(prompt, str) and _role(chosen) == "assistant":
        row["prompt"] = [{"role": "user", "content": prompt}]
    elif prompt is None or (isinstance(chosen, list) and isinstance(prompt, str)):
        row["prompt"], chosen, rejected = _parted(chosen, rejected, where)
        if prompt is not None and not any(prompt.strip() in str(m.get("content")) for m in row["prompt"]):
            raise UserError(
                f"{where}: 'prompt' stands in no message that 'chosen' and 'rejected' share; remove one of them"
            )
    if chosen == rejected:
        raise UserError(f"{where}: 'chosen' and 'rejected' are the same, so there is nothing to prefer; remove the row")
    better, unused = _converted(row | {"completion": chosen}, where, (*ignore, *_SCORES))
    worse, _ = _converted(row | {"completion": rejected}, where, (*ignore, *_SCORES))
    made = {"prompt": better["prompt"], "chosen": better["completion"], "rejected": worse["completion"]}
    return made | {k: v for k, v in better.items() if k == RENDERING}, unused


def _role(messages: list[Any]) -> Any:
    """Of the first message."""
    return messages[0].get("role") if messages and isinstance(messages[0], Mapping) else None


def _parted(chosen: Any, rejected: Any, where: str) -> tuple[Any, Any, Any]:
    """What both begin with, and the rest of each: messages up to the answers, letters up to the last space."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    if shared is None:
        shared = min(len(chosen), len(rejected))
    if isinstance(chosen, str):
        shared -= bool(shared) and chosen[shared - 1] == " "
    if not 0 < shared < min(len(chosen), len(rejected)):
        raise UserError(
            f"{where}: 'chosen' and 'rejected' have no prompt in common, and none stands in 'prompt'; add it"
        )
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _judged(row: dict[str, Any], where: str, ignore: Sequence[str]) -> _Made:
    _require(row, where, "kto")
    label = row.pop("label")
    if not isinstance(label, bool) and label not in (0, 1):
        raise UserError(f"{where}: 'label' is {label!r} where true or false is needed: whether the answer is good")
    made, unused = _converted(row, where, ignore)
    return made | {"label": bool(label)}, unused


def _asked(row: dict[str, Any], where: str, _: Sequence[str]) -> _Made:
    _require(row, where, "grpo")
    if not row["prompt"] or not isinstance(row["prompt"], str | list):
        raise UserError(f"{where}: 'prompt' is neither a string nor a list of messages, or empty; correct the row")
    if isinstance(row["prompt"], list) and row["prompt"][-1].get("role") == "assistant":
        raise UserError(f"{where}: 'prompt' ends with an answer of the assistant; end it with what is asked")
    return row, set()


_GATHER = {"dpo": _pair, "kto": _judged, "grpo": _asked}


def _require(row: Mapping[str, Any], where: str, objective: str) -> None:
    needed = {"dpo": ("chosen", "rejected"), "kto": ("prompt", "completion", "label"), "grpo": ("prompt",)}[objective]
    missing = [key for key in needed if row.get(key) is None]
    if missing:
        found = ", ".join(row) or "none"
        raise UserError(
            f"{where}: no {missing[0]!r} (keys: {found}); train.objective: {objective} takes rows of {FORMS[objective]}"
        )


def _converted(row: dict[str, Any], where: str, ignore: Sequence[str]) -> _Made:
    """Prompt and answer as `forms` takes them."""
    found = convert(row, where, ignore)
    if "prompt" not in found.row:
        raise UserError(f"{where}: unknown form of row (keys: {', '.join(row)}); give a prompt and an answer")
    rendering = {RENDERING: json.dumps(found.rendering)} if found.rendering else {}
    return {**found.row, **rendering}, found.unused
