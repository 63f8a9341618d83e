"""What ends a search, and what only ends a trial; and a search's files, which are nobody else's."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPTNeoXConfig, OPTConfig, PhiConfig, PreTrainedConfig

import tiny
import trimtab
from trimtab.bit_search import ledger, workers
from trimtab.bit_search.objective import Rounded
from trimtab.bit_search.searching import Search
from trimtab.errors import Diverged, UserError
from trimtab.memory.process import memory_errors
from trimtab.models.sources import SafetensorsSource
from trimtab.pipeline import stages
from trimtab.recipe import recipe
from trimtab.recipe.recipe import Recipe

SEARCH: dict[str, Any] = {"units": "layer", "bits": [4, 8], "trials": 1, "tokens": 64, "sensitivity_tokens": 64}


def made(folder: Path, *, changes: dict[str, Any] | None = None, **search: Any) -> Recipe:
    if not (folder / "m").exists():
        tiny.model(folder / "m")
        tiny.text(folder / "t.jsonl")
    blocks = {"search": {**SEARCH, **search}, **(changes or {})}
    return recipe.from_dict(tiny.recipe(folder / "m", folder / "t.jsonl", folder / "out", **blocks))


def fails(error: BaseException) -> Any:
    def quality(self: Rounded, rules: Any, steps: int) -> float:
        raise error

    return quality


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError("numpy"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
        RuntimeError("CUDA error: out of memory"),
        Diverged("train: the loss became nan in step 1"),
    ],
    ids=lambda error: f"{type(error).__name__}: {str(error)[:10]}",
)
def test_a_trial_may_want_memory_or_diverge(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    monkeypatch.setattr(Rounded, "__call__", fails(error))
    used = made(tmp_path)
    with pytest.raises(UserError, match="none of 3 was finished; the last: "):
        workers.run(used)
    assert {t.state for t in Search(used).ledger.trials()} == {"infeasible"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        ZeroDivisionError("division by zero"),
        UserError("data.eval_path: line 3"),
        AssertionError("a bug"),
        KeyError("logits"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_anything_else_ends_the_search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Any RuntimeError was counted as an infeasible trial, and the search went on."""
    monkeypatch.setattr(Rounded, "__call__", fails(error))
    used = made(tmp_path)
    with pytest.raises(type(error)) as raised:
        workers.run(used)
    assert raised.value is error
    (trial,) = Search(used).ledger.trials()
    assert trial.state == "dead"
    assert trial.reason.startswith(f"ended the search: {type(error).__name__}")


