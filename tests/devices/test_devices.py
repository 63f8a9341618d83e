"""What names of devices mean here, and what is refused of them before any work is done."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import tiny
import trimtab as tt
from trimtab import devices
from trimtab.errors import UserError
from trimtab.models import reload
from trimtab.models.attention import attending, check_attention
from trimtab.models.kv_cache import attention_of
from trimtab.quant.activations import KvCache
from trimtab.quant.int32_packing import pack_int32

CPU = torch.device("cpu")


@pytest.fixture
def three_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three CUDA devices, of which the second is current."""
    has = SimpleNamespace(is_available=lambda: True, device_count=lambda: 3, current_device=lambda: 1)
    has.get_device_name = lambda device: "a GPU"
    has.mem_get_info = lambda device: (7, 9)
    lacks = SimpleNamespace(is_available=lambda: False)
    monkeypatch.setattr(torch, "get_device_module", lambda d: has if torch.device(d).type == "cuda" else lacks)


NAMES = {"auto": "cuda:1", "cuda": "cuda:1", "cuda:2": "cuda:2", "cpu": "cpu"}


@pytest.mark.parametrize("name", NAMES)
def test_names(three_gpus: None, name: str) -> None:
    assert devices.resolve(name) == torch.device(NAMES[name])
    assert devices.resolve(torch.device(NAMES[name])) == torch.device(NAMES[name])


REFUSED = {
    "gpu": "model.device: 'gpu' is none of auto, cpu, cuda, cuda:N, mps, xpu",
    "cuda:x": "is none of",
    "cpu:1": "is none of",
    "cuda:3": "model.device: there is no cuda:3: cuda devices here are 0 to 2",
    "xpu": "model.device: xpu is not here .* set model.device=auto or cpu",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(three_gpus: None, name: str) -> None:
    with pytest.raises(UserError, match=REFUSED[name]):
        devices.resolve(name)


def test_described(three_gpus: None) -> None:
    assert devices.described(torch.device("cuda:2")) == "cuda:2 (a GPU)"
    assert devices.described(CPU) == "cpu"
    assert devices.memory(torch.device("cuda:2")) == (7, 9)
    assert devices.memory(CPU) is devices.peak_bytes(CPU) is None
    assert devices.beside_tensors("cuda", begun=True) < devices.beside_tensors("cuda")
    assert devices.beside_tensors("cpu") == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_here_is_refused_before_anything_is_read(text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(tmp_path / "no model", text, tmp_path / "out")
    with pytest.raises(UserError, match=r"model.device: cuda is not here \(torch .*\); set model.device=auto or cpu"):
        tt.run(values, device="cuda")
    with pytest.raises(UserError, match=r"^device: cuda is not here .* set device=auto or cpu"):
        tt.chat(str(tmp_path / "no model"), device="cuda")


def test_a_name_that_is_none_is_refused_with_the_recipe(model: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.device: 'gpu' is none of"):
        tt.run(tiny.recipe(model, text, tmp_path / "out", model={"device": "gpu"}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_plan_for_a_gpu_that_is_elsewhere(model: Path, text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, text, tmp_path / "out")
    here, there = tt.plan(values), tt.plan(values, device="cuda", memory="24GiB")
    assert (here.device, here.free, here.beside) == ("cpu", None, 0)
    assert (there.device, there.free, there.beside) == ("cuda", None, devices.beside_tensors("cuda"))
    assert there.total == here.total


def test_training_in_float16_is_refused_where_losses_are_not_scaled(model: Path, text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, text, tmp_path / "out", model={"dtype": "float16"})
    with pytest.raises(UserError, match=r"model.dtype: float16 on cpu trains without loss scaling"):
        tt.run(values, device="cpu")
    metrics = tt.run(values | {"train": {"steps": 0}}, device="cpu")  # which trains nothing
    assert metrics["max_logit_difference"] == 0


# ---- attention -----------------------------------------------------------------------------------------------------


def test_a_run_trains_with_its_attention_and_is_measured_with_its_own(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.training import ours

    seen, inside = set(), ours.Ours.training_step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.add(attention_of(self.model))
        return inside(self, *args, **kwargs)

    monkeypatch.setattr(ours.Ours, "training_step", step)
    values = tiny.recipe(model, text, tmp_path / "out", train={"attention": "eager", "steps": 2})
    metrics = tt.run(values)
    assert seen == {"eager"}
    assert metrics["max_logit_difference"] == 0
    assert tt.plan(values).activations > tt.plan(values, ["train.attention=sdpa"]).activations


def test_attention_comes_back(model: Path) -> None:
    loaded, _ = tt.load(str(model))
    with attending(loaded, "eager"):
        assert attention_of(loaded) == "eager"
    assert attention_of(loaded) == "sdpa"
    tt.simulate(loaded, kv=KvCache(8))
    with (
        pytest.raises(UserError, match=r"train.attention: eager: this model rounds its keys and values"),
        attending(loaded, "eager"),
    ):
        pass


FLASH = {
    "device": (torch.bfloat16, CPU, "flash_attention_2 runs on CUDA, and model.device is cpu; use sdpa"),
    "dtype": (torch.float32, torch.device("cuda:0"), "computes in bfloat16 or float16; set model.dtype"),
    "library": (torch.bfloat16, torch.device("cuda:0"), "needs a library: pip install flash-attn; or use sdpa"),
}


@pytest.mark.parametrize("case", FLASH)
def test_flash_attention_is_refused_where_it_cannot_serve(model: Path, case: str) -> None:
    dtype, device, said = FLASH[case]
    with pytest.raises(UserError, match="flash_attention_2") as raised:
        check_attention(None, "flash_attention_2", dtype, device, kv=False)  # type: ignore[arg-type]
    assert said in str(raised.value)


def test_rounded_keys_and_values_have_an_attention_of_their_own(model: Path, text: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, text, tmp_path / "out", train={"attention": "eager"}, kv={"bits": 8})
    with pytest.raises(UserError, match=r"train.attention: eager: `kv` rounds keys and values"):
        tt.run(values)


# ---- what was found on the way ------------------------------------------------------------------------------------


def test_ids_that_are_not_contiguous(model: Path) -> None:
    loaded, _ = tt.load(str(model), tt.methods.Rtn(), tiny.RULES)
    ids = torch.arange(64)
    assert torch.equal(loaded.get_input_embeddings()(ids[::2]), loaded.get_input_embeddings()(ids[::2].clone()))


def test_words_are_packed_where_the_codes_are() -> None:
    assert pack_int32(torch.zeros(2, 32, dtype=torch.uint8, device="meta"), 3).is_meta


def test_a_saved_model_without_accelerate_is_moved_as_a_whole(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    loaded, tokenizer = tt.load(str(model), tt.methods.Rtn())
    tt.save(loaded, tmp_path / "saved", tokenizer)
    monkeypatch.setattr(reload, "is_accelerate_available", lambda: False)
    reload._warn.cache_clear()
    for _ in range(2):
        found = reload.reload(tmp_path / "saved", torch.bfloat16, torch.device("meta"))
        assert {p.device.type for p in found.parameters()} == {"meta"}
    assert [r.message.partition(",")[0] for r in caplog.records if r.name == "trimtab"] == [
        "accelerate is not installed"
    ]
