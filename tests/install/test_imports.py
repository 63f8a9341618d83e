"""What may be imported where: without the extras, without Unix's own modules, and what `--help` costs."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from trimtab import extras
from trimtab.errors import UserError

TESTS = Path(__file__).parents[1]

# These import a library of an extra when they are themselves imported; `extras.require` stands before each of them.
NEED_AN_EXTRA = {
    "trimtab.bit_search.bench",
    "trimtab.bit_search.figures",
    "trimtab.bit_search.held_out",
    "trimtab.bit_search.ledger",
    "trimtab.bit_search.mark",
    "trimtab.bit_search.objective",
    "trimtab.bit_search.ray_engine",
    "trimtab.bit_search.results",
    "trimtab.bit_search.searching",
    "trimtab.bit_search.standing",
    "trimtab.bit_search.storage",
    "trimtab.bit_search.workers",
    "trimtab.evaluation.engine_llama_cpp",
    "trimtab.evaluation.engine_mlx",
    "trimtab.formats.gguf.header",
    "trimtab.formats.gguf.read",
    "trimtab.formats.gguf.read_blocks",
    "trimtab.formats.gguf.write",
    "trimtab.training.grpo",
    "trimtab.training.preference_trainers",
    "trimtab.training.trainer",
}
IMPORT_ALL = """
import importlib, json, pkgutil, sys
{before}
import trimtab
failed = []
for module in pkgutil.walk_packages(trimtab.__path__, "trimtab."):
    try:
        importlib.import_module(module.name)
    except ImportError:
        failed.append(module.name)
{after}
print(json.dumps(failed))
"""
NO_EXTRAS = "sys.modules.update(dict.fromkeys({missing}))"
# A system without these modules, as trimtab sees it: other libraries on this one may need them.
NO_UNIX = """
import builtins
import torch, transformers
from transformers.models.llama import modeling_llama

importing, reads = builtins.__import__, []

def import_here(name, globals=None, *rest, **more):
    if name.partition(".")[0] in ("fcntl", "resource", "pwd", "grp") and is_ours((globals or {}).get("__name__")):
        raise ModuleNotFoundError(f"no {name} on this system")
    return importing(name, globals, *rest, **more)

def is_ours(module):
    return str(module).partition(".")[0] == "trimtab"

def watch(event, about):
    if event == "open" and str(about[0]).startswith("/proc"):
        frame = sys._getframe(1)
        while frame is not None and frame.f_globals.get("__name__") in ("io", "os", "pathlib", "codecs"):
            frame = frame.f_back
        if frame is not None and is_ours(frame.f_globals.get("__name__")):
            reads.append((str(about[0]), frame.f_globals["__name__"]))

builtins.__import__ = import_here
sys.addaudithook(watch)
"""
ROUND_TRIP = """
assert reads == [], reads
sys.platform = "win32"
import pathlib, warnings
import tiny
from trimtab.kernels import cpu
from trimtab.memory import process

warnings.simplefilter("error")
assert cpu.library() is None
folder = pathlib.Path(sys.argv[1])
tiny.model(folder / "model")
model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.bfloat16)
model = trimtab.prepare(model, trimtab.methods.LrQat(rank=4), tiny.RULES)
trimtab.fold(model)
trimtab.save(model, folder / "saved", tiny.tokenizer())
again, _ = trimtab.load(str(folder / "saved"))
ids = torch.arange(32).unsqueeze(0)
with torch.no_grad():
    assert torch.equal(model.eval()(ids).logits, again(ids).logits)
"""


def failures(before: str, after: str = "", *arguments: str) -> set[str]:
    """Modules of trimtab that cannot be imported in a fresh process that `before` has prepared."""
    script = IMPORT_ALL.format(before=before, after=after)
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_without_the_extras() -> None:
    missing = sorted({library for libraries in extras.LIBRARIES.values() for library in libraries})
    # What they bring along, and what no extra names.
    others = ["pyarrow", "bitsandbytes", "pandas", "sqlalchemy", "llama_cpp", "mlx"]
    assert failures(NO_EXTRAS.format(missing=[*missing, *others])) == NEED_AN_EXTRA


def test_without_unix(tmp_path: Path) -> None:
    """No module reads /proc when it is imported, and a model goes through on the torch references."""
    engines = {"trimtab.evaluation.engine_llama_cpp", "trimtab.evaluation.engine_mlx"}
    assert failures(NO_UNIX, ROUND_TRIP, str(tmp_path)) <= engines


def test_help_is_quick() -> None:
    """Processor time, since this machine may be at work on something else; the best of three."""

    def seconds(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    started = min(seconds("-c", "pass") for _ in range(3))
    assert min(seconds("-m", "trimtab", "--help") for _ in range(3)) - started < 2


@pytest.mark.parametrize("arguments", [("--help",), ("run", "--help"), ("--version",)])
def test_help_imports_no_torch(arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", "trimtab", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time")}
    assert "trimtab.cli" in loaded
    assert not loaded & {"torch", "transformers", "numpy"}


def test_one_line_names_the_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("trl", "gguf", "datasets"):
        monkeypatch.setitem(sys.modules, library, None)
    extras.require("nothing", "search")
    extras.require_library("nothing", "optuna")
    with pytest.raises(UserError) as caught:
        extras.require("this recipe", "train", "gguf", "search")
    line = "this recipe needs trl, datasets, gguf, not installed here: pip install 'trimtab[train,gguf]'"
    assert str(caught.value) == line
    with pytest.raises(UserError) as caught:
        extras.require_library("reading a.jsonl", "datasets")
    either = "'trimtab[train]' or 'trimtab[eval]'"
    assert str(caught.value) == f"reading a.jsonl needs datasets, not installed here: pip install {either}"
