"""While a model trains: held-out loss, the best model, early stopping, a stop by Ctrl-C."""

import json
import math
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import tiny
from trimtab import cli
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.errors import UserError
from trimtab.evaluation import perplexity as measuring
from trimtab.models.load import load, load_float
from trimtab.pipeline import measuring as measured_by
from trimtab.pipeline import run as running
from trimtab.pipeline.run import Quiet, run
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training.checkpoints import CHECKPOINT
from trimtab.training.held_out import HeldOut, held_out
from trimtab.training.interrupt import Interrupted
from trimtab.training.loss import IGNORED
from trimtab.training.trainer import Step, Trained, fit


@pytest.fixture(autouse=True)
def listening() -> Iterator[None]:
    """Ctrl-C as a terminal sends it: what a shell starts in the background is told to ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, data, `data.jsonl`, and held-out text, `held.jsonl`."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    tiny.jsonl(folder / "held.jsonl", *({"text": f"{i} and {i} make {2 * i}, so they say."} for i in range(50, 60)))
    return folder


def values(given: Path, output: Path, **changes: Any) -> dict[str, Any]:
    defaults: dict[str, Any] = {
        "data": {"eval_path": str(given / "held.jsonl"), "eval_tokens": 200},
        "train": {"evaluate_steps": 2},
        "evaluate": {"parity": False},
    }
    merged = {k: {**v, **changes.get(k, {})} if isinstance(v, dict) else v for k, v in defaults.items()}
    return tiny.recipe(given / "model", given / "data.jsonl", output, **{**changes, **merged})


def unfinished(output: Path) -> Path:
    return output.with_name(f"{output.name}.unfinished")


class Watches(Quiet):
    """Remembers what was said, and the steps."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.steps: list[Step] = []

    def say(self, text: str) -> None:
        self.said.append(text)

    def step(self, step: Step) -> None:
        self.steps.append(step)


# ---- what is measured ---------------------------------------------------------------------------------------------


def test_loss_of_text_is_the_logarithm_of_perplexity(given: Path, tmp_path: Path) -> None:
    model, tokenizer = load_float(str(given / "model"), dtype=torch.float32), tiny.tokenizer()
    recipe = from_dict(values(given, tmp_path / "run"))
    rows = load_rows(str(given / "held.jsonl"))
    windows = token_windows(rows, tokenizer, block_tokens=32, limit_tokens=200)
    found = held_out(recipe, tokenizer, rows, 260)
    assert found.tokens == windows.shape[0] * 31
    for at_once in (1, 64, 1000):
        model.train()
        loss = found.loss(model, at_once)
        assert model.training
        assert loss == pytest.approx(math.log(measuring.perplexity(model, windows)), abs=1e-6)


def test_loss_of_answers_counts_their_tokens_alone(given: Path, tmp_path: Path) -> None:
    """Against a loop over rows one by one: rows of many lengths, some cut, padded together; a mean of means is another."""
    model, tokenizer = load_float(str(given / "model"), dtype=torch.float32), tiny.tokenizer()
    rows = [{"prompt": "a" * (3 * i + 1), "completion": " is " + "b" * (i**2 % 17)} for i in range(12)]
    held = tiny.jsonl(tmp_path / "held.jsonl", *rows)
    recipe = from_dict(values(given, tmp_path / "run", data={"eval_path": str(held), "eval_tokens": None}))
    total = count = 0.0
    for row in rows:
        prompt, answer = (tokenizer(row[k])["input_ids"] for k in ("prompt", "completion"))
        ids = torch.tensor([*prompt, *answer, tiny.EOS])[:32]
        if len(ids) > len(prompt):
            nll = F.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total, count = total + nll[len(prompt) - 1 :].sum().item(), count + len(ids) - len(prompt)
    found = held_out(recipe, tokenizer, load_rows(str(held)), 260)
    assert found.tokens == count
    assert found.loss(model, 64) == pytest.approx(total / count, rel=1e-5)
    assert found.loss(model, 1) == pytest.approx(total / count, rel=1e-5)


def test_padding_counts_for_nothing(given: Path) -> None:
    """A sequence is measured alike alone and beside a longer one."""
    model = load_float(str(given / "model"), dtype=torch.float32)
    short, long = torch.arange(5, 12), torch.arange(20, 50)
    one = HeldOut([(short, short)])
    nothing = torch.full_like(long, IGNORED)
    both = HeldOut([(long, nothing), (short, short)])
    assert both.tokens == one.tokens == 6
    assert both.loss(model, 1000) == pytest.approx(one.loss(model, 1000), rel=1e-5)


