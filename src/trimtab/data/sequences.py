"""From rows to sequences of tokens: texts through the chat template, and the equal blocks that perplexity wants.

Documents are joined with the end-of-sequence token between them and cut:

    d d d d E d d E d d d d d E    block_tokens = 4  ->  [d d d d] [E d d E] [d d d d]    the tail, d E, is dropped

A model whose tokenizer begins every text with a beginning-of-sequence token (Gemma, Llama 2 and 3) was never shown a window
without one, and its perplexity there says nothing: each of its blocks begins with that token, in place of a token of text.

    d d d d E d d E    block_tokens = 4  ->  [B d d d] [B d E d]
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from trimtab.data.conversations import NO_TEMPLATE, answer_of, rendered
from trimtab.data.forms import listed
from trimtab.data.rows import conversational, judged
from trimtab.data.sources import ORIGIN
from trimtab.data.tokens import head_of, tokens_of
from trimtab.errors import UserError
from trimtab.words import size

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def text_of(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each row as one text, conversations through the tokenizer's chat template."""
    if conversational(dataset):
        if not tokenizer.chat_template:
            raise UserError(f"data: the rows are conversations, but the tokenizer has no chat template; {NO_TEMPLATE}")
        return (rendered(row, tokenizer, _place(row, number)) for number, row in enumerate(dataset, start=1))
    if "text" in dataset.features:
        return (row["text"] for row in dataset)
    return (row["prompt"] + answer_of(row) for row in dataset)


def _place(row: Mapping[str, Any], number: int) -> str:
    """Where a row stands in its source; rows that were mixed, or split off, have their places with them."""
    if ORIGIN not in row:
        return f"row {number}"
    source = row[ORIGIN]["source"]
    return f"row {row[ORIGIN]['row']}" + (f" of data.path.{source}" if source else "")


_ROWS_A_TOKEN = 4
"""Rows read at most for each token that is wanted from all of the text; many may be empty."""
_SAMPLED = 256
"""Rows at most whose length says how long a row is."""


def token_windows(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    block_tokens: int,
    limit_tokens: int | None = None,
    spread: bool = False,
) -> torch.Tensor:
    """The rows as token ids, int64 of shape (blocks, block_tokens); see the picture at the top of this file.

    At most `limit_tokens` tokens are used, a whole number of blocks: the first, or, `spread`, evenly from all of the text.
    Neighbours are alike: 8 windows of one article say little about another. Then all rows are read, or, of very many, some
    from everywhere.
    """
    if spread and limit_tokens is not None and len(dataset) > (most := _ROWS_A_TOKEN * limit_tokens):
        dataset = dataset.select([i * len(dataset) // most for i in range(most)])
    if block_tokens < 1:
        raise UserError(f"block_tokens: {block_tokens} is not a length; give at least 1")
    eos_id = tokenizer.eos_token_id
    if not isinstance(eos_id, int):
        raise UserError("data: the tokenizer has no end-of-sequence token to put between documents; set its eos_token")
    head = head_of(tokenizer)
    token_ids = array("i")
    for text in text_of(dataset, tokenizer):
        if limit_tokens is not None and len(token_ids) >= limit_tokens and not spread:
            break
        document = tokens_of(text, tokenizer, head)[len(head) :]  # each block has its own
        token_ids.extend(document)
        # An empty row is not a document, and a chat template may have written the token already.
        if document and document[-1] != eos_id:
            token_ids.append(eos_id)
    each = block_tokens - len(head)
    if each < 1:
        raise UserError(
            f"block_tokens: {block_tokens} leaves no token of text behind the one that begins it; give more"
        )
    there = blocks = len(token_ids) // each
    if limit_tokens is not None:
        blocks = min(blocks, limit_tokens // block_tokens)
    if blocks == 0:
        limited = "" if limit_tokens is None else f", limit_tokens is {limit_tokens}"
        raise UserError(
            f"data: {len(token_ids)} tokens{limited}, not one block of block_tokens = {block_tokens}; "
            "give more text or shorter blocks"
        )
    texts = torch.tensor(np.asarray(token_ids, np.int64)[: there * each]).view(there, each)
    texts = texts[torch.arange(blocks) * there // blocks] if spread else texts[:blocks]
    return torch.cat([torch.tensor(head, dtype=torch.int64).expand(blocks, len(head)), texts], dim=1)


def length_of(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, most: int) -> int:
    """Tokens of a window that `token_windows` can make of the rows: at most `most`, and all there are of fewer."""
    head, there = head_of(tokenizer), 0
    for text in text_of(dataset, tokenizer):
        document = tokens_of(text, tokenizer, head)[len(head) :]
        there += len(document) + (bool(document) and document[-1] != tokenizer.eos_token_id)
        if there + len(head) >= most:
            return most
    return there + len(head)


def check_tokens(windows: torch.Tensor | None, tokenizer: Any, vocabulary: int, key: str) -> None:
    """Raise a `UserError` where a text has a token that a model of `vocabulary` tokens does not have."""
    if windows is None or (largest := int(windows.max())) < vocabulary:
        return
    raise UserError(
        f"{key}: holds {tokenizer.convert_ids_to_tokens(largest)!r}, token {largest} of the tokenizer, but the model's "
        f"embedding has {vocabulary} rows; take the model's own tokenizer"
    )


def spread(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """Rows from everywhere in `dataset`, at least one, of about `tokens` tokens together."""
    some = dataset.select(range(0, len(dataset), -(-len(dataset) // _SAMPLED)))
    mean = sum(len(tokens_of(t, tokenizer)) for t in text_of(some, tokenizer)) / len(some)
    count = min(len(dataset), max(1, round(tokens / max(mean, 1))))
    return dataset.select([i * len(dataset) // count for i in range(count)])


def describe(dataset: Dataset) -> str:
    """One short line, such as `79 documents, 465.2 kB of text` (UTF-8 bytes, without what a chat template adds)."""
    parts = [key for key in ("text", "prompt", "completion", "chosen", "rejected") if key in dataset.features]
    if judged(dataset):
        noun = "pair of answers" if "chosen" in parts else "judged answer"
    elif conversational(dataset):
        noun = "conversation"
    else:
        noun = "document" if "text" in parts else "prompt" if parts == ["prompt"] else "prompt-completion pair"
    held = (text for key in parts for value in dataset[key] for text in listed(value))
    text_bytes = sum(len((text if isinstance(text, str) else text["content"]).encode()) for text in held)
    kind, of, rest = noun.partition(" of ")
    return f"{len(dataset)} {kind}{'' if len(dataset) == 1 else 's'}{of}{rest}, {size(text_bytes)} of text"
