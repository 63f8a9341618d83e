"""Searches of a tiny model from a recipe: what is written, resumed, refused, pruned before and tuned after."""

import csv
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import tiny
import trimtab
from trimtab import chain, recipe
from trimtab.errors import UserError
from trimtab.grid import Grid
from trimtab.methods import Qlora, Rtn
from trimtab.recipe import Recipe
from trimtab.rules import Rule
from trimtab.search import workers
from trimtab.search.ledger import DIED, Trial
from trimtab.search.objective import Rounded
from trimtab.search.searching import Search

SEARCH: dict[str, Any] = {"units": "layer", "bits": [2, 4, 8], "trials": 3, "tokens": 128, "sensitivity_tokens": 64}
TUNED: dict[str, Any] = {"objective": "tuned", "steps": 1, "promote": 2, "ranks": [2, 4]}


def made(folder: Path, *, changes: dict[str, Any] | None = None, **search: Any) -> Recipe:
    if not (folder / "m").exists():
        tiny.model(folder / "m")
        tiny.text(folder / "t.jsonl")
    values = tiny.recipe(
        folder / "m", folder / "t.jsonl", folder / "out", search={**SEARCH, **search}, **(changes or {})
    )
    return recipe.from_dict(values)


def test_a_search_writes_runnable_points_and_goes_on(tmp_path: Path) -> None:
    found = workers.run(made(tmp_path))
    trials = found.ledger.trials()
    assert [t.wish.kind for t in trials] == ["uniform"] * 3 + ["search"] * 3
    folder = tmp_path / "out" / "search"
    rows = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))
    assert [int(r["bytes"]) for r in rows] == sorted(int(r["bytes"]) for r in rows)
    assert (folder / "front.png").stat().st_size > 0
    assert (folder / "bits.png").stat().st_size > 0
    again = workers.run(made(tmp_path, trials=4))
    assert again.ledger.trials()[:6] == trials
    assert len(again.ledger.trials()) == 7
    point = recipe.read(folder / "points" / "2.yaml", ["train.steps=1", "evaluate.parity=false"])
    metrics = trimtab.run(point)
    size = (Path(metrics["output"]) / "model.safetensors").stat().st_size
    row = list(csv.DictReader((folder / "front.csv").read_text().splitlines()))[1]
    assert size <= int(row["bytes"]) < size + 5000
    with pytest.raises(UserError, match="of another model"):
        workers.run(made(tmp_path, bits=[2, 3]))


def test_rounded_quality_is_kl_of_the_prepared_model(tmp_path: Path) -> None:
    """Against transformers' own logits of the float and of the prepared model, a quantized tied embedding included."""
    used = made(tmp_path)
    ids = torch.arange(96).view(3, 32) * 5 % 250
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32)
    rules = Search(used).space.rules((0, 1))
    before = {n: p.clone() for n, p in model.named_parameters()}
    found = Rounded(model, used, ids)(rules, 0)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    with torch.no_grad():
        p = model(input_ids=ids).logits.double().log_softmax(-1)
        q = trimtab.prepare(model, Rtn(), rules)(input_ids=ids).logits.double().log_softmax(-1)
    kl = F.kl_div(q, p, reduction="sum", log_target=True).item() / ids.numel()
    assert kl > 0
    assert found == pytest.approx(kl, rel=1e-3)


def test_tuned_trials_are_promoted_and_choose_ranks(tmp_path: Path) -> None:
    found = workers.run(
        made(tmp_path, changes={"method": {"name": "qlora", "rank": 2}}, trials=3, bits=[2, 4], **TUNED)
    )
    trials = found.ledger.trials()
    assert all(t.state == "complete" for t in trials)
    assert {t.wish.steps for t in trials} == {1, 2}
    assert found.space.ranks == (2, 4, 2, 4)
    rules = [r for r in found.space.rules((0, 3)) if r.rank]
    model = trimtab.load(str(tmp_path / "m"), Qlora(rank=8), [*rules, Rule("*", None)])[0]
    layers = [model.get_submodule(r.match) for r in rules]
    assert {layer.adapter.delta.shape.rank for layer in layers} == {2, 4}


