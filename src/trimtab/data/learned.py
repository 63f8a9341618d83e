"""Which tokens of a row are learned: `all` answers of a conversation, the `last` one, or the `full` row.

text                     [head] t t t t t E          E: the end-of-sequence token, unless the text ends in it
prompt, completion       [head] p p p c c c E        learned from the first c; where the last letters of the prompt and
                                                     the first of the completion share a token, from that one
messages                 as the chat template renders them; of each answer, from where the template has the model begin
                         to where its turn ends, the token that ends it included: see `turns`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from trimtab.data.conversations import Given, answer_of, generated
from trimtab.data.tokens import Encoded, Span, Tokens, bare, shared_head, tokens_of
from trimtab.data.turns import Turns

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Loss = Literal["all", "last", "full"]
"""What is learned of a row."""


def tokens_of_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    where: object,
    head: list[int],
    text: str | None = None,
    loss: Loss = "all",
) -> Tokens:
    """The tokens of a row of `load_rows`, ended; an empty text has none.

    Args:
        row: in one of TRL's forms.
        tokenizer: the model's.
        where: formats to the words that say where the row stands.
        head: of `head_of`.
        text: of a conversation, as `rendered` gave it.
        loss: what of it is learned.
    """
    eos_id = tokenizer.eos_token_id
    if "text" in row:
        return tokens_of_text(bare(row["text"], tokenizer, head), eos_id, head)
    prompt, completion = row["prompt"], answer_of(row)
    if not isinstance(prompt, str):
        assert text is not None
        return _of_conversation(Given.of(row), text, tokenizer, where, head, loss)
    asked, whole = tokens_of(prompt, tokenizer, head), tokens_of(prompt + completion, tokenizer, head)
    whole = _ended(whole, eos_id) if completion else [*whole, *_end(eos_id)]
    shared = shared_head(asked, whole)
    return Tokens(whole, ((0 if loss == "full" else shared, len(whole)),), shared < len(asked))


def tokens_of_text(ids: list[int], eos_id: int | None, head: list[int]) -> Tokens:
    """The tokens of a text, of which those of `bare` are known; all are learned."""
    ids = _ended(head + ids, eos_id) if ids else []
    return Tokens(ids, ((0, len(ids)),) if ids else ())


def _of_conversation(
    given: Given, text: str, tokenizer: PreTrainedTokenizerBase, where: object, head: list[int], loss: Loss
) -> Tokens:
    begin = head if head else [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    encoded = Encoded(text, tokenizer, begin)
    turns = Turns(given, encoded, tokenizer, where)
    merged = turns.merged(begin)
    if loss == "full":
        return Tokens(encoded.ids, ((0, len(encoded.ids)),) if encoded.ids else (), merged)
    answers = [n for n, message in enumerate(given.messages) if message["role"] == "assistant"]
    wanted = [n for n in (answers if loss == "all" else answers[-1:]) if n not in given.rendering.get("given", ())]
    marked = generated(given, text, tokenizer)
    if marked is None:
        parts = [turns.span(n) for n in wanted]
    elif wanted == answers:
        parts = marked
    else:  # the template does not say which mark belongs to which message
        parts = [
            (max(a, c), min(b, d)) for n in wanted for a, b in [turns.span(n)] for c, d in marked if a < d and c < b
        ]
    return Tokens(encoded.ids, _joined(encoded.tokens(*part) for part in parts), merged)


def _joined(spans: Any) -> tuple[Span, ...]:
    """Spans in order, those that touch made one."""
    found: list[Span] = []
    for start, end in sorted(spans):
        if start >= end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return tuple(found)


def _end(eos_id: int | None) -> list[int]:
    assert eos_id is not None, "it was checked that the tokenizer has an end"
    return [eos_id]


def _ended(ids: list[int], eos_id: int | None) -> list[int]:
    return ids if ids and ids[-1] == eos_id else [*ids, *_end(eos_id)]
