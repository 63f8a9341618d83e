"""One row, from the form it is held in to TRL's: every key of it is used, named as unused, or refused.

`{"text"}` learns every token, `{"prompt", "completion"}` the answers. People hold their data in forms, told apart by
their keys:

    {"text"}                              ->  {"text"}                                      language modelling
    {"question", "answer"}                ->  {"prompt": [user], "completion": [assistant]}
    {"instruction", ("input"), "output"}  ->  {"prompt": [user], "completion": [assistant]}
    {"messages": [..., assistant]}        ->  {"prompt": messages[:-1], "completion": messages[-1:]}
    {"conversations": [..., gpt]}         ->  the same, from ShareGPT's {from, value}
    {"prompt", "completion"}              ->  as they are: two strings, or two lists of messages
    {"prompt", "chosen", "rejected"}      ->  as they are, for DPO; see `preferences`

Of a conversation every answer is learned (or the last one: `data.loss`), also those that stand in what is here the
prompt; of a prompt and a completion only the completion. Answers that are not learned whatever the loss (those of an
explicit prompt, those with a weight of 0) have their numbers in the column `rendering`. Where a row fits several forms
(alpaca has `instruction`, `output` *and* a rendered `text`), the most structured one wins.

A key that is dropped is a row that says another thing than the one trained. So beside its form's own keys a row may have
only what can be told to be no part of prompt and answer: empty values, the names in `ABOUT`, those that the user
lists (`data.ignore`), the same text in another form. What a chat template is given besides roles and contents (tools,
calls, its arguments, a message's own keys) goes into the column `rendering`, too; `conversations` finds out whether the
template reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from trimtab.data import preferences
from trimtab.data.messages import (
    ABOUT,
    SHARES,
    Message,
    empty,
    keys_of,
    kind,
    messages,
    parsed,
    plain,
    string,
    system_of,
)
from trimtab.errors import UserError

ACCEPTED_FORMS = (
    '{"text"}, {"question", "answer"}, {"instruction", "output"} (and "input"), {"messages"}, {"conversations"}, '
    '{"prompt", "completion"} or {"prompt", "chosen", "rejected"}'
)
RENDERING = "rendering"
"""Column of what a template is given besides roles and contents, as JSON; only where a row has such."""

TrainingRow = dict[str, Any]
"""`text`; or `prompt` and `completion`, or `prompt`, `chosen` and `rejected`, of strings or of lists of messages."""

_OF_TEMPLATES = ("tools", "chat_template_kwargs")


class Converted(NamedTuple):
    """One row in TRL's form."""

    form: str
    """Its form's name."""
    row: TrainingRow
    rendering: dict[str, Any]
    """What a chat template is given besides: `tools`, `chat_template_kwargs`, and `keys` of messages by their number;
    and `given`, the numbers of answers that are not learned."""
    unused: set[str]
    """Keys that are named as unused."""


_Parts = tuple[TrainingRow, dict[str, Any], set[str]]


# --- the forms -------------------------------------------------------------------------------------------------------


def _conversation(
    prompt: list[Message], completion: list[Message], row: Mapping[str, Any], where: str, *, asked: bool = False
) -> _Parts:
    """Prompt and completion of role and content, what a template is given besides, and unused keys.

    `asked`: the prompt was given as one, so that no answer in it is learned.
    """
    prompt = [*system_of(row, prompt, where), *prompt]
    rendering = _given_to_template(row, where)
    keys, unused, given = keys_of(prompt, completion, where)
    if keys:
        rendering["keys"] = keys
    if asked:
        given += [n for n, m in enumerate(prompt) if m["role"] == "assistant" and n not in given]
    if given:
        rendering["given"] = sorted(given)
    return {"prompt": plain(prompt), "completion": plain(completion)}, rendering, unused


