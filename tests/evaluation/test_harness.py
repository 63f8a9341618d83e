"""lm-evaluation-harness against log-likelihoods by hand, and against itself on a dense copy of the model; paired scores."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from trimtab import cli
from trimtab.errors import UserError
from trimtab.evaluation import harness
from trimtab.evaluation.harness import Score
from trimtab.formats.native.write import save
from trimtab.methods import Rtn
from trimtab.models.load import load, load_float
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline.run import run
from trimtab.recipe import recipe

pytest.importorskip("lm_eval")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]
CHOICES = [["red", "a very long green thing"], ["two", "twelve"], ["up", "downwards"], ["sea", "land"], ["ox", "oxen"]]
PIQA = [{"goal": f"Goal {i}", "sol1": a, "sol2": b, "label": i % 2} for i, (a, b) in enumerate(CHOICES)]
ARC = [
    {
        "id": str(i),
        "question": f"Which is {i}?",
        "choices": {"text": [*texts, "none of them"], "label": ["A", "B", "C"]},
        "answerKey": "ABC"[i % 3],
    }
    for i, texts in enumerate(CHOICES)
]
POLARITY = [{"sentence": f"it is {a} .", "label": i % 2} for i, (a, _) in enumerate(CHOICES)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, the same rounded to 3 bits, `saved`, and rows of three tasks in `data`."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "model")
    model, tokenizer = load(str(folder / "model"), Rtn(), tiny.RULES)
    save(model, folder / "saved", tokenizer)
    for task, split, rows in (
        ("piqa", "validation", PIQA),
        ("arc_easy", "test", ARC),
        ("sentence_polarity", "test", POLARITY),
    ):
        (folder / "data" / task).mkdir(parents=True)
        tiny.jsonl(folder / "data" / task / f"{split}.jsonl", *rows)
    return folder


@pytest.fixture(scope="module")
def asked(given: Path) -> tuple[Any, Any, list[Score]]:
    """The rounded model, its tokenizer, and what it scores."""
    model, tokenizer = load(str(given / "saved"))
    return model, tokenizer, harness.run(model, tokenizer, ["piqa", "arc_easy", "sentence_polarity"], given / "data")


def by_hand(model: Any, tokenizer: Any, question: str, answers: list[str]) -> list[float]:
    """log p(answer | question) of each, token by token, one sequence at a time."""
    found = []
    for answer in answers:
        context, whole = (tokenizer(t)["input_ids"] for t in (question, f"{question} {answer}"))
        with torch.no_grad():
            log_p = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
        found.append(sum(log_p[i - 1, whole[i]].item() for i in range(len(context), len(whole))))
    return found


def items(scores: list[Score], task: str, metric: str) -> Score:
    return next(s for s in scores if (s.task, s.metric) == (task, metric))


def test_accuracies_by_hand(asked: tuple[Any, Any, list[Score]]) -> None:
    model, tokenizer, scores = asked
    questions: dict[str, list[tuple[str, list[str], int]]] = {
        "piqa": [(f"Question: {r['goal']}\nAnswer:", [r["sol1"], r["sol2"]], r["label"]) for r in PIQA],
        "arc_easy": [
            (f"Question: {r['question']}\nAnswer:", r["choices"]["text"], "ABC".index(r["answerKey"])) for r in ARC
        ],
        "sentence_polarity": [
            (
                f"{r['sentence']}\nQuestion: Is this sentence positive or negative?\nAnswer:",
                ["negative", "positive"],
                r["label"],
            )
            for r in POLARITY
        ],
    }
    for task, rows in questions.items():
        right, right_by_byte = [], []
        for question, answers, label in rows:
            found = by_hand(model, tokenizer, question, answers)
            by_byte = [p / len(a) for p, a in zip(found, answers, strict=True)]
            right.append(float(found.index(max(found)) == label))
            right_by_byte.append(float(by_byte.index(max(by_byte)) == label))
        expected = {"acc": right} if task == "sentence_polarity" else {"acc": right, "acc_norm": right_by_byte}
        for metric, values in expected.items():
            score = items(scores, task, metric)
            assert score.items == tuple(values)
            mean = sum(values) / len(values)
            spread = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
            assert score.value == pytest.approx(mean)
            assert score.stderr == pytest.approx(math.sqrt(spread / len(values)))
    assert [(s.task, s.metric) for s in scores] == [
        ("piqa", "acc"),
        ("piqa", "acc_norm"),
        ("arc_easy", "acc"),
        ("arc_easy", "acc_norm"),
        ("sentence_polarity", "acc"),
    ]


def test_a_dense_copy_through_the_harness_itself(given: Path, asked: tuple[Any, Any, list[Score]]) -> None:
    """The harness's own HFLM reads a plain float directory with the quantized model's weights in it."""
    import lm_eval

    model, tokenizer, scores = asked
    dense = load_float(str(given / "model"))
    with torch.no_grad():
        for name, layer in quant_layers(model).items():
            dense.get_submodule(name).weight.copy_(layer.base.dequantize(torch.bfloat16))
    dense.save_pretrained(given / "dense")
    tokenizer.save_pretrained(given / "dense")
    files = {"validation": str(given / "data" / "piqa" / "validation.jsonl")}
    kwargs = {"data_files": files, "cache_dir": str(given / "cache")}
    override = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": kwargs, "training_split": None}
    folder = str(Path(lm_eval.__file__).parent / "tasks" / "piqa")
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(given / "dense"), "dtype": "bfloat16"},
        batch_size=harness.BATCH,
        device="cpu",
        tasks=[{"group": "local", "task": [{"task": "piqa", **override}]}],
        task_manager=lm_eval.tasks.TaskManager(include_defaults=False, include_path=[folder]),
    )
    for metric in ("acc", "acc_norm"):
        ours = items(scores, "piqa", metric)
        assert ours.value == found["results"]["piqa"][f"{metric},none"]
        assert ours.stderr == found["results"]["piqa"][f"{metric}_stderr,none"]
        assert ours.items == tuple(row[metric] for row in found["samples"]["piqa"])


def test_a_limit_spreads_items_evenly(given: Path, asked: tuple[Any, Any, list[Score]]) -> None:
    model, tokenizer, scores = asked
    some = harness.run(model, tokenizer, ["piqa"], given / "data", limit=3)
    all_items = items(scores, "piqa", "acc").items
    assert items(some, "piqa", "acc").items == (all_items[0], all_items[1], all_items[3])
    with pytest.raises(UserError, match="other items"):
        harness.differences(some, scores)


def score(values: list[int], questions: str = "q") -> Score:
    return Score("t", "acc", sum(values) / len(values), 0.0, tuple(map(float, values)), questions)


def test_paired_differences() -> None:
    first, second = [1, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 0, 1, 1, 1, 1, 1, 0, 1, 0]
    (found,) = harness.differences([score(first)], [score(second)])
    d = torch.tensor(second) - torch.tensor(first, dtype=torch.float64)
    assert found.mean == pytest.approx(d.mean().item())
    assert found.stderr == pytest.approx((d.std() / math.sqrt(10)).item())
    assert (found.only_first, found.only_second) == (1, 5)
    assert found.p == pytest.approx(2 * (1 + 6) / 2**6)  # at most 1 of 6 tosses, on either side
    (same,) = harness.differences([score(first)], [score(first)])
    assert (same.mean, same.stderr, same.p) == (0, 0, 1)
    with pytest.raises(UserError, match="other items"):
        harness.differences([score(first)], [score(second, "others")])


def test_what_is_refused(given: Path) -> None:
    with pytest.raises(UserError, match=r"piqqa: unknown task \(did you mean 'piqa'\?\)"):
        harness.check_tasks(["piqqa"], given / "data")
    with pytest.raises(UserError, match=r"hellaswag: no .*validation.jsonl"):
        harness.check_tasks(["hellaswag"], given / "data")
    with pytest.raises(UserError, match="name the directory"):
        harness.check_tasks(["piqa"], None)
    with pytest.raises(UserError, match="a standard error needs two"):
        harness._picked(given / "data" / "piqa" / "validation.jsonl", 1)


def test_on_the_command_line_and_in_a_recipe(given: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: Any = {"tasks": "piqa", "data": str(given / "data"), "limit": None, "out": str(tmp_path / "both.json")}
    cli.harness(str(given / "saved"), str(given / "model"), **options)
    printed = capsys.readouterr().out
    both = harness.read(tmp_path / "both.json")
    assert list(both) == [str(given / "saved"), str(given / "model")]
    assert "acc_norm" in printed
    assert len(json.loads((tmp_path / "both.json").read_text())["differences"]) == 2
    evaluate = {"tasks": ["piqa"], "tasks_data": str(given / "data"), "tasks_limit": 4, "parity": False}
    tiny.text(given / "text.jsonl")
    changes: Any = {"method": "rtn", "train": {"steps": 0}, "evaluate": evaluate}
    metrics = run(recipe.from_dict(tiny.recipe(given / "model", given / "text.jsonl", tmp_path / "run", **changes)))
    (scores,) = harness.read(tmp_path / "run" / "harness.json").values()
    assert metrics["tasks"] == {f"{s.task} {s.metric}": [s.value, s.stderr, 4] for s in scores}
    picked = [both[str(given / "saved")][0].items[i] for i in (0, 1, 2, 3)]
    assert scores[0].items == tuple(picked)
