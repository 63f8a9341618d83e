"""Two processes on the CPU train as one does: losses, codes, checkpoints, errors. One start for all that succeeds."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
import yaml
from safetensors.torch import load_file

import tiny
import trimtab

pytestmark = pytest.mark.slow

METHODS: dict[str, dict[str, Any]] = {
    "lr-qat": {"name": "lr-qat", "rank": 4, "alpha": 64.0},
    "qlora": {"name": "qlora", "rank": 4},
    "peqa": {"name": "peqa"},
    "qa-lora": {"name": "qa-lora", "rank": 4},
    "qat": {"name": "qat"},
}
CONSTANT = {"schedule": "constant", "warmup": 0.0}
"""So that a shorter run begins as a longer one does."""
SUMMED = {"batch_tokens": 256, "steps": 3}
"""Two micro-steps of each process to an optimizer step."""
FLOAT_BLOCK = 4 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
"""Bytes of a decoder block of the tiny model in float32; GPTQ holds it with products of its inputs, which are no larger."""
SMALL = 20_000
"""Bytes of buffers and the like."""
SHARDS = ("ddp", "fsdp")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--local-addr", "127.0.0.1"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TRIMTAB_TUNE": "0"}


def recipe(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """In float32, so that another order of sums is all that differs."""
    values = tiny.recipe(folder / "model", folder / "data.jsonl", folder / name, **changes)
    values["model"] = {**values["model"], "dtype": "float32"}
    values["evaluate"] = {"parity": False, **changes.get("evaluate", {})}
    return values


def cases(folder: Path) -> list[dict[str, Any]]:
    """What two processes do, in order."""
    made: list[dict[str, Any]] = []
    for name, method in METHODS.items():
        evaluate = {"parity": True, "parity_tokens": 64, "baselines": ["float", "rounded"]}
        parity = {"evaluate": evaluate} if name == "lr-qat" else {}
        made += [
            {
                "recipe": recipe(
                    folder, f"{name}-{shard}", method=method, train={"shard": shard}, rules=rules_of(name), **parity
                )
            }
            for shard in SHARDS
        ]
    watched = {"evaluate_steps": 2}
    made += [{"recipe": recipe(folder, f"watched-{shard}", train={"shard": shard, **watched})} for shard in SHARDS]
    # What one process has begun, two continue with, by FSDP2; and the other way round, below.
    made += [{"recipe": recipe(folder, "begun-by-one", train={"shard": "fsdp", **CONSTANT}), "resume": True}]
    made += [{"recipe": recipe(folder, "begun-by-two", train={"shard": "fsdp", "steps": 3, **CONSTANT})}]
    made += [{"recipe": recipe(folder, f"summed-{shard}", train={"shard": shard, **SUMMED})} for shard in SHARDS]
    made += [{"recipe": preferences(folder, "dpo-ddp")}, {"recipe": measured(folder, "measured-fsdp", shard="fsdp")}]
    return made


def measured(folder: Path, name: str, **train: Any) -> dict[str, Any]:
    """All that a run measures of models, on a base that was saved here; static ranges are measured, too."""
    asked = {"baselines": ["rounded"], "prompt": "1 plus 2 is", "answer_tokens": 4, "parity": True, "parity_tokens": 64}
    made = recipe(folder, name, evaluate=asked, activations={"bits": 8, "mode": "static"}, train=train)
    return {
        **made,
        "model": {**made["model"], "path": str(folder / "stored")},
        "rules": None,
        "method": METHODS["lr-qat"],
    }


def loads(folder: Path) -> list[dict[str, Any]]:
    """Models that two processes part while they read: a float one, rounded to nearest and by GPTQ, and one saved here."""
    deep, stored = {"path": str(folder / "deep"), "rules": tiny.RULES}, {"path": str(folder / "stored"), "rules": None}
    cases = [
        deep | {"method": METHODS["lr-qat"], "out": "nearest"},
        deep | {"method": METHODS["lr-qat"], "out": "gptq", "start": torch.arange(64).view(2, 32).tolist()},
        stored | {"method": METHODS["qa-lora"], "out": "again"},
        stored | {"method": None, "out": "as-it-is"},
    ]
    return [case | {"out": str(folder / f"parts-{case['out']}")} for case in cases]


def preferences(folder: Path, name: str) -> dict[str, Any]:
    """DPO; pairs of one length, since a mean over processes weighs them alike."""
    made = recipe(folder, name, train={"objective": "dpo", "steps": 4}, data={"eval_path": None})
    rows = [{"prompt": f"{i} plus {i} is ", "chosen": f"{2 * i:02}.", "rejected": f"{i:02}?"} for i in range(10, 18)]
    made["data"]["path"] = str(tiny.jsonl(folder / "pairs.jsonl", *rows))
    return made


def rules_of(name: str) -> Any:
    return None if name == "qlora" else tiny.RULES


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have done all cases, and one process what they are compared with."""
    folder = tmp_path_factory.mktemp("several")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    trimtab.run(recipe(folder, "begun-by-one", train={"steps": 3, **CONSTANT}))
    tiny.model(folder / "deep", layers=8)
    stored, tokenizer = trimtab.load(str(folder / "deep"), rules=tiny.RULES)
    trimtab.save(stored, folder / "stored", tokenizer)
    (folder / "in-parts.json").write_text(json.dumps(loads(folder)))
    (folder / "cases.json").write_text(json.dumps(cases(folder)))
    (folder / "rules.json").write_text(json.dumps(tiny.RULES))
    command = [*TORCHRUN, ranks.__file__, folder / "cases.json"]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stderr[-4000:]
    return folder


