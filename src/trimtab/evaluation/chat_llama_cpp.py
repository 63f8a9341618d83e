"""A conversation with a GGUF file through llama.cpp, where llama-cpp-python is installed: the engine that serves it.

Without it the file is read by our own reader and answered by transformers, in float: the same weights, but slower.
"""

import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.evaluation.chat import GREEDY, Message, Sampling, Talk, no_room

_TOO_LONG = re.compile(r"\((\d+)\) exceed context window of (\d+)")
"""How llama-cpp-python says that there is no room; only it knows how many tokens its template makes."""


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    return find_spec("llama_cpp") is not None


class LlamaChat(Talk):
    """A GGUF file to ask.

    Args:
        file: the GGUF file.
        system: as of `Talk`.
        sampling: as of `Talk`.
        context: positions to keep room for; 0 for as many as the file names.
    """

    def __init__(self, file: Path, system: str | None = None, sampling: Sampling = GREEDY, context: int = 4096) -> None:
        import llama_cpp

        self._model: Any = llama_cpp.Llama(model_path=str(file), n_ctx=context, verbose=False)
        self.templated = "tokenizer.chat_template" in self._model.metadata
        super().__init__(system, sampling)

    def fits(self, messages: Sequence[Message]) -> bool:
        """Whether question and answer stay within the context; the marks of a template are taken to be 8 tokens a turn."""
        count = sum(len(self._model.tokenize(m["content"].encode(), add_bos=False)) + 8 for m in messages)
        return count + self.sampling.tokens <= int(self._model.n_ctx())

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        """The answer as llama.cpp gives it."""
        try:
            yield from self._pieces(messages)
        except ValueError as error:
            found = _TOO_LONG.search(str(error))
            if found is None:
                raise
            raise UserError(no_room(int(found[1]), int(found[2]))) from error

    def _pieces(self, messages: Sequence[Message]) -> Iterator[str]:
        s = self.sampling
        options: dict[str, Any] = {
            "max_tokens": s.tokens, "temperature": s.temperature, "top_p": s.top_p, "top_k": s.top_k, "min_p": s.min_p,
            "repeat_penalty": s.repetition_penalty, "seed": s.seed, "stream": True,
        }  # fmt: skip
        if self.templated:
            for part in self._model.create_chat_completion(list(messages), **options):
                yield part["choices"][0]["delta"].get("content") or ""
            return
        for part in self._model.create_completion("\n".join(m["content"] for m in messages), **options):
            yield part["choices"][0]["text"]
