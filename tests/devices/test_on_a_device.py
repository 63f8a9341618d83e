"""Every stage and every command computes on the device that is named, and nothing mixes it with the host or another one.

`pretend_cuda` runs the functions of `stages` in a process with two CUDA devices that are not there: an operator that is
given tensors of several devices raises in it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import stages

import gguf_models
import tiny
import trimtab as tt

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
Pretend = Callable[..., Any]
OURS = stages.OURS
GRID = [{"match": "*", "grid": {"bits": 4, "group": 32}}]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that every format takes."""
    path = tmp_path_factory.mktemp("whole")
    gguf_models.random_model(gguf_models.FAMILIES["llama"]).bfloat16().save_pretrained(path)
    gguf_models.byte_level_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved(pretend_cuda: Pretend, whole: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run with everything in it left, all of it computed on the device."""
    out = tmp_path_factory.mktemp("runs") / "out"
    values = tiny.recipe(
        whole, text, out, model={"device": OURS}, rules=GRID,
        start={"name": "gptq", "tokens": 128}, distill={"teacher": "cached", "top_k": 8}, train={"evaluate_steps": 3},
        evaluate={"baselines": ["float", "rounded"], "prompt": "2 plus 3?", "answer_tokens": 3},
        export=["native", "dense", "gguf", "compressed-tensors", "gptq", "awq", "mlx"],
    )  # fmt: skip
    metrics, where = pretend_cuda(stages.ran, values)
    assert where == {OURS}
    assert metrics["max_logit_difference"] == 0
    assert metrics["device"] == f"{OURS} (pretended)"
    assert 0 < metrics["load_device_peak_memory_bytes"] < metrics["device_peak_memory_bytes"]
    return out


def _on_both(pretend_cuda: Pretend, values: dict[str, Any], tmp_path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The metrics of a run on the device, all of it computed there, and of the same on the CPU."""
    there, where = pretend_cuda(stages.ran, values | {"model": values["model"] | {"device": OURS}})
    assert where == {OURS}
    return there, tt.run(values | {"output": str(tmp_path / "cpu")}, device="cpu")


def test_a_run(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    start = {"name": "block", "tokens": 128, "steps": 2}
    there, here = _on_both(pretend_cuda, tiny.recipe(model, text, tmp_path / "out", start=start), tmp_path)
    assert there["losses"] == pytest.approx(here["losses"], rel=2e-3)
    assert there["max_logit_difference"] == 0
    assert "device_peak_memory_bytes" not in here


def test_a_run_resumed(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    """On the CPU, from a checkpoint of the device."""
    values = tiny.recipe(model, text, tmp_path / "out", model={"device": OURS}, evaluate={"parity": False})
    whole, _ = pretend_cuda(stages.ran, values)
    for file in (tmp_path / "out" / "checkpoints").glob("checkpoint-6/*"):
        file.unlink()
    metrics = tt.run(tmp_path / "out" / "recipe.yaml", device="cpu", resume=True)
    assert metrics["losses"] == pytest.approx(whole["losses"], rel=2e-3)


def test_what_else_a_run_may_have(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    """NF4 with absmax in 8 bits under an adapter that stays, rounded inputs and cache, a teacher in memory."""
    changes: dict[str, Any] = {
        "method": {"name": "qlora", "rank": 4},
        "rules": [{"match": "*", "grid": {"codebook": "nf4", "group": 64, "double_quant": True}}],
        "distill": {"teacher": "int8"},
        "train": {"lr": 1e-3},
        "export": ["native", "peft"],
        "evaluate": {"baselines": ["rounded"]},
    }
    there, here = _on_both(pretend_cuda, tiny.recipe(model, text, tmp_path / "out", **changes), tmp_path)
    assert there["losses"] == pytest.approx(here["losses"], rel=2e-3)
    changes = {"activations": {"bits": 8, "mode": "static"}, "kv": {"bits": 8}, "evaluate": {"parity": False}}
    there, here = _on_both(pretend_cuda, tiny.recipe(model, text, tmp_path / "static", **changes), tmp_path / "static")
    assert there["losses"] == pytest.approx(here["losses"], rel=2e-3)


def test_a_reference(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, text, tmp_path / "out", model={"device": OURS}, train={"reference": str(model)})
    values["train"] |= {"objective": "dpo"}
    assert pretend_cuda(stages.reference, values) == {OURS}


def test_float16_scales_its_losses(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    """With another attention, too: what autocast and it have changed is undone before anything is compared."""
    values = tiny.recipe(model, text, tmp_path / "out", model={"device": OURS, "dtype": "float16"})
    metrics, where = pretend_cuda(stages.ran, values | {"train": values["train"] | {"attention": "eager"}})
    assert where == {OURS}
    assert metrics["max_logit_difference"] == 0
    assert metrics["moved_by_training"]["codes"] > 0


def test_ids_beyond_the_vocabulary(pretend_cuda: Pretend, model: Path) -> None:
    assert "a row outside 0 to 259 of a stored weight" in pretend_cuda(stages.embedded, str(model), 260)
    assert pretend_cuda(stages.embedded, str(model), 259) == "found"


def test_every_method(pretend_cuda: Pretend, model: Path) -> None:
    found = pretend_cuda(stages.methods, str(model))
    assert {name for name, (_, where) in found.items() if where != {OURS}} == set()
    assert {name for name, (loss, _) in found.items() if not 4 < loss < 7} == set()


def test_tensors_move_as_they_are_read(pretend_cuda: Pretend, model: Path) -> None:
    """So the host holds one float layer at most, which is on its way."""
    assert pretend_cuda(stages.loaded, str(model)) == []


def test_commands(pretend_cuda: Pretend, saved: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "piqa").mkdir()
    items = [{"goal": f"{i} plus {i}", "sol1": f"{2 * i}", "sol2": "blue", "label": i % 2} for i in range(4)]
    tiny.jsonl(tmp_path / "piqa" / "validation.jsonl", *items)
    found, where = pretend_cuda(stages.commands, str(saved), str(saved / "dense"), str(text), str(tmp_path))
    assert where == {OURS}
    here = tt.evaluate(str(saved), str(text), tokens=128, block_tokens=32, device="cpu")
    assert found["evaluate"] == pytest.approx(here.perplexity, rel=1e-3)
    assert found["compare"] == pytest.approx(0, abs=1e-6)
    assert found["chat"] == tt.chat(str(saved), device="cpu").answer("2 plus 3?", 4)
    served, where = pretend_cuda(stages.served, str(saved / "dense"), str(text))
    assert where == {OURS}
    assert served.device == OURS
    assert served.max_logprob == 0


def test_exports_are_the_same_from_every_device(pretend_cuda: Pretend, saved: Path, tmp_path: Path) -> None:
    names = ["gguf", "gptq", "awq", "mlx", "compressed-tensors", "dense"]
    there = pretend_cuda(stages.exported, str(saved), names, str(tmp_path / "there"), OURS)
    assert there == stages.exported(str(saved), names, str(tmp_path / "here"), "cpu")
    assert len(there) == len(names)


def test_a_gguf_file_and_back(pretend_cuda: Pretend, saved: Path, text: Path, tmp_path: Path) -> None:
    """Tensors of the file that were not touched are found again among those on the device."""
    (file,) = (saved / "gguf").glob("*.gguf")
    method = {"name": "peqa"}
    values = tiny.recipe(file, text, tmp_path / "out", method=method, rules=None, export=["native", "gguf"])
    values["evaluate"]["parity"] = False
    there, here = _on_both(pretend_cuda, values, tmp_path)
    assert there["losses"] == pytest.approx(here["losses"], rel=2e-3)
    (made,), (ours,) = ((tmp_path / where / "gguf").glob("*.gguf") for where in ("out", "cpu"))
    assert made.stat().st_size == ours.stat().st_size


def test_pruning_and_searching(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    search = {
        "bits": [3, 4],
        "trials": 2,
        "budget": "1MiB",
        "tokens": 64,
        "sensitivity_tokens": 64,
        "objective": "tuned",
    }
    values = tiny.recipe(
        model, text, tmp_path / "out", model={"device": OURS}, rules=[{"match": "*", "grid": {"bits": 4, "group": 32}}],
        prune={"ratio": 0.2, "tokens": 64, "block_tokens": 32, "multiple_of": 32},
        search=search | {"steps": 2, "uniform": False}, evaluate={"parity": False},
    )  # fmt: skip
    metrics, where = pretend_cuda(stages.pruned_and_searched, values, str(model), str(tmp_path / "narrow"))
    assert where == {OURS}
    assert metrics["device"].startswith(OURS)


@pytest.mark.slow
def test_each_worker_of_a_search_has_its_device(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    """Products that mix devices fail there, so a trial that is complete was computed on the one that it names."""
    search = {"units": "layer", "bits": [3, 4], "trials": 4, "tokens": 64, "sensitivity_tokens": 64, "devices": [1, 0]}
    search |= {"objective": "tuned", "steps": 1, "uniform": False}
    values = tiny.recipe(model, text, tmp_path / "out", rules=[{"match": "*", "grid": {"bits": 4, "group": 32}}])
    where, refused = pretend_cuda(stages.searched, values | {"search": search})
    assert refused == "search.devices: there is no cuda:2: cuda devices here are 0 to 1"
    assert len(where) == 4
    assert {place.rpartition(" ")[2] for place in where} == {"cuda:0", "cuda:1"}


def test_two_waits_in_a_micro_step(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, text, tmp_path / "out", model={"device": OURS}, evaluate={"parity": False})
    found = pretend_cuda(stages.syncs, values)
    steps = found.pop("micro-steps")
    assert steps == 12
    assert sum(found.values()) <= 2 * steps, found


def test_a_device_without_float64(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {"start": {"name": "gptq", "tokens": 64}, "method": {"name": "loftq", "rank": 4}}
    values = tiny.recipe(model, text, tmp_path / "out", model={"device": OURS}, rules=None, **changes)
    metrics, where = pretend_cuda(stages.without_float64, values | {"start": {"name": "rtn"}})
    assert where == {OURS}
    assert metrics["max_logit_difference"] == 0
    values = tiny.recipe(model, text, tmp_path / "gptq", model={"device": OURS}, start=changes["start"])
    pretend_cuda(stages.without_float64, values)


def test_a_tied_head_over_two_devices(pretend_cuda: Pretend, model: Path, tmp_path: Path) -> None:
    loaded, tokenizer = tt.load(str(model), tt.methods.Rtn(), tiny.RULES)
    tt.save(loaded, tmp_path / "saved", tokenizer)
    where, loss = pretend_cuda(stages.split_over_two, str(tmp_path / "saved"))
    assert where == {"cuda:0", "cuda:1"}
    import torch

    ids = torch.arange(32)[None]
    assert loss == pytest.approx(float(loaded(input_ids=ids, labels=ids).loss), rel=1e-3)


def test_a_plan_speaks_of_the_device(pretend_cuda: Pretend, model: Path, text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, text, tmp_path / "out", model={"device": OURS})
    found = pretend_cuda(stages.planned, values)
    assert found["device"] == OURS
    assert 0 < 4 * 2**30 - found["free"] < 2**20
    assert found["beside"] > 0
    assert f"memory free on {OURS}" in found["line"]
