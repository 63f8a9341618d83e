"""What several processes are refused, planned and told, found out in one."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tiny
import trimtab
from trimtab import processes
from trimtab.ending import Terminated
from trimtab.errors import UserError
from trimtab.memory.plan import plan
from trimtab.models import load
from trimtab.models.sharding import to_first
from trimtab.models.sources import open_source
from trimtab.pipeline import starting
from trimtab.recipe.fields import StartBlock
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training import parted
from trimtab.training.interrupt import EndsAfterTheStep, Interrupted
from trimtab.training.options import check_training
from trimtab.training.ours import Ours


def recipe(given: Path, **train: Any) -> Recipe:
    return from_dict(tiny.recipe(given / "model", given / "data.jsonl", given / "out", train=train))


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts them."""
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)


def test_one_process_is_the_first_and_waits_for_nobody() -> None:
    assert (processes.count(), processes.rank(), processes.is_first()) == (1, 0, True)
    with processes.together():
        processes.barrier()
        assert processes.first(lambda: 3) == processes.first_before(lambda: 3) == processes.total(3) == 3
        assert processes.any_of(True)
        assert not processes.any_of(False)


@pytest.mark.usefixtures("two")
def test_a_starter_says_which_process_this_is() -> None:
    assert (processes.count(), processes.rank(), processes.is_first()) == (2, 1, False)


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(
    ("train", "said"),
    {
        "the batch": ({"batch_tokens": 64}, r"x block_tokens = 128; set train.batch_tokens=128, or train.micro_batch=1"),
        "none": ({"shard": "none"}, r"train.shard: none, and 2 processes were started"),
        "others": ({"processes": 8}, r"train.processes: 8, and there are 2; .* --nproc_per_node 8"),
        "kto": ({"objective": "kto"}, r"kto trains by one process$"),
        "dpo": ({"objective": "dpo", "shard": "fsdp"}, r"dpo trains by one process, or train.shard=ddp"),
    }.values(),
)  # fmt: skip
def test_what_two_do_not_do_is_refused(given: Path, train: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check_training(recipe(given, **train))


@pytest.mark.usefixtures("two")
def test_one_device_is_not_named_for_two(given: Path) -> None:
    values = tiny.recipe(given / "model", given / "data.jsonl", given / "out")
    values["model"]["device"] = "cuda:0"
    with pytest.raises(UserError, match=r"cuda:0 names one device, and there are 2 processes; use cuda or auto"):
        check_training(from_dict(values))


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which GPUs became the current one, on a machine with one of them."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    return chosen


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("here", [1, 2])
def test_each_process_takes_a_gpu(here: int, one_gpu: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(here))
    processes.take_device("cpu")
    assert one_gpu == []
    if here == 2:
        with pytest.raises(UserError, match=r"2 processes .* has 1 GPU; start 1, or set model.device=cpu"):
            processes.take_device("auto")
    else:
        processes.take_device("cuda")
        assert one_gpu == [0]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize("named", ["cuda", "auto", torch.device("cuda"), "cuda:0", "cpu"])
def test_each_process_loads_its_parts_to_its_gpu(
    named: Any, given: Path, one_gpu: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a loop's own `torch.cuda.set_device`. Two GPUs are pretended to be there, until one is to be used."""
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: [0, *one_gpu][-1])
    found: list[torch.device] = []

    def parting(shard: Any, device: torch.device) -> Any:
        found.append(device)
        raise UserError("enough")

    monkeypatch.setattr(load, "_parting", parting)
    with pytest.raises(UserError, match=r"^enough$"):
        trimtab.load(str(given / "model"), device=named, shard=True)
    number = re.search(r":(\d)", str(named))
    assert found == [torch.device("cpu") if named == "cpu" else torch.device("cuda", int(number[1]) if number else 1)]
    with pytest.raises(UserError, match=r"^enough$"):
        trimtab.load(str(given / "model"), device="cpu")
    assert one_gpu == ([] if number or named == "cpu" else [1])


@pytest.mark.usefixtures("one_gpu")
def test_a_model_on_the_cpu_is_parted_there(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds: list[str] = []
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(parted, "mesh_of", kinds.append)
    monkeypatch.setattr(parted, "shard", lambda model, mesh: model)
    values = tiny.recipe(given / "model", given / "data.jsonl", given / "out", train={"shard": "fsdp"})
    values["model"]["device"] = "cpu"
    trainer = SimpleNamespace(args=SimpleNamespace(world_size=2), model=torch.nn.Linear(2, 2), groups=[])
    parted.part(trainer, from_dict(values))
    assert kinds == ["cpu"]


@pytest.mark.usefixtures("two")
def test_the_second_process_holds_no_tensor_that_it_has_asked_for() -> None:
    kept = to_first(torch.ones(8, dtype=torch.bfloat16))
    assert (kept.dtype, kept.untyped_storage().nbytes()) == (torch.bfloat16, 0)


@pytest.mark.usefixtures("two")
def test_ctrl_c_is_no_failure_that_another_process_had_first() -> None:
    store = dist.HashStore()
    store.set("failed", "0")
    processes._hear(store, KeyboardInterrupt, KeyboardInterrupt(), None)  # raises Elsewhere else, after a while
    with pytest.raises(processes.Elsewhere):  # SIGTERM is how the others are ended then, and they have nothing to say
        processes._hear(store, Terminated, Terminated(), None)


def test_the_end_is_what_all_have_agreed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    ends, control = EndsAfterTheStep(lambda _: None), SimpleNamespace(should_save=False, should_training_stop=False)
    ends.asked = True
    assert not ends.agreed, "others were not asked yet, and may be measuring"
    ends.on_step_end(None, SimpleNamespace(global_step=1), control)
    assert ends.agreed
    other = EndsAfterTheStep(lambda _: None)
    monkeypatch.setattr(processes, "any_of", lambda asked: True)
    with pytest.raises(Interrupted):
        other.check(3, 3)


def test_a_loss_of_another_process_that_is_no_number_stops_this_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    trainer: Any = SimpleNamespace(
        _losses=torch.tensor(1.0),
        args=SimpleNamespace(should_save=True, output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=2),
    )
    Ours._look(trainer)
    monkeypatch.setattr(processes, "any_of", lambda asked: True)
    with pytest.raises(processes.Elsewhere):
        Ours._look(trainer)
    assert not list(tmp_path.iterdir()), "the process that saves removes the checkpoint that gave it"


@pytest.mark.usefixtures("two")
def test_two_take_what_they_can(given: Path) -> None:
    check_training(recipe(given, shard="fsdp"))


@pytest.mark.parametrize(
    ("variable", "said"), [("ACCELERATE_USE_DEEPSPEED", "DeepSpeed: "), ("ACCELERATE_USE_FSDP", "train.shard=fsdp")]
)
def test_wrappers_of_accelerate_are_refused(
    given: Path, variable: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(UserError, match=said):
        check_training(recipe(given))


def test_processes_are_not_started_by_a_call(given: Path) -> None:
    with pytest.raises(UserError, match=r"train.processes: 2, and there is one; `trimtab run` starts them"):
        trimtab.run(recipe(given, processes=2))


def test_stages_before_training_are_of_one_process(given: Path) -> None:
    values = tiny.recipe(given / "model", given / "data.jsonl", given / "out", train={"processes": 2})
    with pytest.raises(UserError, match=r"prune, search: are stages of one process"):
        trimtab.run({**values, "prune": {"ratio": 0.2}})


def test_several_gpus_are_pointed_out(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert starting.hint(recipe(given)) == ()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    (line,) = starting.hint(recipe(given))
    assert "add train.processes=4 to this command" in line
    assert "torchrun --nproc_per_node 4 -m trimtab run recipe.yaml" in line
    assert starting.hint(recipe(given, shard="none")) == ()


def test_a_plan_is_that_of_one_process(given: Path) -> None:
    def planned(**train: Any) -> Any:
        chosen = recipe(given, **train)
        return plan(chosen, open_source(chosen.model.path).layout())

    one, ddp, fsdp = planned(), planned(processes=2), planned(processes=2, shard="fsdp")
    assert (ddp.codes, ddp.activations) == (one.codes, one.activations)
    assert ddp.apart > one.apart, "a step is one micro-batch now, whose gradients come as its activations go"
    assert (fsdp.codes, fsdp.optimizer) == (-(-one.codes // 2), -(-one.optimizer // 2))
    assert fsdp.temporary > one.temporary, "blocks are gathered"
    assert (one.before, ddp.before, fsdp.before) == (0, 0, 0), "it is loaded in parts, within what training takes"


def test_gptq_works_beside_the_parts(given: Path) -> None:
    def before(**train: Any) -> int:
        chosen = recipe(given, **train).model_copy(update={"start": StartBlock(name="gptq", tokens=256)})
        return plan(chosen, open_source(chosen.model.path).layout()).before

    one, two, eight = before(), before(processes=2, shard="fsdp"), before(processes=8, shard="fsdp", batch_tokens=512)
    stored = plan(recipe(given), open_source(str(given / "model")).layout())
    whole = stored.codes + stored.float_parameters + stored.adapters
    assert two - eight == pytest.approx(whole * (1 / 2 - 1 / 8), rel=1e-3)
    assert one - two < whole / 2, "one block is whole, and what lies outside"


def test_a_cast_of_what_is_sharded_is_refused() -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = trimtab.prepare(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), trimtab.methods.LrQat(rank=2))
    with pytest.raises(UserError, match=r"param_dtype = torch.bfloat16: would cast codes"):
        trimtab.shard(model, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with pytest.raises(UserError, match=r"shard: there is one process"):
        trimtab.shard(model)
    assert trimtab.gather(model) is model
