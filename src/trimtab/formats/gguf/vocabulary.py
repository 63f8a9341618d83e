"""A tokenizer as GGUF's metadata: what llama.cpp needs to cut text into the very tokens that the model was trained on.

GGUF holds a vocabulary and the *name* of a pre-tokenizer whose rules are compiled into llama.cpp. The name is found by
structure: the pre-tokenizer in `tokenizer.json` is reduced to its steps, and these are looked up in a table whose every
row was compared with llama.cpp's own tokens (`tests/serving`). A pre-tokenizer that is not in it is refused: a wrong
name would load, and cut words differently.

    byte-level BPE     tokens, merges, pre-tokenizer by name                 GPT-2, SmolLM, Llama 3, Qwen, Mistral Nemo
    sentencepiece BPE  tokens and scores: the highest score is joined first  Llama 2, Mistral, Gemma, Phi-3

A `tokenizer.json` keeps no scores, but its merges are the pairs that form each token, best score first: minus the rank
of a token's first merge orders them the same way. That holds if merges of one token are neighbours, which is checked.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trimtab.errors import UserError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""gguf's TokenType."""

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_MARKS = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CASED_WORDS = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|"
)
_CONTRACTED_WORDS = _CASED_WORDS.replace("|", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|")
_MARKED_WORDS = _WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
_SLASHED_MARKS = _MARKS.replace(r"[\r\n]*", r"[\r\n/]*")
_MARKED_MARKS = _MARKS.replace(r"\p{L}", r"\p{L}\p{M}")


@dataclass(frozen=True)
class PreTokenizer:
    """A pre-tokenizer that llama.cpp knows by name."""

    name: str
    steps: tuple[str, ...]
    """Its steps: `digits`, `split REGEX`, `bytes` or `bytes regex` (GPT-2's own splitting)."""
    whole_words: bool = False
    """Whether a word that is a token is taken without merging (`ignore_merges`)."""


PRE_TOKENIZERS = (
    PreTokenizer("gpt-2", ("bytes regex",)),
    PreTokenizer("smollm", ("digits", "bytes regex")),
    PreTokenizer("qwen2", (rf"split {_WORDS}\p{{N}}{_MARKS}", "bytes")),
    PreTokenizer("llama-bpe", (rf"split {_WORDS}\p{{N}}{{1,3}}{_MARKS}", "bytes"), True),
    PreTokenizer("dbrx", (rf"split {_WORDS}\p{{N}}{{1,3}}{_MARKS}", "bytes")),
    PreTokenizer("qwen35", (rf"split {_MARKED_WORDS}\p{{N}}{_MARKED_MARKS}", "bytes")),
    PreTokenizer("gpt-4o", (rf"split {_CONTRACTED_WORDS}\p{{N}}{{1,3}}{_SLASHED_MARKS}", "bytes")),
    PreTokenizer("tekken", (rf"split {_CASED_WORDS}\p{{N}}{_SLASHED_MARKS}", "bytes"), True),
)


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says about a tokenizer."""

    model: str
    """`gpt2` (byte-level BPE) or `llama` (sentencepiece)."""
    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str] | None = None
    scores: list[float] | None = None
    ids: dict[str, int] = field(default_factory=dict)
    """bos, eos, unknown and padding, and further tokens that end a text."""
    flags: dict[str, bool] = field(default_factory=dict)
    chat_template: str | list[dict[str, str]] | None = None

    def fields(self) -> dict[str, Any]:
        """GGUF's keys and values."""
        found: dict[str, Any] = {"model": self.model, "pre": self.pre, "tokens": self.tokens}
        if self.scores is not None:
            found["scores"] = self.scores
        found["token_type"] = self.types
        if self.merges is not None:
            found["merges"] = self.merges
        found |= {f"{name}_token_id": id_ for name, id_ in self.ids.items()}
        return {f"tokenizer.ggml.{key}": value for key, value in (found | self.flags).items()}


def vocabulary(tokenizer: Any, size: int, config: Any, stops: Sequence[int] = ()) -> Vocabulary:
    """The vocabulary of a transformers tokenizer.

    Args:
        tokenizer: a fast one, the only kind that transformers 5 makes of these families.
        size: rows of the embedding; ids without a token are filled with unused ones.
        config: of the model, which knows of special tokens that the tokenizer does not name.
        stops: tokens at which the model stops, `end_tokens`.

    Raises:
        UserError: if llama.cpp would cut text differently.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError("GGUF needs the model's tokenizer, with its tokenizer.json; add it to the model's directory")
    spec = json.loads(backend.to_str())
    if spec["model"]["type"] != "BPE":
        raise UserError(f"GGUF: a {spec['model']['type']} tokenizer; only BPE ones are written")
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in spec["model"]["merges"]]
    if not merges:
        raise UserError("GGUF: a tokenizer of single characters, without merges, which llama.cpp does not load")
    ids = _special_ids(tokenizer, config)
    names = {i: tokenizer.convert_ids_to_tokens(i) or "" for i in stops}
    common: dict[str, Any] = {"ids": ids | _ends_of(ids, names), "chat_template": _template(tokenizer)}
    ends = _ends(tokenizer)
    if spec["model"].get("byte_fallback"):
        tokens, types = _tokens(tokenizer, spec, size, sentencepiece=True)
        flags = {"add_space_prefix": _space_prefix(spec), **ends}
        return Vocabulary("llama", "default", tokens, types, scores=_scores(tokens, merges), flags=flags, **common)
    tokens, types = _tokens(tokenizer, spec, size, sentencepiece=False)
    joined = [" ".join(merge) for merge in merges]
    return Vocabulary("gpt2", pre_tokenizer(spec).name, tokens, types, merges=joined, flags=ends, **common)


def pre_tokenizer(spec: dict[str, Any]) -> PreTokenizer:
    """The row of the table that a `tokenizer.json` has; a `UserError` if none."""
    steps = tuple(_steps(spec.get("pre_tokenizer")))
    for known in PRE_TOKENIZERS:
        if known.steps == steps and known.whole_words == bool(spec["model"].get("ignore_merges")):
            return known
    names = ", ".join(known.name for known in PRE_TOKENIZERS)
    whole = ", ignore_merges" if spec["model"].get("ignore_merges") else ""
    raise UserError(
        f"GGUF: llama.cpp's name for this pre-tokenizer is not known here (its steps: {', '.join(steps)}{whole}); "
        f"tested are {names} and sentencepiece's: start from a GGUF file of this model, whose tokenizer is then copied"
    )


def _steps(pre: dict[str, Any] | None) -> list[str]:
    if pre is None:
        return []
    kind = pre["type"]
    if kind == "Sequence":
        return [step for part in pre["pretokenizers"] for step in _steps(part)]
    if kind == "Digits" and pre["individual_digits"]:
        return ["digits"]
    if kind == "Split" and "Regex" in pre["pattern"] and pre["behavior"] == "Isolated" and not pre["invert"]:
        return [f"split {pre['pattern']['Regex']}"]
    if kind == "ByteLevel" and not pre["add_prefix_space"]:
        return ["bytes regex" if pre.get("use_regex", True) else "bytes"]
    return [json.dumps(pre)]


def _tokens(tokenizer: Any, spec: dict[str, Any], size: int, *, sentencepiece: bool) -> tuple[list[str], list[int]]:
    """Text and type of every id, as llama.cpp's own converter gives them."""
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in spec["model"]["vocab"].items():
        _inside(token, i, size)
        byte = sentencepiece and len(token) == 6 and token.startswith("<0x") and token.endswith(">")
        tokens[i], types[i] = token, BYTE if byte else NORMAL
    unknown = spec["model"].get("unk_token")
    for added in spec["added_tokens"]:
        i, token = added["id"], added["content"]
        _inside(token, i, size)
        if added["special"] or _looks_special(token):
            types[i] = UNKNOWN if sentencepiece and token == unknown else CONTROL
        else:
            token, types[i] = token.replace("\u2581", " "), USER_DEFINED
        tokens[i] = token
    return tokens, types


def _inside(token: str, i: int, size: int) -> None:
    if i >= size:
        raise UserError(f"GGUF: token {token!r} has id {i}, but the embedding has only {size} rows")


def _looks_special(token: str) -> bool:
    """Control tokens that some tokenizers do not mark as such; llama.cpp's converter has the same list."""
    return (
        token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
        or (token.startswith("<|") and token.endswith("|>"))
        or (token.startswith("<\uff5c") and token.endswith("\uff5c>"))
        or (token.startswith("<unused") and token.endswith(">"))
    )


def _scores(tokens: list[str], merges: list[list[str]]) -> list[float]:
    """Scores that order tokens as their merges do."""
    rank: dict[str, int] = {}
    last = None
    for i, (left, right) in enumerate(merges):
        token = left + right
        if token in rank and token != last:
            raise UserError(
                f"GGUF: the merges that form {token!r} are not neighbours, so no score of a sentencepiece vocabulary "
                "orders them; start from a GGUF file of this model, whose tokenizer is then copied"
            )
        rank.setdefault(token, i)
        last = token
    # Tokens that no merge forms are characters, which no score touches: last, in order of their ids.
    return [-float(rank.get(token, len(merges) + i)) for i, token in enumerate(tokens)]


def _space_prefix(spec: dict[str, Any]) -> bool:
    """Whether text gets a space before it: by the normalizer in older files, by the pre-tokenizer in newer ones."""
    text = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _special_ids(tokenizer: Any, config: Any) -> dict[str, int]:
    ids = {}
    for name, short in (("bos", "bos"), ("eos", "eos"), ("unknown", "unk"), ("padding", "pad")):
        found = getattr(tokenizer, f"{short}_token_id")
        found = getattr(config, f"{short}_token_id", None) if found is None else found
        if isinstance(found, int):
            ids[name] = found
    return ids


_STOPS_BY_NAME = frozenset(
    {
        *("<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "_<EOT>"),
        *("<|end_of_text|>", "<end_of_utterance>"),
    }
)
"""Tokens at which llama.cpp stops because of their text."""


def end_tokens(model: Any) -> list[int]:
    """Tokens at which a model stops, by its generation config: what it was trained to end with is among them.

    One that the embedding has no row for is of a larger vocabulary, and never comes.
    """
    found = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = getattr(model.config.get_text_config(), "eos_token_id", None) if found is None else found
    stops = [] if found is None else [found] if isinstance(found, int) else [int(i) for i in found]
    return [i for i in stops if i < model.get_input_embeddings().num_embeddings]


def _ends_of(ids: dict[str, int], stops: dict[int, str]) -> dict[str, int]:
    """Keys that make llama.cpp stop at all of these tokens (ids to texts): it has three, and knows some by their text.

    The key `eos` stays what it is, since that token is also what may be put behind a text.
    """
    held = {ids[name] for name in ("eos", "eot", "eom") if name in ids}
    free = [name for name in ("eos", "eot", "eom") if name not in ids]
    # A token that it knows by its text comes last: it stops there without a key, too.
    left = sorted((i for i in stops if i not in held), key=lambda i: stops[i] in _STOPS_BY_NAME)
    unheld = [i for i in left[len(free) :] if stops[i] not in _STOPS_BY_NAME]
    if unheld:
        raise UserError(
            f"GGUF: the model stops at {len(held) + len(left)} tokens, and a file names three: token {unheld[0]} "
            f"({stops[unheld[0]]!r}) has no place; leave those that are not used out of the generation config"
        )
    return dict(zip(free, left, strict=False))


def more_ends(fields: Mapping[str, Any], stops: Sequence[int]) -> dict[str, int]:
    """Keys to add to a newly written file, so that llama.cpp stops where the model does.

    Args:
        fields: of the file, gguf's.
        stops: tokens at which the model stops; those that are no control tokens of the file are of no file.
    """
    ids = {n: fields[f"tokenizer.ggml.{n}_token_id"].contents() for n in ("eos", "eot", "eom") if _key(n) in fields}
    types, tokens = (fields.get(f"tokenizer.ggml.{name}") for name in ("token_type", "tokens"))
    if types is None or tokens is None:
        return {}
    kinds, size = types.contents(), len(tokens.data)
    names = {i: tokens.contents(i) for i in stops if i < size and kinds[i] in (CONTROL, USER_DEFINED)}
    known = {i: text for i, text in names.items() if text not in _STOPS_BY_NAME}
    return {_key(name): i for name, i in _ends_of(ids, known).items()}


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}_token_id"


def _ends(tokenizer: Any) -> dict[str, bool]:
    """Whether text gets tokens before and after it, seen by trying."""
    ids, bare = tokenizer("a").input_ids, tokenizer("a", add_special_tokens=False).input_ids
    begins = len(ids) > len(bare) and ids[0] == tokenizer.bos_token_id
    ends = len(ids) > len(bare) and ids[-1] == tokenizer.eos_token_id
    return {"add_bos_token": begins, "add_eos_token": ends}


def _template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template
