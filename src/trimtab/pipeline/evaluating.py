"""`trimtab eval` and `trimtab harness`: how good a model is, on held-out text and on tasks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from trimtab.data.sequences import check_tokens
from trimtab.errors import UserError
from trimtab.evaluation import harness as asking
from trimtab.evaluation.harness import Difference, Score
from trimtab.evaluation.perplexity import perplexity as perplexity_of
from trimtab.formats.manifest import add
from trimtab.models.load import load_as_it_is
from trimtab.models.positions import require_length
from trimtab.recipe import inputs, texts
from trimtab.recipe.fields import DataBlock


@dataclass(frozen=True)
class Evaluation:
    """Perplexity on held-out data."""

    perplexity: float
    tokens: int
    """Tokens in all windows."""
    data: str
    split: str
    block_tokens: int
    """Tokens in a window."""
    device: str = "cpu"
    """Where it was computed."""


def perplexity(
    path: str, data: str | None, split: str | None, block_tokens: int | None, tokens: int | None, device: torch.device
) -> Evaluation:
    """Perplexity of a model; arguments as of `trimtab.evaluate`."""
    for option, value in (("block_tokens", block_tokens), ("tokens", tokens)):
        if value is not None and value < 2:
            raise UserError(f"{option}: {value} tokens predict nothing; give at least 2")
    if data is None:
        block = inputs.held_out(Path(path))
        if block is None:
            inside = Path(path) / "model"
            where = f", or give the model that a search left: {inside}" if inside.is_dir() else ""
            raise UserError(f"{path}: has no recipe that names held-out data; pass --data{where}")
        if split is not None and block.eval_path is None:
            raise UserError(f"split: {path} is measured on rows held out of {block.named}; pass --data with the split")
    else:
        block = DataBlock(path=data, eval_path=data)
    own = {"eval_split": split, "block_tokens": block_tokens, "eval_tokens": tokens}
    block = block.model_copy(update={key: value for key, value in own.items() if value is not None})
    rows = texts.held_out(block)
    if rows is None:
        raise UserError(f"{path}: its recipe names no held-out data; pass --data")
    model, tokenizer = load_as_it_is(path, device=device)
    windows = texts.windows_of(block, rows, tokenizer)
    read, of, length = block.eval_path, block.eval_split, windows.shape[1]
    if read is None:
        read, of = f"rows held out of {block.named}", block.split
    check_tokens(windows, tokenizer, model.config.get_text_config().vocab_size, read)
    require_length(model, length, "block_tokens")
    return Evaluation(perplexity_of(model, windows), windows.numel(), read, of, length, str(device))


@dataclass(frozen=True)
class Accuracies:
    """Scores of one model or two, and the second's differences from the first."""

    scores: dict[str, list[Score]]
    """By path."""
    differences: list[Difference]
    out: str
    """The JSON file that holds them."""


def accuracies(
    path: str,
    other: str | None,
    tasks: Sequence[str],
    data: str | None,
    limit: int | None,
    out: str | None,
    device: torch.device,
) -> Accuracies:
    """Accuracies of one model or two; arguments as of `trimtab.harness`."""
    asking.check_tasks(tasks, data)
    if out is None and not Path(path).is_dir():
        raise UserError(f"{path}: is not a directory to write harness.json into; pass --out")
    file = out or str(Path(path) / "harness.json")
    asking.check_out(file)
    paths = (path,) if other is None else (path, other)
    scores = {}
    for name in paths:
        scores[name] = asking.run(*load_as_it_is(name, device=device), tasks, data or "", limit=limit)
    found = [] if other is None else asking.differences(scores[path], scores[other])
    asking.write(file, scores, found)
    if out is None:
        add(Path(path), ("harness.json",))
    return Accuracies(scores, found, file)
