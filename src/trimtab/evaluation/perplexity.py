"""Perplexity over windows of tokens: exp of the mean of -log p(next token), windows that do not overlap.

Legend: W windows, L tokens in each, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

TOKENS_AT_ONCE = 1024
"""Tokens in one forward pass, at least one window: low-bit weights are rebuilt once for all of them."""


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows_WL: Tensor) -> float:
    """Perplexity of a causal language model.

    Args:
        model: in evaluation mode it is put, and left.
        windows_WL: int64 token ids (W, L); each window is read alone, its first token is not predicted.

    Returns:
        exp(mean negative log-likelihood) over W (L - 1) tokens.
    """
    model.eval()
    device = next(model.parameters()).device
    total = 0.0
    for some in windows_WL.split(max(1, TOKENS_AT_ONCE // windows_WL.shape[1])):
        ids_WL = some.to(device)
        logits_WLV = model(input_ids=ids_WL, use_cache=False).logits[:, :-1]
        for logits_LV, ids in zip(logits_WLV, ids_WL, strict=True):
            total += F.cross_entropy(logits_LV.float(), ids[1:], reduction="sum").item()
    return math.exp(total / (windows_WL.shape[0] * (windows_WL.shape[1] - 1)))
