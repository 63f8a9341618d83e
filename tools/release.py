"""What a release takes (RELEASING.md):

    python tools/release.py check               the version is the same everywhere, and the changelog has something new
    python tools/release.py try [PYTHON ...]    builds sdist and wheel into dist/, and tries them in clean environments
    python tools/release.py date                gives what is unreleased in CHANGELOG.md the version and today's date
    python tools/release.py next VERSION        begins the next version

`try` takes every Python of this machine that is supported, unless told which. Only the standard library is imported.
"""

import datetime
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PLACES = {
    "pyproject.toml": r'(?m)^version = "(.*)"$',
    "src/trimtab/__init__.py": r'(?m)^__version__ = "(.*)"$',
    "CITATION.cff": r"(?m)^version: (.*)$",
}
"""Where the version stands."""
CHANGELOG = ROOT / "CHANGELOG.md"
PYTHONS = ("python3.11", "python3.12", "python3.13", "python3.14")
UNRELEASED = "## [Unreleased]\n"


def found(texts: dict[str, str]) -> dict[str, str]:
    """The version in each of these files."""
    return {name: re.search(PLACES[name], text)[1] for name, text in texts.items()}  # type: ignore[index]


def versions() -> dict[str, str]:
    """The version in each place."""
    return found({name: (ROOT / name).read_text(encoding="utf-8") for name in PLACES})


def unreleased(changelog: str) -> str:
    """What the changelog has under its first heading."""
    return changelog.partition(UNRELEASED)[2].partition("\n## [")[0].strip()


def dated(changelog: str, number: str, day: datetime.date) -> str:
    """The changelog with what is unreleased under a version and a date."""
    return changelog.replace(UNRELEASED, f"{UNRELEASED}\n## [{number}] - {day.isoformat()}\n", 1)


def version() -> str:
    """The version of this checkout, which is the same in every place."""
    found = versions()
    if len(set(found.values())) != 1:
        raise SystemExit(f"release: versions differ: {', '.join(f'{name} {v}' for name, v in found.items())}")
    return next(iter(found.values()))


def check(changelog: str) -> str:
    """The version that would be released, with this changelog."""
    if f"## [{version()}] - " in changelog:
        raise SystemExit(f"release: CHANGELOG.md has {version()} already; begin the next version (release.py next)")
    if not unreleased(changelog):
        raise SystemExit("release: CHANGELOG.md has nothing under Unreleased")
    return version()


def date() -> None:
    """Write the date into the changelog and the citation."""
    day, citation = datetime.date.today(), ROOT / "CITATION.cff"
    before = CHANGELOG.read_text(encoding="utf-8")
    CHANGELOG.write_text(dated(before, check(before), day), encoding="utf-8")
    text = re.sub(r"(?m)^date-released: .*\n", "", citation.read_text(encoding="utf-8"))
    citation.write_text(f"{text}date-released: {day.isoformat()}\n", encoding="utf-8")


def begin(number: str) -> None:
    """Write the next version everywhere."""
    for name, pattern in PLACES.items():
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        was = re.search(pattern, text)
        assert was is not None, name
        path.write_text(text[: was.start(1)] + number + text[was.end(1) :], encoding="utf-8")


# ---- clean environments ---------------------------------------------------------------------------------------------

TRIAL = """
import sys
import torch, transformers
import tiny
import trimtab as tt

model, tokenizer = tt.load(str(tiny.model(tiny.Path("model"))), tt.methods.LrQat(rank=4))
ids = torch.arange(32).unsqueeze(0)
model(input_ids=ids, labels=ids).loss.backward()
tt.fold(model)
tt.save(model, "saved", tokenizer)
with torch.no_grad():
    again = transformers.AutoModelForCausalLM.from_pretrained("saved")
    assert torch.equal(again(ids).logits, model(ids).logits)
print(tt.__version__, sys.version.split()[0], torch.__version__)
"""
"""Quantize, train a step, fold, save and load a tiny model: what the core dependencies are enough for."""


def run(*command: object, cwd: Path = ROOT, path: Path | None = None) -> str:
    """A command that must succeed; what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {} if path is None else {"PYTHONPATH": str(path)}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"release: {' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip()


def supported(names: tuple[str, ...] = PYTHONS) -> list[str]:
    """Those of these Pythons that run here."""
    works = [name for name in names if shutil.which(name)]
    return [n for n in works if not subprocess.run([n, "-c", ""], capture_output=True, check=False).returncode]


def pip(python: Path, *words: object) -> None:
    """pip in the environment of a Python."""
    run(python, "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet", *words)


def build(folder: Path) -> tuple[Path, Path]:
    """The sdist and the wheel that is made of it, in dist/."""
    maker = folder / "builder" / "bin" / "python"
    run(sys.executable, "-m", "venv", folder / "builder")
    pip(maker, "install", "hatchling>=1.27")
    shutil.rmtree(ROOT / "dist", ignore_errors=True)
    run(maker, "-m", "hatchling", "build", "-t", "sdist", "-d", ROOT / "dist")
    (sdist,) = (ROOT / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        packed.extractall(folder, filter="data")
    unpacked = folder / sdist.name.removesuffix(".tar.gz")
    run(maker, "-m", "hatchling", "build", "-t", "wheel", "-d", ROOT / "dist", cwd=unpacked)
    (wheel,) = (ROOT / "dist").glob("*.whl")
    return unpacked, wheel


def tried(name: str, unpacked: Path, wheel: Path, folder: Path) -> str:
    """One Python with the wheel and nothing but what it asks for: the trial and the commands that need no extra."""
    here = folder / Path(name).name
    here.mkdir()
    run(name, "-m", "venv", here / "env")
    python = here / "env" / "bin" / "python"
    torch = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    pip(python, "install", torch)  # first and alone, so that the smallest build that fits is taken
    pip(python, "install", wheel)
    pip(python, "check")
    said = run(python, "-c", TRIAL, cwd=here, path=unpacked / "tests")
    for command in ("--version", "methods", "formats", "recipe --schema", "verify saved", "plan model/config.json"):
        run(here / "env" / "bin" / "trimtab", *command.split(), cwd=here)
    shutil.rmtree(here)
    return said


def main(words: list[str]) -> None:
    """The command line."""
    match words:
        case ["check"]:
            print(f"{check(CHANGELOG.read_text(encoding='utf-8'))} can be released")
        case ["date"]:
            date()
        case ["next", number]:
            begin(number)
        case ["try", *names]:
            version()
            with tempfile.TemporaryDirectory() as folder:
                unpacked, wheel = build(Path(folder))
                for name in names or supported():
                    print(f"{name}: {tried(name, unpacked, wheel, Path(folder))}", flush=True)
        case _:
            raise SystemExit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
