"""Whole runs on a tiny model: what they write, that trained = folded = saved, and that data of every form trains."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
import trimtab
from trimtab import cli
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.evaluation import parity
from trimtab.evaluation.perplexity import perplexity
from trimtab.layers.linear import QuantLinear
from trimtab.models.load import load
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline.run import Quiet, run
from trimtab.recipe.recipe import from_dict, read
from trimtab.training.trainer import _Trainer, fit

KEYS = {
    "answers",
    "moved_by_training",
    "weights_changed_by_fold",
    "device",
    "disk_bytes",
    "fold",
    "fold_error",
    "load_peak_memory_bytes",
    "losses",
    "max_logit_difference",
    "method",
    "output",
    "peak_memory_bytes",
    "perplexity",
    "seconds",
    "tokens",
    "train_seconds",
    "trainable",
}
EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
LINEAR = sum((64 * 64, 32 * 64, 32 * 64, 64 * 64, 128 * 64, 128 * 64, 64 * 128)) * 2
"""Weights in the linear layers of both blocks."""


def everywhere(**grid: Any) -> list[dict[str, Any]]:
    return [EMBEDDING, {"match": "*", "grid": grid}]


# name -> changes, what folding says, trainable parameters
SIDES = sum(n + k for n, k in ((64, 64), (32, 64), (32, 64), (64, 64), (128, 64), (128, 64), (64, 128))) * 2
RUNS: dict[str, tuple[dict[str, Any], str, int]] = {
    "lr-qat": (
        {"evaluate": {"prompt": "Hi", "answer_tokens": 4}},
        "14 layers folded, bitwise",
        4 * SIDES + LINEAR // 32,
    ),
    "qlora": ({"method": {"name": "qlora", "rank": 4}, "rules": None}, "14 layers kept as adapters", 4 * SIDES),
    "qa-hira": (
        {"method": "qa-hira", "rules": everywhere(bits=4, group=32, zero="real")},
        "14 layers folded, bitwise",
        LINEAR // 32,
    ),
    "peqa": ({"method": "peqa", "rules": everywhere(bits=4, group=16)}, "14 layers folded, bitwise", LINEAR // 16),
    "qat": (
        {"method": "qat", "rules": everywhere(bits=2), "train": {"lr": 1e-3}},
        "14 layers folded, bitwise",
        LINEAR + 2 * (64 + 32 + 32 + 64 + 128 + 128 + 64),
    ),
    "lora": (
        {"method": {"name": "lora", "rank": 4}, "rules": None, "merge": True},
        "14 layers merged, algebraic",
        4 * SIDES,
    ),
    "rtn": ({"method": "rtn", "train": {"steps": 0}}, "nothing to fold", 0),
}


RELOADER = """
import json, sys
from trimtab.evaluation import parity
for line in sys.stdin:
    parity._main(*json.loads(line))
    print(flush=True)
