"""Conversations: what the model is given, what comes of it piece by piece, and who answers."""

import json
import sys
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from transformers import AutoModelForCausalLM

import tiny
import trimtab
from trimtab.errors import UserError
from trimtab.evaluation import chat_llama_cpp
from trimtab.evaluation.chat import Chat, Message, Sampling, Talk, _trimmed


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    return folder


@pytest.fixture
def talk(given: Path) -> Chat:
    made = trimtab.chat(str(given / "model"), sampling=Sampling(tokens=12))
    assert isinstance(made, Chat)
    made.model.generation_config.eos_token_id = None  # so that it always says something
    return made


class Echo(Talk):
    """Answers with what it was given."""

    def __init__(self, room: int = 100) -> None:
        super().__init__("be brief")
        self.room, self.asked = room, list[list[Message]]()

    def fits(self, messages: Sequence[Message]) -> bool:
        return len(messages) <= self.room

    def stream(self, messages: Sequence[Message]) -> Iterator[str]:
        self.asked.append(list(messages))
        yield from (" ", messages[-1]["content"], " ", "!", "\n")


def contents(messages: Sequence[Message]) -> list[str]:
    return [m["content"] for m in messages]


def test_a_conversation_is_remembered_until_it_is_reset() -> None:
    echo = Echo()
    assert list(echo.say("one")) == ["one", " !"]
    assert list(echo.say("two")) == ["two", " !"]
    assert contents(echo.asked[1]) == ["be brief", "one", "one !", "two"]
    assert [m["role"] for m in echo.asked[1]] == ["system", "user", "assistant", "user"]
    assert echo.answer("alone") == "alone !"
    assert contents(echo.asked[2]) == ["be brief", "alone"]
    echo.reset()
    list(echo.say("three"))
    assert contents(echo.asked[3]) == ["be brief", "three"], "the system prompt stays"


def test_what_has_no_room_is_forgotten_in_pairs() -> None:
    echo = Echo(room=4)
    for question in ("one", "two", "three"):
        list(echo.say(question))
    assert contents(echo.asked[2]) == ["be brief", "two", "two !", "three"]
    assert echo.forgotten == 2


def test_an_answer_that_is_broken_off_is_remembered_as_far_as_it_came() -> None:
    echo = Echo()
    pieces = echo.say("one")
    assert next(pieces) == "one"
    pieces.close()  # type: ignore[attr-defined]
    assert contents(echo.history) == ["one", "one"]


@pytest.mark.parametrize(
    ("pieces", "whole"), [([" a", " ", "b ", " "], "a b"), ([" ", "\n"], ""), (["a", "\n\n", "b"], "a\n\nb"), ([], "")]
)
def test_trimmed(pieces: list[str], whole: str) -> None:
    assert "".join(_trimmed(iter(pieces))) == whole


def test_the_stream_is_the_answer(talk: Chat) -> None:
    """What transformers generates at once from the rendered template; remembered as it was shown."""
    talk.sampling = Sampling(tokens=12, repetition_penalty=5.0)  # else this model says but one thing
    pieces = list(talk.say("Hello?"))
    ids = talk.tokenizer("user: Hello?\nassistant: ", return_tensors="pt")["input_ids"]
    options: dict[str, Any] = {
        "max_new_tokens": 12,
        "do_sample": False,
        "repetition_penalty": 5.0,
        "pad_token_id": tiny.EOS,
    }
    out = talk.model.generate(ids, **options)  # type: ignore[operator]
    assert "".join(pieces) == talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip() != ""
    assert talk.history[1] == {"role": "assistant", "content": "".join(pieces)}


def test_an_answer_alone_is_greedy(talk: Chat) -> None:
    """As transformers' own `generate` gives it."""
    said = [{"role": "user", "content": "Hello?"}]
    made = talk.tokenizer.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = made["input_ids"]
    out = talk.model.generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=tiny.EOS)  # type: ignore[operator]
    assert talk.answer("Hello?", 5) == talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_draws(given: Path) -> None:
    def drawn(**options: Any) -> str:
        made = trimtab.chat(str(given / "model"), sampling=Sampling(tokens=12, **options))
        return "".join(made.say("Hello?"))

    assert drawn(temperature=1.0, seed=1) == drawn(temperature=1.0, seed=1) != drawn(temperature=1.0, seed=2)
    greedy = drawn()
    assert drawn(temperature=1.0, top_k=1, seed=1) == greedy
    assert drawn(temperature=0.9, min_p=1.0, seed=3) == greedy
    assert drawn(repetition_penalty=5.0) != greedy


