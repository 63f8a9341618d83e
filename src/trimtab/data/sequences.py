"""From a user's files to the two shapes that training and evaluation take.

Training wants rows in TRL's forms, because `SFTTrainer` derives the loss mask from them: `{"text"}` learns every token,
`{"prompt", "completion"}` only the completion. People hold their data in four forms, told apart by their keys:

    {"text"}                              ->  {"text"}                                      language modelling
    {"instruction", ("input"), "output"}  ->  {"prompt": [user], "completion": [assistant]}
    {"messages": [..., assistant]}        ->  {"prompt": messages[:-1], "completion": messages[-1:]}
    {"prompt", "completion"}              ->  as they are: two strings, or two lists of messages

So a conversation is trained on its last answer only. TRL's `assistant_only_loss` would train every answer, but needs
`{% generation %}` marks, which most chat templates lack; a prompt and a completion work with every template. Where a
row fits several forms (alpaca has `instruction`, `output` *and* a rendered `text`), the most structured one wins:
messages, prompt, instruction, text. Other keys (ids, sources) are dropped.

Every row is checked here, with its file and line, rather than failing hours later inside a tokenizer; hence rows are
read into memory (`limit` bounds them) instead of being mapped from disk.

Perplexity wants equal blocks of tokens. Documents are joined with the end-of-sequence token between them and cut:

    d d d d E d d E d d d d d E    block_tokens = 4  ->  [d d d d] [E d d E] [d d d d]    the tail, d E, is dropped

A model whose tokenizer begins every text with a beginning-of-sequence token (Gemma, Llama 2 and 3) was never shown a window
without one, and its perplexity there says nothing: each of its blocks begins with that token, in place of a token of text.

    d d d d E d d E    block_tokens = 4  ->  [B d d d] [B d E d]
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from trimtab.data.rows import Located, kind, located_rows
from trimtab.errors import UserError
from trimtab.extras import require_library

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

ACCEPTED_FORMS = '{"text"}, {"instruction", "output"} (and "input"), {"messages"} or {"prompt", "completion"}'

Message = dict[str, str]
TrainingRow = dict[str, str | list[Message]]


# --- checking and converting one row ---------------------------------------------------------------------------------


def _string(value: object, key: str, where: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {key!r} is {kind(value)} where a string is needed; correct or remove the row")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair; Arrow and tokenizers fail on it
        raise UserError(f"{where}: {key!r} is not valid Unicode ({error.reason}); correct or remove the row") from error
    return value


def _messages(value: object, key: str, where: str) -> list[Message]:
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
        fields = ("role", "content")
        messages.append({field: _string(message.get(field), f"{name}.{field}", where) for field in fields})
    return messages


def _from_text(row: Mapping[str, Any], where: str) -> TrainingRow:
    return {"text": _string(row["text"], "text", where)}


def _from_instruction(row: Mapping[str, Any], where: str) -> TrainingRow:
    prompt = _string(row["instruction"], "instruction", where)
    # A table (parquet, hub) has the column in every row: there null is how "no input" is written.
    extra = "" if row.get("input") is None else _string(row["input"], "input", where)
    answer = _string(row["output"], "output", where)
    return {
        "prompt": [{"role": "user", "content": prompt + ("\n\n" + extra if extra else "")}],
        "completion": [{"role": "assistant", "content": answer}],
    }


def _from_messages(row: Mapping[str, Any], where: str) -> TrainingRow:
    messages = _messages(row["messages"], "messages", where)
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise UserError(f"{where}: 'messages' has no message with the role 'assistant' (roles: {', '.join(roles)})")
    if roles[-1] != "assistant":
        raise UserError(f"{where}: 'messages' ends with the role {roles[-1]!r}; end it with the assistant's answer")
    if len(messages) == 1:
        raise UserError(f"{where}: 'messages' has nothing before the answer; add the user's message, or use 'text'")
    return {"prompt": messages[:-1], "completion": messages[-1:]}


def _from_prompt(row: Mapping[str, Any], where: str) -> TrainingRow:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return {key: _messages(row[key], key, where) for key in ("prompt", "completion")}
    return {key: _string(row[key], key, where) for key in ("prompt", "completion")}


class _Form(NamedTuple):
    keys: tuple[str, ...]
    """Keys a row must have to be of this form; other keys are allowed."""
    convert: Callable[[Mapping[str, Any], str], TrainingRow]


_FORMS = (  # most structured first: the first whose keys are all there wins
    _Form(("messages",), _from_messages),
    _Form(("prompt", "completion"), _from_prompt),
    _Form(("instruction", "output"), _from_instruction),
    _Form(("text",), _from_text),
)


def _convert(row: Mapping[str, Any], where: str) -> tuple[str, TrainingRow]:
    """The name of the row's form, and the row in TRL's form."""
    for form in _FORMS:
        if all(key in row for key in form.keys):
            converted = form.convert(row, where)
            lists = form.keys[0] == "prompt" and isinstance(converted["prompt"], list)
            return "{" + ", ".join(form.keys) + "}" + (" with message lists" if lists else ""), converted
    found = ", ".join(map(str, row)) or "none"
    raise UserError(f"{where}: unknown form of row (keys: {found}); accepted are {ACCEPTED_FORMS}")


def _converted(rows: Iterable[Located]) -> Iterator[TrainingRow]:
    """Every row in TRL's form, held to the form of the first one."""
    first_form = first_where = ""
    for where, row in rows:
        form, converted = _convert(row, where)
        if not first_form:
            first_form, first_where = form, where
        elif form != first_form:
            raise UserError(f"{where}: the form is {form}, but {first_form} at {first_where}; keep to one form")
        yield converted


