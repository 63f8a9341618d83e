"""A prepared model in the trainers that people have: TRL's, transformers', a loop of their own; folded to the bit after."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.methods import LrQat, Method, Peqa, QaHira, Qlora
from trimtab.training.grpo import ReferredGRPOTrainer

# TRL calls transformers' own old names.
pytestmark = pytest.mark.filterwarnings("ignore:.gradient_checkpointing_(en|dis)able. is deprecated:FutureWarning")

IDS = torch.arange(24).view(2, 12)
REAL = {"bits": 4, "group": 32, "zero": "real"}
HEAD = [{"match": "lm_head", "grid": REAL}, {"match": "*", "grid": REAL}]
TIED = [{"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}, {"match": "*", "grid": REAL}]
PAIRS = [{"prompt": f"{i} plus {i} is ", "chosen": f"{2 * i}.", "rejected": "blue."} for i in range(4)]
OPTIONS: dict[str, Any] = {
    "max_steps": 2, "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True,
    "save_strategy": "no", "logging_steps": 1, "learning_rate": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny.model(folder / name, tied=name == "tied") for name in ("tied", "untied")}


def prepared(path: Path, method: Method | None = None, tied: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return tt.prepare(model, method or LrQat(rank=4, alpha=64.0), TIED if tied else HEAD)


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def sft(model: PreTrainedModel, out: Path) -> Any:
    rows = Dataset.from_list([{"text": "one and one are two"}] * 4)
    return SFTTrainer(model, SFTConfig(str(out), **OPTIONS), train_dataset=rows, processing_class=tiny.tokenizer())


def dpo(model: PreTrainedModel, out: Path) -> Any:
    return DPOTrainer(
        model, ref_model=tt.reference(model), args=DPOConfig(str(out), **OPTIONS),
        train_dataset=Dataset.from_list(PAIRS), processing_class=tiny.tokenizer(),
    )  # fmt: skip


def kto(model: PreTrainedModel, out: Path) -> Any:
    rows = [
        {"prompt": p["prompt"], "completion": p[k], "label": k == "chosen"} for p in PAIRS for k in p if k != "prompt"
    ]
    return KTOTrainer(
        model, ref_model=tt.reference(model), args=KTOConfig(str(out), **OPTIONS),
        train_dataset=Dataset.from_list(rows), processing_class=tiny.tokenizer(),
    )  # fmt: skip


def orpo(model: PreTrainedModel, out: Path) -> Any:
    args = ORPOConfig(str(out), max_length=64, **OPTIONS)
    return ORPOTrainer(model, args, train_dataset=Dataset.from_list(PAIRS), processing_class=tiny.tokenizer())


def digits(completions: list[str], **_: Any) -> list[float]:
    return [float(i + sum(c.isdigit() for c in text)) for i, text in enumerate(completions)]


def grpo(model: PreTrainedModel, out: Path) -> Any:
    args = GRPOConfig(str(out), num_generations=2, max_completion_length=6, **OPTIONS)
    rows = Dataset.from_list([{"prompt": p["prompt"]} for p in PAIRS])
    return GRPOTrainer(model, digits, args, train_dataset=rows, processing_class=tiny.tokenizer())


def plain(model: PreTrainedModel, out: Path) -> Any:
    rows = Dataset.from_dict({"input_ids": IDS.tolist(), "labels": IDS.tolist()})
    return Trainer(model, TrainingArguments(str(out), **OPTIONS), train_dataset=rows)


class Loop:
    """A loop by hand, with what `Trainer` calls it."""

    def __init__(self, model: PreTrainedModel, _: Path) -> None:
        self.model = model

    def train(self) -> None:
        optimizer = torch.optim.AdamW((p for p in self.model.parameters() if p.requires_grad), lr=1e-2)
        self.model.train()
        for _ in range(2):
            self.model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


TRAINERS: dict[str, Callable[..., Any]] = {
    "sft": sft, "dpo": dpo, "kto": kto, "orpo": orpo, "grpo": grpo, "transformers": plain, "loop": Loop
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINERS)
def test_trains_and_folds(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    """Every trainer, with a head in few bits that is trained: what was trained is what is folded."""
    model = prepared(models["untied"])
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = logits(model)
    TRAINERS[name](model, tmp_path).train()
    model.eval()
    assert any(n.startswith("lm_head.") for n in start)
    still = [n for n, p in model.named_parameters() if n in start and torch.equal(p, start[n])]
    assert not [n for n in still if not n.endswith("delta.A")], "A moves when B has"
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    trained = logits(model)
    assert not torch.equal(trained, before)
    report = tt.fold(model)
    assert {layer.kind for layer in report} == {"bitwise"}
    assert sum(layer.differing for layer in report) == 0
    assert torch.equal(logits(model), trained)


def test_trl_with_its_own_defaults(models: dict[str, Path], tmp_path: Path) -> None:
    """Autocast to bfloat16 and activation checkpointing are on, the head is tied: what was trained is what is folded."""
    model = prepared(models["tied"], tied=True)
    given = {k: v for k, v in OPTIONS.items() if k != "bf16"}
    trainer = DPOTrainer(
        model, ref_model=tt.reference(model), args=DPOConfig(str(tmp_path), **given),
        train_dataset=Dataset.from_list(PAIRS), processing_class=tiny.tokenizer(),
    )  # fmt: skip
    assert trainer.args.bf16
    assert trainer.args.gradient_checkpointing
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693147, abs=1e-4)
    assert losses[1] != losses[0]
    trained = logits(model.eval())
    assert sum(layer.differing for layer in tt.fold(model)) == 0
    assert torch.equal(logits(model), trained)


@pytest.mark.parametrize("method", [LrQat(rank=4, alpha=64.0), Peqa(), QaHira(), Qlora(rank=4)], ids=lambda m: m.name)
def test_the_gradient_of_a_head_by_its_weight_is_that_of_its_forward(method: Method, models: dict[str, Path]) -> None:
    """Losses that multiply by `lm_head.weight` train the head's adapter as the layer itself does."""
    head: Any = prepared(models["untied"], method).lm_head
    with torch.no_grad():
        for p in head.adapter.parameters():
            p.add_(0.01 * torch.randn_like(p))
    x, pull = torch.randn(5, 64), torch.randn(5, 260)
    found = []
    for y in (head(x), torch.nn.functional.linear(x, head.weight)):
        (y * pull).sum().backward()
        found.append((y.detach(), [p.grad.clone() for p in head.adapter.parameters()]))
        head.adapter.zero_grad()
    (y, wanted), (by_weight, got) = found
    torch.testing.assert_close(by_weight, y, rtol=1e-4, atol=1e-5)
    for a, b in zip(got, wanted, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "data": lambda head, d: head.weight.data.add_(d),
    "in place": lambda head, d: head.weight.add_(d),
    "operator": lambda head, d: head.weight.__iadd__(d),
    "copy": lambda head, d: head.weight.copy_(d),
    "part": lambda head, d: head.weight.__setitem__(0, d[0]),
    "out": lambda head, d: torch.add(d, d, out=head.weight),
    "init": lambda head, _: torch.nn.init.zeros_(head.weight),
}


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("way", WRITES)
def test_nothing_is_written_into_the_weight_of_a_head(way: str, adapter: bool, models: dict[str, Path]) -> None:
    """A merge into a matrix that is computed would be lost without a word."""
    model = prepared(models["untied"])
    if not adapter:
        tt.fold(model)
    delta = torch.ones(260, 64)
    with torch.no_grad(), pytest.raises(UserError, match=r"^lm_head\.weight is computed from few bits.*trimtab\.fold"):
        WRITES[way](model.lm_head, delta)
    for layer in (model.lm_head, model.model.layers[0].mlp.up_proj):
        with pytest.raises(AttributeError, match=r"weight cannot be set: its matrix is stored"):
            layer.weight = torch.nn.Parameter(delta)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_preparing_for_kbit_training_changes_nothing(checkpointing: bool, models: dict[str, Path]) -> None:
    """The habit of QLoRA users froze every adapter, and cast what is stored."""
    model = prepared(models["untied"], Qlora(rank=4))
    before = {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()}
    logits_before = logits(model)
    assert not model.hqq_quantized, "it is told to that function alone"
    assert dict(model.named_parameters()).keys() == before.keys()
    options = {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "use_gradient_checkpointing": checkpointing}
    assert prepare_model_for_kbit_training(model, **options) is model
    assert {n: (p.requires_grad, p.dtype) for n, p in model.named_parameters()} == before
    assert torch.equal(logits(model), logits_before)
    assert model.is_gradient_checkpointing == checkpointing
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_another_adapter_is_refused_with_what_to_do(target: str, models: dict[str, Path], tmp_path: Path) -> None:
    """peft's own words are `Target module QuantLinear is not supported`; around a float layer it would freeze ours."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(models["untied"], dtype=torch.float32)
    tt.prepare(model, Qlora(rank=4), [{"match": "*", "grid": REAL}])
    names = [n for n, _ in model.named_modules()]
    wants = [n for n, p in model.named_parameters() if p.requires_grad]
    lora = LoraConfig(r=2, target_modules=[target])
    rows = Dataset.from_list([{"text": "one and one are two"}] * 4)
    tries: list[Callable[[], Any]] = [
        lambda: SFTTrainer(
            model, SFTConfig(str(tmp_path), **OPTIONS), train_dataset=rows, peft_config=lora,
            processing_class=tiny.tokenizer(),
        ),
        lambda: get_peft_model(model, copy.deepcopy(lora)),
    ]  # fmt: skip
    for attempt in tries:
        with pytest.raises(UserError, match=r"^peft_config: .*leave peft_config out.*trimtab\.methods\.Qlora"):
            attempt()
    assert [n for n, _ in model.named_modules()] == names
    assert [n for n, p in model.named_parameters() if p.requires_grad] == wants


@pytest.mark.parametrize("tied", [True, False])
def test_parameters_are_counted_as_peft_counts_them(
    tied: bool, models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = models["tied" if tied else "untied"]
    theirs = get_peft_model(
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32),
        LoraConfig(r=4, target_modules="all-linear" if tied else r".*(_proj|lm_head)"),
    )
    ours = prepared(path, Qlora(rank=4), tied=tied)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    wanted = capsys.readouterr().out
    ours.print_trainable_parameters()
    assert capsys.readouterr().out == wanted != ""


REFERENCES: dict[str, tuple[Callable[..., Any], dict[str, Any], bool, bool]] = {
    "by name": (DPOTrainer, {}, False, True),
    "ours": (DPOTrainer, {}, True, False),
    "precomputed": (DPOTrainer, {"precompute_ref_log_probs": True}, False, False),
    "grpo": (GRPOTrainer, {}, False, False),
    "grpo by name": (GRPOTrainer, {"beta": 0.1}, False, True),
    "grpo with ours": (ReferredGRPOTrainer, {"beta": 0.1}, True, False),
    "sft": (SFTTrainer, {}, False, False),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_that_is_not_step_0_is_told(
    name: str, models: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """TRL makes one by the model's name where it is given none: the float model."""
    kind, options, ours, told = REFERENCES[name]
    model = prepared(models["untied"])
    options = {**OPTIONS, "max_steps": 1, **options}
    given: dict[str, Any] = {"train_dataset": Dataset.from_list(PAIRS), "processing_class": tiny.tokenizer()}
    if kind is DPOTrainer:
        given |= {"args": DPOConfig(str(tmp_path), **options)} | ({"ref_model": tt.reference(model)} if ours else {})
    elif kind is SFTTrainer:
        given |= {
            "args": SFTConfig(str(tmp_path), **options),
            "train_dataset": Dataset.from_list([{"text": "one two"}] * 4),
        }
    else:
        given |= {"args": GRPOConfig(str(tmp_path), num_generations=2, max_completion_length=2, **options)}
        given |= {"reward_funcs": digits} | ({"ref_model": tt.reference(model)} if ours else {})
    trainer = kind(model=model, **given)
    with caplog.at_level("WARNING", logger="trimtab"):
        trainer.train()
    assert ("is not the model at step 0" in caplog.text) == told
    if name == "grpo with ours":
        assert trainer.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6)
