"""Few bits by every library, in one run on one machine: the same model, calibration tokens and text, one measure.

    python benchmarks/yardstick/run.py --data DIR [--models smollm2-135m FILE.gguf] [--bits 2 3 4] [--only trimtab]
    python benchmarks/report.py yardstick                         docs/yardstick.md

Every row is a line of benchmarks/results/yardstick.jsonl, and one that stands there is not run again. Each is a process of
its own, which leaves a folder of float weights that lie on its grid; what the text is worth to it is measured on those
weights, whoever made them. Minutes are of processors, all cores together, and peak memory is the process's.

WikiText-2: the train part for all (64 windows of 512 tokens calibrate, 1,024 tokens a step tune), and the first 8,192
tokens of the test text. DIR holds wikitext2. A peer has an environment of its own (`peers/NAME.txt` lists what is installed
there), which is made below `--environments` when it is first needed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from math import exp
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import save_file

from benchmarks.files import RESULTS, add, read, say
from benchmarks.quality.rates import REAL, SMOLLM2, loss_on, text_windows
from trimtab.models.load import load_float, open_source

OUT = RESULTS / "yardstick.jsonl"
PEERS, ENVIRONMENTS = Path(__file__).parent / "peers", Path(__file__).parents[2] / "build" / "yardstick"
WATCHED = Path(__file__).with_name("watched.py")
CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
MODELS, WIDTHS = (SMOLLM2, "gemma-3-270m-Q4_K_M", "qwen2.5-coder-0.5b-Q4_K_M"), (2, 3, 4)
LENGTH, CALIBRATION, HELD, GROUP = 512, 64, 16, 64
"""Tokens in a window, windows that calibrate and that are measured on, and weights that share a scale."""
OURS = ("rtn", "gptq", "block", "lr-qat", "lr-qat from gptq", "lr-qat from block", "peqa", "peqa from block", "qat")
"""`peqa from block` is EfficientQAT's recipe: blocks one by one, then scales end to end."""
LIBRARIES = {"trimtab": OURS, "auto-round": ("auto-round light", "auto-round", "auto-round best")}


@dataclass(frozen=True)
class Row:
    """A model on a grid, by a library's method; no bits is the float model, tuned by LoRA."""

    model: str
    bits: int | None
    group: int | None
    library: str
    method: str


def known_of(row: Row, done: list[dict[str, Any]]) -> dict[str, Any] | None:
    """What was measured of a row; None where it was not run."""
    return next((line for line in done if all(line[k] == v for k, v in asdict(row).items())), None)


def rows(models: Iterable[str], widths: Iterable[int], libraries: Iterable[str]) -> Iterator[Row]:
    """In the order that they are run in: one width of all models and libraries after the other."""
    for bits in widths:
        for model in models:
            for library in libraries:
                some = (m for m in LIBRARIES[library] if m != "auto-round best" or model == SMOLLM2)
                yield from (Row(model, bits, GROUP, library, method) for method in some)
    if "trimtab" in libraries:
        yield from (Row(model, None, None, "trimtab", "lora") for model in models)


class Given:
    """A model's float weights as a folder that every library reads, and its texts."""

    def __init__(self, path: str, data: Path, folder: Path) -> None:
        self.folder = folder
        tokenizer = open_source(path).tokenizer()
        if not (folder / "config.json").exists():
            load_float(path, dtype=torch.float32).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        train, held = (text_windows(data / text, tokenizer, LENGTH) for text in REAL.texts)
        self.held = held[:HELD]
        save_file({"train": train}, folder.with_suffix(".texts"))

    def perplexity(self, folder: Path) -> float:
        """Of the held-out text, by the float weights in a folder."""
        return exp(loss_on(load_float(str(folder), dtype=torch.float32), self.held, 8))


def python_of(library: str, environments: Path) -> str:
    """The interpreter that a library is installed for; a peer's environment is made if it is not there."""
    if library == "trimtab":
        return sys.executable
    python = environments / library / "bin" / "python"
    if not python.exists():
        say(f"installing {library} (minutes)")
        subprocess.run([sys.executable, "-m", "venv", str(environments / library)], check=True)
        install = [str(python), "-m", "pip", "install", "--quiet", "--no-input", "-c", str(CONSTRAINTS)]
        for line in (PEERS / f"{library}.txt").read_text().splitlines():  # torch first: the smallest build that matches
            subprocess.run([*install, *line.split()], check=True)
    return str(python)


def run(row: Row, given: Given, environments: Path, threads: int) -> dict[str, Any]:
    """Make a row's weights in a process of its own, and measure them."""
    script = Path(__file__).with_name("ours.py") if row.library == "trimtab" else PEERS / f"{row.library}.py"
    with tempfile.TemporaryDirectory() as place, (Path(place) / "log").open("w+") as log:
        out = Path(place) / "weights"
        job = asdict(row) | {
            "base": str(given.folder),
            "texts": str(given.folder.with_suffix(".texts")),
            "calibration": CALIBRATION,
            "blocks": str(given.folder.with_suffix(".blocks")),
            "out": str(out),
            "threads": threads,
        }
        began = time.monotonic()
        command = [python_of(row.library, environments), str(WATCHED), str(script), json.dumps(job)]
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        _, status, used = os.wait4(process.pid, 0)
        said = (Path(place) / "log").read_text()
        if status:
            raise SystemExit(f"{row}: {said[-4000:]}")
        return {
            "perplexity": given.perplexity(out),
            "minutes": round((used.ru_utime + used.ru_stime) / 60, 2),
            "wall_minutes": round((time.monotonic() - began) / 60, 2),
            "peak_mb": int(said.split()[-1]) // 1024,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=[SMOLLM2], help="a name, or a .gguf file, which is dequantized")
    parser.add_argument("--bits", type=int, nargs="+", default=list(WIDTHS))
    parser.add_argument("--only", nargs="+", choices=LIBRARIES, default=list(LIBRARIES), metavar="LIBRARY")
    parser.add_argument("--methods", nargs="+", help="these alone")
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--environments", type=Path, default=ENVIRONMENTS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    deadline, bases = time.monotonic() + 60 * args.minutes, args.environments / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    named = {Path(model).stem: model for model in args.models}
    known: dict[str, Given] = {}
    for row in rows(list(named), args.bits, args.only):
        if args.methods and row.method not in args.methods:
            continue
        done = read(OUT)
        if known_of(row, done) is not None:
            continue
        if time.monotonic() > deadline:
            say("out of time; run it again to go on")
            return
        if row.model not in known:
            known[row.model] = Given(named[row.model], args.data, bases / row.model)
        given = known[row.model]
        exact = next((line["float_perplexity"] for line in done if line["model"] == row.model), None)
        exact = given.perplexity(given.folder) if exact is None else exact
        found = run(row, given, args.environments, args.threads)
        if row.method.endswith(" from block"):  # which its process found
            start = known_of(replace(row, method="block"), done)
            if start is None:
                raise SystemExit(f"{row}: the row `block` is to be run before it")
            found["minutes"] = round(found["minutes"] + start["minutes"], 2)
        add(OUT, asdict(row) | {"float_perplexity": exact} | found)
        say(f"{row}: {found}")


if __name__ == "__main__":
    main()
