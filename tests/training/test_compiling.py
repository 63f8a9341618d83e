"""`train.compile`: the same training, through a compiler."""

import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTTrainer

import tiny
from trimtab import fold
from trimtab.errors import UserError
from trimtab.models.load import load
from trimtab.recipe.recipe import from_dict
from trimtab.training.compiling import CompilationFailed, Compiling, pays
from trimtab.training.trainer import CHECKPOINT, Step, Trained, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
CLOSE = 2e-3
"""Of losses in bfloat16, whose sums a compiler takes in another order."""


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a compiler but its last part, which takes most of the time."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


def trained(given: Path, output: Path, resume: bool = False, stop: int | None = None, **changes: Any) -> Trained:
    changes["train"] = {"compile": True, **changes.get("train", {})}
    recipe = from_dict(tiny.recipe(given / "model", given / "data.jsonl", output, **changes))
    torch.manual_seed(0)  # of the adapters' start
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)

    def on_step(step: Step) -> None:
        if step.step == stop:
            raise KeyboardInterrupt

    found = fit(model, tokenizer, recipe, resume=resume, on_step=on_step)
    assert all("forward" not in vars(layer) for layer in model.model.layers), "the layers are as they were"
    assert {layer.kind for layer in fold(model)} == {"bitwise"}
    return found


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.slow
def test_a_compiled_training_is_the_same_training(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    eager = trained(given, tmp_path / "eager", train={"compile": False})
    assert not graphs()
    compiled = trained(given, tmp_path / "compiled")
    assert compiled.losses == pytest.approx(eager.losses, rel=CLOSE)
    assert graphs() == 1, "equal layers share a graph"
    assert list((tmp_path / "cache" / "compiled").iterdir()), "what was compiled is kept there"


@pytest.mark.usefixtures("quick")
def test_a_resumed_training_goes_on_as_it_would_have(given: Path, tmp_path: Path) -> None:
    whole = trained(given, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(given, tmp_path / "stopped", stop=4)
    torch._dynamo.reset()
    assert trained(given, tmp_path / "stopped", resume=True).losses == whole.losses
    one, other = (load_file(tmp_path / n / "checkpoints" / "checkpoint-6" / CHECKPOINT) for n in ("whole", "stopped"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


SETTINGS: dict[str, dict[str, Any]] = {
    "no checkpointing": {"train": {"activation_checkpointing": False}},
    "rows of many lengths": {"data": {"packing": "none", "block_tokens": 48}, "train": {"batch_tokens": 192}},
    "packed rows": {"data": {"packing": "bfd", "block_tokens": 64}},
    "distilled": {"distill": {"weight": 0.5, "teacher": "bfloat16"}},
    "evaluated": {"train": {"evaluate_steps": 2}},
    "rounded inputs": {"activations": {"bits": 8}, "kv": {"bits": 8}},
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_trains_the_same_compiled(name: str, given: Path, tmp_path: Path) -> None:
    changes = SETTINGS[name]
    losses = []
    for compile in (False, True):
        train = {"steps": 3, "compile": compile, **changes.get("train", {})}
        losses.append(trained(given, tmp_path / str(compile), **{**changes, "train": train}).losses)
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE)
    assert 1 <= graphs() <= 2, "with and without a mask"


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_train_the_same_compiled(objective: str, given: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt": f"{i} plus {i}?", "chosen": f"It is {2 * i}.", "rejected": "No."}
        if objective == "dpo"
        else {"prompt": f"{i} plus {i}?", "completion": f"It is {2 * i}.", "label": bool(i % 2)}
        for i in range(1, 13)
    ]
    path = tiny.jsonl(tmp_path / "pairs.jsonl", *rows)
    losses = []
    for compile in (False, True):
        train = {"steps": 2, "compile": compile, "objective": objective}
        data = {"path": str(path), "eval_path": None, "block_tokens": 64}
        losses.append(trained(given, tmp_path / str(compile), train=train, data=data).losses)
    assert losses[1] == pytest.approx(losses[0], rel=CLOSE)
    assert graphs()


def test_what_cannot_be_compiled_warns_once_and_trains_on(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = trained(given, tmp_path / "eager", train={"compile": False})

    def backend(*_: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.warns(UserWarning, match="could not be compiled .*no such instruction") as told:
        compiled = trained(given, tmp_path / "compiled")
    assert len([w for w in told if "train.compile" in str(w.message)]) == 1
    assert (compiled.losses, compiled.tokens) == (eager.losses, eager.tokens)
    assert not [f for f in warnings.filters if ".grad attribute" in str(f[1])], "the process is as it was"


def test_what_fails_in_backward_is_not_made_again(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients would be added twice."""
    step = SFTTrainer.training_step

    def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
        step(self, *args, **kwargs)
        raise CompilationFailed("no such instruction")

    monkeypatch.setattr(SFTTrainer, "training_step", fails)
    monkeypatch.setattr(Compiling, "__enter__", lambda self: setattr(self, "active", True) or self)
    with pytest.raises(UserError, match=r"in backward .*no such instruction.*train.compile: false"):
        trained(given, tmp_path / "run")


def test_without_a_compiler_it_warns_once(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.warns(UserWarning, match="no C\\+\\+ compiler \\(no-such-compiler\\)"):
        trained(given, tmp_path / "run", train={"steps": 1})
    assert not graphs()


@pytest.mark.usefixtures("quick")
def test_dynamos_limit_is_never_passed_without_a_word(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure = Compiling._configure

    def few(self: Compiling, kinds: int) -> None:
        configure(self, kinds)
        self._dynamic = False
        self._settings.enter_context(torch._dynamo.config.patch(recompile_limit=1))

    monkeypatch.setattr(Compiling, "_configure", few)
    with pytest.warns(UserWarning, match="train.compile: a layer could not be compiled"):
        trained(given, tmp_path / "run", train={"steps": 3}, data={"packing": "none", "block_tokens": 64})


def test_auto_compiles_where_it_pays() -> None:
    config = LlamaConfig(hidden_size=576, intermediate_size=1536, num_hidden_layers=30, vocab_size=64)
    with torch.device("meta"):
        layers = list(LlamaForCausalLM(config).model.layers)

    def says(method: str, steps: int, kinds: int) -> bool:
        values = {"model": {"path": "x"}, "method": {"name": method}, "data": {"path": "x"}, "train": {"steps": steps}}
        return pays(from_dict(values), layers, kinds, "cpu")

    assert [says("q-bara", steps, 1) for steps in (1, 1000)] == [False, True]
    assert not says("q-bara", 1000, 1000), "a thousand kinds of layers"
    assert not any(says(method, 1000, 1) for method in ("lr-qat", "qat")), "which round in each step"


def test_auto_leaves_a_short_training_alone(given: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trained(given, tmp_path / "run", train={"steps": 1, "compile": "auto"})
    assert not graphs()
