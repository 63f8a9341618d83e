"""Commands where the machine lacks something: UTF-8, a home folder, room for what is printed, memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab import surroundings

FULL = Path("/dev/full")
NO_USER = """
import pwd

def none(number):
    raise KeyError(f"getpwuid(): uid not found: {number}")

pwd.getpwuid = none
"""


def command(*arguments: Any, out: Any = subprocess.PIPE, **changes: str | None) -> subprocess.CompletedProcess[str]:
    """A command as a shell starts it; variables that are None are not set."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **changes}
    environment = {name: value for name, value in environment.items() if value is not None}
    line = [sys.executable, "-m", "trimtab", *map(str, arguments)]
    heard: dict[str, Any] = {"stdout": out, "stderr": subprocess.PIPE, "encoding": "utf-8", "errors": "replace"}
    return subprocess.run(line, env=environment, check=False, timeout=300, **heard)


def recipe(given: Path, out: Path, **changes: Any) -> Path:
    quick = {"method": "rtn", "train": {"steps": 0}, "data": {"eval_tokens": 64}, **changes}
    return tiny.write(out.parent / "recipe.yaml", tiny.recipe(given / "model", given / "data.jsonl", out, **quick))


@pytest.mark.slow
def test_a_locale_that_is_not_utf_8(given: Path, tmp_path: Path) -> None:
    """Recipes, data, names of files and answers with letters that the terminal lacks."""
    asked = {"parity": False, "prompt": "漢字?", "answer_tokens": 4}
    file = recipe(given, tmp_path / "out", name="naïve", evaluate=asked)
    ascii_ = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"}
    done = command("run", file, **ascii_)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "model.safetensors").is_file()
    lost = command("verify", tmp_path / "Größe", **ascii_)  # bytes that this locale cannot read are kept as they are
    assert lost.returncode == 2
    assert lost.stderr.startswith(f"error: {tmp_path}/Gr\\udcc3\\udcb6\\udcc3\\udc9fe: no manifest.json")
    named = command("run", file, f"output={tmp_path}/漢", **ascii_)
    assert named.returncode == 2
    assert len(named.stderr.splitlines()) == 1, named.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="homes of POSIX")
def test_no_home_and_no_user_entry(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "site").mkdir()
    (tmp_path / "tmp").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_USER)
    path = os.pathsep.join([str(tmp_path / "site"), str(Path(surroundings.__file__).parents[1])])
    unset = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "TRIMTAB_CACHE", "XDG_CACHE_HOME", "HF_HOME")
    monkeypatch.chdir(tmp_path)
    file = recipe(given, tmp_path / "out", evaluate={"parity": False})
    done = command("run", file, PYTHONPATH=path, TMPDIR=str(tmp_path / "tmp"), **dict.fromkeys(unset))
    assert done.returncode == 0, done.stderr
    home = tmp_path / "tmp" / f"trimtab-home-{os.geteuid()}"
    assert f"there is no home folder: caches are in {home}; set HOME" in done.stderr
    assert home.stat().st_mode & 0o777 == 0o700
    assert list(home.rglob("kernels-*.so")) or not shutil.which("cc")
    assert {f.name for f in tmp_path.iterdir()} == {"site", "tmp", "out", "recipe.yaml"}, "no folder called ~"


@pytest.mark.skipif(os.name == "nt", reason="homes of POSIX")
def test_a_home_that_somebody_else_has_made_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings.tempfile, "tempdir", str(tmp_path))
    mine = surroundings._home()
    assert surroundings._home() == mine
    mine.chmod(0o777)
    other = surroundings._home()
    assert other != mine
    assert other.stat().st_mode & 0o777 == 0o700
    mine.rmdir()
    mine.symlink_to(other)
    assert surroundings._home() not in (mine, other)


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written() -> None:
    with FULL.open("w") as file:
        done = command("recipe", out=file)
    assert done.returncode == 2
    assert done.stderr == "error: the disk is full; make room there, or choose a place on another disk\n"


def test_output_that_nobody_reads() -> None:
    """`trimtab methods | head -1`."""
    reads, writes = os.pipe()
    os.close(reads)
    done = command("recipe", out=writes)
    os.close(writes)
    assert done.returncode in (0, 1)
    assert done.stderr == ""
