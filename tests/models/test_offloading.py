"""A saved model that others place: on the disk by accelerate, by plans of transformers, by DeepSpeed."""

from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.distributed.configuration_utils import DistributedConfig

import tiny
import trimtab
from trimtab.errors import UserError
from trimtab.layers.linear import QuantLinear
from trimtab.models import offloading

IDS = torch.arange(20).view(1, 20)
REST = ("model.layers", "model.norm", "model.rotary_emb", "lm_head")
HEAD = [{"match": "lm_head", "grid": {"bits": 4, "group": 32}}, *tiny.RULES]


@pytest.fixture(scope="module", params=["tied", "a head of its own"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quantized model with adapters that moved, its embedding and head in few bits."""
    folder, tied = tmp_path_factory.mktemp("offloading"), request.param == "tied"
    tiny.model(folder / "model", layers=3, tied=tied)
    model, tokenizer = trimtab.load(
        str(folder / "model"), trimtab.methods.LrQat(rank=4), rules=tiny.RULES if tied else HEAD
    )
    torch.manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += torch.rand_like(p) * 0.01
    trimtab.save(model, folder / "saved", tokenizer)
    assert isinstance(model.get_output_embeddings(), QuantLinear)
    return folder / "saved"


def placed(saved: Path, folder: Path, **options: Any) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(saved, offload_folder=str(folder), **options)
    return found


@pytest.mark.parametrize("device_map", ["auto", "by hand", "all"])
def test_a_model_partly_on_the_disk_answers_as_a_whole_one(saved: Path, tmp_path: Path, device_map: str) -> None:
    """Logits and generated tokens; between forwards nothing of it is in memory."""
    whole = AutoModelForCausalLM.from_pretrained(saved)
    bytes_ = sum(p.numel() * p.element_size() for p in whole.parameters())
    maps: dict[str, dict[str, Any]] = {
        "auto": {"device_map": "auto", "max_memory": {"cpu": bytes_ // 2}},
        "by hand": {"device_map": {"model.embed_tokens": "disk", **dict.fromkeys(REST, "cpu")}},
        "all": {"device_map": {"": "disk"}},
    }
    model = placed(saved, tmp_path, **maps[device_map])
    assert "disk" in model.hf_device_map.values()
    away = {name for name, p in model.named_parameters() if p.is_meta}
    assert away
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, whole(IDS).logits)
    told: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    assert torch.equal(model.generate(IDS, **told), whole.generate(IDS, **told))
    assert {name for name, p in model.named_parameters() if p.is_meta} == away


def test_what_fits_stays_in_memory(saved: Path, tmp_path: Path) -> None:
    model = placed(saved, tmp_path, device_map="auto", max_memory={"cpu": 10**9})
    assert not any(p.is_meta for p in model.parameters())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("name", offloading._SIZES)
def test_parallelism_of_transformers_is_refused(saved: Path, name: str) -> None:
    """Of two processes by `tp_plan`: `test_several` has them. Of one it is no parallelism."""
    config = AutoConfig.from_pretrained(saved)
    config.distributed_config = SimpleNamespace(**{name: 2})
    with pytest.raises(UserError, match=rf"^[\w ]+ \({name} = 2\): .*shard=True.*train.shard=fsdp$"):
        offloading.refuse_other_parting(config)
    config.distributed_config = SimpleNamespace(**{name: 1})
    offloading.refuse_other_parting(config)


def test_every_size_of_transformers_is_looked_at(saved: Path) -> None:
    assert {field.name for field in fields(DistributedConfig) if field.name.endswith("_size")} == {*offloading._SIZES}
    config = AutoConfig.from_pretrained(saved)
    config.distributed_config = DistributedConfig(tp_size=2)
    with pytest.raises(UserError, match=r"^tensor parallelism \(tp_size = 2\): "):
        AutoModelForCausalLM.from_pretrained(saved, config=config)


def test_zero_3_is_refused_by_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As transformers sees it: a live config of DeepSpeed, which is not installed here."""
    from transformers.integrations import deepspeed

    zero = SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: zero)
    with pytest.raises(UserError, match=r"^DeepSpeed: ZeRO-3 casts and flattens .*train.shard=fsdp$"):
        offloading.refuse_other_parting(AutoConfig.from_pretrained(saved))


@pytest.mark.parametrize("stage", [2, 3, None])
def test_a_trainer_by_deepspeed_is_refused(saved: Path, tmp_path: Path, stage: int) -> None:
    """When it is made, before it prepares anything: here its callbacks are told what they are told then."""
    from transformers import Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(saved)
    trainer = Trainer(model, TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"))
    told = trainer.args, trainer.state, trainer.control
    trainer.callback_handler.on_init_end(*told)
    trainer.args.deepspeed_plugin = SimpleNamespace(zero_stage=stage)  # what `deepspeed=` leaves there
    with pytest.raises(UserError, match=rf"^DeepSpeed: {f'ZeRO-{stage}' if stage else 'it'} casts and flattens"):
        trainer.callback_handler.on_init_end(*told)
