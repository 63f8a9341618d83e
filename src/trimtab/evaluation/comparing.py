"""Two models on one text: how far their predictions are apart, token by token, and how good each is.

    KL(A || B) = sum over the vocabulary of p_A (log p_A - log p_B), in nats, at every predicted token

Legend: W windows, L tokens in each, V vocabulary, P predicted tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.errors import UserError
from trimtab.evaluation.perplexity import of_loss, require_numbers

_AT_ONCE = 2**24
"""Numbers of a float32 tensor of log-probabilities that are held at once."""
_QUANTILES = (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999)
_WORST = 8
_BEFORE = 24
"""Tokens of text shown before a token at which two models differ."""


@dataclass(frozen=True)
class Side:
    """One of the two."""

    path: str
    """As it was named, its adapter included."""
    perplexity: float
    bytes: int
    """Of its files."""


@dataclass(frozen=True)
class Comparison:
    """Two models on the same tokens."""

    first: Side
    second: Side
    data: str
    split: str
    tokens: int
    """In all windows; the first of each is not predicted."""
    block_tokens: int
    kl: float
    """Mean of KL(first || second), nats a token."""
    kl_error: float
    """Its standard error, from the means of the windows; 0 for one window."""
    top1_agreement: float
    """Share of tokens for which both hold the same one likeliest."""
    loss_difference: float
    """Mean loss of the second minus that of the first, nats a token."""
    loss_error: float
    """Its standard error, from the same windows of both."""
    quantiles: list[tuple[float, float]]
    """(share of the tokens, the KL that it does not exceed)."""
    apart: list[dict[str, Any]]
    """The tokens at which they differ most: text before, the token, what each held likeliest, KL."""

    def to_json(self) -> dict[str, Any]:
        """Plain values for `compare.json`."""
        return asdict(self)


@dataclass(frozen=True)
class Apart:
    """How far two models are apart at each predicted token: tensors (W, L - 1)."""

    kl: Tensor
    first_loss: Tensor
    second_loss: Tensor
    first_top: Tensor
    second_top: Tensor


@torch.no_grad()
def apart(first: PreTrainedModel, second: PreTrainedModel, windows_WL: Tensor) -> Apart:
    """Run both on every window.

    Args:
        first: a causal language model, put into evaluation mode.
        second: another with the same tokens; rows by which one head is longer (padding) are left out.
        windows_WL: int64 token ids (W, L).
    """
    found: list[tuple[Tensor, ...]] = []
    for model in (first, second):
        model.eval()
    for ids in windows_WL:
        given = ids.unsqueeze(0)
        a_LV, b_LV = (m(input_ids=given.to(m.device), use_cache=False).logits[0, :-1].cpu() for m in (first, second))
        rows = min(a_LV.shape[-1], b_LV.shape[-1])
        chunk = max(1, _AT_ONCE // rows)
        parts = [
            _apart(a[:, :rows], b[:, :rows], targets)
            for a, b, targets in zip(a_LV.split(chunk), b_LV.split(chunk), ids[1:].split(chunk), strict=True)
        ]
        found.append(tuple(torch.cat(some) for some in zip(*parts, strict=True)))
    made = Apart(*(torch.stack(some) for some in zip(*found, strict=True)))
    for which, model, loss in (("first", first, made.first_loss), ("second", second, made.second_loss)):
        require_numbers(loss, f"compare: the {which} model", model.dtype)
    return made


def _apart(a_PV: Tensor, b_PV: Tensor, targets_P: Tensor) -> tuple[Tensor, ...]:
    log_a, log_b = a_PV.float().log_softmax(-1), b_PV.float().log_softmax(-1)
    losses = (-log.gather(-1, targets_P[:, None])[:, 0] for log in (log_a, log_b))
    kl = (log_a.exp() * (log_a - log_b)).sum(-1).clamp(min=0)
    return kl, *losses, log_a.argmax(-1), log_b.argmax(-1)


def check_same_tokens(first: Any, second: Any, texts: Sequence[str]) -> None:
    """Raise a `UserError` where two tokenizers make other tokens of a text: their predictions have no common ground."""
    for text in texts:
        if first(text)["input_ids"] != second(text)["input_ids"]:
            raise UserError(
                f"compare: the two models have different tokenizers: they split {text[:40]!r} differently, so there is no "
                "token that both predict; measure each with `trimtab eval`"
            )


def summary(found: Apart, windows_WL: Tensor, tokenizer: Any, **about: Any) -> Comparison:
    """A `Comparison` of what was found.

    Args:
        found: of `apart`.
        windows_WL: the windows it was found on.
        tokenizer: to show the tokens at which the two differ.
        about: `first` and `second` as (path, bytes), `data`, `split`.
    """
    differences = found.second_loss - found.first_loss
    (first, first_bytes), (second, second_bytes) = about["first"], about["second"]
    return Comparison(
        first=Side(first, _perplexity(found.first_loss), first_bytes),
        second=Side(second, _perplexity(found.second_loss), second_bytes),
        data=about["data"],
        split=about["split"],
        tokens=windows_WL.numel(),
        block_tokens=windows_WL.shape[1],
        kl=found.kl.double().mean().item(),
        kl_error=_error(found.kl),
        top1_agreement=(found.first_top == found.second_top).double().mean().item(),
        loss_difference=differences.double().mean().item(),
        loss_error=_error(differences),
        quantiles=_quantiles(found.kl),
        apart=_worst(found, windows_WL, tokenizer),
    )


def _perplexity(loss_WL: Tensor) -> float:
    return of_loss(loss_WL.double().mean().item(), "compare: a model", loss_WL.dtype)


def _quantiles(values_WL: Tensor) -> list[tuple[float, float]]:
    """As `torch.quantile`, which takes no more than 2^24 values: between two neighbours in proportion."""
    ranked = values_WL.flatten().double().sort().values
    found = []
    for share in _QUANTILES:
        at = share * (len(ranked) - 1)
        low, high = ranked[math.floor(at)], ranked[math.ceil(at)]
        found.append((share, torch.lerp(low, high, at % 1).item()))
    return found


def _error(values_WL: Tensor) -> float:
    means = values_WL.double().mean(1)
    return (means.std() / math.sqrt(len(means))).item() if len(means) > 1 else 0.0


def _worst(found: Apart, windows_WL: Tensor, tokenizer: Any) -> list[dict[str, Any]]:
    """The tokens of the largest divergences, the largest first."""
    rows = []
    most = found.kl.flatten().topk(min(_WORST, found.kl.numel()))
    for kl, place in zip(most.values.tolist(), most.indices.tolist(), strict=True):
        window, at = divmod(place, found.kl.shape[1])
        ids = windows_WL[window]
        one = {
            "before": tokenizer.decode(ids[max(0, at + 1 - _BEFORE) : at + 1]),
            "token": tokenizer.decode(ids[at + 1]),
        }
        tops = {"first": found.first_top, "second": found.second_top}
        rows.append(one | {side: tokenizer.decode(top[window, at]) for side, top in tops.items()} | {"kl": kl})
    return rows