def test_a_want_of_memory_is_known_from_what_torch_really_says() -> None:
    with pytest.raises(MemoryError, match="DefaultCPUAllocator"), memory_errors():
        torch.empty(1 << 62, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shapes cannot") as raised, memory_errors():
        torch.ones(2, 3) @ torch.ones(2, 3)
    assert raised.type is RuntimeError


def test_a_failure_of_one_worker_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its trace reaches the command that was given, and the others are not waited for."""
    started: list[Any] = []

    class Process:
        """A worker in this process: the second fails, the first would go on for ever."""

        exitcode, ended = None, False

        def __init__(self, target: Any, args: Any) -> None:
            self.target, self.args = target, args

        def start(self) -> None:
            started.append(self)
            if len(started) == 2:
                monkeypatch.setattr(workers, "Search", raises)
                with pytest.raises(KeyError):
                    self.target(*self.args)

        def is_alive(self) -> bool:
            return not self.ended

        def terminate(self) -> None:
            self.ended = True

        def join(self, timeout: float | None = None) -> None:
            return

    def raises(*_: Any) -> None:
        raise KeyError("logits")

    used = made(tmp_path, workers=2)
    monkeypatch.setattr(type(workers.multiprocessing.get_context("spawn")), "Process", Process)
    with pytest.raises(RuntimeError, match=r"(?s)search: a worker failed\nTraceback .*KeyError: 'logits'"):
        workers.run(used)
    assert all(process.ended for process in started)


# ---- its files --------------------------------------------------------------------------------------------------------


def test_a_journal_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is read of the model; it was a traceback."""

    def never(*_: Any) -> None:
        raise AssertionError("read a tensor")

    monkeypatch.setattr(SafetensorsSource, "read", never)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    for storage in ("file/journal.log", "folder", "/proc/1/journal.log", "/dev/full/journal.log"):
        with pytest.raises(
            UserError, match=r"search\.storage: the journal .* cannot be written \(.*\); set search\.storage"
        ):
            trimtab.search(made(tmp_path, storage=str(tmp_path / storage)))
    with pytest.raises(UserError, match=r"output: .*/file is a file"):
        trimtab.search(made(tmp_path).model_copy(update={"output": str(tmp_path / "file")}))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("text", ["mine, without an end of line", '{"text": "a"}\n{"text": "b"}', "\n\nmine"])
def test_somebodys_file_is_no_journal(tmp_path: Path, text: str) -> None:
    """A journal's last line is cut off if it has no end: so would be that of any file."""
    file = tmp_path / "notes.jsonl"
    file.write_text(text)
    with pytest.raises(UserError, match=r"notes\.jsonl is not a journal of Optuna"):
        Search(made(tmp_path, storage=str(file)))
    assert file.read_text() == text
    assert not (tmp_path / "notes.jsonl.lock").exists()


def test_a_folder_of_something_else_is_no_searchs(tmp_path: Path) -> None:
    folder = tmp_path / "out/search"
    folder.mkdir(parents=True)
    (folder / "trials.csv").write_text("mine")
    with pytest.raises(UserError, match=r"holds trials\.csv, which no search wrote"):
        Search(made(tmp_path))
    with pytest.raises(UserError, match=r"holds trials\.csv, which trimtab did not write"):
        stages.run(made(tmp_path), overwrite=True)
    assert [f.name for f in folder.iterdir()] == ["trials.csv"]


def test_a_search_at_work_is_not_overwritten(tmp_path: Path) -> None:
    used = made(tmp_path)
    found = Search(used)
    trial = found.ledger.claim(found.wish)
    assert trial is not None
    assert ledger.busy(str(tmp_path / "out/search/journal.log"), used.name)
    with pytest.raises(UserError, match=r"journal\.log is at work; wait for it"):
        stages.run(used, overwrite=True)
    found.ledger.fail(trial, "dead", "interrupted")
    assert not ledger.busy(str(tmp_path / "out/search/journal.log"), used.name)


def test_copies_of_points_stay(tmp_path: Path) -> None:
    workers.run(made(tmp_path))
    points = tmp_path / "out/search/points"
    (points / "mine.yaml").write_text("mine")
    (points / "99.yaml").write_text("of a longer front")
    workers.run(made(tmp_path))
    assert (points / "mine.yaml").read_text() == "mine"
    assert not (points / "99.yaml").exists()
    with pytest.raises(UserError, match=r"holds points/mine\.yaml, which trimtab did not write"):
        stages.run(made(tmp_path), overwrite=True)


# ---- families that have no name for their norm --------------------------------------------------------------------------

SIZES: dict[str, Any] = {"vocab_size": 260, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES: dict[str, PreTrainedConfig] = {
    "phi": PhiConfig(**SIZES, intermediate_size=128),
    "opt": OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=64),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=128),
}


ENDS = ("fc1", "dense_h_to_4h")


@pytest.mark.parametrize("name", FAMILIES)
def test_rounded_trials_of_any_family(name: str) -> None:
    """Pythia and Phi call their last norm otherwise than Llama; KL against transformers' own logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[name]), dtype=torch.float32).eval()
    linear = next(n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n.endswith(ENDS))
    torch.nn.init.normal_(model.get_submodule(linear).weight, std=1.0)
    rules = trimtab.recipe.rules.parse_rules([{"match": linear, "grid": {"bits": 2, "group": 32}}])
    assert rules is not None
    used = recipe.from_dict({"model": {"path": "x"}, "method": "rtn", "train": {"steps": 0}})
    ids = torch.arange(64).view(2, 32) * 5 % 250
    found = Rounded(model, used, ids)(rules, 0)
    with torch.no_grad():
        p = model(input_ids=ids).logits.double().log_softmax(-1)
        q = trimtab.prepare(model, trimtab.methods.Rtn(), rules)(input_ids=ids).logits.double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True).item() / ids.numel()
    assert kl > 0
    assert found == pytest.approx(kl, rel=1e-3)
