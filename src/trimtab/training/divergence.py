"""Distillation: how far a student's next-token distribution is from its teacher's, and its gradient in the logits.

    loss = (1 - w) CE + w T^2 KL(p || q),     p = softmax(teacher / T),  q = softmax(student / T)
    d KL / d student = (q - p) / T            so that T^2 KL pulls with T (q - p), as strongly at every temperature

The teacher gives all of p, or what a cache on disk holds of it: its k largest probabilities, and the mass r of all
other tokens as one bucket. KL between the bucketed distributions is a lower bound of the whole KL, and its gradient is
again q - p, where p spreads r over the other tokens as the *student* does: nothing is claimed about tokens that were not
kept, and no mass is lost. (Renormalising the k alone would push all other tokens of the student to zero.)

Both forms are written out rather than left to autograd: the loss makes a chunk's logits once and keeps only the
gradient in the hidden states (see `loss`).

Legend: C tokens of a chunk, T counted tokens, V vocabulary, D hidden size, k kept tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Protocol

import torch
from torch import Tensor

from trimtab.models.head import Head

LOGITS_CHUNK_TOKENS = 128
"""Tokens whose logits exist at once in training; on a GPU at least."""
_MOST_TOKENS = 4096
_SHARE = 16
"""On a GPU logits may take this part of what is free there."""
IGNORED = -100
"""Label of tokens that do not count."""


class Targets(Protocol):
    """What the teacher says of the counted tokens of a batch, in their order."""

    def __len__(self) -> int:
        """Counted tokens."""

    def divergence(self, chunk: slice, logits_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Sum of KL(p || q) over a chunk of the counted tokens, and q - p (C, V); the logits are left as they are."""


class FullTargets:
    """The whole distribution, from the teacher's hidden states and head, or from its logits where a head is not all.

    Args:
        states: (T, D) hidden states; (T, V) logits if there is no head.
        head: makes the head, once, at the first chunk: until then it needs no memory.
    """

    def __init__(self, states: Tensor, head: Callable[[], Head] | None) -> None:
        self._states, self._make = states, head

    @cached_property
    def _head(self) -> Head | None:
        return None if self._make is None else self._make()

    def __len__(self) -> int:
        """Counted tokens."""
        return len(self._states)

    def logits(self, chunk: slice) -> Tensor:
        """The teacher's float32 logits (C, V)."""
        states = self._states[chunk]
        return states.float() if self._head is None else self._head.logits(states)

    def divergence(self, chunk: slice, logits_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Targets`."""
        log_p = self.logits(chunk).div(temperature).log_softmax(1)
        log_q = logits_CV.div(temperature).log_softmax(1)
        p = log_p.exp()
        kl = torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
        return kl, log_q.exp_().sub_(p)


@dataclass(frozen=True)
class TopTargets:
    """The k largest probabilities and the bucket of the rest, at the temperature that they were made for."""

    log_probs: Tensor
    """(T, k + 1): log p of the kept tokens, then log of the remaining mass."""
    ids: Tensor
    """(T, k): the kept tokens."""

    def __len__(self) -> int:
        """Counted tokens."""
        return len(self.ids)

    def divergence(self, chunk: slice, logits_CV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """See `Targets`."""
        log_p, ids = self.log_probs[chunk].float(), self.ids[chunk].long()
        log_p = log_p.log_softmax(1)  # stored in few digits: their sum is 1 only about
        rest_CV = logits_CV / temperature
        kept = rest_CV.gather(1, ids)
        rest_CV.scatter_(1, ids, -torch.inf)
        log_rest = rest_CV.logsumexp(1, keepdim=True)
        scores = torch.cat([kept, log_rest], 1)
        log_q = scores - scores.logsumexp(1, keepdim=True)
        p = log_p.exp()
        kl = torch.where(p > 0, p * (log_p - log_q), 0).sum()
        gap = log_q.exp() - p
        # Among the rest, q_j = (share of j in the rest) q_rest, and p is spread in the same shares.
        error_CV = rest_CV.sub_(log_rest).exp_().mul_(gap[:, -1:])
        return kl, error_CV.scatter_(1, ids, gap[:, :-1])


def counted_tokens(labels_T: Tensor) -> Tensor:
    """Positions of the labels that count, int64. A GPU is waited for, so a micro-step asks once."""
    return (labels_T != IGNORED).nonzero().squeeze(1)


def chunks(tokens: int, at_once: int = LOGITS_CHUNK_TOKENS) -> Iterator[slice]:
    """Cuts counted tokens so that few logits exist at once."""
    return (slice(start, start + at_once) for start in range(0, tokens, at_once))


@cache
def tokens_at_once(device: torch.device, vocabulary: int) -> int:
    """How many tokens' logits may exist at once: more on a GPU that has memory to spare, where few are slow.

    Decided once in a process: sums in another order have other last bits, so no step may depend on who else uses the GPU.
    """
    if device.type != "cuda":
        return LOGITS_CHUNK_TOKENS
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _at_once(free, vocabulary)


def _at_once(free_bytes: int, vocabulary: int) -> int:
    """Logits and their exponentials in float32, and both in a half type on their way."""
    fits, tokens = free_bytes // _SHARE // (12 * vocabulary), LOGITS_CHUNK_TOKENS
    while tokens < _MOST_TOKENS and 2 * tokens <= fits:
        tokens *= 2
    return tokens


def top_of(logits_CV: Tensor, k: int, temperature: float) -> TopTargets:
    """What a cache keeps of a chunk: float16 logarithms, exact enough beside bfloat16 logits, and int32 tokens."""
    log_p = logits_CV.div(temperature).log_softmax(1)
    values, ids = log_p.topk(k, 1)
    rest = log_p.scatter_(1, ids, -torch.inf).logsumexp(1, keepdim=True)
    return TopTargets(torch.cat([values, rest], 1).half(), ids.int())


@dataclass(frozen=True)
class Distillation:
    """How much a batch's loss follows the teacher."""

    weight: float
    """w: share of the divergence; cross-entropy has the rest."""
    temperature: float
    targets: Targets
