r"""Where an answer begins and ends in a rendered conversation, for templates that do not mark it.

An answer begins where the prompt before it ends, head of the answer included, and its turn ends where the conversation
up to it does:

    <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\n..
    `-- rendered with the head of an answer --------------'|               |
    `-- rendered with the answer ------------------------------------------'     learned: Hello<|im_end|>\n

Most templates render a conversation's beginning as they render the whole of it. Some do not: they leave earlier thoughts
out, move the system prompt to the last question, or end the last turn otherwise. There what differs is bounded by the
contents of the messages, which one more rendering finds exactly: with marks of the private use area around each of them.
Taken away, the marks must leave the very text; else nothing is known of the contents.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from trimtab.data.conversations import Given, render
from trimtab.data.tokens import Encoded, Span, bare, shared_head
from trimtab.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MARKS = 0xF0000
"""The first of 65,534 characters that mean nothing to anyone."""


class Turns:
    """The turns of one conversation.

    Args:
        given: what was rendered.
        encoded: the rendering and its tokens.
        tokenizer: the model's.
        where: formats to the words that say where the row stands.
    """

    def __init__(self, given: Given, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, where: object) -> None:
        self._given, self._encoded, self._tokenizer, self._where = given, encoded, tokenizer, where
        self._text = encoded.text
        self._prompts: dict[int, str | None] = {}

    def merged(self, head: list[int]) -> bool:
        """Whether the last prompt alone has other tokens than at the head of all; it begins with `head` once at most."""
        prompt = self._prompt(self._given.asked)
        if prompt is None:
            return False
        ids = bare(prompt, self._tokenizer, [])
        while head and ids[: 2 * len(head)] == head * 2:
            ids = ids[len(head) :]
        return shared_head(ids, self._encoded.ids) < len(ids)

    def span(self, number: int) -> Span:
        """The characters of message `number` that the model is to write.

        Raises:
            UserError: where the template does not let it be told.
        """
        start = self._start(number)
        end = None if start is None else self._end(number, start)
        if start is None or end is None:
            raise UserError(
                f"data, {self._where}: it cannot be told where the answer in message {number + 1} begins and ends in the "
                "tokenizer's chat template; mark it there by {% generation %} and {% endgeneration %}, or set "
                "data.loss: last"
            )
        return start, end

    def _start(self, number: int) -> int | None:
        prompt, text = self._prompt(number), self._text
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        if number == 0:
            return None if prompt is None else self._encoded.apart(prompt)
        low, contents = self._before(number), self._contents[number]
        high = len(text) if contents is None else contents[0]
        if low is None:
            return None
        if prompt is not None:
            if low <= (apart := self._encoded.apart(prompt)) <= high:
                return apart
            tail = self._behind_last(
                prompt, number
            )  # what stands before the question is another thing, not what follows
            if tail is not None and text.startswith(tail, low) and low + len(tail) <= high:
                return low + len(tail)
        return None if contents is None else contents[0]

    def _end(self, number: int, start: int) -> int | None:
        text = self._text
        if number == len(self._given.messages) - 1:
            return len(text)
        whole = self._rendered(number + 1, asked=False)
        if whole is not None and text.startswith(whole):
            return len(whole)
        contents, high = self._contents[number], self._after(number)
        least = start if contents is None else contents[1]
        if whole is None:
            return None if contents is None else self._encoded.special_at(least) or least
        prompt = self._prompt(number)
        turn = whole[len(prompt) :] if prompt is not None and whole.startswith(prompt) else ""
        for at in range(len(turn)):  # what an answer has before it only as long as it is the last: an empty thought
            rest = turn[at:]
            if text.startswith(rest, start) and least < start + len(rest) <= high and self._whole_call(number, rest):
                return start + len(rest)
        if least < (apart := self._encoded.apart(whole)) <= high and self._whole_call(number, text[start:apart]):
            return apart
        return None if contents is None else self._encoded.special_at(least) or least

    def _whole_call(self, number: int, part: str) -> bool:
        """Whether a part of the text has the calls that a message makes."""
        calls = self._given.rendering.get("keys", {}).get(str(number), {}).get("tool_calls", ())
        return all(call.get("function", call)["name"] in part for call in calls)

    def _behind_last(self, prompt: str, number: int) -> str | None:
        """What a prompt has behind the content of its last message; None where that is not in it as it is."""
        core = self._given.messages[number - 1]["content"].strip()
        at = prompt.rfind(core) if core and self._contents[number - 1] is not None else -1
        return None if at < 0 else prompt[at + len(core) :]

    def _prompt(self, number: int) -> str | None:
        """All before message `number` with the head of an answer; None where the template refuses it."""
        if number not in self._prompts:
            self._prompts[number] = self._rendered(number, asked=True)
        return self._prompts[number]

    def _rendered(self, count: int, *, asked: bool) -> str | None:
        try:
            return render(self._given.head(count), self._tokenizer, self._where, asked=asked)
        except UserError:
            return None

    # ---- where the contents are ------------------------------------------------------------------------------------

    def _before(self, number: int) -> int | None:
        """The end of the last content before message `number`; None where nothing is known of the contents."""
        if not any(self._contents):
            return None
        return next((span[1] for span in reversed(self._contents[:number]) if span is not None), 0)

    def _after(self, number: int) -> int:
        """The start of the first content behind message `number`."""
        return next((span[0] for span in self._contents[number + 1 :] if span is not None), len(self._text))

    @cached_property
    def _contents(self) -> list[Span | None]:
        """Of each message, where its content stands in the text; None where it is empty, left out or not to be found.

        Where its start is left out (earlier thoughts), the end alone is known, and stands for both.
        """
        return self._marked(before=True) or self._marked(before=False) or [None] * len(self._given.messages)

    def _marked(self, *, before: bool) -> list[Span | None] | None:
        """The same by marks around each content, or behind it alone, which templates that look at its start do not see."""
        messages, cores = [], []
        for number, message in enumerate(self._given.messages):
            content = message["content"]
            core = content.strip()
            at = content.find(core) if core else 0
            first, last = (chr(_MARKS + 2 * number + i) for i in range(2)) if core else ("", "")
            cores.append(core)
            marked = content[:at] + (first if before else "") + core + last + content[at + len(core) :]
            messages.append({**message, "content": marked})
        try:
            marked_text = render(
                Given(messages, self._given.asked, self._given.rendering), self._tokenizer, self._where
            )
        except UserError:
            return None
        places: dict[int, int] = {}
        plain: list[str] = []
        for character in marked_text:
            if _MARKS <= (code := ord(character)) < _MARKS + 2 * len(messages):
                places[code - _MARKS] = len(plain)
            else:
                plain.append(character)
        if "".join(plain) != self._text:
            return None
        spans: list[Span | None] = []
        for number, core in enumerate(cores):
            end = places.get(2 * number + 1)
            if end is None:
                spans.append(None)
                continue
            whole = self._text[max(0, end - len(core)) : end] == core
            spans.append((places.get(2 * number, end - len(core) if whole else end), end))
        return spans