def seen(folder: Path, name: str) -> dict[str, Any]:
    first, second = (json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second, "both processes are given the same metrics"
    return first


@pytest.fixture(scope="module")
def alone(done: Path) -> dict[str, dict[str, Any]]:
    """The metrics of one process, by method."""
    return {
        name: trimtab.run(recipe(done, f"{name}-alone", method=method, rules=rules_of(name)))
        for name, method in METHODS.items()
    }


@pytest.mark.parametrize("shard", SHARDS)
@pytest.mark.parametrize("name", METHODS)
def test_they_train_as_one_does(done: Path, alone: dict[str, dict[str, Any]], name: str, shard: str) -> None:
    found, one = seen(done, f"{name}-{shard}"), alone[name]
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert found["tokens"] == one["tokens"], "tokens are counted over all processes"
    assert found["perplexity"]["tuned"] == pytest.approx(one["perplexity"]["tuned"], rel=1e-3)
    same(done / f"{name}-{shard}", done / f"{name}-alone")


def same(one: Path, other: Path) -> None:
    """Codes are equal, and what is trained but for the order of sums."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    for key, tensor in theirs.items():
        if key.endswith("codes"):
            assert torch.equal(ours[key], tensor), key
        else:
            torch.testing.assert_close(ours[key], tensor, rtol=2e-2, atol=1e-4)


@pytest.mark.parametrize("shard", SHARDS)
def test_what_is_saved_is_what_was_trained(done: Path, shard: str) -> None:
    assert seen(done, f"lr-qat-{shard}")["max_logit_difference"] == 0


@pytest.mark.parametrize("shard", SHARDS)
def test_baselines_are_those_of_one(done: Path, shard: str) -> None:
    """With fsdp no process has a whole model to measure: they run it together."""
    values = recipe(done, f"baselines-{shard}", train={"steps": 0}, evaluate={"baselines": ["float", "rounded"]})
    one, found = trimtab.run(values)["perplexity"], seen(done, f"lr-qat-{shard}")["perplexity"]
    assert {k: found[k] for k in ("float", "rounded")} == pytest.approx(
        {k: one[k] for k in ("float", "rounded")}, rel=1e-5
    )
    kept = json.loads((done / f"lr-qat-{shard}" / "checkpoints" / "measured.json").read_text())
    assert kept["float"] == found["float"]


def test_a_model_in_parts_is_measured_as_a_whole_one(done: Path) -> None:
    found, one = seen(done, "measured-fsdp"), trimtab.run(measured(done, "measured-alone"))
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
    assert found["perplexity"] == pytest.approx(one["perplexity"], rel=1e-3)
    assert found["answers"]["before"] == one["answers"]["before"]
    assert found["answers"]["after"]
    assert found["max_logit_difference"] == 0
    same(done / "measured-fsdp", done / "measured-alone")


def test_a_loop_of_ones_own_saves_a_sharded_model(done: Path) -> None:
    ranks.by_hand(done / "model", tiny.RULES, done / "by-hand-alone")
    same(done / "by-hand", done / "by-hand-alone")


@pytest.mark.parametrize("name", ["nearest", "gptq", "again", "as-it-is"])
def test_no_process_has_all_of_a_model_that_it_loads_in_parts(done: Path, name: str) -> None:
    for rank in (0, 1):
        found = json.loads((done / f"parts-{name}-{rank}.json").read_text())
        half = (found["whole"] - found["outside"]) / 2
        floats = 0 if name != "gptq" else 4 * FLOAT_BLOCK
        assert found["held"] <= half + found["outside"] + found["block"] + floats + SMALL
        assert found["after"] <= found["whole"] / 2 + SMALL
        if name != "gptq":  # whose block in float is as large as so small a model
            assert found["held"] < 0.75 * found["whole"], "it is never there"


@pytest.mark.parametrize("name", ["nearest", "gptq", "again", "as-it-is"])
def test_a_model_in_parts_trains_as_a_whole_one(done: Path, name: str) -> None:
    case = next(case for case in loads(done) if case["out"].endswith(name))
    model, tokenizer = ranks.loaded(case, shard=False)
    if case["method"]:
        ranks.train(model)
    trimtab.save(model, done / f"alone-{name}", tokenizer)
    same(done / f"parts-{name}", done / f"alone-{name}")
    for file in ("config.json", "generation_config.json"):
        assert (done / f"parts-{name}" / file).read_text() == (done / f"alone-{name}" / file).read_text()


def test_tensor_parallelism_is_one_line(done: Path) -> None:
    said = (done / "tensor-parallel.txt").read_text()
    assert said.startswith("tensor parallelism (tp_size = 2): ")
    assert len(said.splitlines()) == 1


def test_gradients_are_summed_over_micro_steps(done: Path) -> None:
    one = trimtab.run(recipe(done, "summed-alone", train=SUMMED))["losses"]
    for shard in SHARDS:
        assert seen(done, f"summed-{shard}")["losses"] == pytest.approx(one, rel=1e-4)


def test_preferences_are_learned_as_one_does(done: Path) -> None:
    one = trimtab.run(preferences(done, "dpo-alone"))
    assert seen(done, "dpo-ddp")["losses"] == pytest.approx(one["losses"], rel=1e-4)


@pytest.mark.parametrize("shard", SHARDS)
def test_the_best_model_is_the_same(done: Path, shard: str) -> None:
    one = trimtab.run(recipe(done, f"watched-alone-{shard}", train={"evaluate_steps": 2}))["held_out"]
    found = seen(done, f"watched-{shard}")["held_out"]
    assert (found["steps"], found["best_step"]) == (one["steps"], one["best_step"])
    assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)


def test_a_checkpoint_holds_whole_tensors(done: Path) -> None:
    checkpoint = done / "lr-qat-fsdp" / "checkpoints" / "checkpoint-6"
    states = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"].values()
    assert {type(v) for state in states for v in state.values()} == {torch.Tensor}
    one = load_file(done / "lr-qat-ddp" / "checkpoints" / "checkpoint-6" / "trainable.safetensors")
    parted = load_file(checkpoint / "trainable.safetensors")
    assert {name: t.shape for name, t in parted.items()} == {name: t.shape for name, t in one.items()}


def test_training_goes_on_with_another_number_of_processes(done: Path) -> None:
    through = trimtab.run(recipe(done, "through", train={**CONSTANT}))["losses"]
    by_two = trimtab.run(recipe(done, "begun-by-two", train={**CONSTANT}), resume=True)["losses"]
    assert by_two == pytest.approx(through, rel=1e-4)
    by_one = seen(done, "begun-by-one")["losses"]
    assert by_one == pytest.approx(through, rel=2e-3)
    moments, expected = (moments_of(done / name) for name in ("begun-by-one", "through"))
    assert moments.keys() == expected.keys()
    for key, tensor in expected.items():
        torch.testing.assert_close(moments[key], tensor, rtol=2e-2, atol=2e-2 * float(tensor.abs().max()))


def moments_of(run: Path) -> dict[tuple[int, str], torch.Tensor]:
    states = torch.load(run / "checkpoints" / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
    return {(number, name): tensor for number, state in states.items() for name, tensor in state.items()}


def started(folder: Path, values: dict[str, Any], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`trimtab run` in a process of its own."""
    file = folder / f"{Path(values['output']).name}.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "trimtab", "run", str(file), *arguments]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)


def test_the_batch_is_that_of_all_and_one_process_says_so(done: Path) -> None:
    values = recipe(done, "refused", train={"processes": 2, "batch_tokens": 192})
    result = started(done, values)
    assert result.returncode == 2
    said = "error: train.batch_tokens: 192 is the batch of all 2 processes"
    assert result.stderr.count("error:") == 1, result.stderr
    assert said in result.stderr, result.stderr
    assert "train.batch_tokens=128 or 256, or train.micro_batch=1" in result.stderr
    assert not Path(values["output"]).exists()


def test_the_second_process_fails_and_all_end_with_its_message(done: Path) -> None:
    file = done / "second.py"
    file.write_text(
        "import os, sys\n"
        "import trimtab.training.trainer as trainer\n"
        "from trimtab.errors import UserError\n"
        "from trimtab.cli import main\n"
        "def fails(*args):\n"
        "    raise UserError('the second one cannot')\n"
        "if os.environ['RANK'] == '1':\n"
        "    trainer.groups_of = fails\n"
        "sys.argv = ['trimtab', 'run', sys.argv[1]]\n"
        "main()\n"
    )
    values = recipe(done, "failing")
    (done / "failing.yaml").write_text(yaml.safe_dump(values))
    began = time.monotonic()
    result = subprocess.run(
        [*TORCHRUN, file, done / "failing.yaml"], env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert result.returncode != 0
    assert "error: process 1 of 2: the second one cannot" in result.stderr
    assert result.stderr.count("error: ") == 1, result.stderr
    assert not Path(values["output"]).exists()
    assert time.monotonic() - began < 200


def test_a_process_that_is_killed_ends_all_and_the_run_goes_on(done: Path) -> None:
    values = recipe(done, "killed", train={"processes": 2, "steps": 400, "save_steps": 2})
    file = done / "killed.yaml"
    file.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "trimtab", "run", str(file)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        unfinished = done / "killed.unfinished" / "checkpoints"
        deadline = time.monotonic() + 240
        while not list(unfinished.glob("checkpoint-*/trainer_state.json")):
            assert run.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        children = subprocess.run(["pgrep", "-P", str(run.pid)], capture_output=True, text=True).stdout.split()
        ranks = [int(pid) for pid in children if b"RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
        os.kill(ranks[-1], signal.SIGKILL)
        shown, _ = run.communicate(timeout=120)
    line = (
        "error: process 1 of 2 was ended by SIGKILL, mostly for want of memory; --resume continues from the last step"
    )
    assert [shown_line for shown_line in shown.splitlines() if shown_line.startswith(line)]
    assert run.returncode == 128 + signal.SIGKILL
    last = max(int(p.parent.name.rpartition("-")[2]) for p in unfinished.glob("checkpoint-*/trainer_state.json"))
    result = started(done, {**values, "train": {**values["train"], "steps": last + 1}}, "--resume")
    assert result.returncode == 0, result.stderr
    assert len(json.loads((done / "killed" / "metrics.json").read_text())["losses"]) == last + 1
