"""One row, from the form it is held in to TRL's: every key of it is used, named as unused, or refused.

`{"text"}` learns every token, `{"prompt", "completion"}` only the completion. People hold their data in four forms, told
apart by their keys:

    {"text"}                              ->  {"text"}                                      language modelling
    {"instruction", ("input"), "output"}  ->  {"prompt": [user], "completion": [assistant]}
    {"messages": [..., assistant]}        ->  {"prompt": messages[:-1], "completion": messages[-1:]}
    {"prompt", "completion"}              ->  as they are: two strings, or two lists of messages

So a conversation is trained on its last answer only. TRL's `assistant_only_loss` would train every answer, but needs
`{% generation %}` marks, which most chat templates lack; a prompt and a completion work with every template. Where a
row fits several forms (alpaca has `instruction`, `output` *and* a rendered `text`), the most structured one wins:
messages, prompt, instruction, text.

A key that is dropped is a row that says another thing than the one trained. So beside its form's own keys a row may have
only what can be told to be no part of prompt and answer: empty values, the names in `_ABOUT`, those that the user
lists (`data.ignore`), the same text in another form. What a chat template is given besides roles and contents (tools, its
arguments, a message's own keys) goes into the column `rendering`; `tokens` finds out whether the template reads it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from trimtab.errors import UserError

ACCEPTED_FORMS = '{"text"}, {"instruction", "output"} (and "input"), {"messages"} or {"prompt", "completion"}'
RENDERING = "rendering"
"""Column of what a template is given besides roles and contents, as JSON; only where a row has such."""

Message = dict[str, str]
TrainingRow = dict[str, str | list[Message]]

_ABOUT = {
    "id", "_id", "idx", "index", "uid", "uuid", "guid", "row", "row_id", "item_id", "example_id", "prompt_id",
    "question_id", "conversation_id", "message_id", "tool_call_id", "hash", "md5", "sha256", "source", "source_id",
    "dataset", "dataset_name", "origin", "url", "link", "file", "path", "file_path", "dump", "license", "licence",
    "author", "created", "created_at", "created_by", "updated_at", "date", "time", "timestamp", "version", "lang",
    "language", "language_score", "category", "categories", "subcategory", "domain", "subject", "subset", "split",
    "topic", "topics", "tags", "task", "task_id", "task_name", "task_type", "type", "is_classification", "name",
    "title", "difficulty", "level", "num_turns", "length", "num_tokens", "token_count", "quality", "model",
    "generator", "annotator", "meta", "metadata",
}  # fmt: skip
"""Names that say where a row comes from or what it is like, and that nobody would expect to be trained."""
_SHARES = {"weight", "weights", "sample_weight", "loss_weight", "train", "trainable", "train_on", "loss"}
"""Names that say how much of the loss a row or message has."""
_OF_TEMPLATES = ("tools", "chat_template_kwargs")


def kind(value: object) -> str:
    """What a value is, for people."""
    return "null" if value is None else type(value).__name__


def _empty(value: object) -> bool:
    """Whether a key says nothing: a table has every column in every row, null where a row has no such key."""
    return value is None or (isinstance(value, str | list | dict) and not value)


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {kind(value)} where a string is needed; correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; Arrow and tokenizers fail on it
        raise UserError(f"{where}: {key!r} is not valid Unicode ({error.reason}); correct or remove the row") from error
    return value


class Converted(NamedTuple):
    """One row in TRL's form."""

    form: str
    """Its form's name."""
    row: TrainingRow
    rendering: dict[str, Any]
    """What a chat template is given besides: `tools`, `chat_template_kwargs`, and `keys` of messages by their number."""
    unused: set[str]
    """Keys that are named as unused."""


# --- messages --------------------------------------------------------------------------------------------------------


def _messages(value: object, key: str, where: str) -> list[dict[str, Any]]:
    """Messages with their role, content and whatever other keys they have."""
    if not isinstance(value, list) or not value:
        found = "an empty list" if value == [] else kind(value)
        raise UserError(f"{where}: {key!r} is {found} where a list of {{role, content}} messages is needed")
    messages = []
    for index, message in enumerate(value):
        name = f"{key}[{index}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: {name!r} is {kind(message)} where a {{role, content}} message is needed")
        if message.get("tool_calls"):  # dropping them would teach the model to answer with their empty content
            raise UserError(f"{where}: {name!r} has tool_calls, which are not supported; write the call into 'content'")
        fields = {f: _string(message.get(f), f"{name}.{f}", where) for f in ("role", "content")}
        messages.append({**{k: v for k, v in message.items() if k not in fields and not _empty(v)}, **fields})
    return messages


