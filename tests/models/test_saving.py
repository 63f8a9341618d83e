"""`save_pretrained` of a prepared model: what peft would where that is all, the whole model elsewhere; with a card."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import tiny
import trimtab as tt
from trimtab.errors import UserError
from trimtab.methods import Loftq, Lora, LrQat, Method, QBara, Qlora
from trimtab.models.adapter_files import config

IDS = torch.arange(24).view(2, 12)
NF4 = [{"match": "*", "grid": {"codebook": "nf4", "group": 64, "double_quant": True}}]
INT4 = [{"match": "*", "grid": {"bits": 4, "group": 32}}]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("models") / "untied", tied=False)


def prepared(path: Path, method: Method, rules: Any = None, *, loaded: bool = False) -> PreTrainedModel:
    torch.manual_seed(0)
    if loaded:
        model = tt.load(str(path), method, rules, dtype=torch.float32)[0]
    else:
        model = tt.prepare(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), method, rules)
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.add_(0.05 * torch.randn_like(p))
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("method", [Lora(rank=4), QBara(rank=4)], ids=lambda m: m.name)
def test_peft_loads_the_adapter_on_the_same_base(method: Method, loaded: bool, path: Path, tmp_path: Path) -> None:
    rules = [{"match": "*", "grid": "float"}]
    model = prepared(path, method, rules, loaded=loaded)
    model.save_pretrained(tmp_path / "a")
    names = {f.name for f in (tmp_path / "a").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "README.md"}
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(path)
    base = AutoModelForCausalLM.from_pretrained(config["base_model_name_or_path"], dtype=torch.float32)
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base, tmp_path / "a")), logits(model), rtol=1e-4, atol=1e-5
    )
    card = (tmp_path / "a" / "README.md").read_text()
    assert 'library_name: "peft"' in card
    assert 'PeftModel.from_pretrained(base, "a")' in card


def test_an_adapter_of_nf4_is_small_and_goes_on(path: Path, tmp_path: Path) -> None:
    """The same base is made again by the same grid, by ours and by bitsandbytes (tests/quant/test_codebook.py)."""
    model = prepared(path, Qlora(rank=4, alpha=8.0), NF4)
    model.save_pretrained(tmp_path / "a")
    stored = load_file(tmp_path / "a" / "adapter_model.safetensors")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(t.numel() for t in stored.values()) == trained
    assert 'bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True' in (tmp_path / "a" / "README.md").read_text()
    again, _ = tt.load(str(path), Qlora(rank=4, alpha=8.0), NF4, dtype=torch.float32)
    from trimtab.models.peft_init import start_from

    start_from(again, str(tmp_path / "a"))
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-6)


WHOLE: dict[str, tuple[Method, Any]] = {
    "folds": (LrQat(rank=4), INT4),
    "grid that peft has not": (Qlora(rank=4), INT4),
    "codes of its own": (Loftq(rank=4), NF4),
}


@pytest.mark.parametrize("name", WHOLE)
def test_elsewhere_the_whole_model_is_saved(
    name: str, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    method, rules = WHOLE[name]
    model = prepared(path, method, rules)
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        model.save_pretrained(tmp_path / "m")
    assert ("saved before folding: 14 layers" in caplog.text) == (name == "folds")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))
    card = (tmp_path / "m" / "README.md").read_text()
    assert 'library_name: "trimtab"' in card, "plain transformers cannot read it"
    assert f"14 adapters in the {'levels' if name == 'folds' else 'output'} place: not folded" in card
    if name == "folds":
        tt.fold(model)
        caplog.clear()
        model.save_pretrained(tmp_path / "folded")
        assert "saved before folding" not in caplog.text
        assert "not folded" not in (tmp_path / "folded" / "README.md").read_text()


def test_what_is_trained_besides_an_adapter_is_not_left_out(path: Path, tmp_path: Path) -> None:
    model = prepared(path, Lora(rank=4))
    model.model.norm.weight.requires_grad_(True)
    model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m" / "model.safetensors").exists()


@pytest.mark.parametrize("method", [Lora(rank=4), Qlora(rank=4)], ids=lambda m: m.name)
def test_save_writes_the_whole_model_without_a_word(
    method: Method, path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = prepared(path, method, NF4 if method.name == "qlora" else None)
    with caplog.at_level(logging.WARNING, logger="trimtab"):
        tt.save(model, tmp_path / "m")
    assert not caplog.text
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "m")), logits(model))


def test_a_trainer_goes_on_from_its_checkpoint_and_ends_with_the_adapter(path: Path, tmp_path: Path) -> None:
    rows = [{"input_ids": IDS[i], "labels": IDS[i]} for i in (0, 1)]
    options: dict[str, Any] = {
        "per_device_train_batch_size": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "save_steps": 2,
        "learning_rate": 1e-2, "max_steps": 4,
    }  # fmt: skip
    found = []
    for checkpoint in (None, str(tmp_path / "t" / "checkpoint-2")):
        torch.manual_seed(0)
        model = tt.prepare(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), Lora(rank=4))
        trainer = Trainer(model, TrainingArguments(str(tmp_path / "t"), **options), train_dataset=rows)  # type: ignore[arg-type]
        trainer.train(resume_from_checkpoint=checkpoint)
        found.append(logits(model.eval()))
    assert torch.equal(*found)
    trainer.save_model(str(tmp_path / "end"))
    assert (tmp_path / "end" / "adapter_config.json").exists()
    assert not (tmp_path / "end" / "model.safetensors").exists()


def files(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir()}


def test_one_form_takes_the_place_of_the_other(path: Path, tmp_path: Path) -> None:
    """An adapter's config beside a whole model has transformers load the float base and the old adapter, without a word."""
    out = tmp_path / "out"
    model = prepared(path, Lora(rank=4), [{"match": "*", "grid": "float"}])
    model.save_pretrained(out)
    assert "adapter_config.json" in files(out)
    whole = prepared(path, LrQat(rank=4), INT4)
    whole.save_pretrained(out)
    assert not {"adapter_config.json", "adapter_model.safetensors"} & files(out)
    assert "An adapter" not in (out / "README.md").read_text()
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(out)), logits(whole))
    model.save_pretrained(out)
    assert not {"model.safetensors", "config.json"} & files(out)
    assert "An adapter" in (out / "README.md").read_text()


