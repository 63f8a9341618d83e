"""What training takes for granted of TRL's and transformers' trainers (see docs/upgrades.md)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab.models.architecture import architecture_of
from trimtab.models.load import load
from trimtab.recipe import texts
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training.trainer import Trained, fit, packed


def parsed(given: Path, output: Path, **changes: Any) -> Recipe:
    return from_dict(tiny.recipe(given / "model", given / "data.jsonl", output, **changes))


def trained(recipe: Recipe) -> Trained:
    torch.manual_seed(0)  # of the adapters' start
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)
    return fit(model, tokenizer, recipe)


def test_micro_batches_change_no_step(given: Path, tmp_path: Path) -> None:
    """The mean is over all tokens of a step; half of it, or a mean of means, would move scales by another step."""
    steps = {}
    for micro_batch in (1, 2, 4):
        out = tmp_path / str(micro_batch)
        options = {"steps": 1, "micro_batch": micro_batch, "save_steps": 1, "warmup": 0, "clip": 1e9}
        recipe = parsed(given, out, method={"name": "qlora", "rank": 4}, train=options, model={"dtype": "float32"})
        done = trained(recipe)
        state = torch.load(out / "checkpoints" / "checkpoint-1" / "optimizer.pt", weights_only=True)["state"]
        steps[micro_batch] = done.losses[0], torch.cat([s["exp_avg"].flatten() for s in state.values()])
    loss, moment = steps[4]
    assert moment.norm() > 0
    for micro_batch in (1, 2):
        message = f"a step of micro-batches of {micro_batch} is another than that of one batch of 4"
        assert steps[micro_batch][0] == pytest.approx(loss, rel=1e-4), message
        assert (steps[micro_batch][1] - moment).norm() < 1e-3 * moment.norm(), message


def test_the_trainer_prints_nothing(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(parsed(given, tmp_path / "run", train={"steps": 1}))
    assert "loss" not in capsys.readouterr().out, (
        "a callback of transformers prints steps; `trainer._trainer` removes it"
    )


def test_trl_logs_the_tokens_that_we_count(given: Path, tmp_path: Path) -> None:
    done = trained(parsed(given, tmp_path / "run", train={"steps": 2, "save_steps": 2}))
    state = json.loads((tmp_path / "run/checkpoints/checkpoint-2/trainer_state.json").read_text())
    logged = [entry.get("num_tokens") for entry in state["log_history"] if "loss" in entry]
    assert done.tokens == 2 * 128
    assert logged == [128, 256], "TRL no longer takes what it logs from _metrics, or counts tokens by itself as well"


@pytest.mark.parametrize("packing", ["wrapped", "bfd", "none"])
def test_columns_of_packed_sequences(given: Path, tmp_path: Path, packing: str) -> None:
    recipe = parsed(given, tmp_path / "run", data={"packing": packing})
    assert recipe.data is not None
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules)
    sequences, collate = packed(model, tokenizer, recipe, texts.training_of(recipe).rows)
    columns = {"input_ids", "labels", *(["seq_lengths"] if packing == "bfd" else [])}
    assert set(sequences.column_names) - {"text"} == columns, (
        f"TRL packs sequences into columns {sequences.column_names} now"
    )
    assert {"input_ids", "labels"} <= set(collate([sequences[0]]))


SCALED = {
    "cohere": "logit_scale",
    "granite": "logits_scaling",
    "falcon_h1": "lm_head_multiplier",
    "gemma2": "final_logit_softcapping",
}


@pytest.mark.parametrize(("family", "key"), SCALED.items())
def test_what_models_do_with_their_logits(family: str, key: str) -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model(family)
    assert hasattr(config, key), f"{family}'s config no longer says by {key} what is done with its logits"
    found = architecture_of(config)
    assert key in (found.softcap, *found.logit_factors)
