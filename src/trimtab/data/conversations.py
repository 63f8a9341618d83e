"""Conversations through a chat template: the text, and that nothing which the row holds is dropped on the way.

A template is a program of the model's vendor, and servers run the same one: so it is given all that a row has (tools,
calls, thoughts, arguments), and what it renders nothing of is refused.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from trimtab.data.bounded import Unrendered, bounded
from trimtab.data.forms import RENDERING
from trimtab.data.messages import Message
from trimtab.data.tokens import bare
from trimtab.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAMES_OF_CALLS = ("tool_call_id", "name")
"""Keys of a tool's answer that say which call it belongs to: templates may go by the order alone."""
MARKS = re.compile(r"\{%[-+]?\s*generation\b")
"""How a template says where an answer begins."""


NO_TEMPLATE = (
    'give plain {"text"} or {"prompt", "completion"} rows, or name a chat template in data.template (alpaca, chatml or a '
    ".jinja file)"
)
"""What to do where a tokenizer has no chat template."""
Way = tuple[bool, bool]
_WAYS: tuple[Way, ...] = ((False, False), (True, False), (False, True), (True, True))
"""How calls can be written: with arguments as JSON instead of an object, and with no content instead of an empty one."""


class Given(NamedTuple):
    """What a chat template is given."""

    messages: list[Message]
    asked: int
    """How many of them are the prompt."""
    rendering: dict[str, Any]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> Given:
        """Of a row of `load_rows` that is a conversation."""
        rendering = json.loads(row.get(RENDERING) or "{}")
        return cls([*row["prompt"], *answer_of(row)], len(row["prompt"]), rendering)

    def without(self, *path: str) -> Given:
        """The same without one entry of `rendering`."""
        rendering = json.loads(json.dumps(self.rendering))
        block = rendering
        for key in path[:-1]:
            block = block[key]
        del block[path[-1]]
        return Given(self.messages, self.asked, rendering)

    def head(self, count: int) -> Given:
        """Its first messages."""
        return Given(self.messages[:count], self.asked, self.rendering)

    def whole(self, way: Way = (False, False)) -> list[Message]:
        """Messages with all their keys, calls written in one of `_WAYS`."""
        keys, (spelled, silent) = self.rendering.get("keys", {}), way
        made = [{**message, **keys.get(str(i), {})} for i, message in enumerate(self.messages)]
        for message in made:
            if spelled and "tool_calls" in message:
                message["tool_calls"] = [_spelled(call) for call in message["tool_calls"]]
            if silent and "tool_calls" in message and not message["content"]:
                message["content"] = None
        return made

    def called(self, number: int) -> bool:
        """Whether a message calls a tool; -1 is the last."""
        keys = self.rendering.get("keys", {})
        return "tool_calls" in keys.get(str(range(len(self.messages))[number]), {})

    def calls(self) -> list[dict[str, Any]]:
        """The functions that its messages call, with their arguments."""
        keys = self.rendering.get("keys", {})
        calls = [c for i in range(len(self.messages)) for c in keys.get(str(i), {}).get("tool_calls", ())]
        return [call.get("function", call) for call in calls]


def answer_of(row: Mapping[str, Any]) -> Any:
    """What follows a row's prompt: its completion, or the better one of two."""
    return row["completion"] if "completion" in row else row["chosen"]


def _spelled(call: dict[str, Any]) -> dict[str, Any]:
    inner = call.get("function", call)
    function = {**inner, "arguments": json.dumps(inner["arguments"], ensure_ascii=False)}
    return {**call, "function": function} if "function" in call else function


def render(given: Given, tokenizer: PreTrainedTokenizerBase, where: object, *, asked: bool = False) -> str:
    """A conversation through the chat template: all of it, or (`asked`) with the head of an answer behind it.

    Most templates write the arguments of a call as JSON, some (DeepSeek's) want them written already: those fail with an
    object, or print it as Python does, and are given the text. Some see a call only where there is no content.
    """
    arguments, calls, error = given.rendering.get("chat_template_kwargs", {}), given.calls(), ""
    own = [name for name in arguments if name in inspect.signature(tokenizer.apply_chat_template).parameters]
    if own:
        raise UserError(
            f"data, {where}: chat_template_kwargs has {own[0]!r}, which is not an argument of a template; remove it"
        )
    cause: Exception | None = None
    for way in _WAYS if calls else _WAYS[:1]:
        try:
            with bounded():
                text = tokenizer.apply_chat_template(
                    given.whole(way),
                    tools=given.rendering.get("tools"),
                    tokenize=False,
                    add_generation_prompt=asked,
                    **arguments,
                )
                assert isinstance(text, str)
                text.encode()  # tokenizers fail on half of a surrogate pair
        except Unrendered as failed:
            # A template is a program: it refuses what its model never saw (a system role, two users), and it fails.
            error, cause = error or str(failed), failed
            continue
        if way == _WAYS[-1] or _called(calls, text):
            return text
    raise UserError(
        f"data, {where}: the tokenizer's chat template refuses it ({error}); change the row's roles, or the template"
    ) from cause