@pytest.mark.parametrize("option", [{"top_p": 0.4}, {"top_k": 3}, {"min_p": 0.6}])
def test_draws_are_transformers(talk: Chat, option: dict[str, Any]) -> None:
    """Of the same seed: from as many tokens as its own `generate` draws from, and not from all."""
    said = {}
    for name, more in (("some", option), ("all", {})):
        talk.sampling = Sampling(tokens=12, temperature=1.5, seed=5, **more)
        said[name] = talk.answer("Hello?", 12)
    ids = talk.tokenizer("user: Hello?\nassistant: ", return_tensors="pt")["input_ids"]
    given: dict[str, Any] = {"top_k": 0, **option, "temperature": 1.5, "do_sample": True, "max_new_tokens": 12}
    torch.manual_seed(5)
    out = talk.model.generate(ids, **given, pad_token_id=tiny.EOS)  # type: ignore[operator]
    theirs = talk.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
    assert said["some"] == theirs != said["all"]


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_p": 0}, {"tokens": 0}, {"min_p": 2}])
def test_what_makes_no_sense(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_room_is_the_models(talk: Chat) -> None:
    talk.model.config.max_position_embeddings = 60
    assert talk.fits([{"role": "user", "content": "short"}])
    assert not talk.fits([{"role": "user", "content": "long " * 12}])


def test_a_question_that_finds_no_room_is_refused(talk: Chat) -> None:
    """Of a table of positions there is an end; and a template may write more than anybody asked."""
    talk.model.config.max_position_embeddings = 60
    assert talk.answer("short", 2) is not None
    for template in (None, "{% for a in range(99) %}ab{% endfor %}"):
        talk.tokenizer.chat_template = template or talk.tokenizer.chat_template
        with pytest.raises(UserError, match=r"the question has \d+ tokens with .*, and the model has room for 60;"):
            talk.answer("short" if template else "long " * 60, 2)


@pytest.mark.parametrize("kind", [RuntimeError, KeyError, AssertionError, OSError])
def test_an_error_of_the_thread_is_raised_here(
    talk: Chat, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Whatever it is: who waits for the next piece would wait for ever."""

    def generate(*_: object, **__: object) -> None:
        raise kind("no memory")

    monkeypatch.setattr(talk.model, "generate", generate)
    with pytest.raises(kind, match="no memory"):
        list(talk.say("Hello?"))


@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 5}, {"min_p": 0.1}, {"seed": 3}])
def test_what_only_drawing_reads_needs_a_temperature(option: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(option))}: only draws with a temperature"):
        Sampling(**option)
    Sampling(temperature=0.7, **option)


def test_without_a_template(tmp_path: Path) -> None:
    tiny.model(tmp_path / "base", template=None)
    made = trimtab.chat(str(tmp_path / "base"))
    assert not made.templated
    with pytest.raises(UserError, match="no chat template"):
        trimtab.chat(str(tmp_path / "base"), system="be brief")
    with pytest.raises(UserError, match="no chat template"):
        made.system = "be brief"


@pytest.mark.parametrize(
    "template", ["{% for m in messages %}", "{{ messages[9].content }}", "{{ raise_exception('no') }}", "{{ 1 // 0 }}"]
)
def test_a_template_that_is_broken_is_said(talk: Chat, monkeypatch: pytest.MonkeyPatch, template: str) -> None:
    monkeypatch.setattr(talk.tokenizer, "chat_template", template)
    with pytest.raises(UserError, match="the tokenizer's chat template cannot write this conversation"):
        talk.answer("Hi")


def test_folders(given: Path, tmp_path: Path) -> None:
    """Of a run with stages the model; a format that no one here runs is said, with what does."""
    run = tmp_path / "run"
    AutoModelForCausalLM.from_pretrained(given / "model", dtype=torch.bfloat16).save_pretrained(run / "model")
    tiny.tokenizer().save_pretrained(run / "model")
    assert trimtab.chat(str(run)).answer("Hi", 3) == trimtab.chat(str(given / "model")).answer("Hi", 3)
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "config.json").write_text(json.dumps({"quantization": {"bits": 4}}))
    with pytest.raises(UserError, match=r"mlx_lm\.chat --model"):
        trimtab.chat(str(tmp_path / "mlx"))
    with pytest.raises(UserError, match="none of auto"):
        trimtab.chat(str(run), engine="vllm")
    with pytest.raises(UserError, match="is not a GGUF file"):
        trimtab.chat(str(run), engine="llama.cpp")


class Llama:
    """What llama-cpp-python offers, of it what is used (0.3.16)."""

    made: ClassVar[dict[str, Any]] = {}

    def __init__(self, model_path: str, n_ctx: int, verbose: bool) -> None:
        Llama.made = {"model_path": model_path}
        self.metadata = {"tokenizer.chat_template": "..."}

    def n_ctx(self) -> int:
        return 300

    def tokenize(self, text: bytes, add_bos: bool) -> list[int]:
        return list(text)

    def create_chat_completion(self, messages: list[Message], **options: Any) -> Iterator[dict[str, Any]]:
        Llama.made |= {"messages": messages, **options}
        if len(messages[-1]["content"]) > 300:
            raise ValueError("Requested tokens (308) exceed context window of 300")
        for delta in ({"role": "assistant"}, {"content": "4"}, {"content": "2"}, {}):
            yield {"choices": [{"delta": delta}]}


def test_a_gguf_file_is_answered_by_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is installed; `tests/serving` asks the real one."""
    file = tmp_path / "run" / "gguf" / "model.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGUF")
    module = types.ModuleType("llama_cpp")
    module.Llama = Llama  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp", module)
    monkeypatch.setattr(chat_llama_cpp, "find_spec", lambda _: True)
    drawn: dict[str, Any] = {"temperature": 0.5, "top_p": 0.8, "top_k": 7, "min_p": 0.1, "seed": 3}
    made = trimtab.chat(
        str(file.parent), system="be brief", sampling=Sampling(tokens=9, **drawn, repetition_penalty=1.5)
    )
    assert list(made.say("6 times 7?")) == ["4", "2"]
    assert Llama.made["model_path"] == str(file)
    assert contents(Llama.made["messages"]) == ["be brief", "6 times 7?"]
    assert {**drawn, "max_tokens": 9, "repeat_penalty": 1.5}.items() <= Llama.made.items()
    assert made.fits([{"role": "user", "content": "x" * 200}])
    assert not made.fits([{"role": "user", "content": "x" * 290}])
    with pytest.raises(UserError, match=r"the question has 308 tokens .* and the model has room for 300"):
        list(made.say("x" * 301))
