"""Searches of a tiny model from a recipe: what is written, resumed, refused, pruned before and tuned after."""

import csv
import io
import os
import random
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM

import tiny
import trimtab
from trimtab.bit_search import figures, objective, results, workers
from trimtab.bit_search.ledger import DIED, Trial, Wish
from trimtab.bit_search.objective import Rounded
from trimtab.bit_search.searching import Search
from trimtab.errors import Diverged, UserError
from trimtab.formats import manifest
from trimtab.methods import Qlora, Rtn
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline import stages
from trimtab.pipeline.pruned import pruned, pruned_already
from trimtab.pipeline.run import run
from trimtab.quant.grid import Grid
from trimtab.recipe import recipe
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule
from trimtab.report.terminal import Terminal
from trimtab.training import build

SEARCH: dict[str, Any] = {"units": "layer", "bits": [2, 4, 8], "trials": 3, "tokens": 128, "sensitivity_tokens": 64}
RANGED = [tiny.RULES[0], {"match": "*", "grid": {"bits": 4, "group": 16}}]
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
    assert [int(f.stem) for f in sorted((folder / "points").iterdir())] == list(range(1, len(rows) + 1))
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
    with pytest.raises(UserError, match="other values of: rules, search, units"):
        workers.run(made(tmp_path, bits=[2, 3]))


def test_the_pictures_hold_every_trial_and_baseline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(figures, "_save", lambda figure, file: drawn.update({file.stem: figure.axes[0]}))
    changes = {"method": {"name": "qlora", "rank": 2}}
    space = Search(made(tmp_path, changes=changes, **TUNED)).space
    budget = space.bytes((len(space.bits) - 1,) * 2)
    found = workers.run(made(tmp_path, changes=changes, trials=4, budget=budget, **TUNED))
    trials = found.ledger.trials()
    axes = drawn["front"]
    shown = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    names = ["trials, 1 steps", "trials, 2 steps", "uniform widths, 1 steps", "front", "budget"]
    assert [*shown][:5] == names
    assert [*shown][5].startswith("float model, untuned: ")
    points = len(shown["front"].get_xdata()) + sum(len(shown[n].get_offsets()) for n in names[:3])
    assert points == sum(t.state == "complete" for t in trials)
    assert {text.get_text() for text in axes.texts} == {"2r2", "2r4", "4r2", "4r4", "8r2", "8r4"}
    front = found.front(trials)
    assert drawn["bits"].images[0].get_array().shape == (len(front), 2)


