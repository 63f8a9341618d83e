"""A model in parts, in one process that is all there are: what is gathered of it is what it was, in all that it does."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from transformers import LlamaForCausalLM, PreTrainedModel

import tiny
import trimtab
from trimtab.models import sharding
from trimtab.models.simulate import simulate
from trimtab.quant.activations import KvCache

IDS = torch.arange(24).view(1, 24)


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of one process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def in_parts(path: Path, mesh: DeviceMesh) -> PreTrainedModel:
    model, _ = trimtab.load(str(path), trimtab.methods.LrQat(rank=2), rules=tiny.RULES, dtype=torch.float32, shard=mesh)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    found: torch.Tensor = model(IDS).logits
    return found


def test_modules_of_a_gathered_model_ask_its_own_config(tmp_path: Path, mesh: DeviceMesh) -> None:
    model = in_parts(tiny.model(tmp_path / "model"), mesh)
    skeleton, whole = sharding.skeleton_of(model), trimtab.gather(model)
    assert whole is not None
    for made in (skeleton, whole):
        configs = [module.config for module in made.modules() if hasattr(module, "config")]
        assert len(configs) > 4
        assert all(config is made.config for config in configs)
        assert made.config is not model.config
        assert made.config.quantization_config == model.config.quantization_config


def test_a_gathered_model_rounds_the_keys_that_it_is_told_to(tmp_path: Path, mesh: DeviceMesh) -> None:
    tiny.model(tmp_path / "model")
    expected, _ = trimtab.load(
        str(tmp_path / "model"), trimtab.methods.LrQat(rank=2), rules=tiny.RULES, dtype=torch.float32
    )
    model = in_parts(tmp_path / "model", mesh)
    plain = logits(expected)
    for each in (expected, model):
        simulate(each, kv=KvCache(bits=4))
    whole = trimtab.gather(model)
    assert whole is not None
    assert not torch.equal(logits(expected), plain)
    assert torch.equal(logits(whole), logits(expected))
    after = trimtab.gather(in_parts(tmp_path / "model", mesh))
    assert after is not None
    simulate(after, kv=KvCache(bits=4))
    assert torch.equal(logits(after), logits(expected))


def test_buffers_that_are_stored_are_read(tmp_path: Path, mesh: DeviceMesh) -> None:
    """Rotary frequencies that a cast has rounded are saved, since they would be made again."""
    model = LlamaForCausalLM.from_pretrained(tiny.model(tmp_path / "model"), dtype=torch.float32).bfloat16()
    trimtab.save(trimtab.prepare(model, trimtab.methods.Rtn(), tiny.RULES), tmp_path / "saved")
    whole, parted = (trimtab.load(str(tmp_path / "saved"), shard=shard)[0] for shard in (False, mesh))
    names = whole.config.quantization_config.buffers
    assert "model.rotary_emb.inv_freq" in names
    for name in names:
        assert whole.get_buffer(name).dtype == torch.bfloat16
        torch.testing.assert_close(parted.get_buffer(name), whole.get_buffer(name), rtol=0, atol=0)
    gathered = trimtab.gather(parted)
    assert gathered is not None
    assert torch.equal(logits(gathered), logits(whole))