def _called(calls: list[dict[str, Any]], text: str) -> bool:
    """Whether a rendering has all calls, and none as Python prints it."""
    return all(call["name"] in text and not (call["arguments"] and repr(call["arguments"]) in text) for call in calls)


def generated(given: Given, text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, int]] | None:
    """The parts of a rendering, from and to, that its template marks by `{% generation %}`; None without marks.

    Args:
        given: what was rendered.
        text: of `render`.
        tokenizer: the model's.
    """
    source = tokenizer.get_chat_template(tools=given.rendering.get("tools"))
    if not MARKS.search(source):
        return None
    from transformers.utils import chat_template_utils

    render_marked: Any = chat_template_utils.render_jinja_template  # its annotation leaves the marks out

    for way in _WAYS:
        with bounded():
            texts, parts = render_marked(
                conversations=[given.whole(way)],
                tools=given.rendering.get("tools"),
                chat_template=source,
                return_assistant_tokens_mask=True,
                **{**tokenizer.special_tokens_map, **given.rendering.get("chat_template_kwargs", {})},
            )
        if texts[0] == text:
            return [(start, end) for start, end in parts[0] if start < end]
    raise AssertionError("a template renders the same twice")


def rendered(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, where: object) -> str:
    """A conversation as one text; what the template does not read of the row is refused."""
    given = Given.of(row)
    text = render(given, tokenizer, where)
    if given.rendering:
        _check_read(given, text, tokenizer, where)
    return text


def _check_read(given: Given, text: str, tokenizer: PreTrainedTokenizerBase, where: object) -> None:
    """Refuse what the template renders nothing of: it would be dropped."""
    source = tokenizer.get_chat_template(tools=given.rendering.get("tools"))
    named = frozenset(re.findall(r"\w+", source))
    for path, what, known in _entries(given):
        if known and path[-1] in named:
            continue  # an argument may have its default value, an earlier turn's thoughts are left out
        try:
            read = render(given.without(*path), tokenizer, where) != text
        except UserError:
            read = True  # it is missed
        if not read:
            raise UserError(
                f"data, {where}: the tokenizer's chat template does not render {what}, so it would be dropped; remove it, "
                "write it into the messages, or use a template that does"
            )


def _entries(given: Given) -> Iterator[tuple[tuple[str, ...], str, bool]]:
    """Each entry of `rendering`, what it is, and whether it is enough that the template names it."""
    if "tools" in given.rendering:
        yield ("tools",), "'tools'", False
    for name in given.rendering.get("chat_template_kwargs", {}):
        yield ("chat_template_kwargs", name), f"the argument {name!r} of chat_template_kwargs", True
    for number, keys in given.rendering.get("keys", {}).items():
        for key in keys:
            if key in _NAMES_OF_CALLS and given.messages[int(number)]["role"] == "tool":
                continue
            earlier = int(number) < given.asked and key != "tool_calls"
            yield ("keys", number, key), f"{key!r} of message {int(number) + 1}", earlier


def left_out(row: Mapping[str, Any], text: str) -> tuple[bool, bool]:
    """Whether the template has changed the answer, and any message before it, beyond white space."""
    spaced = " ".join(text.split())
    changed = [
        [" ".join(message["content"].split()) not in spaced for message in part]
        for part in (answer_of(row), row["prompt"])
    ]
    return any(changed[0]), any(changed[1])


def end_of_turns(row: Mapping[str, Any], text: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int | None, str]:
    """The token by which a template ends an answer, if it has one of its own; and what follows the answer.

    Args:
        row: a conversation.
        text: of `rendered`.
        tokenizer: the model's.
    """
    answer = answer_of(row)[-1]["content"].strip()
    behind = text[text.rindex(answer) + len(answer) :] if answer and answer in text else text[-20:]
    added = tokenizer.added_tokens_decoder
    special = {i for i, token in added.items() if token.special} | set(tokenizer.all_special_ids)
    special -= {tokenizer.unk_token_id}
    ids = bare(behind, tokenizer, [])
    for ending in (special, set(added)):
        for id_ in ids:
            if id_ in ending:
                return id_, behind
    return None, behind
