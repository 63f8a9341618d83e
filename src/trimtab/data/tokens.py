"""From one row to token ids: for training, for measuring and for asking, by the same functions.

A text begins as the tokenizer begins every text, once: Llama, Mistral and Gemma were never shown a text without their
beginning-of-sequence token, nor one with two, and many texts have it written out (`<s>Once upon a time.`). A conversation
begins as its chat template says, since servers add nothing to what a template renders.

    text                     [head] t t t t t E          E: the end-of-sequence token, unless the text ends in it
    prompt, completion       [head] p p p c c c E        learned from the first c; where the last letters of the prompt and
                                                         the first of the completion share a token, from that one
    messages                 as the chat template renders them, learned from where the prompt's rendering ends
"""

from __future__ import annotations

import inspect
import json
import re
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from trimtab.data.forms import RENDERING
from trimtab.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase


def head_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer itself puts before every text: one beginning-of-sequence token, as a rule, or nothing."""
    bare, whole = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    starts = (i for i in range(len(whole) - len(bare) + 1) if whole[i : i + len(bare)] == bare)
    return list(whole[: next(starts, 0)])


def tokens_of(text: str, tokenizer: PreTrainedTokenizerBase, head: list[int] | None = None) -> list[int]:
    """A text's tokens, begun once and not ended.

    Args:
        text: with or without the beginning-of-sequence token written out.
        tokenizer: the model's.
        head: of `head_of`, if it is at hand.
    """
    head = head_of(tokenizer) if head is None else head
    return head + _bare(text, tokenizer, head)


def _bare(text: str, tokenizer: PreTrainedTokenizerBase, head: list[int]) -> list[int]:
    """A text's tokens without those that begin it, written out or not."""
    # verbose=False: a document longer than the model's context is expected here.
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    while head and ids[: len(head)] == head:
        ids = ids[len(head) :]
    return ids


class Tokens(NamedTuple):
    """A row as the model is shown it."""

    ids: Sequence[int]
    learned_from: int
    """The first token that is learned; those before it are given. The first of all cannot be learned."""
    merged: bool = False
    """Whether the prompt alone has other tokens than at the head of prompt and answer."""

    def learned(self, length: int | None = None) -> int:
        """Tokens that are learned of the first `length`."""
        there = len(self.ids) if length is None else min(length, len(self.ids))
        return max(0, there - max(1, self.learned_from))

    def labels(self, ignored: int) -> list[int]:
        """The token ids, `ignored` where they are given."""
        return [ignored] * self.learned_from + list(self.ids[self.learned_from :])

    def compact(self) -> Tokens:
        """The same in four bytes a token, where a list takes up to 36: all rows of a data set are held at once."""
        return Tokens(array("i", self.ids), self.learned_from, self.merged)


def dataset_of(rows: Iterable[tuple[Sequence[int], Sequence[int]]]) -> Dataset:
    """Token ids and labels in the columns that TRL takes as they are: `input_ids` and `labels`."""
    from datasets import Dataset, Features, List, Value

    columns: dict[str, list[Any]] = {"input_ids": [], "labels": []}
    for row in rows:
        for column, values in zip(columns.values(), row, strict=True):
            column.append(np.array(values, dtype=np.int32))
    return Dataset.from_dict(columns, features=Features({name: List(Value("int32")) for name in columns}))


