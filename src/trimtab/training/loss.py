"""Cross-entropy over a large vocabulary, a chunk of tokens at a time; with a teacher, its divergence too.

The head is frozen, so the gradient of the loss in the hidden states is known as soon as the logits are:

    dloss/dh_t = (softmax(h_t W^T) - onehot(y_t)) W        summed over tokens, divided by their count

Each chunk's logits are made once, turned into that gradient, and dropped; what is kept for backward is as large as
the hidden states. (TRL's chunked loss makes the logits twice and, without Triton, took four times as long on a CPU; it
also reads `lm_head.weight`, which a quantized head does not have.)

Where it cannot serve (a trained head, logits of another form), `loss_of_logits` computes the same from logits.

Legend: T tokens, D hidden size, V vocabulary, C tokens of a chunk.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.models.head import Head
from trimtab.training.divergence import IGNORED, Distillation, chunks, counted_tokens, tokens_at_once


def chunked_cross_entropy(
    hidden_TD: Tensor, head: Head, labels_T: Tensor, distillation: Distillation | None = None,
    counted: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Sum of -log softmax(logits)[y] over the tokens whose label counts; with a teacher, (1 - w) CE + w T^2 KL.

    Args:
        hidden_TD: last hidden states, with gradients.
        head: frozen, in the same dtype.
        labels_T: int64 labels already shifted; -100 does not count.
        distillation: the teacher's targets of the counted tokens.
        counted: `counted_tokens` of the labels, where they are known.

    Returns:
        A float32 scalar whose gradient reaches `hidden_TD` only.
    """
    counted = counted_tokens(labels_T) if counted is None else counted
    hidden, labels = hidden_TD.index_select(0, counted), labels_T[counted]
    with torch.no_grad():
        total, grad = torch.zeros((), device=hidden.device), torch.empty_like(hidden)
        for chunk in _chunks(labels, head.weight_VD.shape[0], distillation):
            part, grad[chunk] = _chunk(hidden[chunk], head, labels[chunk], chunk, distillation)
            total += part
    # The value of the sum, with the gradient that was computed along with it.
    return total + ((hidden - hidden.detach()) * grad).float().sum()


def _chunk(
    hidden: Tensor, head: Head, labels: Tensor, chunk: slice, distillation: Distillation | None
) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss and its gradient in the hidden states; its logits are gone before the next ones come."""
    logits = head.logits(hidden)
    slope = head.after.slope(logits)
    part, error = _error(logits, labels, chunk, distillation)
    if not isinstance(slope, float) or slope != 1:
        error *= slope
    return part, error.to(hidden.dtype) @ head.weight_VD


def loss_of_logits(
    logits_TV: Tensor, labels_T: Tensor, distillation: Distillation | None = None, counted: Tensor | None = None
) -> Tensor:
    """The same from logits that are all there, with a gradient that reaches them: for heads that are trained.

    Args:
        logits_TV: with gradients, in any dtype.
        labels_T: int64 labels already shifted; -100 does not count.
        distillation: the teacher's targets of the counted tokens.
        counted: `counted_tokens` of the labels, where they are known.
    """
    if distillation is None:
        return torch.nn.functional.cross_entropy(logits_TV.float(), labels_T, ignore_index=IGNORED, reduction="sum")
    counted = counted_tokens(labels_T) if counted is None else counted
    logits, labels = logits_TV.index_select(0, counted), labels_T[counted]
    total = logits.float().sum() * 0
    for chunk in _chunks(labels, logits.shape[1], distillation):
        some = logits[chunk].float()
        with torch.no_grad():
            part, error = _error(some.detach().clone(), labels[chunk], chunk, distillation)
        total = total + part + ((some - some.detach()) * error).sum()
    return total


def _chunks(labels: Tensor, vocabulary: int, distillation: Distillation | None) -> Iterator[slice]:
    assert distillation is None or len(distillation.targets) == len(labels), "teacher and student count other tokens"
    return chunks(len(labels), tokens_at_once(labels.device, vocabulary))


def _error(logits: Tensor, labels: Tensor, chunk: slice, distillation: Distillation | None) -> tuple[Tensor, Tensor]:
    """A chunk's summed loss, and its gradient in the logits, which it overwrites."""
    if distillation is not None:
        w, temperature = distillation.weight, distillation.temperature
        kl, pull = distillation.targets.divergence(chunk, logits, temperature)
    log_sum = logits.logsumexp(1)
    rows = torch.arange(len(labels), device=labels.device)
    loss = (log_sum - logits[rows, labels]).sum()
    error = logits.sub_(log_sum.unsqueeze(1)).exp_()
    error[rows, labels] -= 1
    if distillation is None:
        return loss, error
    return (1 - w) * loss + w * temperature**2 * kl, error.mul_(1 - w).add_(pull, alpha=w * temperature)


def summed_loss(
    model: PreTrainedModel, labels_BL: Tensor, distillation: Distillation | None = None,
    counted: Tensor | None = None, **inputs: Any,
) -> Tensor:  # fmt: skip
    """Sum of the next-token losses of a causal model whose head is frozen.

    It never holds all logits, unless the model makes them in a way of its own (`Head.fits`).

    Args:
        model: in any mode, its head frozen.
        labels_BL: int64 labels in step with the tokens; -100 does not count.
        distillation: the teacher's targets of the counted tokens.
        counted: `counted_tokens` of the labels that follow each token, where they are known.
        inputs: what the model's forward takes.
    """
    labels_T = labels_BL[:, 1:].flatten()
    if not Head.fits(model):
        return loss_of_logits(model(**inputs).logits[:, :-1].flatten(0, 1), labels_T, distillation, counted)
    hidden = model.base_model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    # The head's weight lies in the shared buffer: no other layer runs until the loss is there.
    return chunked_cross_entropy(hidden, Head.of(model, hidden.dtype, reuse=True), labels_T, distillation, counted)


__all__ = ["IGNORED", "chunked_cross_entropy", "loss_of_logits", "summed_loss"]
