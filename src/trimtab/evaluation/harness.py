"""lm-evaluation-harness on any model of ours, offline: multiple-choice tasks, standard errors, and paired differences.

The harness asks a model for log p(answer | question) of every answer: `acc` takes the likeliest, `acc_norm` the likeliest
per byte. A registered task keeps its own prompts here; only where it reads its rows is overridden, inside an inline group
(a bare mapping with a registered task's name would not be merged with it). `--data DIR` holds <task>/<split>.jsonl in the
data sets' original fields; nothing is fetched.

On n items an accuracy has a standard error of up to 0.5 / sqrt(n): 3.5 points at 200. Two models that answer the *same*
items differ by far less noise, since most items are easy or hard for both:

    d_i = right_b(i) - right_a(i)        mean(d) +- sd(d) / sqrt(n)        McNemar: of the items on which they differ,
                                                                          a fair coin's probability of such a split

With a limit the items are spread evenly through the file (the harness would take the first, and some files are sorted by
subject), so that they are the same for every model. The only file that imports lm_eval.

Legend: n items.
"""

import gzip
import hashlib
import json
import logging
import math
import os
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trimtab.disk import replace_text
from trimtab.errors import UserError, nearest
from trimtab.extras import require

BATCH = 8
"""Answers in one forward pass, sorted by length."""
_MMLU = "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"


@dataclass(frozen=True)
class _Task:
    """Where a task's rows are, and its prompt."""

    split: str
    """The split's name in the harness."""
    files: tuple[str, ...]
    """The first of these that is there is read."""
    defined: str | None = None
    """Folder of the harness's own definition; None for one given whole, here."""
    prompt: dict[str, Any] = field(default_factory=dict)
    """Question, answers and which is right, where it is given here."""


TASKS = {
    "piqa": _Task("validation", ("validation.jsonl",), "piqa"),
    "arc_easy": _Task("test", ("test.jsonl",), "arc"),
    "hellaswag": _Task("validation", ("validation.jsonl",), "hellaswag"),
    "winogrande": _Task("validation", ("validation.jsonl",), "winogrande"),
    "openbookqa": _Task("test", ("test.jsonl",), "openbookqa"),
    "boolq": _Task("validation", ("validation.jsonl", "validation.part.jsonl"), "super_glue/boolq"),
    "mmlu": _Task(
        "test",
        ("test.jsonl", "test.jsonl.gz", "validation.jsonl"),
        prompt={"doc_to_text": _MMLU, "doc_to_choice": ["A", "B", "C", "D"], "doc_to_target": "answer"},
    ),
    "blimp": _Task(
        "validation",
        ("mini.jsonl", "all.jsonl", "all.jsonl.gz"),
        prompt={"doc_to_text": "", "doc_to_choice": "{{[sentence_good, sentence_bad]}}", "doc_to_target": 0},
    ),
    "sentence_polarity": _Task(
        "test",
        ("test.jsonl",),
        prompt={
            "doc_to_text": "{{sentence}}\nQuestion: Is this sentence positive or negative?\nAnswer:",
            "doc_to_choice": ["negative", "positive"],
            "doc_to_target": "label",
        },
    ),
}
"""Tasks by name; the prompts given here are the harness's own for MMLU (without examples), BLiMP and SST-2."""


@dataclass(frozen=True)
class Score:
    """One model's accuracy on one task."""

    task: str
    metric: str
    """acc, or acc_norm: log-probabilities divided by the answers' length in bytes."""
    value: float
    stderr: float
    """The sample's standard deviation / sqrt(n)."""
    items: tuple[float, ...]
    """1 for every item that was answered rightly, else 0."""
    questions: str
    """A hash of the items, questions and answers: scores of the same questions can be paired."""


@dataclass(frozen=True)
class Difference:
    """Second model minus first, on the same items."""

    task: str
    metric: str
    mean: float
    stderr: float
    only_first: int
    """Items that only the first model answered rightly."""
    only_second: int
    p: float
    """Two-sided exact McNemar test: how likely so uneven a split is between equally good models."""


def check_tasks(tasks: Sequence[str], data: str | Path | None) -> None:
    """Raise a `UserError` for an unknown task, missing rows, or a missing library; quick."""
    require("lm-evaluation-harness", "eval")
    if data is None:
        raise UserError("the tasks read local files: name the directory that holds <task>/<split>.jsonl")
    for task in tasks:
        if task not in TASKS:
            raise UserError(f"{task}: unknown task{nearest(task, list(TASKS))}; known are {', '.join(TASKS)}")
        file_of(task, Path(data))


def file_of(task: str, data: Path) -> Path:
    """The rows of a task.

    Raises:
        UserError: if they are not there.
    """
    wanted = [data / task / name for name in TASKS[task].files]
    found = next((file for file in wanted if file.is_file()), None)
    if found is None:
        raise UserError(f"{task}: no {' or '.join(map(str, wanted))}; the rows are read from there")
    return found


