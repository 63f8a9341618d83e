"""What is said of the data before training, and how many steps a number of epochs is."""

import math
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from trimtab.recipe import texts
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training.epochs import sequences_of, steps_of, steps_of_epoch
from trimtab.training.labelled import label
from trimtab.training.overview import Overview, overview, shortened, shown
from trimtab.training.trainer import packed


def recipe_of(folder: Path, rows: list[Any], train: dict[str, Any], **data: Any) -> Recipe:
    values = tiny.recipe(folder / "model", tiny.jsonl(folder / "rows.jsonl", *rows), folder / "run", data=data)
    values["train"] = {"batch_tokens": 64, "micro_batch": 2, **train}
    return from_dict({**values, "data": {**values["data"], "block_tokens": 16, **data}})


def seen(recipe: Recipe, tokenizer: Any = None, **options: Any) -> Overview:
    assert recipe.data is not None
    read, tokenizer = texts.training(recipe.data), tokenizer or tiny.tokenizer()
    return overview(recipe, read, label(recipe, tokenizer, read.rows, 260, **options), tokenizer)


def asked(*lengths: tuple[int, int]) -> list[Any]:
    return [{"prompt": "p" * prompt, "completion": "c" * answer} for prompt, answer in lengths]


ROWS = asked((5, 3), (8, 6), (14, 9), (12, 20), (16, 5), (40, 1), (3, 3), (4, 1), (9, 1))


def test_numbers_by_hand(tmp_path: Path) -> None:
    found = seen(recipe_of(tmp_path, ROWS, {"steps": 6}, packing="none", eval_path=None))
    lengths = [len(row["prompt"] + row["completion"]) + 1 for row in ROWS]
    answers = [len(row["completion"]) + 1 for row in ROWS]
    assert (found.rows, found.kind, found.held_out) == (9, "pairs", 0)
    assert (found.tokens, found.learned, found.longest) == (sum(lengths), sum(answers), 42)
    assert (found.cut, found.left_out) == (2, 2)
    assert (found.sequences, found.steps_an_epoch, found.steps) == (7, 2, 6)  # two sequences of two to a step
    assert found.example == (("ppppp", False), ("ccc<eos>", True))
    first, second = found.lines()
    assert f"9 pairs, {sum(lengths)} tokens of which {sum(answers) / sum(lengths):.0%} are learned" in first
    assert (
        "the longest has 42, 2 are cut, 2 left out; 7 sequences of at most 16 tokens, 2 steps an epoch, 6 steps in"
        in first
    )
    assert "(3 epochs)" in first
    assert second.endswith("ppppp⟦ccc<eos>⟧")


def test_an_example_is_what_is_trained_on(tmp_path: Path) -> None:
    """Cut where the sequence is, and every answer of a conversation marked."""
    talk = [
        {"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
    ]
    recipe = recipe_of(
        tmp_path, [{"messages": talk}], {"steps": 1, "batch_tokens": 128}, block_tokens=64, packing="none"
    )
    found = seen(recipe)
    assert shown(found.example) == "user: a\nassistant: ⟦b\n⟧user: c\nassistant: ⟦d\n⟧"
    assert found.kind == "conversations"
    last = from_dict({**tiny.recipe(tmp_path / "m", tmp_path / "rows.jsonl", tmp_path / "r"), "train": {"steps": 1,
        "batch_tokens": 64, "micro_batch": 1}, "data": {"path": str(tmp_path / "rows.jsonl"), "block_tokens": 64,
        "loss": "last"}})  # fmt: skip
    assert shown(seen(last).example) == "user: a\nassistant: b\nuser: c\nassistant: ⟦d\n⟧"
    text = seen(recipe_of(tmp_path, [{"text": "abc"}], {"steps": 1}))
    assert text.example == (("a", False), ("bc<eos>", True))  # nothing stands before the first token
    assert text.kind == "texts"


def test_long_parts_lose_their_middle() -> None:
    assert shortened("a" * 240) == "a" * 240
    assert shortened("a" * 200 + "b" * 200) == "a" * 80 + " [.. 240 characters ..] " + "b" * 80


def test_preferences_are_looked_at_and_not_trained(tmp_path: Path) -> None:
    from trimtab.errors import UserError

    rows = [{"prompt": "a", "chosen": "bb", "rejected": "c"}] * 3
    recipe = recipe_of(tmp_path, rows, {"steps": 1}, eval_path=None)
    found = seen(recipe, preferences=True)
    assert (found.kind, found.learned) == ("preferences", 9)
    with pytest.raises(UserError, match=r"preferences \(prompt, chosen, rejected\).*train.objective to dpo or kto"):
        seen(recipe)
    judged = recipe_of(tmp_path, [{"prompt": "a", "completion": "b", "label": True}], {"steps": 1}, eval_path=None)
    with pytest.raises(UserError, match=r"preferences \(prompt, completion, label\).*train.objective to kto"):
        seen(judged)


@pytest.mark.parametrize("packing", ["none", "bfd", "wrapped"])
@pytest.mark.parametrize(("epochs", "micro"), [(1, 2), (3, 1), (0.5, 2), (2.5, 4)])
def test_epochs_are_those_of_transformers(tmp_path: Path, packing: str, epochs: float, micro: int) -> None:
    """An oracle: TRL packs, and transformers' trainer counts the steps of so many epochs."""
    sft = pytest.importorskip("trl.trainer.sft_trainer")
    train = {"epochs": epochs, "micro_batch": micro}
    recipe = recipe_of(tmp_path, ROWS, train, packing=packing, eval_path=None)
    found = label(recipe, tiny.tokenizer(), texts.training(recipe.data).rows, 260)  # type: ignore[arg-type]
    config = LlamaConfig(vocab_size=260, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    sequences = sequences_of(recipe, found)
    assert sequences == len(packed(model, tiny.tokenizer(), recipe, found)[0])
    args = sft.SFTConfig(
        output_dir=str(tmp_path / "trl"), num_train_epochs=epochs, per_device_train_batch_size=micro, bf16=False,
        gradient_accumulation_steps=4 // micro, max_length=16, packing=packing != "none", report_to="none",
        packing_strategy="bfd" if packing == "none" else packing, shuffle_dataset=True, seed=0, learning_rate=0.0,
        logging_strategy="no", save_strategy="no", disable_tqdm=True, gradient_checkpointing=False,
    )  # fmt: skip
    trainer = sft.SFTTrainer(model=model, args=args, train_dataset=found.sequences, processing_class=tiny.tokenizer())
    theirs = trainer.set_initial_training_values(args, trainer.get_train_dataloader())
    assert steps_of(recipe, sequences) == theirs[-1] == max(1, math.ceil(epochs * steps_of_epoch(recipe, sequences)))
