"""Cross-entropy over a large vocabulary, a chunk of tokens at a time.

The head is frozen, so the gradient of the loss in the hidden states is known as soon as the logits are:

    dloss/dh_t = (softmax(h_t W^T) - onehot(y_t)) W        summed over tokens, divided by their count

Each chunk's logits are made once, turned into that gradient, and dropped; what is kept for backward is as large as
the hidden states. (TRL's chunked loss makes the logits twice and, without Triton, took four times as long on a CPU; it
also reads `lm_head.weight`, which a quantized head does not have.)

Legend: T tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.linear import QuantLinear
from trimtab.memory import LOGITS_CHUNK_TOKENS

IGNORED = -100
"""Label of tokens that do not count."""


def chunked_cross_entropy(
    hidden_TD: Tensor,
    weight_VD: Tensor,
    labels_T: Tensor,
    *,
    bias_V: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Sum of -log softmax(h W^T + bias)[y] over the tokens whose label counts.

    Args:
        hidden_TD: last hidden states, with gradients.
        weight_VD: the head's weight, frozen, in the same dtype.
        labels_T: int64 labels already shifted; -100 does not count.
        bias_V: the head's bias, frozen.
        softcap: logits are passed through softcap * tanh(logits / softcap) (Gemma 2).

    Returns:
        A float32 scalar whose gradient reaches `hidden_TD` only.
    """
    counted = labels_T != IGNORED
    hidden, labels = hidden_TD[counted], labels_T[counted]
    with torch.no_grad():
        total, grad = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        for start in range(0, len(labels), LOGITS_CHUNK_TOKENS):
            chunk = slice(start, start + LOGITS_CHUNK_TOKENS)
            part, grad[chunk] = _chunk(hidden[chunk], weight_VD, labels[chunk], bias_V, softcap)
            total += part
    # The value of the sum, with the gradient that was computed along with it.
    return total + ((hidden - hidden.detach()) * grad).float().sum()


def _chunk(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> tuple[Tensor, Tensor]:
    logits = torch.nn.functional.linear(hidden, weight, bias).float()
    slope = None
    if softcap is not None:
        squashed = torch.tanh(logits / softcap)
        logits, slope = softcap * squashed, 1 - squashed.square()
    log_sum = logits.logsumexp(1)
    rows = torch.arange(len(labels), device=labels.device)
    loss = (log_sum - logits[rows, labels]).sum()
    error = logits.sub_(log_sum.unsqueeze(1)).exp_()
    error[rows, labels] -= 1
    if slope is not None:
        error *= slope
    return loss, error.to(hidden.dtype) @ weight


def summed_loss(model: PreTrainedModel, labels_BL: Tensor, **inputs: Any) -> Tensor:
    """Sum of the next-token losses of a causal model whose head is frozen, never holding all logits.

    Args:
        model: on its base model's hidden states the head is all that follows.
        labels_BL: int64 labels in step with the tokens; -100 does not count.
        inputs: what the model's forward takes.
    """
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    head: Any = model.get_output_embeddings()
    dtype = hidden.dtype
    # The head's weight lies in the shared buffer: no other layer runs until the loss is there.
    quantized = isinstance(head, QuantLinear)
    weight = head.dequantize(dtype, reuse=True) if quantized else head.weight.detach().to(dtype)
    bias = None if head.bias is None else head.bias.detach().to(dtype)
    softcap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return chunked_cross_entropy(hidden, weight, labels_BL[:, 1:].flatten(), bias_V=bias, softcap=softcap)