@pytest.mark.parametrize(("method", "expected"), [("lr-qat", 4.0), ("qlora", 1.0)])
def test_training_codes_mends_small_roundings_best(tmp_path: Path, method: str, expected: float) -> None:
    """The prior of tuned trials falls faster with the width, but not where codes stay as they are."""
    found = {}
    for kind in ("rounded", "tuned"):
        (tmp_path / kind).mkdir()
        values = {"method": {"name": method, "rank": 2}, "rules": RANGED}
        used = made(tmp_path / kind, changes=values, objective=kind, steps=1)
        found[kind] = Search(used).problem.cost_UC
    ratio = found["tuned"] / found["rounded"]
    np.testing.assert_allclose(ratio[:, 0] / ratio[:, 1], expected)
    np.testing.assert_allclose(ratio[:, 1] / ratio[:, 2], expected**2)


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
    ends: list[BaseException | None] = [None, KeyboardInterrupt(), None, Diverged("it diverged")]

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
def test_ctrl_c_stops_the_command_and_says_how_to_go_on(tmp_path: Path) -> None:
    used = made(tmp_path, trials=12, units="fusion")
    file, said = tmp_path / "r.yaml", tmp_path / "r.log"
    file.write_text(used.to_yaml(), encoding="utf-8")
    ledger = Search(used).ledger
    # What a shell runs in the background ignores the signal, and so would its children.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = begin(file)
    signal.signal(signal.SIGINT, before)
    while process.poll() is None and not any(t.state == "complete" for t in ledger.trials()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.wait() == 130, said.read_text()
    assert f"stopped; resume with `trimtab search {file}`" in said.read_text()
    assert "Traceback" not in said.read_text()
    ledger.bury()  # what was claimed and not begun
    assert not any(t.state == "running" for t in ledger.trials())
    assert (tmp_path / "out" / "search" / "trials.csv").exists()


@pytest.mark.slow
def test_workers_end_when_the_command_is_killed(tmp_path: Path) -> None:
    """Their trials in flight are finished; who gives the command again has no strangers beside its own workers."""
    used = made(tmp_path, trials=2000, units="fusion", workers=2, bits=[2, 3, 4, 5, 6, 7, 8])
    file = tmp_path / "r.yaml"
    file.write_text(used.to_yaml(), encoding="utf-8")
    process, ledger = begin(file), Search(used).ledger
    while process.poll() is None and sum(t.state == "complete" for t in ledger.trials()) < 2:
        time.sleep(0.05)
    process.kill()
    process.wait()
    until = time.monotonic() + 60
    while (made_before := len(ledger.trials())) and time.monotonic() < until:
        time.sleep(5)  # a trial takes a fraction of a second
        if len(ledger.trials()) == made_before:
            break
    assert len(ledger.trials()) == made_before
    assert sum(t.state == "complete" for t in ledger.trials()) < 2000


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
    with pytest.raises(UserError, match="at the smallest widths"):
        Search(made(tmp_path, budget_training="1kB", changes={"name": "tight"}))


def test_a_lowered_budget_counts_for_trials_made_before_it(tmp_path: Path) -> None:
    """They teach, but are no part of the front; as many trials within it are made as were asked for."""
    whole = workers.run(made(tmp_path))
    budget = whole.space.bytes((0, 1))
    found = workers.run(made(tmp_path, budget=budget))
    trials = found.ledger.trials()
    front = found.front(trials)
    assert max(found.space.bytes(t.wish.configuration) for t in trials) > budget
    assert front
    assert all((t.bytes or 0) <= budget for t in front)
    inside = [t for t in trials if found.space.bytes(t.wish.configuration) <= budget]
    # Within it there are five of nine configurations: 22, 24, 42, 28 or 82, 44; all that are left were made.
    assert sum(t.wish.kind == "search" for t in inside) == 3 or len(inside) == len(
        [c for c in product(range(3), repeat=2) if found.space.bytes(c) <= budget]
    )
    metrics = trimtab.run(results.best(found).model_copy(update={"output": str(tmp_path / "best")}))
    assert (Path(metrics["output"]) / "model.safetensors").stat().st_size <= budget


def test_a_lowered_training_budget_counts_too(tmp_path: Path) -> None:
    changes = {"method": {"name": "lr-qat", "rank": 4, "storage": "int"}}
    found = Search(made(tmp_path, changes=changes))
    small, large = found._peak((0, 0)), found._peak((2, 2))
    assert small < large
    trials = [Trial(n, Wish((c, c), 0), "complete", 1 + n, 9.0 - n) for n, c in enumerate((0, 2))]
    assert len(found.front(trials)) == 2
    tight = Search(made(tmp_path, changes=changes, budget_training=(small + large) // 2))
    assert tight.front(trials) == trials[:1]


@pytest.mark.parametrize(
    ("changes", "search", "named"),
    [
        ({"rules": [{**tiny.RULES[0], "grid": {"bits": 4, "group": 32}}, tiny.RULES[1]]}, {}, "rules, units"),
        ({"data": {"limit": 3}}, {}, "data"),
        ({}, {"sensitivity_tokens": 32}, "search"),
        ({"train": {"lr": 1.0}}, {}, None),  # of no account for rounded trials
        ({"train": {"steps": 9}}, TUNED, None),
        ({"train": {"lr": 1.0}}, TUNED, "train"),
        ({"activations": {"bits": 8}}, TUNED, "start, distill, activations or kv"),
    ],
)
def test_a_study_is_of_one_recipe(
    changes: dict[str, Any], search: dict[str, Any], named: str | None, tmp_path: Path
) -> None:
    method = {"method": {"name": "qlora", "rank": 2}} if search is TUNED else {}
    Search(made(tmp_path, changes=method, **(search if search is TUNED else {})))
    if named is None:
        Search(made(tmp_path, changes=method | changes, **search))
    else:
        with pytest.raises(UserError, match=f"other values of: {named};"):
            Search(made(tmp_path, changes=method | changes, **search))


def test_a_recipe_read_back_goes_on_with_its_study(tmp_path: Path) -> None:
    """As workers do: rates left to the method are written out."""
    changes = {"method": {"name": "qlora", "rank": 2}, "train": {"lr": None, "lr_scale": None}, "distill": {}}
    used = made(tmp_path, changes=changes, **TUNED)
    Search(used)
    file = tmp_path / "r.yaml"
    file.write_text(used.to_yaml(), encoding="utf-8")
    Search(recipe.read(file))


def test_trials_without_a_mark_are_of_another_recipe(tmp_path: Path) -> None:
    used = made(tmp_path)
    found = Search(used)
    assert found.ledger.claim(lambda _: Wish((0, 0), 0)) is not None
    found.ledger.note("marks", None)
    with pytest.raises(UserError, match="other values of: data, method, model, rules"):
        Search(used)


def test_trials_train_what_a_run_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block-wise start, rounded inputs, and a teacher whose answers are written once."""
    seen: list[tuple[bool, Path | None, bool]] = []

    def fit(model: Any, tokenizer: Any, recipe: Recipe, **_: Any) -> None:
        rounded = any(getattr(layer, "inputs", None) is not None for layer in quant_layers(model).values())
        seen.append((rounded, recipe.teacher_cache, (recipe.teacher_cache or Path()).joinpath("teacher.json").exists()))

    starts: list[Any] = []
    real = build.load
    monkeypatch.setattr(objective, "fit", fit)
    monkeypatch.setattr(build, "load", lambda *a, **k: starts.append(k["start"]) or real(*a, **k))
    changes = {
        "activations": {"bits": 8},
        "start": {"name": "block", "tokens": 64, "steps": 1},
        "distill": {},
        "train": {"batch_tokens": 64},
    }
    search = {"objective": "tuned", "steps": 1, "trials": 1, "bits": [4], "uniform": False}
    found = workers.run(made(tmp_path, changes=changes, **search))
    assert [t.state for t in found.ledger.trials()] == ["complete"]
    assert seen == [(True, tmp_path / "out-teacher", True)]
    assert isinstance(starts[0], trimtab.Blockwise)
    assert results.best(found).teacher_cache == tmp_path / "out-teacher"


def test_what_cannot_run_is_infeasible_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Rounded, rules: list[Rule], steps: int) -> float:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Rounded, "__call__", fails)
    used = made(tmp_path)
    with pytest.raises(UserError, match="none of 6 was finished; the last: MemoryError: DefaultCPU"):
        workers.run(used)
    assert {t.state for t in Search(used).ledger.trials()} == {"infeasible"}


def test_nothing_is_claimed_before_it_can_be_tried(tmp_path: Path) -> None:
    used = made(tmp_path, changes={"data": {"eval_path": str(tmp_path / "nowhere.jsonl")}})
    with pytest.raises(UserError, match="nowhere"):
        workers.run(used)
    tiny.text(tmp_path / "nowhere.jsonl")
    assert Search(used).ledger.trials() == []


@pytest.mark.slow
def test_workers_that_stop_early_are_no_end_of_a_search(tmp_path: Path) -> None:
    """It ends with the error that stopped the first of them."""
    changes = {"data": {"eval_path": str(tmp_path / "nowhere.jsonl")}}
    with pytest.raises(UserError, match=r"nowhere\.jsonl: no such file or directory"):
        workers.run(made(tmp_path, changes=changes, workers=2))


def test_float_layers_alone_are_not_wanted_where_inputs_are_rounded(tmp_path: Path) -> None:
    """LoRA beside float layers could be trained, but no input of theirs is rounded, and planning it is an error."""
    changes = {"method": {"name": "qlora", "rank": 2}, "rules": RANGED}
    for rounded, admitted in ((None, True), ({"bits": 8}, False)):
        used = made(tmp_path, changes=changes | {"activations": rounded, "name": f"{rounded}"}, bits=[4, 16])
        found = Search(used)
        assert found.admits((0, 1))
        assert found.admits((1, 1)) == admitted


def test_what_is_left_untouched_has_one_choice(tmp_path: Path) -> None:
    found = Search(made(tmp_path, bits=[4, 16], ranks=[2, 4]))
    assert list(zip(found.space.bits, found.space.ranks, strict=True)) == [(4, 2), (4, 4), (16, None)]


def test_a_width_that_a_format_cannot_hold_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="export: mlx"):
        Search(made(tmp_path, changes={"export": ["native", "mlx"], "rules": RANGED}, bits=[4]))


@pytest.mark.parametrize(
    ("format_", "bits", "refused"),
    [
        ("compressed-tensors", [2, 3, 4], "in a model of several grids"),
        ("compressed-tensors", [4], None),
        ("gptq", [4, 16], None),  # nothing but float layers is no model that is wanted
        ("gptq", [4, 8], "export: gptq"),
        ("awq", [4, 8], "export: awq"),
    ],
)
def test_several_widths_that_a_format_cannot_hold_are_refused_first(
    format_: str, bits: list[int], refused: str | None, tmp_path: Path
) -> None:
    rules = [{"match": "*", "grid": {"bits": 4, "group": 16, "zero": "integer"}}]
    used = made(tmp_path, changes={"export": ["native", format_], "rules": rules}, bits=bits)
    if refused is None:
        Search(used)
    else:
        with pytest.raises(UserError, match=refused):
            Search(used)


def test_windows_come_from_all_of_the_text(tmp_path: Path) -> None:
    """Of sensitivities and of trials: the first windows are of one article."""
    found = Search(made(tmp_path))
    for windows in (found.bench.windows(found.bench.held_out, 64), found.bench.windows(found.bench.rows, 64)):
        whole = trimtab.data.sequences.token_windows(
            found.bench.rows, found.bench.tokenizer, block_tokens=windows.shape[1]
        )
        at = [int((whole == window).all(1).nonzero()[0]) for window in windows]
        assert at == [i * len(whole) // len(windows) for i in range(len(windows))]
        assert at[-1] >= len(whole) // 2


def test_two_prunings_alike_are_two_models(tmp_path: Path) -> None:
    """Pruned on another processor from the same recipe, other channels may have been chosen."""
    used = pruned(made(tmp_path, changes={"prune": {"ratio": 0.2, "tokens": 64, "block_tokens": 32}}))
    Search(used)
    Search(used)
    folder = Path(used.model.path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1.0
    model.save_pretrained(folder)
    manifest.write_manifest(folder, "pruned")
    with pytest.raises(UserError, match=r"other values of: what model\.path holds;"):
        Search(used)


def test_overwriting_leaves_no_old_study_to_go_on_with(tmp_path: Path) -> None:
    """One in the output directory is removed; of one that lies elsewhere the user is told."""
    changes = {"train": {"steps": 1}, "evaluate": {"parity": False}}
    url = f"sqlite:///{tmp_path}/study.db"
    stages.run(made(tmp_path, changes=changes, trials=1, storage=url))
    again = made(tmp_path, changes=changes, trials=1, storage=url)
    with pytest.raises(UserError, match=r"sqlite:.*holds a study 'tiny', which --overwrite does not remove"):
        stages.run(again, overwrite=True)
    assert (tmp_path / "out" / "model").exists()
    stages.run(again.model_copy(update={"name": "another"}), overwrite=True)
    inside = made(tmp_path, changes=changes, trials=1, storage=str(tmp_path / "out" / "search" / "journal.log"))
    stages.run(inside, overwrite=True)
    stages.run(inside, overwrite=True)


def test_the_terminal_shows_the_front_and_what_is_left(tmp_path: Path) -> None:
    shown, lines = Terminal(), io.StringIO()
    shown.console = Console(file=lines, width=120, force_terminal=True, color_system=None, legacy_windows=False)
    found = workers.run(made(tmp_path, trials=2), shown.search)
    shown.searched(found)
    said = lines.getvalue()
    assert "5 trials done, 0 running, 0 failed; hypervolume" in said
    assert "about 0 min left" in said
    for point in found.front(found.ledger.trials()):
        assert f"{point.quality:.4f}" in said
    assert "sensitivities took 3 passes over 64 tokens" in said
    assert "\x1b[?25h" in said.rpartition("\x1b[?25l")[2]  # the cursor is back
    assert "trials were made" not in said
    more = Search(made(tmp_path, trials=20))
    assert more.unmade(found.ledger.trials()).startswith("2 of 20 trials were made")


def test_a_search_that_runs_out_of_configurations_says_so(tmp_path: Path) -> None:
    """Two layers and two widths: four configurations, two of them uniform."""
    found = workers.run(made(tmp_path, bits=[2, 4], trials=9))
    assert len(found.ledger.trials()) == 4
    assert found.unmade(found.ledger.trials()).startswith("2 of 9 trials were made: no other configuration")


def test_python_and_command_carry_out_the_same_stages(tmp_path: Path) -> None:
    used = made(tmp_path, changes={"train": {"steps": 1}, "evaluate": {"parity": False}}, trials=1)
    assert trimtab.run(used)["output"] == str(tmp_path / "out" / "model")
    with pytest.raises(UserError, match="stages before a run"):
        run(used)


def test_overwriting_removes_nothing_before_the_recipe_is_checked(tmp_path: Path) -> None:
    prune = {"ratio": 0.2, "multiple_of": 32, "tokens": 64, "block_tokens": 32}
    used = made(tmp_path, changes={"prune": prune, "train": {"steps": 1}, "evaluate": {"parity": False}}, trials=1)
    stages.run(used)
    kept = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*") if f.is_file()}
    assert used.prune is not None
    wrong = used.model_copy(update={"prune": used.prune.model_copy(update={"ratio": 30.0})})
    with pytest.raises(UserError, match="between 0 and 1"):
        stages.run(wrong, overwrite=True)
    with pytest.raises(UserError, match="pass one of them"):
        stages.run(used, overwrite=True, resume=True)
    missing = used.model_copy(update={"evaluate": used.evaluate.model_copy(update={"tasks": ("piqa",)})})
    with pytest.raises(UserError, match="tasks"):
        stages.run(missing.model_copy(update={"output": str(tmp_path / "new")}))
    assert not (tmp_path / "new" / "search").exists()
    other = used.model_copy(update={"model": used.model.model_copy(update={"dtype": "float32"})})
    with pytest.raises(UserError, match="dtype is 'float32', and was 'bfloat16'; remove it"):
        stages.search(other)
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").rglob("*") if f.is_file()} == kept
    (tmp_path / "out" / "search" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds mine\.txt, which trimtab did not write"):
        stages.run(used, overwrite=True)


def test_pruned_widths_are_whole_groups_of_the_rules(tmp_path: Path) -> None:
    """128 inputs of down in groups of 32, and heads of 16 that leave only whole groups to o."""
    changes = {"prune": {"ratio": 0.3, "multiple_of": 8, "tokens": 64, "block_tokens": 32}}
    after = pruned(made(tmp_path, changes=changes))
    config = AutoConfig.from_pretrained(after.model.path)
    assert config.intermediate_size % 32 == 0
    assert config.num_attention_heads * config.head_dim % 32 == 0
    assert pruned_already(made(tmp_path, changes=changes)).model == after.model


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
    metrics = stages.run(used)
    assert metrics["output"] == str(tmp_path / "out" / "model")
    served = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model")
    assert served.config.intermediate_size < 128
    with pytest.raises(UserError, match="not empty"):
        stages.run(used)
    assert used.prune is not None
    otherwise = used.model_copy(update={"prune": used.prune.model_copy(update={"ratio": 0.1})})
    with pytest.raises(UserError, match=r"on other text: options: ratio is 0\.1, and was 0\.2; remove it"):
        pruned(otherwise)
    assert used.data is not None
    for change in (
        {"limit": 3},
        {"holdout": 0.5},
        {"ignore": ("x",)},
        {"columns": {"text": "body"}},
        {"template": "alpaca"},
    ):
        with pytest.raises(UserError, match="on other text"):
            pruned(used.model_copy(update={"data": used.data.model_copy(update=change)}))
    held = Path(used.data.named).read_bytes()
    Path(used.data.named).write_bytes(held + held)
    with pytest.raises(UserError, match="on other text"):
        pruned(used)
    Path(used.data.named).write_bytes(held)
    assert pruned(used).prune is None
    left = tmp_path / "out" / "pruned"
    again = used.model_copy(update={"model": used.model.model_copy(update={"path": str(left)})})
    with pytest.raises(UserError, match=r"model\.path: .* is in the output directory"):
        stages.run(again, overwrite=True)
    assert (left / "config.json").exists()


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
