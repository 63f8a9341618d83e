"""Conversations, however they are written down, as messages of role, content and whatever else a chat template may read.

    {"role": "assistant", "content": "c"}               the form of chat templates (OpenAI's)
    {"from": "gpt", "value": "c"}                        ShareGPT's; its function_call becomes a message with tool_calls

A call of a tool has its arguments as an object, which is what chat templates write out. OpenAI's files hold them as a
string of JSON; it is read, since a template would otherwise quote it a second time.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from trimtab.errors import UserError, nearest

Message = dict[str, Any]

ABOUT = {
    "id", "_id", "idx", "index", "uid", "uuid", "guid", "row", "row_id", "item_id", "example_id", "prompt_id",
    "question_id", "conversation_id", "message_id", "hash", "md5", "sha256", "source", "source_id",
    "dataset", "dataset_name", "origin", "url", "link", "file", "path", "file_path", "dump", "license", "licence",
    "author", "created", "created_at", "created_by", "updated_at", "date", "time", "timestamp", "version", "lang",
    "language", "language_score", "category", "categories", "subcategory", "domain", "subject", "subset", "split",
    "topic", "topics", "tags", "task", "task_id", "task_name", "task_type", "type", "is_classification", "name",
    "title", "difficulty", "level", "num_turns", "length", "num_tokens", "token_count", "quality", "model",
    "generator", "annotator", "meta", "metadata",
}  # fmt: skip
"""Names that say where a row comes from or what it is like, and that nobody would expect to be trained."""
SHARES = {"weight", "weights", "sample_weight", "loss_weight", "train", "trainable", "train_on", "loss"}
"""Names that say how much of the loss a row or message has."""

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "bing": "assistant", "bard": "assistant", "system": "system",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function_call": "function_call",
}  # fmt: skip
"""ShareGPT's names of speakers to the roles of chat templates."""


def kind(value: object) -> str:
    """What a value is, for people."""
    return "null" if value is None else type(value).__name__


def empty(value: object) -> bool:
    """Whether a key says nothing: a table has every column in every row, null where a row has no such key."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def string(value: object, key: str, where: str) -> str:
    """A string that tokenizers take.

    Raises:
        UserError: for anything else.
    """
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {kind(value)} where a string is needed; correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; Arrow and tokenizers fail on it
        raise UserError(f"{where}: {key!r} is not valid Unicode ({error.reason}); correct or remove the row") from error
    return value


def parsed(value: object, key: str, where: str) -> Any:
    """A value that tables hold as a string of JSON, since the rows of a column have one type."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: {key!r} is a string that is not JSON ({error.msg}); correct it") from error


def messages(value: object, key: str, where: str) -> list[Message]:
    """Messages with their role, content and whatever other keys they have."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind(value)
        raise UserError(f"{where}: {key!r} is {found} where a list of {{role, content}} messages is needed")
    made = []
    for index, message in enumerate(value):
        name = f"{key}[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: {name!r} is {kind(message)} where a {{role, content}} message is needed")
        made.append(_shared(message, name, where) if "from" in message else _message(message, name, where))
    return made


def _message(message: Mapping[str, Any], name: str, where: str) -> Message:
    calls, content = message.get("tool_calls"), message.get("content")
    if not empty(calls):
        content = "" if content is None else content  # a call alone: there the content is null, or no key at all
    fields: Message = {"role": string(message.get("role"), f"{name}.role", where)}
    fields["content"] = string(content, f"{name}.content", where)
    if not empty(calls):
        if fields["role"] != "assistant":
            raise UserError(
                f"{where}: {name!r} has tool_calls and the role {fields['role']!r}; only an assistant calls"
            )
        fields["tool_calls"] = _calls(calls, f"{name}.tool_calls", where)
    return {**{k: v for k, v in message.items() if k not in (*fields, "tool_calls") and not empty(v)}, **fields}


def _shared(message: Mapping[str, Any], name: str, where: str) -> Message:
    """One of ShareGPT's."""
    speaker = string(message["from"], f"{name}.from", where)
    role = _ROLES.get(speaker)
    if role is None:
        hint = nearest(speaker, list(_ROLES))
        raise UserError(f"{where}: '{name}.from' is {speaker!r}{hint}; known are {', '.join(_ROLES)}")
    content = string(message.get("value"), f"{name}.value", where)
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    if role != "function_call":
        return _message({**rest, "role": role, "content": content}, name, where)
    call = parsed(content, f"{name}.value", where)
    calls = [{"type": "function", "function": one} for one in (call if isinstance(call, list) else [call])]
    return _message({**rest, "role": "assistant", "content": "", "tool_calls": calls}, name, where)


def _calls(value: object, key: str, where: str) -> list[dict[str, Any]]:
    """Calls of tools, their arguments as objects."""
    calls = parsed(value, key, where)
    if not isinstance(calls, list):
        raise UserError(f"{where}: {key!r} is {kind(calls)} where a list of calls is needed; correct the row")
    made = []
    for index, call in enumerate(calls):
        name = f"{key}[{index}]"
        inner = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(inner, Mapping) or not isinstance(inner.get("name"), str):
            raise UserError(f"{where}: {name!r} names no function; a call is {{function: {{name, arguments}}}}")
        given = inner.get("arguments")
        arguments = {} if empty(given) else parsed(given, f"{name}.arguments", where)
        if not isinstance(arguments, Mapping):
            raise UserError(f"{where}: '{name}.arguments' is {kind(arguments)} where an object is needed")
        function = {**inner, "arguments": dict(arguments)}
        made.append({"type": "function", **call, "function": function} if "function" in call else function)
    return made


def keys_of(
    prompt: list[Message], completion: list[Message], where: str
) -> tuple[dict[str, Message], set[str], list[int]]:
    """What messages have besides role and content.

    Args:
        prompt: the messages before the completion.
        completion: those after.
        where: where the row stands.

    Returns:
        Keys for the template to read, by the message's number; keys that are named as unused; and the numbers of answers
        that their row says are not to be learned.
    """
    found: dict[str, Message] = {}
    unused: set[str] = set()
    given: list[int] = []
    for number, message in enumerate([*prompt, *completion]):
        for key, value in message.items():
            if key in ("role", "content"):
                continue
            if key in SHARES:
                if not _share(value, message["role"], f"{where}: {key!r} of message {number + 1}"):
                    given.append(number)
            elif key in ABOUT - {"name"}:
                unused.add(key)
            else:
                found.setdefault(str(number), {})[key] = value
    return found, unused, given


def _share(value: object, role: str, what: str) -> bool:
    """Whether a message's share of the loss has it learned; a role other than the assistant's can only have none."""
    if isinstance(value, int | float) and float(value) in (0.0, 1.0) and (role == "assistant" or not value):
        return role != "assistant" or bool(value)
    does = (
        "an answer is learned whole or not at all" if role == "assistant" else "only an assistant's answers are learned"
    )
    raise UserError(
        f"{what} is {value!r}, but {does}; make it {'0 or 1' if role == 'assistant' else '0'}, or remove it"
    )


def plain(part: list[Message]) -> list[Message]:
    """Role and content alone."""
    return [{"role": m["role"], "content": m["content"]} for m in part]


def system_of(row: Mapping[str, Any], prompt: list[Message], where: str) -> list[Message]:
    """A row's system prompt as a message, if it has one; `prompt` must then hold none."""
    system = row.get("system")
    if empty(system):
        return []
    if any(m["role"] in ("system", "developer") for m in prompt):
        raise UserError(f"{where}: 'system' beside a message with the role 'system'; keep one of them")
    return [{"role": "system", "content": string(system, "system", where)}]
