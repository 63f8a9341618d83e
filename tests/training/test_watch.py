"""The line about a loss that does not move, or leaps."""

from pathlib import Path

import pytest

import tiny
from trimtab.models.load import load
from trimtab.recipe import recipe
from trimtab.training import trainer as train
from trimtab.training.watch import advice, verdict

NOISE = [0.02, -0.03, 0.01, 0.0, -0.02, 0.03, -0.01, 0.02, -0.02, 0.01, 0.02, -0.01]


@pytest.mark.parametrize(
    ("slope", "end", "found"),
    [(-0.05, 0.0, None), (-0.01, 0.0, None), (0.0, 0.01, "still"), (0.01, 0.0, "still"), (0.0, 2.0, "leaps")],
)
def test_what_losses_say(slope: float, end: float, found: str | None) -> None:
    losses = [3 + slope * i + noise + (end if i > 8 else 0) for i, noise in enumerate(NOISE)]
    assert verdict(losses) == found


def test_a_loss_that_has_left_leaps_however_it_jumps() -> None:
    """Its own jumps are no noise to measure the leap by."""
    assert verdict([3.0, 9.0, 4.5, 11.0, 6.0, 12.0, 7.0, 13.0, 8.0]) == "leaps"


def test_the_line_names_the_key_its_rate_and_a_better_one() -> None:
    values = {"model": {"path": "m"}, "method": "peqa", "data": {"path": "d"}, "train": {"steps": 100}}
    rising = [3.0, 5.5, 6.0, 6.1, 6.0, 6.2, 6.1, 6.0, 6.1]
    shares = advice(recipe.from_dict(values), rising)
    assert shares == (
        "the loss leaps (3.00 to 6.07 in 9 steps): try train.lr_scale=0.0073 train.parametrization=relative; "
        "it is 0.022 now"
    )
    paper = recipe.from_dict({**values, "method": "qlora", "train": {"steps": 100, "lr": 2e-4}})
    line = "the loss does not fall (3.00 to 3.00 in 9 steps): if it stays so, try train.lr=0.0006; it is 0.0002 now"
    assert advice(paper, [3.0] * 9) == line


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"lr": 1e-9, "lr_scale": 1e-9, "parametrization": "relative"}, "does not fall"),
        ({}, None),
    ],
    ids=["still", "default"],
)
def test_a_run_says_which_rate_to_change(tmp_path: Path, changes: dict[str, object], said: str | None) -> None:
    """With no rates at all the loss of a model that learns falls, and nothing is said."""
    tiny.model(tmp_path / "model")
    tiny.jsonl(tmp_path / "data.jsonl", *[{"text": "one two three four five six seven eight"}] * 40)
    block = {"steps": 40, "lr": None, "lr_scale": None, "save_steps": 100, "warmup": 0.0} | changes
    values = tiny.recipe(tmp_path / "model", tmp_path / "data.jsonl", tmp_path / "out", train=block)
    parsed = recipe.from_dict(values)
    model, tokenizer = load(str(tmp_path / "model"), parsed.method, parsed.rules, quiet=True)
    lines: list[str] = []
    trained = train.fit(model, tokenizer, parsed, say=lines.append)
    heard = [line for line in lines if line.startswith("the loss")]
    assert [line.partition("(")[0] for line in heard] == ([f"the loss {said} "] if said else [])
    if said:
        rate = f"{changes['lr']:.2g}"
        assert heard[0].endswith(f"it is {rate} now")
        assert "train.lr=" in heard[0]
        assert "train.parametrization=relative" in heard[0]
    else:
        assert trained.losses[-1] < trained.losses[0] - 0.2