def _given_to_template(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, type_ in zip(_OF_TEMPLATES, (list, dict), strict=True):
        if empty(row.get(key)):
            continue
        value = parsed(row[key], key, where)
        if not isinstance(value, type_):
            raise UserError(f"{where}: {key!r} is {kind(value)} where a {type_.__name__} is needed; correct the row")
        if value:
            found[key] = value
    return found


def _from_text(row: Mapping[str, Any], where: str) -> _Parts:
    return {"text": string(row["text"], "text", where)}, {}, set()


def _from_question(row: Mapping[str, Any], where: str) -> _Parts:
    asked, answer = (string(row[key], key, where) for key in ("question", "answer"))
    return _conversation([{"role": "user", "content": asked}], [{"role": "assistant", "content": answer}], row, where)


def _from_instruction(row: Mapping[str, Any], where: str) -> _Parts:
    prompt = string(row["instruction"], "instruction", where)
    # A table (parquet, hub) has the column in every row: there null is how "no input" is written.
    extra = "" if row.get("input") is None else string(row["input"], "input", where)
    answer = string(row["output"], "output", where)
    asked = [
        *_history(row.get("history"), where),
        {"role": "user", "content": prompt + ("\n\n" + extra if extra else "")},
    ]
    return _conversation(asked, [{"role": "assistant", "content": answer}], row, where)


def _history(value: object, where: str) -> list[Message]:
    """Earlier turns, given as pairs of question and answer."""
    if empty(value):
        return []
    pairs = value if isinstance(value, list) else [value]
    turns: list[Message] = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UserError(
                f"{where}: 'history' is not a list of [question, answer] pairs; correct it, or use 'messages'"
            )
        for role, text in zip(("user", "assistant"), pair, strict=True):
            turns.append({"role": role, "content": string(text, f"history[{index}]", where)})
    return turns


def _from_messages(row: Mapping[str, Any], where: str, key: str = "messages") -> _Parts:
    found = messages(row[key], key, where)
    roles = [message["role"] for message in found]
    if "assistant" not in roles:
        raise UserError(f"{where}: {key!r} has no message with the role 'assistant' (roles: {', '.join(roles)})")
    if roles[-1] != "assistant":
        raise UserError(f"{where}: {key!r} ends with the role {roles[-1]!r}; end it with the assistant's answer")
    if len(found) == 1:
        raise UserError(f"{where}: {key!r} has nothing before the answer; add the user's message, or use 'text'")
    return _conversation(found[:-1], found[-1:], row, where)


def _from_conversations(row: Mapping[str, Any], where: str) -> _Parts:
    return _from_messages(row, where, "conversations")


def _from_prompt(row: Mapping[str, Any], where: str) -> _Parts:
    prompt, completion = row["prompt"], row["completion"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return {key: string(row[key], key, where) for key in ("prompt", "completion")}, {}, set()
    asked, answered = (messages(row[key], key, where) for key in ("prompt", "completion"))
    for index, message in enumerate(answered):
        if message["role"] not in ("assistant", "tool"):
            raise UserError(
                f"{where}: 'completion[{index}]' has the role {message['role']!r}, and all of a completion is trained; "
                "move it into 'prompt'"
            )
    if answered[-1]["role"] != "assistant":
        raise UserError(f"{where}: 'completion' ends with the role 'tool'; end it with the assistant's answer")
    return _conversation(asked, answered, row, where, asked=True)


def _from_preference(row: Mapping[str, Any], where: str) -> _Parts:
    found = preferences.pair(row, where)
    return found, {} if isinstance(found["prompt"], str) else _given_to_template(row, where), set()


def _from_judged(row: Mapping[str, Any], where: str) -> _Parts:
    found = preferences.judged(row, where)
    return found, {} if isinstance(found["prompt"], str) else _given_to_template(row, where), set()


class _Form(NamedTuple):
    keys: tuple[str, ...]
    """Keys a row must have to be of this form."""
    more: tuple[str, ...]
    """Keys that it may have besides, where it is a conversation."""
    convert: Callable[[Mapping[str, Any], str], _Parts]
    fits: Callable[[Mapping[str, Any]], bool] = lambda _: True
    also: tuple[str, ...] = ()
    """Keys that it may have whether it is a conversation or not."""


_FORMS = (  # most structured first: the first whose keys are all there wins
    _Form(("chosen", "rejected"), ("system", *_OF_TEMPLATES), _from_preference, also=("prompt",)),
    _Form(
        ("prompt", "completion", "label"),
        ("system", *_OF_TEMPLATES),
        _from_judged,
        lambda row: row["label"] in (0, 1),
    ),
    _Form(("messages",), ("system", *_OF_TEMPLATES), _from_messages),
    _Form(("conversations",), ("system", *_OF_TEMPLATES), _from_conversations),
    _Form(("prompt", "completion"), ("system", *_OF_TEMPLATES), _from_prompt),
    _Form(("instruction", "output"), ("input", "system", "history", *_OF_TEMPLATES), _from_instruction),
    _Form(("question", "answer"), ("system", *_OF_TEMPLATES), _from_question),
    _Form(("text",), (), _from_text),
)
KEYS = tuple(dict.fromkeys(key for form in _FORMS for key in (*form.also, *form.keys, *form.more)))
"""Keys that a form reads."""


def convert(row: Mapping[str, Any], where: str, ignore: Iterable[str] = ()) -> Converted:
    """A row in TRL's form.

    Args:
        row: as it stands in its source.
        where: the words that say where that is.
        ignore: keys that the user says belong neither to prompt nor to answer.

    Raises:
        UserError: for a form that is not known, a value of a wrong type, or a key that would be dropped.
    """
    ignored = set(ignore)
    row = {str(key): value for key, value in row.items()}
    for form in _FORMS:
        if all(key in row and key not in ignored for key in form.keys) and form.fits(row):
            converted, rendering, unused = form.convert(row, where)
            lists = form.keys[0] in ("prompt", "chosen") and isinstance(converted["prompt"], list)
            more = form.more if isinstance(converted.get("prompt"), list) else ()
            unused |= _unused(row, (*form.also, *form.keys, *more), converted, where, ignored)
            name = "{" + ", ".join(form.keys) + "}" + (" with message lists" if lists else "")
            return Converted(name, converted, rendering, unused)
    found = ", ".join(row) or "none"
    raise UserError(
        f"{where}: unknown form of row (keys: {found}); accepted are {ACCEPTED_FORMS}, or name your own keys in "
        "data.columns, such as {prompt: sentence, completion: label}"
    )


def _unused(
    row: Mapping[str, Any], used: tuple[str, ...], converted: TrainingRow, where: str, ignore: set[str]
) -> set[str]:
    """Keys besides the used ones, each of which must be known to be no part of what is trained."""
    unused = set()
    about = ABOUT | (preferences.ABOUT if "chosen" in converted else set())
    for key, value in row.items():
        if key in used or empty(value):
            continue
        if key in SHARES and key not in ignore:
            if isinstance(value, int | float) and float(value) == 1:
                continue
            raise UserError(
                f"{where}: {key!r} is {value!r}, but every row counts alike; remove the key, or repeat or remove rows"
            )
        if key in ignore or key in about or _same(key, value, converted):
            unused.add(key)
            continue
        raise UserError(
            f"{where}: the key {key!r} would be dropped: rows like this are trained on {', '.join(used)} alone. Move it "
            "into them, or name it in data.ignore if it belongs neither to prompt nor to answer"
        )
    return unused


def _same(key: str, value: object, converted: TrainingRow) -> bool:
    """Whether a string is a part of what is trained, or holds all of it: a row that is there in two forms."""
    if (
        key == "messages" and "chosen" in converted and isinstance(value, list)
    ):  # UltraFeedback has the chosen one twice
        return [m.get("content") for m in value] == [m["content"] for m in (*converted["prompt"], *converted["chosen"])]
    if key not in ("text", "prompt", "instruction", "question") or not isinstance(value, str):
        return False
    parts = [m if isinstance(m, str) else m["content"] for part in converted.values() for m in listed(part)]
    return any(value.strip() in part for part in parts) or all(part.strip() in value for part in parts)


def listed(part: Any) -> list[Any]:
    """A string as a list of one, a list of messages as it is; nothing of what is neither."""
    return [part] if isinstance(part, str) else part if isinstance(part, list) else []
