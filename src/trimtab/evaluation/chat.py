"""Answers of a model, greedy or sampled, all at once or as they come, through its chat template where it has one.

Chat      a model of transformers: any that we load
Talk      what a conversation is, whatever computes the answers (`chat_llama_cpp` has llama.cpp do it)
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TextIteratorStreamer

from trimtab.data.bounded import Unrendered, bounded
from trimtab.data.tokens import tokens_of
from trimtab.errors import UserError

Message = dict[str, str]


_GREEDY = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "seed": None}
"""What only drawing reads."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    tokens: int = 256
    """Longest answer."""
    temperature: float = 0.0
    """0 takes the likeliest token; larger ones draw more freely."""
    top_p: float = 1.0
    """Draw from the fewest tokens that have this share together."""
    top_k: int = 0
    """Draw from this many; 0 for all."""
    min_p: float = 0.0
    """Draw from tokens at least so likely as this share of the likeliest."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were there already are less likely."""
    seed: int | None = None
    """Of the draws; None for another each time."""

    def __post_init__(self) -> None:
        good = {
            "tokens": self.tokens >= 1,
            "temperature": self.temperature >= 0,
            "top_p": 0 < self.top_p <= 1,
            "top_k": self.top_k >= 0,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": self.repetition_penalty > 0,
        }
        drawn = [name for name, fixed in _GREEDY.items() if not self.temperature and getattr(self, name) != fixed]
        if drawn:
            raise UserError(
                f"{drawn[0]}: only draws with a temperature; set temperature, for example 0.7, or leave it out"
            )
        for name, fine in good.items():
            if not fine:
                raise UserError(f"{name}: {getattr(self, name)} makes no sense; see `trimtab chat --help`")


GREEDY = Sampling()
"""The likeliest token each time."""


class Talk(ABC):
    """A conversation with a model.

    Args:
        system: what the model is told first; None for what its template says by itself.
        sampling: how it answers.
    """

    templated: bool = True
    """Whether the model has a chat template; one without continues the text that it is given."""

    def __init__(self, system: str | None = None, sampling: Sampling = GREEDY) -> None:
        self.sampling, self.history = sampling, list[Message]()
        self.system = system
        self.forgotten = 0
        """Messages that the last question found no room for, the oldest first."""

    @property
    def system(self) -> str | None:
        """What the model is told first."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not self.templated:
            raise UserError(
                "system: the model has no chat template, so there is no place for a system prompt; leave it out"
            )
        self._system = text

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.history.clear()

    def say(self, text: str) -> Iterator[str]:
        """Ask, and have the answer as it comes; both are remembered, of an answer that is broken off what came of it."""
        self.history.append({"role": "user", "content": text})
        answer = ""
        try:
            for piece in _trimmed(self.stream(self._messages())):
                answer += piece
                yield piece
        finally:
            self.history.append({"role": "assistant", "content": answer})

    def answer(self, prompt: str, tokens: int = 256) -> str:
        """The answer to one question, of at most so many tokens; neither it nor the question is remembered."""
        before, self.sampling = self.sampling, replace(self.sampling, tokens=tokens)
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        try:
            return "".join(_trimmed(self.stream([*first, {"role": "user", "content": prompt}])))
        finally:
            self.sampling = before

    def _messages(self) -> list[Message]:
        """The system prompt and as much of the history as there is room for, the last question at least."""
        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        kept = list(self.history)
        while len(kept) > 1 and not self.fits([*first, *kept]):
            del kept[:2]  # a question and its answer
        self.forgotten = len(self.history) - len(kept)
        return [*first, *kept]

    @abstractmethod
    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether there is room for these and an answer."""

    @abstractmethod
    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer to the last of these messages, as it comes."""


def _trimmed(pieces: Iterator[str]) -> Iterator[str]:
    """Pieces of a text without the white space at its two ends."""
    begun, held = False, ""
    for piece in pieces:
        whole = held + piece if begun else (held + piece).lstrip()
        kept = whole.rstrip()
        held = whole[len(kept) :] if kept or begun else ""
        if kept:
            begun = True
            yield kept


class Chat(Talk):
    """A loaded model to ask.

    Args:
        model: a causal language model.
        tokenizer: the model's.
        system: as of `Talk`.
        sampling: as of `Talk`.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, system: str | None = None, sampling: Sampling = GREEDY
    ) -> None:
        self.model, self.tokenizer, self.templated = model, tokenizer, bool(tokenizer.chat_template)
        super().__init__(system, sampling)

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether question and answer stay within the positions that the model's config names."""
        room = self._room()
        return room is None or len(ids_of(self.tokenizer, messages)) + self.sampling.tokens <= room

    def _room(self) -> int | None:
        """The positions that the model's config names."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        return limit if isinstance(limit, int) else None

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer as it comes: transformers generates in a thread, which ends when nobody listens any more."""
        ids, room = ids_of(self.tokenizer, messages), self._room()
        if room is not None and len(ids) > room:
            raise UserError(no_room(len(ids), room))
        given = _given(self.model, self.tokenizer, ids)
        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        heard = [True]
        options = _options(self.sampling) | {"stopping_criteria": [lambda ids, *_: _stopped(ids, not heard)]}

        def generate() -> None:
            device = self.model.device
            if device.type == "cuda" and device.index != torch.cuda.current_device():
                torch.cuda.set_device(device)  # which each thread chooses for itself
            if self.sampling.seed is not None:
                torch.manual_seed(self.sampling.seed)
            with torch.no_grad():
                cast(Any, self.model).generate(**given, **options, streamer=streamer)

        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(generate)
            # Whatever it fails with, what waits for the next piece has to hear of the end.
            done.add_done_callback(lambda future: streamer.end() if future.exception() else None)
            try:
                yield from streamer
            finally:
                heard.clear()
            done.result()


