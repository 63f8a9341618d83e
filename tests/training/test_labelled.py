"""What is left to learn of the rows: refused where it is nothing, counted where it is less; exactly what TRL trains on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tiny
from trimtab.data.rows import load_rows
from trimtab.errors import UserError
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training.labelled import Labelled, label
from trimtab.training.stopping import stop_at
from trimtab.training.trainer import packed

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
IM_END = 258


def chatml() -> PreTrainedTokenizerFast:
    """tiny's byte tokenizer with a template that ends turns otherwise than the tokenizer ends texts."""
    made = tiny.tokenizer(CHATML)
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return made


def asked(*lengths: tuple[int, int]) -> list[dict[str, str]]:
    """Rows by the number of letters of their prompt and answer."""
    return [{"prompt": "p" * prompt, "completion": "c" * answer} for prompt, answer in lengths]


def made(folder: Path, *rows: Any, tokenizer: Any = None, vocabulary: int = 260, **data: Any) -> Labelled:
    recipe = recipe_of(folder, *rows, **data)
    return label(recipe, tokenizer or tiny.tokenizer(), rows_of(recipe), vocabulary)


def recipe_of(folder: Path, *rows: Any, **data: Any) -> Recipe:
    file = tiny.jsonl(folder / "rows.jsonl", *rows)
    return from_dict(tiny.recipe(folder / "model", file, folder / "run", data={"block_tokens": 16, **data}))


def rows_of(recipe: Recipe) -> Any:
    assert recipe.data is not None
    return load_rows(recipe.data.path, ignore=recipe.data.ignore)