def _conversation(
    prompt: list[dict[str, Any]], completion: list[dict[str, Any]], row: Mapping[str, Any], where: str
) -> tuple[TrainingRow, dict[str, Any], set[str]]:
    """Prompt and completion of role and content, what a template is given besides, and unused keys."""
    system = row.get("system")
    if not _empty(system):
        if any(m["role"] in ("system", "developer") for m in prompt):
            raise UserError(f"{where}: 'system' beside a message with the role 'system'; keep one of them")
        prompt = [{"role": "system", "content": _string(system, "system", where)}, *prompt]
    rendering: dict[str, Any] = {}
    keys, unused = _message_keys(prompt, completion, where)
    if keys:
        rendering["keys"] = keys
    for key, type_ in zip(_OF_TEMPLATES, (list, dict), strict=True):
        value = row.get(key)
        if _empty(value):
            continue
        if isinstance(value, str):  # in tables: the rows of a column have one type
            try:
                value = json.loads(value)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: {key!r} is a string that is not JSON ({error.msg}); correct it") from error
        if not isinstance(value, type_):
            raise UserError(f"{where}: {key!r} is {kind(value)} where a {type_.__name__} is needed; correct the row")
        if value:
            rendering[key] = value
    plain = [[{"role": m["role"], "content": m["content"]} for m in part] for part in (prompt, completion)]
    return {"prompt": plain[0], "completion": plain[1]}, rendering, unused


def _message_keys(
    prompt: list[dict[str, Any]], completion: list[dict[str, Any]], where: str
) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """Keys of messages besides role and content, for the template to read; and those that are named as unused."""
    found: dict[str, dict[str, Any]] = {}
    unused: set[str] = set()
    for number, message in enumerate([*prompt, *completion]):
        answer = number >= len(prompt)
        for key, value in message.items():
            if key in ("role", "content"):
                continue
            if key in _SHARES:
                _check_share(value, float(answer), f"{where}: {key!r} of message {number + 1}", answer)
            elif key in _ABOUT - {"name"}:
                unused.add(key)
            else:
                found.setdefault(str(number), {})[key] = value
    return found, unused


def _check_share(value: object, wanted: float, what: str, answer: bool) -> None:
    if not isinstance(value, int | float) or float(value) != wanted:
        does = "the answer at the end is trained whole" if answer else "messages before the last answer are not trained"
        raise UserError(f"{what} is {value!r}, but {does}; remove it, or make a row of every answer to be trained")


# --- the forms -------------------------------------------------------------------------------------------------------

_Parts = tuple[TrainingRow, dict[str, Any], set[str]]


def _from_text(row: Mapping[str, Any], where: str) -> _Parts:
    return {"text": _string(row["text"], "text", where)}, {}, set()


def _from_instruction(row: Mapping[str, Any], where: str) -> _Parts:
    prompt = _string(row["instruction"], "instruction", where)
    # A table (parquet, hub) has the column in every row: there null is how "no input" is written.
    extra = "" if row.get("input") is None else _string(row["input"], "input", where)
    answer = _string(row["output"], "output", where)
    asked = [
        *_history(row.get("history"), where),
        {"role": "user", "content": prompt + ("\n\n" + extra if extra else "")},
    ]
    return _conversation(asked, [{"role": "assistant", "content": answer}], row, where)


def _history(value: object, where: str) -> list[Message]:
    """Earlier turns, given as pairs of question and answer."""
    if _empty(value):
        return []
    pairs = value if isinstance(value, list) else [value]
    turns: list[Message] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(f"{where}: 'history' is no list of [question, answer] pairs; correct it, or use 'messages'")
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": _string(text, f"history[{index}]", where)})
    return turns


