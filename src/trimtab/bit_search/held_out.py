"""The loss that tuned trials are ranked by, in nats a token: of what training counts, on rows it has not seen.

text rows                   every token of windows from all of the text
prompts and completions     the completions' tokens, packed as in training: a prompt's loss is nobody's aim, and with
                            answers of a word or two it would drown theirs
"""

import math
import tempfile
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from trimtab.data.sequences import spread, token_windows
from trimtab.errors import UserError
from trimtab.evaluation.perplexity import perplexity
from trimtab.recipe.recipe import Recipe
from trimtab.training.loss import IGNORED, loss_of_logits
from trimtab.training.trainer import packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Loss = Callable[["PreTrainedModel"], float]


def windows(recipe: Recipe, tokenizer: Any, rows: Any, tokens: int) -> Tensor:
    """At most so many tokens, from all of the rows' text, in windows (W, L) of `data.block_tokens`."""
    assert recipe.data is not None
    length = min(recipe.data.block_tokens, tokens)
    return token_windows(rows, tokenizer, block_tokens=length, limit_tokens=tokens, spread=True)


def loss(recipe: Recipe, tokenizer: Any, rows: Any, tokens: int) -> Loss:
    """What measures a model on `rows`; infinite, or not a number, where it has diverged.

    Args:
        recipe: says how training packs its rows.
        tokenizer: the model's.
        rows: held out of training.
        tokens: to use of them, prompts included.

    Raises:
        UserError: at the first model, where no token counts: prompts alone fill `data.block_tokens`.
    """
    if "prompt" in rows.column_names:
        return partial(_of_answers, recipe=recipe, tokenizer=tokenizer, rows=spread(rows, tokenizer, tokens))
    return partial(_of_text, windows_WL=windows(recipe, tokenizer, rows, tokens))


def _of_text(model: "PreTrainedModel", windows_WL: Tensor) -> float:
    try:
        return math.log(perplexity(model, windows_WL))
    except OverflowError:
        return math.inf


@torch.no_grad()
def _of_answers(model: "PreTrainedModel", recipe: Recipe, tokenizer: Any, rows: Any) -> float:
    with tempfile.TemporaryDirectory(prefix="trimtab-held-out-") as folder:  # the trainer makes one for its checkpoints
        sequences, collate = packed(model, tokenizer, recipe.model_copy(update={"output": folder}), rows)
    model.eval()
    device, total, count = next(model.parameters()).device, 0.0, 0
    for batch in DataLoader(sequences, collate_fn=collate):
        inputs = {key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()}
        labels = inputs.pop("labels")[:, 1:].flatten()
        logits = model(**inputs, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += float(loss_of_logits(logits, labels))
        count += int((labels != IGNORED).sum())
    if not count:
        raise UserError("data.eval_path: prompts leave no room for an answer; raise data.block_tokens")
    return total / count
