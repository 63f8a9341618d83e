"""It installs as it says: the wheel in an environment of its own without any extra, and the sdist, which tests itself.

The core dependencies take minutes to install, so they are kept beside the compiled kernels, in a folder that is named after
what was asked for. No environment of a test is in there: each has its own, which sees that folder's libraries.
"""

import hashlib
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path

import platformdirs
import pytest
import yaml
from filelock import FileLock

import tiny
import trimtab

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet")


def run(*command: object, path: Path | None = None, **options: object) -> str:
    """Runs a command that must succeed, without the PYTHONPATH of this process, and gives what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def libraries() -> Path:
    """A folder with the core dependencies, as `core`, and the builder, as `builder`; made once and kept."""
    core = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    constraints = ROOT / "constraints.txt"
    key = "\n".join([*core, constraints.read_text(), sys.version])
    kept = Path(os.environ.get("TRIMTAB_CACHE") or platformdirs.user_cache_path("trimtab", appauthor=False))
    folder = kept / f"core-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    kept.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not (folder / "complete").exists():
            # torch first and alone, as `make setup` does, so that the smallest build that fits is taken.
            torch = next(line for line in constraints.read_text().splitlines() if line.startswith("torch=="))
            run(sys.executable, "-m", "venv", "--clear", "--without-pip", folder / "core")
            install = (*PIP, "--python", folder / "core" / "bin" / "python", "install")
            run(*install, torch)
            run(*install, "-c", constraints, *core)
            run(*PIP, "install", "--target", folder / "builder", "hatchling>=1.27")
            (folder / "complete").touch()
    return folder


@pytest.fixture(scope="module")
def unpacked(libraries: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built and unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", folder, cwd=ROOT, path=libraries / "builder")
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def python(libraries: Path, unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with trimtab and its core dependencies: a wheel of the sdist, without extras."""
    folder = tmp_path_factory.mktemp("installed")
    builder = libraries / "builder"
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=unpacked, path=builder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "env")
    found, shared = (next(f.glob("lib/python*/site-packages")) for f in (folder / "env", libraries / "core"))
    (found / "core.pth").write_text(f"{shared}\n")
    here = folder / "env" / "bin" / "python"
    run(*PIP, "--python", here, "install", "--no-deps", "--no-index", wheel)
    run(*PIP, "--python", here, "check")
    return here


IN_PYTHON = """
import sys
import torch, transformers
import trimtab as tt

folder = sys.argv[1]
rules = [{"match": "*", "grid": {"bits": 4, "group": 32, "zero": "integer"}}]
model, tokenizer = tt.load(f"{folder}/model", tt.methods.LrQat(rank=4), rules)
tt.fold(model)
tt.save(model, f"{folder}/saved", tokenizer)
other = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/model", dtype=torch.bfloat16)
tt.prepare(other, tt.methods.LrQat(rank=4), rules)
again, _ = tt.load(f"{folder}/saved")
ids = torch.arange(32).unsqueeze(0)
with torch.no_grad():
    assert torch.equal(model(ids).logits, again(ids).logits)
"""


@pytest.fixture(scope="module")
def given(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, what the installed library makes of it, text, tasks, and recipes."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    run(python, "-c", IN_PYTHON, folder, cwd=folder)
    data = tiny.text(folder / "data.jsonl")
    (folder / "model.gguf").write_bytes(b"GGUF")
    tiny.jsonl(folder / "tasks.jsonl", {})
    of = {
        "tune": {},
        "to-gguf": {"export": ["native", "gguf"]},
        "to-vllm": {"export": ["native", "compressed-tensors"]},
        "asked": {"evaluate": {"tasks": ["piqa"], "tasks_data": str(folder)}},
        "searched": {"search": {"budget": "1MiB"}},
        "from-gguf": {"model": {"path": str(folder / "model.gguf")}},
    }
    for name, changes in of.items():
        values = tiny.recipe(folder / "model", data, folder / "out" / name, **changes)
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(values))
    return folder


WORKS = {
    "--help": "Usage",
    "--version": trimtab.__version__,
    "methods": "lr-qat",
    "formats": "native",
    "recipe --explain": "rank",
    "recipe": "model:",
    "plan tune.yaml": "total",
    "verify saved": "files are what was written",
    "chat saved --prompt hello --tokens 2": "\n",
}
"""Commands that need no extra, and a part of what they print."""

LACKS = {
    "run tune.yaml": "train",
    "run to-gguf.yaml": "gguf|train",
    "run to-vllm.yaml": "serve|train",
    "run asked.yaml": "eval",
    "run searched.yaml": "search",
    "run from-gguf.yaml": "gguf",
    "search searched.yaml": "search",
    "plan from-gguf.yaml": "gguf",
    "prune model --out pruned --ratio 0.3": "train",
    "eval saved --data data.jsonl": "eval",
    "harness saved --data .": "eval",
    "export saved --format gguf": "gguf",
    "export saved --format compressed-tensors": "serve",
    "chat model.gguf --prompt hello": "gguf",
    "parity saved --engine transformers --trained saved --data data.jsonl": "eval",
}
"""Commands that need an extra, and which of them the one line names."""


@pytest.mark.parametrize("command", WORKS)
def test_a_command_works(command: str, python: Path, given: Path) -> None:
    assert WORKS[command] in run(python, "-m", "trimtab", *command.split(), cwd=given)


def test_the_console_script(python: Path, given: Path) -> None:
    assert run(python.with_name("trimtab"), "methods", cwd=given) == run(python, "-m", "trimtab", "methods", cwd=given)


@pytest.mark.parametrize("command", LACKS)
def test_a_command_names_what_it_lacks(command: str, python: Path, given: Path) -> None:
    """In one line, with exit status 2, and nothing is written."""
    before = sorted(given.rglob("*"))
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    whole = [str(python), "-m", "trimtab", *command.split()]
    done = subprocess.run(whole, cwd=given, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert re.search(rf"pip install .*'trimtab\[([a-z]+,)*({LACKS[command]})(,[a-z]+)*\]'", line), line
    verb, *words = command.split()
    began = f"planning {words[0]}\n" if verb == "plan" else ""  # it takes seconds, so it says that it began
    assert done.stdout == began
    assert sorted(given.rglob("*")) == before


def test_the_sdist_is_whole(unpacked: Path) -> None:
    """All of a checkout but what only its history and its server need."""
    if not (ROOT / ".git").exists():
        pytest.skip("no checkout to compare with")
    tracked = set(run("git", "ls-files", cwd=ROOT).splitlines())
    packed = {file.relative_to(unpacked).as_posix() for file in unpacked.rglob("*") if file.is_file()}
    assert {name for name in tracked - packed if not name.startswith(".")} == set()
    assert packed - tracked <= {"PKG-INFO"}


def test_the_sdist_tests_itself(unpacked: Path) -> None:
    some = ["tests/test_structure.py", "tests/quant/test_packing.py", "tests/recipe", "tests/formats/test_stored.py"]
    quick = ["-k", "not import_is and not light_import", "-p", "no:cacheprovider"]
    said = run(sys.executable, "-m", "pytest", *some, *quick, cwd=unpacked, path=unpacked / "src")
    assert "passed" in said or "100%" in said