"""


@pytest.fixture(scope="module")
def runs(given: Path) -> dict[str, dict[str, Any]]:
    """The metrics of every run; each is compared with what another process reloads.

    A fresh process costs five seconds of imports, so the first run has its own and one more serves the others.
    """
    done = {}
    command = [sys.executable, "-c", RELOADER]
    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as reloader,
    ):

        def serve(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert reloader.stdin is not None
            assert reloader.stdout is not None
            assert command[:4] == [sys.executable, "-P", "-m", "trimtab.evaluation.parity"]
            reloader.stdin.write(json.dumps(command[4:]) + "\n")
            reloader.stdin.flush()
            assert reloader.stdout.readline() == "\n"
            return subprocess.CompletedProcess(command, 0)

        for name, (changes, _, _) in RUNS.items():
            values = tiny.recipe(given / "model", given / "data.jsonl", given / "runs" / name, **changes)
            done[name] = trimtab.run(from_dict(values))
            patch.setattr(parity.subprocess, "run", serve)
    return done


def written(metrics: dict[str, Any], file: str) -> Any:
    return json.loads((Path(metrics["output"]) / file).read_text())


@pytest.mark.parametrize("name", RUNS)
def test_runs(runs: dict[str, dict[str, Any]], name: str) -> None:
    metrics, (_, fold, trainable) = runs[name], RUNS[name]
    steps = 0 if name == "rtn" else 6
    assert set(metrics) == KEYS
    assert written(metrics, "metrics.json") == metrics
    assert (metrics["fold"], metrics["trainable"]) == (fold, trainable)
    assert len(metrics["losses"]) == steps
    assert metrics["tokens"] == steps * 128
    assert all(0 < loss < 7 for loss in metrics["losses"])
    assert 100 < metrics["perplexity"]["tuned"] < 400
    out = Path(metrics["output"])
    assert metrics["disk_bytes"] == sum(f.stat().st_size for f in out.iterdir() if f.name not in LATER and f.is_file())
    assert {f.name for f in (out / "checkpoints").glob("checkpoint-*")} == (
        {"checkpoint-3", "checkpoint-6"} if steps else set()
    )
    assert not list(out.parent.glob(".*"))  # nothing temporary is left beside it


LATER = {"metrics.json", "parity.json", "manifest.json", "report.json", "report.html", "README.md"}
"""Written after the model was weighed."""


@pytest.mark.parametrize("name", RUNS)
def test_what_the_page_is_made_of(runs: dict[str, dict[str, Any]], name: str) -> None:
    """The layers add up to the run, the history is the training, and the plan is of the same order as what was measured."""
    metrics = runs[name]
    record = written(metrics, "report.json")
    layers = {layer["name"]: layer for layer in record["layers"]}
    for what in ("codes", "of_codes", "groups", "of_groups"):
        assert sum(layer.get(what, 0) for layer in layers.values()) == metrics["moved_by_training"][what]
    assert [line["loss"] for line in record.get("history", [])] == pytest.approx(metrics["losses"], abs=1e-4)
    plan = record.get("plan")
    assert (plan is None) is (name == "rtn"), "what is not trained is not planned"
    if plan is not None:
        assert 0.5 < (plan["process"] + plan["total"]) / metrics["peak_memory_bytes"] < 2
    assert record["versions"]["torch"] == torch.__version__
    in_codes = [layer for layer in layers.values() if layer["bits"] is not None]
    assert all(0 < layer["error"] < 1 for layer in in_codes)
    if name in ("lr-qat", "peqa"):  # fewer bits, more error
        by_bits = {layer["bits"]: layer["error"] for layer in in_codes}
        assert by_bits[8] < 0.02 < by_bits[min(by_bits)]
    if name != "rtn":
        text = "".join(piece for piece, _ in record["example"])
        assert text == "0 plus 1 is 1, and 0 times two is 0.<eos>"[:32], "as far as block_tokens reach"
        assert [learned for _, learned in record["example"]] == [False, True], "the first token is given"
    assert metrics["seconds"] > metrics["train_seconds"]


def test_the_error_of_rounding(given: Path, runs: dict[str, dict[str, Any]]) -> None:
    """Against the weights of the file itself, in float64."""
    true = load_file(given / "model" / "model.safetensors")
    model, _ = load(str(given / "runs" / "rtn"))
    layers = {layer["name"]: layer for layer in written(runs["rtn"], "report.json")["layers"]}
    for name in ("model.embed_tokens", "model.layers.1.mlp.down_proj"):
        weight = true[f"{name}.weight"].double()
        ours = quant_layers(model)[name].base.dequantize(torch.float32).double()
        assert layers[name]["error"] == pytest.approx(((ours - weight).norm() / weight.norm()).item(), rel=1e-4)


@pytest.mark.parametrize("name", RUNS)
def test_parity(runs: dict[str, dict[str, Any]], name: str) -> None:
    metrics = runs[name]
    report = written(metrics, "parity.json")
    assert (report["tokens"], report["fold"]) == (64, metrics["fold"])
    trained, folded, reloaded = report["stages"]
    assert [stage["stage"] for stage in report["stages"]] == ["trained", "folded", "reloaded"]
    assert trained["identical"]
    assert (metrics["weights_changed_by_fold"] == 0) is (name != "lora")  # merged into a bfloat16 copy
    assert metrics["max_logit_difference"] == max(stage["max_difference"] for stage in report["stages"])
    assert {**folded, "stage": ""} == {**reloaded, "stage": ""}
    if name == "lora":
        assert not folded["identical"]
        assert 0 < metrics["fold_error"] < 2**-8  # the rounding of a bfloat16 copy
        assert 0 < folded["max_difference"] < 0.1
        assert folded["top1_agreement"] > 0.9
        return
    for stage in (folded, reloaded):
        assert stage["identical"]
        assert (stage["max_difference"], stage["kl"], stage["top1_agreement"]) == (0, 0, 1)
        assert stage["perplexity"] == trained["perplexity"]
    assert metrics["fold_error"] == 0


def test_what_was_saved_is_what_was_measured(runs: dict[str, dict[str, Any]], given: Path) -> None:
    """Reloaded by the public function."""
    rows = load_rows(str(given / "data.jsonl"))
    for name, metrics in runs.items():
        model, tokenizer = trimtab.load(metrics["output"])
        blocks = token_windows(rows, tokenizer, block_tokens=32, limit_tokens=256)
        assert perplexity(model, blocks) == metrics["perplexity"]["tuned"]
        assert "perplexity_of" not in metrics  # texts are learned whole
        adapters = [m.adapter for m in quant_layers(model).values() if isinstance(m, QuantLinear) and m.adapter]
        assert len(adapters) == (14 if name == "qlora" else 0)


MOVED = {
    "lr-qat": {"codes", "scale"},
    "qa-hira": {"offset"},
    "peqa": {"scale"},
    "qat": {"codes", "scale"},
    "rtn": set(),
}


@pytest.mark.parametrize("name", MOVED)
def test_training_moves_what_the_method_trains(runs: dict[str, dict[str, Any]], name: str) -> None:
    """And nothing else; without this, parity would hold of models that nothing happened to."""
    recipe = read(Path(runs[name]["output"]) / "recipe.yaml")
    model, _ = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)
    trimtab.fold(model)
    before, after = model.state_dict(), load_file(recipe.out / "model.safetensors")
    moved = {key for key, value in before.items() if not torch.equal(value, after[key])}
    assert {key.rpartition(".")[2] for key in moved} == MOVED[name]
    assert all("_proj." in key for key in moved)
    assert len(moved) == 14 * len(MOVED[name])


def test_answers(runs: dict[str, dict[str, Any]]) -> None:
    assert set(runs["lr-qat"]["answers"]) == {"before", "after"}
    assert runs["qlora"]["answers"] == {}


def test_the_written_recipe_runs_and_gives_the_same_model(runs: dict[str, dict[str, Any]], given: Path) -> None:
    """Through the command line, bit for bit."""
    first = Path(runs["lr-qat"]["output"])
    again = given / "runs" / "again"
    arguments = ["run", str(first / "recipe.yaml"), f"output={again}", "evaluate={parity: false, baselines: [rounded]}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["trimtab", *arguments])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
    assert not stopped.value.code
    before, after = load_file(first / "model.safetensors"), load_file(again / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    metrics = json.loads((again / "metrics.json").read_text())
    assert metrics["losses"] == runs["lr-qat"]["losses"]
    assert metrics["perplexity"]["rounded"] == runs["rtn"]["perplexity"]["tuned"]
    assert set(metrics) == KEYS - {"max_logit_difference"}
    assert read(again / "recipe.yaml").to_yaml() == (again / "recipe.yaml").read_text()


def test_overwriting_replaces_all_of_an_earlier_run(runs: dict[str, dict[str, Any]], given: Path) -> None:
    out = given / "runs" / "twice"
    changes: dict[str, Any] = {"train": {"steps": 1, "save_steps": 1}, "evaluate": {"parity": True}}
    recipe = from_dict(tiny.recipe(given / "model", given / "data.jsonl", out, **changes, data={"eval_path": None}))
    said: list[str] = []

    class Listener(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    metrics = run(recipe, show=Listener())
    assert any("on random tokens for want of held-out data" in text for text in said)
    assert metrics["perplexity"] == {}
    compared = json.loads((out / "parity.json").read_text())
    assert compared["text"] == "random"
    assert [stage["identical"] for stage in compared["stages"]] == [True] * 3
    (out / "notes.txt").write_text("mine")
    assert (out / "checkpoints" / "checkpoint-1").is_dir()
    untrained = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 0})})
    with pytest.raises(trimtab.UserError, match=r"holds notes\.txt, which trimtab did not write"):
        run(untrained, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"
    (out / "notes.txt").unlink()
    assert run(untrained, overwrite=True)["losses"] == []
    assert not (out / "checkpoints").exists()


# ---- a base of today --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"name": "qa-hira"}, {"name": "lora", "rank": 4}], ids=["qa-hira", "lora"])
def test_two_stages(runs: dict[str, dict[str, Any]], given: Path, method: dict[str, Any]) -> None:
    """The codes of the first stage are the codes of the second."""
    first = Path(runs["lr-qat"]["output"])
    out = given / "runs" / f"then-{method['name']}"
    changes = {"method": method, "rules": None, "train": {"steps": 3}, "evaluate": {"parity": False}}
    metrics = run(from_dict(tiny.recipe(first, given / "data.jsonl", out, **changes)))
    before, after = load_file(first / "model.safetensors"), load_file(out / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    if method["name"] == "lora":
        assert moved == set()
        assert metrics["fold"] == "14 layers kept as adapters"
        assert len(after.keys() - before.keys()) == 28
    else:
        assert moved
        assert all(name.endswith(".zero") for name in moved)
        assert before.keys() == after.keys()
    assert metrics["perplexity"]["tuned"] != runs["lr-qat"]["perplexity"]["tuned"]


def test_no_float_baseline_of_a_quantized_model(runs: dict[str, dict[str, Any]], given: Path) -> None:
    values = tiny.recipe(Path(runs["lr-qat"]["output"]), given / "data.jsonl", given / "runs" / "never")
    values |= {"rules": None, "evaluate": {"baselines": ["float"]}}
    with pytest.raises(trimtab.UserError, match=r"model.path: .*no float model to compare with"):
        run(from_dict(values))
    assert not (given / "runs" / "never").exists()


# ---- data -------------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[list[dict[str, Any]], str | None]] = {
    "text": ([{"text": f"line {i} of text"} for i in range(12)], None),
    "instruction": ([{"instruction": f"say {i}", "input": "loud", "output": f"<{i}!>"} for i in range(12)], "<{}!>\n"),
    "messages": (
        [
            {
                "messages": [
                    {"role": "user", "content": "hello"},
                    {"role": "assistant", "content": "not trained", "weight": 0},
                    {"role": "user", "content": f"say {i}"},
                    {"role": "assistant", "content": f"<{i}!>"},
                ]
            }
            for i in range(12)
        ],
        "<{}!>\n",
    ),
    "every answer": (
        [
            {"conversations": [
                {"from": "human", "value": "ready?"}, {"from": "gpt", "value": "yes"},
                {"from": "human", "value": f"say {i}"}, {"from": "gpt", "value": f"<{i}!>"},
            ]}
            for i in range(12)
        ],
        "yes\n<{}!>\n",
    ),
    "strings": ([{"prompt": f"say {i} ", "completion": f"<{i}!>"} for i in range(12)], "<{}!><eos>"),
}  # fmt: skip


@pytest.mark.parametrize(("form", "packing"), [*((form, "auto") for form in ROWS), ("messages", "none")])
def test_only_answers_are_trained(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, packing: str
) -> None:
    """Read off the labels that reach the loss; a text is an answer from end to end."""
    rows, answer = ROWS[form]
    seen: list[tuple[list[int], list[int]]] = []
    loss_of = _Trainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seen.extend(zip(inputs["input_ids"].tolist(), inputs["labels"].tolist(), strict=True))
        return loss_of(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(_Trainer, "compute_loss", compute_loss)
    changes = {"train": {"steps": 1, "batch_tokens": 256, "micro_batch": 2}, "rules": None}
    held = {"eval_path": None, "packing": packing, "block_tokens": 128}
    values = tiny.recipe(given / "model", tiny.jsonl(tmp_path / "rows.jsonl", *rows), tmp_path / "run", **changes)
    values["data"] |= held
    recipe = from_dict({**values, "method": {"name": "qlora", "rank": 2}})
    model, tokenizer = load(recipe.model.path, recipe.method, recipe.rules, dtype=recipe.dtype)
    done = fit(model, tokenizer, recipe)
    assert done.losses[0] > 1
    trained = [token for ids, labels in seen for token, label in zip(ids, labels, strict=True) if label != -100]
    assert [label for _, labels in seen for label in labels if label != -100] == trained
    text = tokenizer.decode(trained)
    if answer is None:
        assert set(text.split("<eos>")) - {""} <= {row["text"] for row in rows}
        return
    for i in range(12):
        text = text.replace(answer.format(i), "")
    assert trained
    assert text == ""
