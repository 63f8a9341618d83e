"""Rows that say which of two answers is better, or whether one is good, in the forms of TRL's DPO and KTO trainers.

{"prompt", "chosen", "rejected"}      strings, or messages                     DPO
{"chosen", "rejected"}                two whole conversations: what they begin with alike becomes the prompt
{"prompt", "completion", "label"}     label: whether the completion is good    KTO
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.data.messages import Message, empty, messages, plain, string, system_of
from trimtab.errors import UserError

ABOUT = {"score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating", "rejected_rating", "margin",
         "chosen_model", "rejected_model"}  # fmt: skip
"""Names that say what a judgement was like."""


def pair(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A prompt with a chosen and a rejected answer."""
    chosen, rejected = row["chosen"], row["rejected"]
    prompt = None if empty(row.get("prompt")) else row["prompt"]
    if not isinstance(chosen, list) and not isinstance(rejected, list) and not isinstance(prompt, list):
        if prompt is None:
            return _parted(row, where)
        return _differing({key: string(row[key], key, where) for key in ("prompt", "chosen", "rejected")}, where)
    if isinstance(prompt, list) and isinstance(chosen, str) and isinstance(rejected, str):
        chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in (chosen, rejected))
    parts = [messages(part, key, where) for part, key in ((chosen, "chosen"), (rejected, "rejected"))]
    asked = messages(prompt, "prompt", where) if isinstance(prompt, list) else []
    alike = _alike(parts[0], parts[1])
    heads = [bool(asked) and part[: len(asked)] == asked for part in parts]
    if heads[0] != heads[1]:
        raise UserError(f"{where}: only one of 'chosen' and 'rejected' begins with the prompt; let both, or neither")
    if asked and not heads[0]:
        alike = 0  # the prompt stands apart
    elif asked:
        alike, asked = max(alike, len(asked)), []
    asked, parts = [*asked, *parts[0][:alike]], [part[alike:] for part in parts]
    if isinstance(prompt, str) and not any(prompt.strip() == m["content"].strip() for m in asked):
        if asked:
            raise UserError(
                f"{where}: 'prompt' is none of the messages that 'chosen' and 'rejected' begin with; remove it or them"
            )
        asked = [{"role": "user", "content": string(prompt, "prompt", where)}]
    if not asked:
        raise UserError(
            f"{where}: nothing before the answers: 'chosen' and 'rejected' have no prompt in common; add one"
        )
    asked = [*system_of(row, asked, where), *asked]
    for key, part in zip(("chosen", "rejected"), parts, strict=True):
        _check_answer(part, key, where)
    return _differing(
        {"prompt": _plain(asked, where), "chosen": _plain(parts[0], where), "rejected": _plain(parts[1], where)}, where
    )


def judged(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A prompt with one answer, and whether it is good."""
    prompt, completion, label = row["prompt"], row["completion"], row["label"]
    if not isinstance(prompt, list) and not isinstance(completion, list):
        return {key: string(row[key], key, where) for key in ("prompt", "completion")} | {"label": bool(label)}
    asked, answered = (messages(row[key], key, where) for key in ("prompt", "completion"))
    _check_answer(answered, "completion", where)
    asked = [*system_of(row, asked, where), *asked]
    return {"prompt": _plain(asked, where), "completion": _plain(answered, where), "label": bool(label)}


def _parted(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Two texts without a prompt: what they begin with alike is the prompt, up to the last white space in it."""
    texts = [string(row[key], key, where) for key in ("chosen", "rejected")]
    shared = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    while shared and not texts[0][shared - 1].isspace():
        shared -= 1
    if not shared:
        raise UserError(
            f"{where}: nothing before the answers: 'chosen' and 'rejected' have no prompt in common; add one"
        )
    found = {"prompt": texts[0][:shared], "chosen": texts[0][shared:], "rejected": texts[1][shared:]}
    return _differing(found, where)


def _alike(one: list[Message], other: list[Message]) -> int:
    """Messages that two conversations begin with, of which the last ones are the answers."""
    most = min(len(one), len(other)) - 1
    return next((i for i in range(most) if one[i] != other[i]), most)


def _check_answer(part: list[Message], key: str, where: str) -> None:
    if not part:
        raise UserError(f"{where}: '{key}' has no message behind the prompt; add the answer, or remove the row")
    for index, message in enumerate(part):
        if message["role"] != "assistant":
            raise UserError(
                f"{where}: '{key}[{index}]' has the role {message['role']!r}, and an answer is the assistant's alone; move "
                "what was said before it into 'prompt'"
            )


def _plain(part: list[Message], where: str) -> list[Message]:
    """Role and content; what else a message has would be dropped."""
    for message in part:
        more = [key for key in message if key not in ("role", "content")]
        if more:
            raise UserError(f"{where}: a message has {more[0]!r}, which rows of preferences cannot have; remove it")
    return plain(part)


def _differing(row: dict[str, Any], where: str) -> dict[str, Any]:
    if row["chosen"] == row["rejected"]:
        raise UserError(f"{where}: 'chosen' and 'rejected' are the same, so there is nothing to prefer; remove the row")
    return row