def test_a_float_model_that_lies_there_is_not_removed(path: Path, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    AutoModelForCausalLM.from_pretrained(path).save_pretrained(out)
    held = (out / "model.safetensors").read_bytes()
    prepared(path, Lora(rank=4), [{"match": "*", "grid": "float"}]).save_pretrained(out)
    assert "adapter_config.json" in files(out)
    assert (out / "model.safetensors").read_bytes() == held


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("method", [Lora(rank=4), LrQat(rank=4)], ids=lambda m: m.name)
def test_nothing_is_saved_over_what_the_model_was_read_from(
    method: Method, loaded: bool, path: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(path, tmp_path / "base")
    rules = INT4 if method.name == "lr-qat" else [{"match": "*", "grid": "float"}]
    model, before = prepared(base, method, rules, loaded=loaded), files(base)
    held = (base / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="was read from there"):
        model.save_pretrained(base)
    assert files(base) == before
    assert (base / "model.safetensors").read_bytes() == held


_DOUBLE = {"codebook": "nf4", "group": 64, "double_quant": True}
NOT_BITSANDBYTES = {
    "some layers": [{"match": "*.mlp.*", "grid": _DOUBLE}, {"match": "*", "grid": "float"}],
    "two tables": [{"match": "*.mlp.*", "grid": {"codebook": "fp4", "group": 64}}, *NF4],
    "the embedding, too": [{"match": "model.embed_tokens", "grid": _DOUBLE}, *NF4],
    "the head, too": [{"match": "lm_head", "grid": _DOUBLE}, *NF4],
}


@pytest.mark.parametrize("name", NOT_BITSANDBYTES)
def test_what_bitsandbytes_would_not_round_so_is_saved_whole(name: str, path: Path, tmp_path: Path) -> None:
    """The codes could not be made again from the base and one config."""
    model = prepared(path, Qlora(rank=4), NOT_BITSANDBYTES[name])
    model.save_pretrained(tmp_path / "out")
    assert "model.safetensors" in files(tmp_path / "out")
    assert "adapter_config.json" not in files(tmp_path / "out")


def test_a_commit_is_named_as_peft_reads_it() -> None:
    found = config({"q": 4}, {"q": 4.0}, "owner/base@abc123", False)
    assert (found["base_model_name_or_path"], found["revision"]) == ("owner/base", "abc123")
    assert config({"q": 4}, {"q": 4.0}, "owner/base", False)["revision"] is None