# --- the public functions --------------------------------------------------------------------------------------------


def load_rows(path: str, *, split: str = "train", limit: int | None = None) -> Dataset:
    """The rows of `path` in TRL's forms: `{"text"}` or `{"prompt", "completion"}`.

    `path` is a file of JSON lines (`.jsonl`, `.json`), a `.parquet` file, a text (`.txt`, `.md`: one document a file),
    a directory of such files of one kind (all of them, sorted by name), `pydoc-topics`, or the id of a hub dataset.
    `split` is for the last two; `pydoc-topics` has `train` and `heldout`. At most `limit` rows are read and checked.
    """
    require_library(f"reading {path}", "datasets")
    from datasets import Dataset, Features, Value

    if limit is not None and limit < 1:
        raise UserError(f"limit: {limit} rows asked of {path}; give at least 1, or leave it out for all rows")
    rows = list(_converted(islice(located_rows(path, split), limit)))
    if not rows:  # a file says so itself, with its name; what is left is an empty split of a hub dataset
        raise UserError(f"{path}: no rows in the split {split!r}; choose another split")
    # Stated, not inferred: the schema must not depend on the rows that happen to come first.
    message_list = [{"role": Value("string"), "content": Value("string")}]
    features = {key: message_list if isinstance(value, list) else Value("string") for key, value in rows[0].items()}
    return Dataset.from_dict({key: [row[key] for row in rows] for key in features}, features=Features(features))


def conversational(dataset: Dataset) -> bool:
    """Whether the rows are lists of messages, which need a chat template, rather than plain strings."""
    from datasets import Value

    return "prompt" in dataset.features and not isinstance(dataset.features["prompt"], Value)


def text_of(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """Each row as one text, conversations through the tokenizer's chat template."""
    if conversational(dataset):
        if not tokenizer.chat_template:
            remedy = 'give plain {"text"} or {"prompt", "completion"} rows, or a tokenizer with a chat template'
            raise UserError(f"data: the rows are conversations, but the tokenizer has no chat template; {remedy}")
        return _rendered(dataset, tokenizer)
    if "text" in dataset.features:
        return (row["text"] for row in dataset)
    return (row["prompt"] + row["completion"] for row in dataset)


def _rendered(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    from jinja2 import TemplateError

    for number, row in enumerate(dataset, start=1):
        try:
            text = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=False)
        except TemplateError as error:  # templates refuse what their model never saw: a system role, two users in a row
            refusal = f"the tokenizer's chat template refuses it ({error})"
            raise UserError(f"data, row {number}: {refusal}; change the row's roles") from error
        assert isinstance(text, str)
        yield text


_ROWS_A_TOKEN = 4
"""Rows read at most for each token that is wanted from all of the text; many may be empty."""
_SAMPLED = 256
"""Rows at most whose length says how long a row is."""


def token_blocks(
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
    head = _begins(tokenizer)
    token_ids: list[int] = []
    for text in text_of(dataset, tokenizer):
        if limit_tokens is not None and len(token_ids) >= limit_tokens and not spread:
            break
        # verbose=False: a document longer than the model's context is expected here, blocks are what the model sees.
        document = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if document[: len(head)] == head:  # a chat template has written it
            document = document[len(head) :]
        token_ids += document
        # An empty row is no document, and a chat template may have written the token already.
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
    texts = torch.tensor(token_ids[: there * each], dtype=torch.int64).view(there, each)
    texts = texts[torch.arange(blocks) * there // blocks] if spread else texts[:blocks]
    return torch.cat([torch.tensor(head, dtype=torch.int64).expand(blocks, len(head)), texts], dim=1)


def spread(dataset: Dataset, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Dataset:
    """Rows from everywhere in `dataset`, at least one, of about `tokens` tokens together."""
    some = dataset.select(range(0, len(dataset), -(-len(dataset) // _SAMPLED)))
    mean = sum(len(tokenizer(t, verbose=False)["input_ids"]) for t in text_of(some, tokenizer)) / len(some)
    count = min(len(dataset), max(1, round(tokens / max(mean, 1))))
    return dataset.select([i * len(dataset) // count for i in range(count)])


def _begins(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The beginning-of-sequence token, where the tokenizer itself puts one before a text, or nothing."""
    ids = tokenizer("")["input_ids"]
    return ids[:1] if ids and ids[0] == tokenizer.bos_token_id else []


def describe(dataset: Dataset) -> str:
    """One short line, such as `79 documents, 465 kB of text` (UTF-8 bytes, without what a chat template adds)."""
    if conversational(dataset):
        noun = "conversation"
        texts = (message["content"] for row in dataset for message in row["prompt"] + row["completion"])
    else:
        noun = "document" if "text" in dataset.features else "prompt-completion pair"
        texts = (text for row in dataset for text in row.values())
    text_bytes = sum(len(text.encode()) for text in texts)
    size = f"{text_bytes} bytes"
    for unit, unit_bytes in (("kB", 10**3), ("MB", 10**6), ("GB", 10**9)):
        if text_bytes >= unit_bytes:
            scaled = text_bytes / unit_bytes
            size = f"{scaled:.1f} {unit}" if scaled < 10 else f"{scaled:.0f} {unit}"
    return f"{len(dataset)} {noun}{'' if len(dataset) == 1 else 's'}, {size} of text"
