"""Hashes of tokenizers: by what their tokens depend on, not by where they were read."""

import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer, CTRLTokenizer

import tiny
from trimtab.data.digests import of_tokenizer


def slow(folder: Path, merges: str) -> CTRLTokenizer:
    folder.mkdir()
    words = ["<unk>", "a@@", "b@@", "c", "ab@@", "bc", "abc"]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version\n" + merges)
    return CTRLTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))


def test_a_slow_tokenizers_merges_are_in_it(tmp_path: Path) -> None:
    one, same = (slow(tmp_path / name, "a b\nab c</w>\n") for name in ("one", "same"))
    other = slow(tmp_path / "other", "b c</w>\na bc</w>\n")
    assert not one.is_fast
    assert one.get_vocab() == other.get_vocab()
    assert of_tokenizer(one) == of_tokenizer(same) != of_tokenizer(other)


def test_a_fast_ones_place_is_not_and_its_template_is(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "moved")
    one, moved = (AutoTokenizer.from_pretrained(tmp_path / name) for name in ("one", "moved"))
    assert of_tokenizer(one) == of_tokenizer(moved)
    moved.chat_template = "{{ messages }}"
    assert of_tokenizer(one) != of_tokenizer(moved)


def test_one_of_somebodys_own_has_no_files() -> None:
    class Own(CTRLTokenizer):
        def __init__(self) -> None:
            super(CTRLTokenizer, self).__init__(unk_token="<unk>")

        vocab_size = 1

        def get_vocab(self) -> dict[str, int]:
            return {"<unk>": 0}

        def save_vocabulary(self, *_: object, **__: object) -> tuple[str, ...]:
            raise NotImplementedError

    assert of_tokenizer(Own())
