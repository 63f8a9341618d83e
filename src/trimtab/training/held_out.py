"""The loss on held-out text while training continues: of what training counts, in nats a token.

    text rows                   every token of the windows that perplexity is measured on, but for each window's first
    prompts and completions     the tokens that training would learn of them, each row by itself, cut at block_tokens

It is a sum over all counted tokens by their number, however rows fall into batches: a mean of batches' means, which
transformers' trainer reports, weighs a token by how few others its batch has. So for text its exponential is the perplexity
that the end of a run reports.

Legend: W windows, L tokens in each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from trimtab.data.sequences import spread
from trimtab.errors import UserError
from trimtab.models.head import Head
from trimtab.models.through import through
from trimtab.recipe import texts
from trimtab.recipe.recipe import Recipe
from trimtab.training.labelled import label
from trimtab.training.loss import IGNORED, loss_of_logits, summed_loss


@dataclass(frozen=True)
class HeldOut:
    """Held-out sequences: token ids and labels of each, int64 of one length; -100 does not count."""

    sequences: list[tuple[Tensor, Tensor]]

    @property
    def tokens(self) -> int:
        """Tokens that count: those that have a label and something before them."""
        return sum(int((labels[1:] != IGNORED).sum()) for _, labels in self.sequences)

    def digest(self) -> str:
        """Changes with anything that is measured on."""
        found = sha256()
        for ids, labels in self.sequences:
            found.update(ids.numpy().tobytes() + labels.numpy().tobytes())
        return found.hexdigest()

    @torch.no_grad()
    def loss(self, model: PreTrainedModel, tokens_at_once: int) -> float:
        """Mean of -log p over all tokens that count.

        Args:
            model: any causal language model; its mode is left as it was.
            tokens_at_once: tokens in a forward pass, padding included; at least one sequence.
        """
        was, device, total = model.training, next(model.parameters()).device, 0.0
        fits = Head.fits(model)  # asked ahead: it may run the model, whose forward is another one within `through`
        model.eval()
        try:
            for ids, mask, labels in self._batches(tokens_at_once):
                inputs: dict[str, Any] = {"input_ids": ids.to(device), "use_cache": False}
                if not bool(mask.all()):
                    inputs["attention_mask"] = mask.to(device)
                labels = labels.to(device)
                if fits:
                    part = through(model, model, partial(summed_loss, model, labels), **inputs)
                else:
                    part = loss_of_logits(model(**inputs).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
                total += float(part)
        finally:
            model.train(was)
        return total / self.tokens

    def _batches(self, tokens_at_once: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Ids, mask and labels, the sequences of like length together."""
        left = sorted(self.sequences, key=lambda pair: len(pair[0]))
        while left:
            length, count = len(left[-1][0]), max(1, tokens_at_once // len(left[-1][0]))
            some, left = left[-count:], left[:-count]
            ids, mask = (torch.zeros(len(some), length, dtype=torch.int64) for _ in range(2))
            labels = torch.full_like(ids, IGNORED)
            for i, (row, wanted) in enumerate(some):
                ids[i, : len(row)], mask[i, : len(row)], labels[i, : len(row)] = row, 1, wanted
            yield ids, mask, labels


def held_out(recipe: Recipe, tokenizer: Any, rows: Any, vocabulary: int, windows_WL: Tensor | None = None) -> HeldOut:
    """What to measure on.

    Args:
        recipe: `data` is read.
        tokenizer: the model's.
        rows: held out of training; None reads them.
        vocabulary: rows of the model's embedding.
        windows_WL: the rows as windows of tokens, where they were made already.

    Raises:
        UserError: for rows that cannot be rendered, or in which nothing counts.
    """
    block = recipe.data
    assert block is not None, "the recipe was checked to have data"
    if rows is None:
        rows = texts.held_out(block)
    if "prompt" not in rows.column_names:
        if windows_WL is None:
            windows_WL = texts.windows_of(block, rows, tokenizer)
        return HeldOut([(row, row) for row in windows_WL])
    if block.eval_tokens is not None:
        rows = spread(rows, tokenizer, block.eval_tokens)
    place: dict[str, Any] = {"packing": "none"}
    if block.eval_path is not None:
        path, split, subset, *_ = block.measured
        place |= {"path": path, "split": split, "subset": subset, "revision": None}
    named = recipe.model_copy(update={"data": block.model_copy(update=place)})
    size = block.block_tokens
    found = HeldOut(
        [
            (torch.tensor(row["input_ids"][:size], dtype=torch.int64), torch.tensor(row["labels"][:size]).long())
            for row in label(named, tokenizer, rows, vocabulary).sequences
        ]
    )
    if not found.tokens:
        raise UserError(f"{texts.key_of(block)}: prompts leave no room for an answer; raise data.block_tokens")
    return found
