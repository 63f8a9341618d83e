"""The rows that a recipe's data block names: those to train on, and those to measure on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from trimtab.data import objectives
from trimtab.data.rows import judged, load_rows
from trimtab.data.sequences import length_of, token_windows
from trimtab.data.sources import Texts, mixed
from trimtab.data.split import SHARE
from trimtab.errors import UserError
from trimtab.recipe.fields import DataBlock, StartBlock

if TYPE_CHECKING:
    from trimtab.recipe.recipe import Recipe


def training(block: DataBlock) -> Texts:
    """The rows to train on, and what is split off them.

    Raises:
        UserError: for anything in them that the user can fix.
    """
    return mixed(block.sources, share_of(block))


def share_of(block: DataBlock) -> float | None:
    """The share of the rows that is split off; None for what `mixed` takes of many."""
    return 0.0 if block.holdout is None and block.eval_path is not None else block.holdout


def most_held_out(block: DataBlock) -> float:
    """The share of the rows that is split off, if any is."""
    share = share_of(block)
    return SHARE if share is None else share


def training_of(recipe: Recipe) -> Texts:
    """What a recipe trains on, in the form that its objective needs: only supervised texts are split.

    Raises:
        UserError: for anything in it that the user can fix.
    """
    block, objective = recipe.data, recipe.train.objective
    assert block is not None, "the recipe was checked to have data"
    if objective == "sft":
        return training(block)
    if objective == "grpo":
        rows = objectives.prompts(block.sources)
        return Texts(rows, None, block.sources, (len(rows),))
    found = mixed(block.sources)
    objectives.check_form(found.rows, objective, block.named)
    return found


def held_out(block: DataBlock, texts: Texts | None = None) -> Any:
    """The rows to measure on, or None.

    Args:
        block: names them, or the share to split off.
        texts: of `training`, if it is at hand.
    """
    if block.eval_path is not None:
        rows = block.measured.rows()
        # Of preferences the good answers are measured, as they are learned.
        kind = "dpo" if "chosen" in rows.column_names else "kto"
        if kind == "kto" and judged(rows) and not any(rows["label"]):
            raise UserError(f"data.eval_path: {block.eval_path} holds no answer that is good, and those are measured")
        return objectives.answers(rows, kind) if judged(rows) else rows
    if block.holdout == 0:
        return None
    found = training(block) if texts is None else texts
    if found.held_out is None and block.holdout is not None:
        raise UserError(
            f"data.holdout: none of {sum(found.counts)} rows is left to measure on: nearly the same stands in the others; "
            "name held-out data in data.eval_path, or set data.holdout to 0"
        )
    return found.held_out


def key_of(block: DataBlock) -> str:
    """The key that held-out rows are of."""
    return "data.holdout" if block.eval_path is None else "data.eval_path"


def windows_of(block: DataBlock, rows: Any, tokenizer: Any) -> Tensor:
    """The tokens (W, L) to measure on, of rows of `held_out`.

    Windows have `block_tokens`; of rows that were split off, all tokens where these are fewer.
    """
    length = block.block_tokens
    if block.eval_path is None:
        length = max(2, length_of(rows, tokenizer, length))
    return token_windows(rows, tokenizer, block_tokens=length, limit_tokens=block.eval_tokens)


def calibration(block: StartBlock, data: DataBlock | None) -> Any:
    """The rows that a start is calibrated on where it names its own, by the keys that the training data has."""
    assert block.path is not None
    if data is not None:
        return data.beside(block.path, block.split, block.subset).rows()
    return load_rows(block.path, split=block.split, subset=block.subset)