def tokens_of_row(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: object, head: list[int], text: str | None = None
) -> Tokens:
    """The tokens of a row of `load_rows`, ended; an empty text has none.

    Args:
        row: in one of TRL's forms.
        tokenizer: the model's.
        where: formats to the words that say where the row stands.
        head: of `head_of`.
        text: of a conversation, as `rendered` gave it.
    """
    eos_id = tokenizer.eos_token_id
    if "text" in row:
        ids = _bare(row["text"], tokenizer, head)
        return Tokens(_ended(head + ids, eos_id) if ids else [], 0)
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str):
        asked, whole = tokens_of(prompt, tokenizer, head), tokens_of(prompt + completion, tokenizer, head)
        whole = _ended(whole, eos_id) if completion else [*whole, *_end(eos_id)]
    else:
        given = _Given.of(row)
        begin = head if head else [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        asked = _once(_bare(render(given, tokenizer, where, asked=True), tokenizer, []), begin)
        assert text is not None
        whole = _once(_bare(text, tokenizer, []), begin)
    shared = next(
        (i for i, (a, b) in enumerate(zip(asked, whole, strict=False)) if a != b), min(len(asked), len(whole))
    )
    return Tokens(whole, shared, shared < len(asked))


def _end(eos_id: int | None) -> list[int]:
    assert eos_id is not None, "it was checked that the tokenizer has an end"
    return [eos_id]


def _ended(ids: list[int], eos_id: int | None) -> list[int]:
    return ids if ids and ids[-1] == eos_id else [*ids, *_end(eos_id)]


def _once(ids: list[int], head: list[int]) -> list[int]:
    """Token ids that begin with `head` once at most: a template writes it, and the first message may have it, too."""
    while head and ids[: 2 * len(head)] == head * 2:
        ids = ids[len(head) :]
    return ids


# ---- conversations ---------------------------------------------------------------------------------------------------


class _Given(NamedTuple):
    """What a chat template is given."""

    messages: list[dict[str, Any]]
    asked: int
    """How many of them are the prompt."""
    rendering: dict[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> _Given:
        rendering = json.loads(row.get(RENDERING) or "{}")
        return cls([*row["prompt"], *row["completion"]], len(row["prompt"]), rendering)

    def without(self, *path: str) -> _Given:
        """The same without one entry of `rendering`."""
        rendering = json.loads(json.dumps(self.rendering))
        block = rendering
        for key in path[:-1]:
            block = block[key]
        del block[path[-1]]
        return _Given(self.messages, self.asked, rendering)


def render(given: _Given, tokenizer: PreTrainedTokenizerBase, where: object, *, asked: bool = False) -> str:
    """A conversation through the chat template: all of it, or the prompt with the head of an answer."""
    from jinja2 import TemplateError

    keys = given.rendering.get("keys", {})
    messages = [{**message, **keys.get(str(i), {})} for i, message in enumerate(given.messages)]
    arguments = given.rendering.get("chat_template_kwargs", {})
    own = [name for name in arguments if name in inspect.signature(tokenizer.apply_chat_template).parameters]
    if own:
        raise UserError(
            f"data, {where}: chat_template_kwargs has {own[0]!r}, which is no argument of a template; remove it"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages[: given.asked] if asked else messages,
            tools=given.rendering.get("tools"),
            tokenize=False,
            add_generation_prompt=asked,
            **arguments,
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # A template is a program: it refuses what its model never saw (a system role, two users in a row), and it fails.
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"data, {where}: the tokenizer's chat template refuses it ({what}); change the row's roles, or the template"
        ) from error
    assert isinstance(text, str)
    return text


def rendered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: object) -> str:
    """A conversation as one text; what the template does not read of the row is refused."""
    given = _Given.of(row)
    text = render(given, tokenizer, where)
    if given.rendering:
        _check_read(given, text, tokenizer, where)
    return text


def _check_read(given: _Given, text: str, tokenizer: PreTrainedTokenizerBase, where: object) -> None:
    """Refuse what the template renders nothing of: it would be dropped."""
    source = tokenizer.get_chat_template(tools=given.rendering.get("tools"))
    named = frozenset(re.findall(r"\w+", source))
    for path, what, known in _entries(given):
        if (
            known and path[-1] in named
        ):  # an argument may have its default value, an earlier turn's thoughts are left out
            continue
        if render(given.without(*path), tokenizer, where) == text:
            raise UserError(
                f"data, {where}: the tokenizer's chat template does not render {what}, so it would be dropped; remove it, "
                "write it into the messages, or use a template that does"
            )


def _entries(given: _Given) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Each entry of `rendering`, what it is, and whether it is enough that the template names it."""
    if "tools" in given.rendering:
        yield ("tools",), "'tools'", False
    for name in given.rendering.get("chat_template_kwargs", {}):
        yield ("chat_template_kwargs", name), f"the argument {name!r} of chat_template_kwargs", True
    for number, keys in given.rendering.get("keys", {}).items():
        for key in keys:
            yield ("keys", number, key), f"{key!r} of message {int(number) + 1}", int(number) < given.asked


def left_out(row: Mapping[str, Any], text: str) -> tuple[bool, bool]:
    """Whether the template has changed the answer, and any message before it, beyond white space."""
    spaced = " ".join(text.split())
    changed = [
        [" ".join(message["content"].split()) not in spaced for message in row[part]]
        for part in ("completion", "prompt")
    ]
    return any(changed[0]), any(changed[1])


def end_of_turns(row: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """The token by which a template ends an answer, if it has one of its own; and what follows the answer.

    Args:
        row: a conversation.
        text: of `rendered`.
        tokenizer: the model's.
    """
    answer = row["completion"][-1]["content"].strip()
    behind = text[text.rindex(answer) + len(answer) :] if answer and answer in text else text[-20:]
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    special -= {tokenizer.unk_token_id}
    ids = _bare(behind, tokenizer, [])
    for ending in (special, set(added)):
        for id_ in ids:
            if id_ in ending:
                return id_, behind
    return None, behind
