"""Perplexity over windows of tokens: exp of the mean of -log p(next token), windows that do not overlap.

Legend: W windows, L tokens in each, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.errors import Diverged
from trimtab.words import beyond

TOKENS_AT_ONCE = 1024
"""Tokens in one forward pass, at least one window: low-bit weights are rebuilt once for all of them."""


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows_WL: Tensor) -> float:
    """Perplexity of a causal language model.

    Args:
        model: in evaluation mode it is put, and left.
        windows_WL: int64 token ids (W, L); each window is read alone, its first token is not predicted.

    Returns:
        exp(mean negative log-likelihood) over W (L - 1) tokens; infinity where that is larger than any number.

    Raises:
        Diverged: if the model's predictions are not numbers.
    """
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for some in windows_WL.split(max(1, TOKENS_AT_ONCE // windows_WL.shape[1])):
        ids_WL = some.to(device)
        logits_WLV = model(input_ids=ids_WL, use_cache=False).logits[:, :-1]
        for logits_LV, ids in zip(logits_WLV, ids_WL, strict=True):
            total += F.cross_entropy(logits_LV.float(), ids[1:], reduction="sum").item()
    return of_loss(total / (windows_WL.shape[0] * (windows_WL.shape[1] - 1)), "perplexity: the model", model.dtype)


def of_loss(loss: float, whose: str, dtype: torch.dtype) -> float:
    """exp(loss); infinity where that is larger than any number.

    Args:
        loss: mean negative log-likelihood, in nats.
        whose: begins the message.
        dtype: that it was computed in.

    Raises:
        Diverged: for a loss that is not a number.
    """
    require_numbers(torch.tensor(loss), whose, dtype)
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def require_numbers(values: Tensor, whose: str, dtype: torch.dtype) -> None:
    """Refuse predictions that are not numbers: compared with others, they would seem to be equal.

    Args:
        values: logits, log-probabilities or losses.
        whose: begins the message.
        dtype: that they were computed in.

    Raises:
        Diverged: for a NaN among them.
    """
    if values.isnan().any():
        raise Diverged(f"{whose}: predicts NaN{beyond(dtype)}; its weights are damaged, or its training diverged")