def _picked(file: Path, limit: int | None) -> list[int]:
    """Numbers of the rows that are asked, spread evenly."""
    with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as lines:
        rows = sum(1 for line in lines if line.strip())
    count = rows if limit is None else min(limit, rows)
    if count < 2:
        raise UserError(f"{file}: {count} of its {rows} rows asked for; a standard error needs two")
    return [i * rows // count for i in range(count)]


def _spec(task: str, data: Path, cache: str) -> dict[str, Any]:
    """What the harness is told of a task."""
    known = TASKS[task]
    splits = {"training_split": None, "validation_split": None, "test_split": None, f"{known.split}_split": known.split}
    files = {known.split: str(file_of(task, data).resolve())}
    local = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": files, "cache_dir": cache}}
    if known.defined is not None:
        return {"group": f"local_{task}", "task": [{"task": task, **local, **splits}]}
    metric = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}
    fixed = {"output_type": "multiple_choice", "metric_list": [metric], "num_fewshot": 0, "metadata": {"version": 1.0}}
    return {"task": task, **local, **splits, **known.prompt, **fixed}


def run(
    model: Any, tokenizer: Any, tasks: Sequence[str], data: str | Path, *, limit: int | None = None, batch: int = BATCH
) -> list[Score]:
    """Ask a model in memory.

    Args:
        model: a causal language model, ours or any; in evaluation mode it is put, and left.
        tokenizer: the model's.
        tasks: names in `TASKS`.
        data: directory that holds <task>/<split>.jsonl in the original fields.
        limit: items of each task, spread evenly; None for all.
        batch: answers in one forward pass.

    Returns:
        A score for each task and metric.

    Raises:
        UserError: see `check_tasks`.
    """
    check_tasks(tasks, data)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model.eval()
    definitions = Path(lm_eval.__file__).parent / "tasks"
    folders = [str(definitions / folder) for task in tasks if (folder := TASKS[task].defined) is not None]
    picked = {task: _picked(file_of(task, Path(data)), limit) for task in tasks}
    with tempfile.TemporaryDirectory() as cache:
        # Indexing all of the harness's definitions takes longer than a small evaluation.
        manager = TaskManager(include_defaults=False, include_path=folders)
        found = lm_eval.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch),
            tasks=[_spec(task, Path(data), cache) for task in tasks],
            samples=picked,
            task_manager=manager,
        )
    assert found is not None, "one process evaluates"
    return [score for task in tasks for score in _scores(task, found["samples"][task], found["results"][task])]


def _scores(task: str, samples: list[dict[str, Any]], results: dict[str, Any]) -> list[Score]:
    rows = sorted(samples, key=lambda sample: sample["doc_id"])
    asked = [[row["doc_id"], row["target"], [list(a) for a in row["arguments"]]] for row in rows]
    questions = hashlib.blake2b(json.dumps(asked).encode(), digest_size=8).hexdigest()
    return [
        Score(
            task,
            metric,
            float(results[f"{metric},none"]),
            float(results[f"{metric}_stderr,none"]),
            tuple(float(row[metric]) for row in rows),
            questions,
        )
        for metric in rows[0]["metrics"]
    ]


def differences(first: Sequence[Score], second: Sequence[Score]) -> list[Difference]:
    """Second minus first, for every task and metric that both have.

    Raises:
        UserError: where they were asked other questions.
    """
    theirs = {(score.task, score.metric): score for score in second}
    found = []
    for a in first:
        b = theirs.get((a.task, a.metric))
        if b is None:
            continue
        if a.questions != b.questions:
            raise UserError(f"{a.task}: the two models were asked other items; use one --data and one --limit for both")
        d = [y - x for x, y in zip(a.items, b.items, strict=True)]
        only_first, only_second = sum(x < 0 for x in d), sum(x > 0 for x in d)
        stderr = statistics.stdev(d) / math.sqrt(len(d))
        p = _coin(only_first, only_second)
        found.append(Difference(a.task, a.metric, statistics.fmean(d), stderr, only_first, only_second, p))
    return found


def _coin(a: int, b: int) -> float:
    """Probability that a + b tosses of a fair coin are split as unevenly as this, or more."""
    tail = sum(math.comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b)
    return min(1.0, 2 * tail)


def check_out(path: str | Path) -> None:
    """Raise a `UserError` for a file that is there and holds no scores: `write` would replace it."""
    file = Path(path)
    if not file.exists():
        return
    try:
        read(file)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: is there already and holds no scores; pass another --out") from error


def write(path: str | Path, scores: Mapping[str, Sequence[Score]], found: Sequence[Difference] = ()) -> None:
    """Scores of each model, with their items, and differences between them, as JSON."""
    models = {name: [asdict(score) for score in some] for name, some in scores.items()}
    content = {"models": models, "differences": [asdict(difference) for difference in found]}
    replace_text(Path(path), json.dumps(content, indent=1) + "\n")


def read(path: str | Path) -> dict[str, list[Score]]:
    """The scores that `write` wrote, by model."""
    models = json.loads(Path(path).read_text(encoding="utf-8"))["models"]
    return {name: [Score(**{**s, "items": tuple(s["items"])}) for s in some] for name, some in models.items()}


def rows(scores: Sequence[Score]) -> list[tuple[str, ...]]:
    """A table's rows: task, metric, value +- stderr, items."""
    return [(s.task, s.metric, f"{s.value:.4f} ± {s.stderr:.4f}", str(len(s.items))) for s in scores]


def difference_rows(found: Sequence[Difference]) -> list[tuple[str, ...]]:
    """A table's rows: task, metric, difference, items that only one of them answered, p."""
    return [
        (d.task, d.metric, f"{d.mean:+.4f} ± {d.stderr:.4f}", f"{d.only_first} / {d.only_second}", _probability(d.p))
        for d in found
    ]


def _probability(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
