"""No code of a model, of the current folder or of another user is run."""

import ast
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import tiny
import trimtab
from trimtab.errors import UserError
from trimtab.evaluation.parity import reloaded_logits
from trimtab.formats.manifest import write_manifest
from trimtab.pipeline import starting
from trimtab.pipeline.run import Quiet, run
from trimtab.recipe.recipe import from_dict
from trimtab.training.trainer import Step

SOURCES = sorted(Path(trimtab.__file__).parent.rglob("*.py"))


def asks(tree: ast.AST) -> list[int]:
    """Lines that have transformers read a folder without refusing the code in it."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    read = [
        c for c in calls if c.func.attr == "from_pretrained" and ast.unparse(c.func.value).startswith(("Auto", "kind"))
    ]  # type: ignore[attr-defined]
    return [c.lineno for c in read if "trust_remote_code=False" not in ast.unparse(c)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_a_folder_is_never_trusted(path: Path) -> None:
    assert asks(ast.parse(path.read_text())) == []


def test_a_call_that_trusts_is_found() -> None:
    assert asks(ast.parse("AutoConfig.from_pretrained(a)\nAutoConfig.from_pretrained(a, trust_remote_code=False)")) == [
        1
    ]


def unpickles(tree: ast.AST) -> list[int]:
    """Lines that read what was pickled, without `weights_only`, or may."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    read = [
        c for c in calls if ast.unparse(c.func) in ("pickle.load", "pickle.loads", "pickle.Unpickler", "torch.load")
    ]
    loose = [c.lineno for c in read if "weights_only=True" not in ast.unparse(c)]
    return loose + [c.lineno for c in calls if "allow_pickle" in ast.unparse(c)]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.name)
def test_no_pickle_is_read(path: Path) -> None:
    """But for what processes of one training tell each other."""
    found = unpickles(ast.parse(path.read_text()))
    assert len(found) == (path.name == "processes.py"), found


def test_a_pickle_that_is_read_is_found() -> None:
    source = "torch.load(f)\ntorch.load(f, weights_only=True)\npickle.load(f)\nnp.load(f, allow_pickle=True)"
    assert sorted(unpickles(ast.parse(source))) == [1, 3, 4]


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.mark), "w")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_checkpoint_of_an_enemy_runs_nothing(given: Path, tmp_path: Path, name: str) -> None:
    """Although its manifest is right."""
    train = {"steps": 4, "save_steps": 2}
    values = tiny.recipe(given / "model", given / "data.jsonl", tmp_path / "out", train=train, data={"eval_path": None})
    with pytest.raises(KeyboardInterrupt):
        run(from_dict(values), show=Stops())
    (checkpoint,) = (tmp_path / "out.unfinished" / "checkpoints").glob("checkpoint-*")
    torch.save(Bomb(tmp_path / "ran"), checkpoint / name)
    write_manifest(checkpoint, "checkpoint")
    with pytest.raises((UserError, pickle.UnpicklingError)):
        run(from_dict(values), resume=True)
    assert not (tmp_path / "ran").exists()
    torch.load(checkpoint / name, weights_only=False).close()
    assert (tmp_path / "ran").exists(), "it would have"


class Stops(Quiet):
    """After three steps."""

    def step(self, step: Step) -> None:
        if step.step == 3:
            raise KeyboardInterrupt


def test_code_beside_a_model_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does transformers ask at the terminal whether it may."""
    tiny.model(tmp_path)
    mark = tmp_path / "ran"
    (tmp_path / "foreign.py").write_text(f"open({str(mark)!r}, 'w')\n")
    config = json.loads((tmp_path / "config.json").read_text())
    foreign = {"AutoConfig": "foreign.C", "AutoModelForCausalLM": "foreign.M", "AutoTokenizer": ["foreign.T", None]}
    config |= {"auto_map": foreign, "model_type": "foreign"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    with pytest.raises(UserError, match=r"config\.json"):
        trimtab.load(str(tmp_path), dtype=torch.float32)
    assert not mark.exists()


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module that Python would take for its own."""
    for module in ("types", "typing", "json"):
        (tmp_path / f"{module}.py").write_text("open('ran', 'w')\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_fresh_process_reads_no_modules_of_the_current_folder(foreign: Path) -> None:
    model = tiny.model(foreign / "model")
    assert reloaded_logits(model, torch.arange(8).view(1, 8), torch.float32).shape[:2] == (1, 8)
    assert not (foreign / "ran").exists()


def test_nor_do_processes_that_train_together(foreign: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[list[str]] = []
    tiny.text(foreign / "data.jsonl")
    values = tiny.recipe(foreign / "model", foreign / "data.jsonl", foreign / "out", train={"processes": 2})
    (foreign / "recipe.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setattr(starting, "_start", lambda count, arguments: started.append(arguments))
    starting.started("recipe.yaml", [], [])
    (arguments,) = started
    done = subprocess.run([sys.executable, *arguments[:3], "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not (foreign / "ran").exists()