def trained_on(labelled: Labelled, recipe: Recipe, tokenizer: Any = None) -> tuple[int, Any]:
    """Tokens that the trainer's batches count, and its sequences."""
    config = LlamaConfig(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    sequences, collate = packed(LlamaForCausalLM(config), tokenizer or tiny.tokenizer(), recipe, labelled)
    return sum(int((collate([row])["labels"][:, 1:] != -100).sum()) for row in sequences), sequences


@pytest.mark.parametrize("packing", ["auto", "bfd", "none"])
def test_no_label_left_in_any_sequence(tmp_path: Path, packing: str) -> None:
    """Training on nothing: prompts longer than block_tokens gave a loss of 0.000 and a saved model, or a traceback."""
    rows = [{"prompt": "word " * 60, "completion": " answer"}] * 7 + asked((40, 3))
    said = (
        r"nothing to learn in 8 rows: of 8 the prompt alone fills data.block_tokens = 32 \(40 to 300 tokens; the first is "
        r"row 1 \(.*rows\.jsonl, line 1\)\); raise"
    )
    with pytest.raises(UserError, match=said):
        made(tmp_path, *rows, packing=packing, block_tokens=32)


@pytest.mark.parametrize(("packing", "counted"), [("none", 17), ("bfd", 17), ("wrapped", None)])
def test_rows_that_are_cut_are_counted(tmp_path: Path, packing: str, counted: int | None) -> None:
    """10 of 12 rows cut, and no word. By hand: of 16 tokens, an end to each answer; 4 + 7, then 2 and 4 before the cut."""
    rows = asked((5, 3), (8, 6), (14, 9), (12, 20), (16, 5), (40, 1))
    recipe = recipe_of(tmp_path, *rows, packing=packing)
    found = label(recipe, tiny.tokenizer(), rows_of(recipe), 260)
    count, sequences = trained_on(found, recipe)
    if counted is None:  # nothing is lost, but for the tokens that sequences begin with
        whole = sum(label != -100 for row in found.sequences for label in row["labels"])
        lost = sum(row["labels"][0] != -100 for row in sequences)
        assert (whole, count) == (4 + 7 + 10 + 21 + 6 + 2, whole - lost)
        assert len(found.notes) == 1
        assert "have an answer that is learned in part without its prompt: packing: wrapped cuts them" in found.notes[0]
        return
    assert count == counted
    assert found.notes == (
        "data: of 6 rows, 2 lose a part of their answer and 2 all of it, 33 of 50 tokens to learn: they are longer than "
        f"data.block_tokens = 16 (the longest has 42); the first is row 3 ({tmp_path}/rows.jsonl, line 3)",
    )
    assert len(found.sequences) == 4  # what has nothing to learn is left out


def test_wrapped_answers_without_their_prompt(tmp_path: Path) -> None:
    """One row of 20 tokens in sequences of 16: whatever the order, some answer stands in a sequence of its own."""
    found = made(tmp_path, *asked((10, 9)), packing="wrapped")
    assert "of 1 rows, 1 have an answer that is learned in part without" in found.notes[0]
    assert made(tmp_path, *asked((3, 4), (3, 4)), packing="wrapped").notes == ()


def test_a_sequence_is_not_taken_for_the_row_of_its_number(tmp_path: Path) -> None:
    """Row 1 is left out, and row 2, the first sequence, is the one of which something is learned without its prompt."""

    def talk(prompt: str, answer: str) -> dict[str, Any]:
        return {
            "prompt": [{"role": "user", "content": prompt}],
            "completion": [{"role": "assistant", "content": answer}],
        }

    plain = tiny.tokenizer("{% for m in messages %}{{ m.content }}{% endfor %}")
    found = made(
        tmp_path, talk("p" * 5, ""), talk("p" * 10, "c" * 9), tokenizer=plain, packing="wrapped", block_tokens=16
    )
    [note] = [note for note in found.notes if "without its prompt" in note]
    assert note.startswith("data: of 2 rows, 1 have an answer")
    assert "the first is" not in note
    first = made(tmp_path, talk("p" * 10, "c" * 9), tokenizer=plain, packing="wrapped", block_tokens=16).notes[0]
    assert first.endswith("line 1)")


def test_texts_lose_their_end(tmp_path: Path) -> None:
    rows = [{"text": "a" * 9}, {"text": "b" * 30}]
    [note] = made(tmp_path, *rows, packing="bfd").notes
    assert "of 2 rows, 1 lose a part of their text and 0 all of it, 15 of 39 tokens" in note
    assert made(tmp_path, *rows).notes == ()  # packing: auto cuts texts into blocks, and trains on all of them


def test_empty_answers_and_texts(tmp_path: Path) -> None:
    [empty] = made(tmp_path, *asked((3, 3), (3, 0))).notes
    assert "of 2 rows, 1 have an empty answer, so that the model learns to say nothing; the first is row 2" in empty
    [unlearned] = made(tmp_path, {"text": "a"}, {"text": ""}).notes
    assert "of 2 rows, 1 hold nothing to learn and are left out; the first is row 2" in unlearned
    with pytest.raises(UserError, match="nothing to learn in 1 rows: no row holds a text or answer"):
        made(tmp_path, {"text": ""})
    chat = {"instruction": "a", "output": "b"}
    with pytest.raises(UserError, match="the chat template renders no answer; look at row 1"):
        made(tmp_path, chat, tokenizer=tiny.tokenizer("{{ messages[0].content }}"))


def test_what_is_said_before_training(tmp_path: Path) -> None:
    long = tiny.tokenizer("{% for m in messages %}{{ m.content.split('</think>')[-1] }}<eos>{% endfor %}")
    rows = [{"instruction": "a", "output": "<think>hm</think>b", "id": 3, "grade": 1}]
    found = made(tmp_path, *rows, tokenizer=long, ignore=["grade"], block_tokens=64).notes
    assert found[0] == "data: keys of rows that are not used: grade, id"
    assert "have an answer of which the chat template leaves something out, which is then not learned" in found[1]
    merging = tiny.tokenizer(
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}?{% endif %}"
    )
    [merged, endless] = made(tmp_path, {"instruction": "a", "output": "b"}, tokenizer=merging).notes
    assert "have a prompt whose last tokens are other ones when an answer follows" in merged
    assert "ends an answer with '', in which there is no token of its own" in endless


