"""Accuracies of the float, the rounded and the tuned model on the same items, with standard errors and paired differences.

The model is SmolLM2-135M-Instruct (`float` is its dequantized 4-bit GGUF), rounded to 3 bits in groups of 64 with integer
zeros, embedding at 8 bits, and tuned by LR-QAT; zero-shot, lm-evaluation-harness's prompts.

    python benchmarks/quality/harness.py --data DIR [--tuned DIR | --train FILE] [--limit 200]

It writes benchmarks/results/harness.json. `--data` holds <task>/<split>.jsonl in the data sets' original fields. Without
`--tuned`, a short recipe is run on `--train`, a text or JSON lines with one.
Models that were asked as many items already are not asked again.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

from trimtab.evaluation import harness
from trimtab.methods import Rtn
from trimtab.models.load import load, load_float, open_source
from trimtab.pipeline.run import run
from trimtab.recipe import recipe

OUT = Path(__file__).parents[1] / "results" / "harness.json"
MODEL = "smollm2-135m"
TASKS = ("piqa", "arc_easy", "sentence_polarity")
RULES = [
    {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}},
    {"match": "*", "grid": {"bits": 3, "group": 64, "zero": "integer"}},
]


def tuned(train: str, folder: Path, steps: int) -> Path:
    """A short LR-QAT run, with the rates that were chosen for the row w3-lr-qat of docs/quality.md."""
    values = {
        "name": "harness",
        "model": {"path": MODEL},
        "method": {"name": "lr-qat", "rank": 32, "alpha": 32.0},
        "rules": RULES,
        "data": {"path": train, "block_tokens": 512},
        "train": {"steps": steps, "batch_tokens": 1024, "micro_batch": 2, "lr": 1e-2, "lr_scale": 1e-3},
        "evaluate": {"parity": False},
        "output": str(folder),
    }
    run(recipe.from_dict(values), overwrite=True)
    return folder


def ask(name: str, folder: str | None, data: str, limit: int | None) -> list[harness.Score]:
    """Scores of one of the three models."""
    if name == "float":
        model, tokenizer = load_float(MODEL), open_source(MODEL).tokenizer()
    else:
        model, tokenizer = load(MODEL, Rtn(), RULES) if name == "rounded" else load(str(folder))
    return harness.run(model, tokenizer, TASKS, data, limit=limit)


def markdown(path: Path = OUT) -> list[str]:
    """The tables, as lines of Markdown; none where nothing was measured."""
    if not path.is_file():
        return []
    models = harness.read(path)
    names = list(models)
    lines = ["| task | metric | items | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for i, score in enumerate(models[names[0]]):
        cells = (f"{models[name][i].value:.3f} ± {models[name][i].stderr:.3f}" for name in names)
        lines.append(f"| {score.task} | {score.metric} | {len(score.items)} | " + " | ".join(cells) + " |")
    lines += ["", "Paired differences on the same items (± is one standard error; p by McNemar's exact test):", ""]
    lines += ["| | task | metric | difference | only the first / only the second right | p |", "|---" * 6 + "|"]
    for first, second in (("float", "rounded"), ("rounded", "tuned"), ("float", "tuned")):
        if first in models and second in models:
            found = harness.differences(models[first], models[second])
            lines += [f"| {second} - {first} | " + " | ".join(row) + " |" for row in harness.difference_rows(found)]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--tuned")
    parser.add_argument("--train")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    if not given.tuned and not given.train:
        parser.error("give --tuned DIR, or --train FILE to make one")
    folder: Any = given.tuned
    scores = harness.read(given.out) if given.out.is_file() else {}
    for name in ("float", "rounded", "tuned"):
        if name != "tuned" and name in scores and {len(s.items) for s in scores[name]} == {given.limit}:
            continue
        if name == "tuned" and folder is None:
            folder = tuned(given.train, Path("runs/harness"), given.steps)
        scores[name] = ask(name, folder, given.data, given.limit)
        harness.write(given.out, scores)
        gc.collect()
    pairs = harness.differences(scores["rounded"], scores["tuned"])
    harness.write(given.out, scores, pairs)
    print("\n".join(markdown(given.out)))


if __name__ == "__main__":
    main()