def test_an_interrupted_search_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trial in flight is dead and is made again; one that fails by itself is infeasible and is not."""
    ends: list[BaseException | None] = [None, KeyboardInterrupt(), None, UserError("it diverged")]

    def quality(self: Rounded, rules: list[Rule], steps: int) -> float:
        end = ends.pop(0) if ends else None
        if end is not None:
            raise end
        return 1.0 + sum(r.grid.bits for r in rules if isinstance(r.grid, Grid))

    monkeypatch.setattr(Rounded, "__call__", quality)
    with pytest.raises(KeyboardInterrupt):
        workers.run(made(tmp_path))
    assert (tmp_path / "out" / "search" / "front.csv").exists()
    trials = workers.run(made(tmp_path)).ledger.trials()
    states = [t.state for t in trials]
    assert states[:4] == ["complete", "dead", "complete", "infeasible"]
    assert trials[2].wish == trials[1].wish
    assert states.count("complete") + states.count("infeasible") == 6
    assert [t.wish for t in trials].count(trials[3].wish) == 1


def test_what_kills_its_worker_twice_is_left_alone(tmp_path: Path) -> None:
    found = Search(made(tmp_path))
    first = found.wish([])
    assert first is not None
    once, again = (Trial(n, first, "dead", reason=DIED) for n in range(2))
    assert found.wish([once]) == first
    assert found.wish([once, again]) != first


def begin(file: Path) -> subprocess.Popen[bytes]:
    """The command itself, in a process of its own."""
    command = [sys.executable, "-m", "trimtab.cli", "search", str(file)]
    with file.with_suffix(".log").open("ab") as said:
        return subprocess.Popen(command, stdout=said, stderr=said, env={**os.environ, "OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_a_killed_search_loses_one_trial_at_most(tmp_path: Path) -> None:
    """SIGKILL at random moments of random trials; what was finished stays as it was, and the rest is made."""
    used = made(tmp_path, trials=12, units="fusion")
    file, said = tmp_path / "r.yaml", tmp_path / "r.log"
    file.write_text(used.to_yaml(), encoding="utf-8")
    ledger, draw, before = Search(used).ledger, random.Random(1), dict[int, Trial]()
    for kills in range(1, 4):
        process, wanted = begin(file), len(before) + draw.randint(1, 3)
        while process.poll() is None and sum(t.state == "complete" for t in ledger.trials()) < wanted:
            time.sleep(draw.uniform(0.0, 0.02))
        time.sleep(draw.uniform(0.0, 0.1))
        assert process.poll() is None, said.read_text()
        process.kill()
        process.wait()
        ledger.bury()
        trials = ledger.trials()
        assert all(trials[number] == trial for number, trial in before.items())
        before = {t.number: t for t in trials if t.state == "complete"}
        assert len(trials) - len(before) <= kills
    assert begin(file).wait() == 0, said.read_text()
    trials = ledger.trials()
    assert all(trials[number] == trial for number, trial in before.items())
    done = [t for t in trials if t.state == "complete"]
    assert len(done) == len({t.wish.configuration for t in done}) == 12 + 3  # with the uniform widths
    rows = list(csv.DictReader((tmp_path / "out" / "search" / "trials.csv").read_text().splitlines()))
    assert [int(r["number"]) for r in rows if r["state"] == "complete"] == [t.number for t in done]


@pytest.mark.slow
def test_two_commands_on_one_journal_never_run_the_same(tmp_path: Path) -> None:
    used = made(tmp_path, trials=8, units="fusion")
    file = tmp_path / "r.yaml"
    file.write_text(used.to_yaml(), encoding="utf-8")
    for process in [begin(file) for _ in range(2)]:
        assert process.wait() == 0, (tmp_path / "r.log").read_text()
    trials = [t for t in Search(used).ledger.trials() if t.state != "duplicate"]
    assert [t.state for t in trials] == ["complete"] * (8 + 3)
    assert len({(t.wish.configuration, t.wish.steps) for t in trials}) == 11


@pytest.mark.slow
def test_two_workers_share_a_search(tmp_path: Path) -> None:
    trials = workers.run(made(tmp_path, workers=2, trials=4)).ledger.trials()
    assert sum(t.state == "complete" for t in trials) == 7
    done = [t.wish for t in trials if t.state == "complete"]
    assert len({(w.configuration, w.steps) for w in done}) == 7


def test_budgets_hold_and_say_when_they_cannot(tmp_path: Path) -> None:
    whole = Search(made(tmp_path)).space
    budget = whole.fixed_bytes + int(whole.bytes_UC[:, 1].sum()) + 10
    found = workers.run(made(tmp_path, budget=budget, trials=5))
    assert all(whole.bytes(t.wish.configuration) <= budget for t in found.ledger.trials())
    assert [t.wish.configuration for t in found.ledger.trials() if t.wish.kind == "uniform"] == [(0, 0), (1, 1)]
    with pytest.raises(UserError, match="smallest configuration"):
        Search(made(tmp_path, budget=100))
    tight = made(tmp_path, budget_training="1kB", changes={"name": "tight"})
    assert Search(tight).wish([]) is None


def test_one_recipe_prunes_searches_and_tunes(tmp_path: Path) -> None:
    used = made(
        tmp_path,
        changes={
            "prune": {"ratio": 0.2, "multiple_of": 32, "tokens": 64, "block_tokens": 32},
            "train": {"steps": 1},
            "evaluate": {"parity": False},
        },
        trials=1,
        uniform=False,
    )
    metrics = chain.run(used)
    assert metrics["output"] == str(tmp_path / "out" / "model")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert served.config.intermediate_size < 128
    with pytest.raises(UserError, match="not empty"):
        chain.run(used)
    assert used.prune is not None
    otherwise = used.model_copy(update={"prune": used.prune.model_copy(update={"ratio": 0.1})})
    with pytest.raises(UserError, match="with other options; pass --overwrite"):
        chain.pruned(otherwise)
    pruned = tmp_path / "out" / "pruned"
    again = used.model_copy(update={"model": used.model.model_copy(update={"path": str(pruned)})})
    with pytest.raises(UserError, match=r"model\.path: .* is in the output directory"):
        chain.run(again, overwrite=True)
    assert (pruned / "config.json").exists()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"promote": 5}, "search.promote"),
        ({"bits": [4, 12]}, "search.bits"),
        ({"objective": "tuned", "units": "row"}, "search.units"),
    ],
)
def test_wrong_blocks_are_named(tmp_path: Path, block: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        made(tmp_path, **block)