def _from_messages(row: Mapping[str, Any], where: str) -> _Parts:
    messages = _messages(row["messages"], "messages", where)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: 'messages' has no message with the role 'assistant' (roles: {', '.join(roles)})")
    if roles[-1] != "assistant":
        raise UserError(f"{where}: 'messages' ends with the role {roles[-1]!r}; end it with the assistant's answer")
    if len(messages) == 1:
        raise UserError(f"{where}: 'messages' has nothing before the answer; add the user's message, or use 'text'")
    return _conversation(messages[:-1], messages[-1:], row, where)


def _from_prompt(row: Mapping[str, Any], where: str) -> _Parts:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return {key: _string(row[key], key, where) for key in ("prompt", "completion")}, {}, set()
    asked, answered = (_messages(row[key], key, where) for key in ("prompt", "completion"))
    for index, message in enumerate(answered):
        if message["role"] != "assistant":
            raise UserError(
                f"{where}: 'completion[{index}]' has the role {message['role']!r}, and all of a completion is trained; "
                "move it into 'prompt'"
            )
    return _conversation(asked, answered, row, where)


class _Form(NamedTuple):
    keys: tuple[str, ...]
    """Keys a row must have to be of this form."""
    more: tuple[str, ...]
    """Keys that it may have besides."""
    convert: Callable[[Mapping[str, Any], str], _Parts]


_FORMS = (  # most structured first: the first whose keys are all there wins
    _Form(("messages",), ("system", *_OF_TEMPLATES), _from_messages),
    _Form(("prompt", "completion"), ("system", *_OF_TEMPLATES), _from_prompt),
    _Form(("instruction", "output"), ("input", "system", "history", *_OF_TEMPLATES), _from_instruction),
    _Form(("text",), (), _from_text),
)


def convert(row: Mapping[str, Any], where: str, ignore: Iterable[str] = ()) -> Converted:
    """A row in TRL's form.

    Args:
        row: as it stands in its source.
        where: the words that say where that is.
        ignore: keys that the user says belong neither to prompt nor to answer.

    Raises:
        UserError: for a form that is not known, a value of a wrong type, or a key that would be dropped.
    """
    row = {str(key): value for key, value in row.items()}
    for form in _FORMS:
        if all(key in row for key in form.keys):
            converted, rendering, unused = form.convert(row, where)
            lists = form.keys[0] == "prompt" and isinstance(converted["prompt"], list)
            more = form.more if isinstance(converted.get("prompt"), list) else ()
            unused |= _unused(row, (*form.keys, *more), converted, where, set(ignore))
            name = "{" + ", ".join(form.keys) + "}" + (" with message lists" if lists else "")
            return Converted(name, converted, rendering, unused)
    found = ", ".join(row) or "none"
    raise UserError(f"{where}: unknown form of row (keys: {found}); accepted are {ACCEPTED_FORMS}")


def _unused(
    row: Mapping[str, Any], used: tuple[str, ...], converted: TrainingRow, where: str, ignore: set[str]
) -> set[str]:
    """Keys besides the used ones, each of which must be known to be no part of what is trained."""
    unused = set()
    for key, value in row.items():
        if key in used or _empty(value):
            continue
        if key in _SHARES and key not in ignore:
            if isinstance(value, int | float) and float(value) == 1:
                continue
            raise UserError(
                f"{where}: {key!r} is {value!r}, but every row counts alike; remove the key, or repeat or remove rows"
            )
        if key in ignore or key in _ABOUT or (key in ("text", "prompt", "instruction") and _same(value, converted)):
            unused.add(key)
            continue
        raise UserError(
            f"{where}: the key {key!r} would be dropped: rows like this are trained on {', '.join(used)} alone. Move it "
            "into them, or name it in data.ignore if it belongs neither to prompt nor to answer"
        )
    return unused


def _same(value: object, converted: TrainingRow) -> bool:
    """Whether a string is a part of what is trained, or holds all of it: a row that is there in two forms."""
    if not isinstance(value, str):
        return False
    parts = [m if isinstance(m, str) else m["content"] for part in converted.values() for m in _listed(part)]
    return any(value.strip() in part for part in parts) or all(part.strip() in value for part in parts)


def _listed(part: str | list[Message]) -> list[Any]:
    """A string as a list of one, a list of messages as it is."""
    return [part] if isinstance(part, str) else part