def no_room(tokens: int, room: int) -> str:
    """What is said of a question that is too long even without all that was said before it."""
    return (
        f"the question has {tokens:,} tokens with what the chat template writes around it, and the model has room for "
        f"{room:,}; ask a shorter one"
    )


def _stopped(ids: torch.Tensor, stop: bool) -> torch.Tensor:
    return torch.full((ids.shape[0],), stop, device=ids.device)


def _options(sampling: Sampling) -> dict[str, Any]:
    """transformers' options; those of a greedy answer leave out what only drawing uses."""
    options: dict[str, Any] = {"max_new_tokens": sampling.tokens, "do_sample": sampling.temperature > 0}
    options["repetition_penalty"] = sampling.repetition_penalty  # 1, too: a model may come with another
    if sampling.temperature > 0:
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        options |= drawn | ({"min_p": sampling.min_p} if sampling.min_p else {})
    return options


def ids_of(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of a conversation whose next turn is the model's; without a template, of its texts as they are."""
    if tokenizer.chat_template:
        try:
            with bounded():
                found = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
        except Unrendered as error:
            raise UserError(
                f"the tokenizer's chat template cannot write this conversation ({error}); fix chat_template.jinja beside "
                "the model, or set data.template when it is trained"
            ) from error
        return list(found["input_ids"])
    return list(tokens_of("\n".join(m["content"] for m in messages), tokenizer))


def _given(model: PreTrainedModel, tokenizer: Any, ids: list[int]) -> dict[str, Any]:
    """What `generate` is given, after a look at the tokens."""
    rows = model.config.get_text_config().vocab_size
    if max(ids) >= rows:
        raise UserError(
            f"{tokenizer.convert_ids_to_tokens(max(ids))!r} in the prompt is token {max(ids)}, but the model's embedding "
            f"has {rows} rows; take the model's own tokenizer"
        )
    given = torch.tensor([ids], device=next(model.parameters()).device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return {"input_ids": given, "attention_mask": torch.ones_like(given), "pad_token_id": pad}