def test_a_family_that_is_not_described_is_measured_by_several_processes(
    given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its head does is found out by running it, and that is not what stands in its place while the loss is made."""
    model, ids = load_float(str(given / "model"), dtype=torch.float32), torch.arange(20, 50)
    one = HeldOut([(ids, ids)]).loss(model, 64)
    monkeypatch.setattr(
        "trimtab.models.head.architecture_of", lambda model: SimpleNamespace(known=False, logit_factors=())
    )
    monkeypatch.setattr("trimtab.models.through.processes.count", lambda: 2)
    assert HeldOut([(ids, ids)]).loss(model, 64) == pytest.approx(one, rel=1e-6)
    monkeypatch.setattr("trimtab.training.held_out.Head.fits", lambda model: False)
    assert HeldOut([(ids, ids)]).loss(model, 64) == pytest.approx(one, rel=1e-6)


# ---- the best model -------------------------------------------------------------------------------------------------


class Given(HeldOut):
    """Losses as a test wants them, one after the other."""

    def __new__(cls, *losses: float) -> "Given":
        return super().__new__(cls)

    def __init__(self, *losses: float) -> None:
        super().__init__([(torch.arange(9), torch.arange(9))])
        object.__setattr__(self, "left", list(losses))

    def loss(self, model: Any, tokens_at_once: int) -> float:
        return float(self.left.pop(0))  # type: ignore[attr-defined]


def fitted(recipe: Recipe, losses: HeldOut, **options: Any) -> tuple[Trained, dict[str, torch.Tensor], list[str]]:
    """Trained as a run does, its trainable tensors after it, and what was said."""
    said: list[str] = []
    torch.manual_seed(0)
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)
    done = fit(model, tokenizer, recipe, held_out=losses, say=said.append, **options)
    return done, {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}, said


def saved(recipe: Recipe, folder: str) -> dict[str, torch.Tensor]:
    return load_file(recipe.out / "checkpoints" / folder / CHECKPOINT)


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_best_is_kept_and_given_back(given: Path, tmp_path: Path) -> None:
    """Measured before the first step, every second one, and after the last, which is none of these."""
    recipe = from_dict(
        values(given, tmp_path / "run", train={"steps": 5, "save_steps": 2, "keep_checkpoints": 3, "evaluate_steps": 2})
    )
    done, left, said = fitted(recipe, Given(3.0, 2.0, 2.5, math.nan))
    assert done.held_out is not None
    assert done.held_out.steps == [0, 2, 4, 5]
    assert done.held_out.losses[:3] == [3.0, 2.0, 2.5]
    assert (done.held_out.best_step, done.held_out.best_loss, done.held_out.stopped_early) == (2, 2.0, False)
    assert same(left, saved(recipe, "best"))
    assert same(left, saved(recipe, "checkpoint-2"))
    assert not same(left, saved(recipe, "checkpoint-5"))
    assert said[0] == "held-out loss 3.000 after step 0, on 8 tokens"
    assert said[-1] == "the model of step 2 is kept: its held-out loss, 2.000, is the lowest; after step 5 it was nan"


def test_training_that_does_harm_is_undone(given: Path, tmp_path: Path) -> None:
    recipe = from_dict(values(given, tmp_path / "run", train={"steps": 2, "evaluate_steps": 1}))
    done, left, _ = fitted(recipe, Given(1.0, 2.0, 3.0))
    assert done.held_out is not None
    assert done.held_out.best_step == 0
    assert all((tensor == 0).all() for name, tensor in left.items() if name.endswith("delta.B"))


def test_the_last_is_best(given: Path, tmp_path: Path) -> None:
    recipe = from_dict(values(given, tmp_path / "run", train={"steps": 2, "evaluate_steps": 5}))
    done, left, said = fitted(recipe, Given(3.0, 2.0))
    assert done.held_out is not None
    assert (done.held_out.steps, done.held_out.best_step) == ([0, 2], 2)
    assert same(left, saved(recipe, "checkpoint-2"))
    assert len(said) == 1


def test_early_stop(given: Path, tmp_path: Path) -> None:
    """Two measurements without a lower loss end it; going on changes nothing, with more patience it goes on."""
    changes: dict[str, Any] = {"steps": 9, "evaluate_steps": 1, "early_stop": 2, "save_steps": 100}
    recipe = from_dict(values(given, tmp_path / "run", train=changes))
    done, left, said = fitted(recipe, Given(3.0, 2.0, 2.5, 2.0, 1.0))
    assert done.held_out is not None
    assert (done.steps, done.held_out.best_step, done.held_out.stopped_early) == (3, 1, True)
    assert said[-2] == (
        "stopping after step 3: in 2 evaluations the held-out loss has not fallen below 2.000, that of step 1 "
        "(train.early_stop: 2)"
    )
    again, left_again, _ = fitted(recipe, Given(), resume=True)
    assert (again.steps, again.losses, again.held_out) == (3, done.losses, done.held_out)
    assert same(left, left_again)
    patient = from_dict(values(given, tmp_path / "run", train={**changes, "early_stop": 3, "steps": 5}))
    more, _, _ = fitted(patient, Given(1.5, 1.75), resume=True)
    assert more.held_out is not None
    assert (more.held_out.steps, more.held_out.best_step) == ([0, 1, 2, 3, 4, 5], 4)


def test_a_run_shows_and_reports_it(given: Path, tmp_path: Path) -> None:
    """What is saved is the best: its perplexity is that of the lowest loss."""
    watch, out = Watches(), tmp_path / "run"
    train = {"steps": 4, "evaluate_steps": 2, "lr": 1e-2, "log_steps": 3, "warmup": 0}
    metrics = run(from_dict(values(given, out, train=train, model={"dtype": "float32"})), show=watch)
    assert [(s.step, s.held_out is None) for s in watch.steps] == [(2, False), (3, True), (4, False)]
    found = json.loads((out / "metrics.json").read_text())["held_out"]
    assert found == metrics["held_out"]
    assert found["steps"] == [0, 2, 4]
    assert [s.held_out for s in watch.steps if s.held_out is not None] == found["losses"][1:]
    assert metrics["perplexity"]["tuned"] == pytest.approx(math.exp(found["best_loss"]), rel=1e-4)
    assert found["best_loss"] == min(found["losses"])
    assert (out / "checkpoints" / "best" / CHECKPOINT).is_file()
    finished = (out / "checkpoints" / "best" / CHECKPOINT).read_bytes()
    longer = from_dict(values(given, out, train={**train, "steps": 8}, model={"dtype": "float32"}))
    with pytest.raises(
        Interrupted
    ):  # it begins with links to the files of the finished run, which it leaves as they are
        run(longer, resume=True, show=PressesCtrlC(6))
    assert (out / "checkpoints" / "best" / CHECKPOINT).read_bytes() == finished
    assert (unfinished(out) / "checkpoints" / "best" / CHECKPOINT).read_bytes() != finished


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"train": {"evaluate_steps": 2}, "data": {"eval_path": None}}, "train.evaluate_steps: .*set data.eval_path"),
        ({"train": {"early_stop": 2, "evaluate_steps": None}}, "train.early_stop: .*set train.evaluate_steps"),
    ],
)
def test_what_needs_what(given: Path, tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        from_dict(values(given, tmp_path / "run", **changes))


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


class PressesCtrlC(Watches):
    """Presses it in a step, as often as told; what a signal does happens at once in the thread that raised it."""

    def __init__(self, after: int, times: int = 1) -> None:
        super().__init__()
        self.after, self.times = after, times

    def step(self, step: Step) -> None:
        super().step(step)
        if step.step == self.after:
            for _ in range(self.times):
                signal.raise_signal(signal.SIGINT)


def test_ctrl_c_finishes_the_step_and_saves_it(given: Path, tmp_path: Path) -> None:
    """And what continues from there is what would have been without it, measurements included."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    train = {"steps": 6, "save_steps": 100, "evaluate_steps": 2}
    metrics = run(from_dict(values(given, straight, train=train)))
    recipe, watch = from_dict(values(given, stopped, train=train)), PressesCtrlC(3)
    with pytest.raises(Interrupted, match="stopped after step 4 of 6"):
        run(recipe, show=watch)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert watch.said[-1] == "Ctrl-C: finishing step 4, then saving; once more to stop at once"
    kept = unfinished(stopped) / "checkpoints"
    assert sorted(f.name for f in kept.iterdir()) == ["best", "checkpoint-4"]
    resumed = run(recipe, resume=True)
    assert resumed["losses"] == metrics["losses"]
    assert resumed["held_out"] == metrics["held_out"]
    for name in ("model.safetensors", f"checkpoints/checkpoint-6/{CHECKPOINT}"):
        assert same(load_file(stopped / name), load_file(straight / name))


def test_ctrl_c_twice_stops_at_once(given: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train = {"steps": 6, "save_steps": 2, "evaluate_steps": None}
    with pytest.raises(KeyboardInterrupt) as stopped:
        run(from_dict(values(given, out, train=train)), show=PressesCtrlC(3, times=2))
    assert not isinstance(stopped.value, Interrupted)
    assert [f.name for f in (unfinished(out) / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_somebodys_own_stays(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pressed: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
    try:
        out = tmp_path / "run"
        train = {"steps": 2, "evaluate_steps": None}
        assert len(run(from_dict(values(given, out, train=train)), show=PressesCtrlC(1))["losses"]) == 2
        assert pressed == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, before)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["trimtab", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


def test_the_command_says_what_goes_on(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line and 130, no traceback; the command that it names goes on."""
    recipe = tiny.write(tmp_path / "the recipe.yaml", values(given, tmp_path / "run", train={"evaluate_steps": None}))
    with monkeypatch.context() as patch:
        patch.setattr("trimtab.report.terminal.Terminal.step", lambda self, step: PressesCtrlC(2).step(step))
        assert command(patch, "run", recipe, "train.steps=4") == 130
    found = capsys.readouterr()
    last = unfinished(tmp_path / "run") / "checkpoints" / "checkpoint-3"
    line = f"stopped after step 3 of 4: {last} is kept. Continue with: trimtab run '{recipe}' train.steps=4 --resume"
    assert found.out.splitlines()[-1] == line
    assert "Traceback" not in found.out + found.err
    assert command(monkeypatch, "run", recipe, "train.steps=4", "--resume") == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()


def test_the_command_says_that_nothing_was_kept(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny.write(tmp_path / "recipe.yaml", values(given, tmp_path / "run"))
    monkeypatch.setattr(running, "build", lambda *_: signal.raise_signal(signal.SIGINT))
    assert command(monkeypatch, "run", recipe) == 130
    line = "stopped, and nothing was trained yet that could be kept: the same command begins again"
    assert capsys.readouterr().out.splitlines()[-1] == line
    assert not unfinished(tmp_path / "run").exists()


# ---- what is measured before training -------------------------------------------------------------------------------


def test_going_on_measures_no_baseline_again(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a finished run that is trained further; another text to measure on is another measurement."""
    straight, out = tmp_path / "straight", tmp_path / "run"
    asked = {"evaluate": {"parity": False, "baselines": ["float", "rounded"], "prompt": "1 plus 2", "answer_tokens": 4}}
    changes = {**asked, "train": {"steps": 4, "evaluate_steps": None}}

    def wanted(folder: Path, **more: Any) -> dict[str, Any]:
        made = values(given, folder, **changes)
        made["evaluate"] = asked["evaluate"]
        return {key: {**v, **more.get(key, {})} if isinstance(v, dict) else v for key, v in made.items()}

    metrics = run(from_dict(wanted(straight)))
    recipe = from_dict(wanted(out))
    with pytest.raises(Interrupted):
        run(recipe, show=PressesCtrlC(2))
    measured: list[str] = []
    real = measured_by.perplexity

    def perplexity(model: Any, windows: Any) -> float:
        measured.append(type(model).__name__)
        return real(model, windows)

    def no_float(*_: Any, **__: Any) -> None:
        raise AssertionError("the float model is loaded again")

    monkeypatch.setattr(measured_by, "perplexity", perplexity)
    with monkeypatch.context() as patch:
        patch.setattr(measured_by, "load_float", no_float)
        resumed = run(recipe, resume=True)
        assert len(measured) == 1  # of what was saved
        assert resumed["perplexity"] == metrics["perplexity"]
        assert resumed["answers"] == metrics["answers"]
        longer = run(from_dict(wanted(out, train={"steps": 5})), resume=True)
        assert longer["perplexity"]["rounded"] == metrics["perplexity"]["rounded"]
        assert len(measured) == 2
    other = run(from_dict(wanted(out, train={"steps": 5}, data={"eval_tokens": 64})), resume=True)
    assert len(measured) == 5
    assert other["perplexity"]["float"] != metrics["perplexity"]["float"]


def test_what_was_best_on_another_text_is_compared_with_no_more(given: Path, tmp_path: Path) -> None:
    """It may have been easier: then no later model would be kept."""
    train = {"steps": 4, "save_steps": 2, "evaluate_steps": 2}
    run(from_dict(values(given, tmp_path / "run", train=train)))
    changes: dict[str, Any] = {"train": {**train, "steps": 8}, "data": {"eval_tokens": 120}}
    found = run(from_dict(values(given, tmp_path / "run", **changes)), resume=True)["held_out"]
    assert found["steps"] == [4, 6, 8], "what was measured before is not mixed in"
    assert found["best_loss"] == min(found["losses"])
