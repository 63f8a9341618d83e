"""Batches that say which labels count, which is known where they are made, on the host.

Their number decides shapes, so a host would otherwise ask a GPU for it, and wait until all that was queued there is done.
The road not taken: leaving out a mask that masks nothing, about which transformers asks in every forward pass. Without a
mask it asks whether positions begin again.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trimtab.training.divergence import counted_tokens

COUNTED = "counted"
"""Key of the positions that count among all labels that follow a token: int64 (T,)."""
Collate = Callable[[list[dict[str, Any]]], dict[str, Any]]


class Known:
    """A collator whose batches say what is counted.

    Args:
        collate: the trainer's own.
    """

    def __init__(self, collate: Collate) -> None:
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """The trainer's batch, with `COUNTED`."""
        batch = self._collate(examples)
        return {**batch, COUNTED: counted_tokens(batch["labels"][:, 1:].flatten())}


def counted_of(batch: dict[str, Any]) -> Tensor:
    """The positions of the labels that count, as the batch says, or looked up where it does not."""
    known: Tensor | None = batch.get(COUNTED)
    return counted_tokens(batch["labels"][:, 1:].flatten()) if known is None else known


__all__ = ["COUNTED", "Collate", "Known", "counted_of"]