def test_tokens_that_the_model_does_not_have(tmp_path: Path) -> None:
    """Tokenizer with more tokens than the embedding has rows: an IndexError after loading."""
    tokenizer = chatml()
    chat = {"instruction": "a", "output": "b"}
    said = r"data, row 1 \(.*line 1\): holds '<\|im_start\|>', token 257 of the tokenizer, .* embedding has 257 rows"
    with pytest.raises(UserError, match=said):
        made(tmp_path, chat, tokenizer=tokenizer, vocabulary=257)
    [note] = made(tmp_path, {"text": "a"}, tokenizer=tokenizer, vocabulary=257).notes
    assert "the tokenizer has 259 tokens, the model's embedding 257 rows; none of the tokens beyond it" in note


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a", "completion": "b"}])
def test_an_end_that_the_model_has_no_row_for(tmp_path: Path, row: dict[str, str]) -> None:
    """Of few rows, too: it is not a token of the text, but of what is trained."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    with pytest.raises(
        UserError, match=rf"row 1 \(.*\): holds '<end>', token {tokenizer.eos_token_id} of the tokenizer"
    ):
        made(tmp_path, row, tokenizer=tokenizer, vocabulary=tokenizer.eos_token_id)


def test_a_tokenizer_without_an_end(tmp_path: Path) -> None:
    """A TypeError in TRL."""
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = None
    chat = {"instruction": "a", "output": "b"}
    for row in ({"text": "a"}, {"prompt": "a", "completion": "b"}, chat):
        with pytest.raises(UserError, match=r"no end-of-sequence token, .*name one of its tokens as `eos_token`"):
            made(tmp_path, row, tokenizer=tokenizer)
    tokenizer.pad_token = "a"
    assert made(tmp_path, chat, tokenizer=tokenizer, block_tokens=64).end is None


@pytest.mark.parametrize(
    ("stops", "said", "kept"),
    [
        (tiny.EOS, "stops at <eos> alone", [tiny.EOS, IM_END]),
        ([tiny.EOS, 7], "stops at <eos>, ", [tiny.EOS, 7, IM_END]),
        (None, "stops nowhere", IM_END),
        (IM_END, None, IM_END),
        ([7, IM_END], None, [7, IM_END]),
    ],
)
def test_the_trained_end_is_kept(tmp_path: Path, stops: Any, said: str | None, kept: Any) -> None:
    """The end of turns: a template ends them with a token at which generation does not stop."""
    found = made(tmp_path, {"instruction": "a", "output": "b"}, tokenizer=chatml(), block_tokens=64)
    assert found.end == IM_END
    small = LlamaConfig(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(small)
    model.generation_config = GenerationConfig(eos_token_id=stops)
    line = stop_at(model, chatml(), found.end)
    assert (line is None) == (said is None)
    assert said is None or (said in str(line) and "trained answers end with <|im_end|>" in str(line))
    assert model.generation_config.eos_token_id == kept
    assert stop_at(model, chatml(), found.end) is None
    assert stop_at(model, chatml(), None) is None
    assert made(tmp_path, {"text": "a"}, tokenizer=chatml()).end == tiny.EOS  # a text ends as the tokenizer says


def test_the_same_tokens_in_training_and_measuring(tmp_path: Path) -> None:
    """A window of one document is the sequence that is trained on."""
    from trimtab.data.sequences import token_windows

    recipe = recipe_of(tmp_path, {"text": "once upon a dog"}, packing="none")
    found = label(recipe, tiny.tokenizer(), rows_of(recipe), 260)
    windows = token_windows(rows_of(recipe), tiny.tokenizer(), block_tokens=16)
    assert torch.equal(windows, torch.tensor(found.sequences["input_ids"][:]))
