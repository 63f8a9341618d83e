"""What is loaded is what was written: one flipped byte, a file too few, a file too many, in every folder of ours."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import exported
import tiny
import trimtab as tt
from gguf_models import byte_level_tokenizer
from trimtab.data import hashes
from trimtab.errors import UserError
from trimtab.methods import Lora, Qlora, Rtn
from trimtab.models import held, whole

RULES = [exported.EMBEDDING, exported.everywhere(bits=4, group=32)]


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of folder: a saved model and its exports, an adapter with its base, a pruned model."""
    folder = tmp_path_factory.mktemp("given")
    tiny.model(folder / "float", template=None)
    byte_level_tokenizer().save_pretrained(folder / "float")
    tiny.text(folder / "data.jsonl")
    model, tokenizer = tt.load(str(folder / "float"), Rtn(), RULES)
    tt.save(model, folder / "saved", tokenizer)
    for name in ("dense", "gguf", "compressed-tensors"):
        tt.export(str(folder / "saved"), name)
    model, tokenizer = tt.load(str(folder / "float"), Qlora(rank=2))
    exported.shake(model)
    tt.save(model, folder / "adapted", tokenizer)
    tt.export(str(folder / "adapted"), "peft")
    tt.prune(str(folder / "float"), folder / "pruned", ratio=0.3, importance="magnitude", multiple_of=32)
    return folder


def flip(file: Path, at: int = -1) -> None:
    """One bit, in a file of the same size and of the same time."""
    about = file.stat()
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))


def _eval(path: Path) -> Any:
    return tt.evaluate(str(path), str(path.parents[0] / "data.jsonl"), tokens=64, block_tokens=32)


WAYS: dict[str, tuple[str, str, Callable[[Path], Any]]] = {
    "load": ("saved", "model.safetensors", lambda f: tt.load(str(f / "saved"))),
    "prepare": ("saved", "model.safetensors", lambda f: tt.load(str(f / "saved"), Lora(rank=2))),
    "from_pretrained": ("saved", "model.safetensors", lambda f: AutoModelForCausalLM.from_pretrained(f / "saved")),
    "eval": ("saved", "model.safetensors", lambda f: _eval(f / "saved")),
    "eval, config": ("saved", "config.json", lambda f: _eval(f / "saved")),
    "eval, tokenizer": ("saved", "tokenizer.json", lambda f: _eval(f / "saved")),
    "export": ("saved", "model.safetensors", lambda f: tt.export(str(f / "saved"), "mlx")),
    "chat": ("saved", "model.safetensors", lambda f: tt.chat(str(f / "saved"))),
    "chat, template": ("saved", "chat_template.jinja", lambda f: tt.chat(str(f / "saved"))),
    "compare": (
        "saved",
        "model.safetensors",
        lambda f: tt.compare(str(f / "float"), str(f / "saved"), f"{f}/data.jsonl"),
    ),
    "parity": (
        "saved/dense",
        "model.safetensors",
        lambda f: tt.parity(str(f / "saved/dense"), "transformers", data=f"{f}/data.jsonl"),
    ),
    "dense": ("saved/dense", "model.safetensors", lambda f: tt.load(str(f / "saved/dense"), Rtn(), RULES)),
    "gguf": ("saved/gguf", "*.gguf", lambda f: tt.load(str(next((f / "saved/gguf").glob("*.gguf"))))),
    "gguf, chat": ("saved/gguf", "*.gguf", lambda f: tt.chat(str(f / "saved/gguf"))),
    "compressed-tensors": (
        "saved/compressed-tensors",
        "model.safetensors",
        lambda f: tt.chat(str(f / "saved/compressed-tensors")),
    ),
    "serve": (
        "saved/compressed-tensors",
        "model.safetensors",
        lambda f: held.start_serving(held.serving(f / "saved/compressed-tensors")[0]),
    ),
    "adapter": ("adapted", "model.safetensors", lambda f: tt.load(str(f / "adapted"))),
    "peft": ("adapted/peft", "adapter_model.safetensors", lambda f: tt.chat(str(f / "adapted/peft"))),
    "peft, base": ("adapted/peft/base", "model.safetensors", lambda f: tt.chat(str(f / "adapted/peft"))),
    "peft, base alone": ("adapted/peft/base", "model.safetensors", lambda f: tt.load(str(f / "adapted/peft/base"))),
    "peft, on another": (
        "adapted/peft",
        "adapter_config.json",
        lambda f: tt.compare(str(f / "float"), str(f / "float"), f"{f}/data.jsonl", first_adapter=f"{f}/adapted/peft"),
    ),
    "pruned": ("pruned", "model.safetensors", lambda f: tt.load(str(f / "pruned"), Rtn(), RULES)),
}
"""By name: the folder, what in it is damaged, and who reads it."""


@pytest.mark.parametrize("way", WAYS)
def test_a_flipped_bit_is_refused_however_it_is_read(given: Path, tmp_path: Path, way: str) -> None:
    folder, name, read = WAYS[way]
    there = shutil.copytree(given, tmp_path / "copy")
    file = next((there / folder).glob(name))
    flip(file, at=len(file.read_bytes()) // 2 if name.endswith("json") else -1)
    with pytest.raises(UserError, match=rf"{file.name}: is not what was written \(its SHA-256 differs\)"):
        read(there)


@pytest.mark.parametrize("name", ["saved", "saved/dense", "adapted", "adapted/peft/base", "pruned"])
def test_what_is_whole_is_read_from_wherever_it_was_copied(given: Path, tmp_path: Path, name: str) -> None:
    there = shutil.copytree(given, tmp_path / "copy")
    (tmp_path / "link").symlink_to(there / name)
    method = None if name == "adapted" else Lora(rank=2)
    tt.load(str(tmp_path / "link"), method)
    (there / name / "README.md").write_text("mine")  # of no account to readers
    (there / name / "notes.txt").write_text("mine")
    tt.load(str(there / name), method)


def test_a_missing_or_shorter_file_is_named(given: Path, tmp_path: Path) -> None:
    there = shutil.copytree(given / "saved", tmp_path / "saved")
    (there / "generation_config.json").unlink()
    with pytest.raises(UserError, match=r"generation_config\.json: is missing"):
        tt.load(str(there))
    shutil.copy(given / "saved/generation_config.json", there)
    with (there / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match=r"model\.safetensors: is not what was written \(it has [\d,]+ bytes, and had"):
        tt.load(str(there))


@pytest.mark.parametrize("name", ["adapter_config.json", "vocab.json", "added_tokens.json"])
def test_a_file_that_would_be_read_with_the_model_is_refused(given: Path, tmp_path: Path, name: str) -> None:
    there = shutil.copytree(given / "saved", tmp_path / "saved")
    (there / name).write_text("{}")
    for look in (lambda: tt.load(str(there)), lambda: tt.verify(there)):
        with pytest.raises(UserError, match=f"{name}: does not belong to this model"):
            look()


def test_a_tokenizer_may_come_later(given: Path, tmp_path: Path) -> None:
    """A model that was saved without one: it changes nothing that was written."""
    tt.save(tt.load(str(given / "saved"))[0], tmp_path / "out")
    AutoTokenizer.from_pretrained(given / "float").save_pretrained(tmp_path / "out")
    assert tt.verify(tmp_path / "out")
    assert tt.load(str(tmp_path / "out"))[1] is not None


def test_a_changed_model_is_read_where_that_is_wanted(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = shutil.copytree(given / "saved", tmp_path / "saved")
    config = json.loads((there / "config.json").read_text())
    (there / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"config\.json: is not what was written.* remove .*manifest\.json"):
        tt.load(str(there))
    assert tt.load(str(there), verify=False)[0].config.rms_norm_eps == 1e-3
    with pytest.raises(UserError, match="is not what was written"):  # the next one looks again
        tt.load(str(there))
    monkeypatch.setenv("TRIMTAB_VERIFY", "0")
    AutoModelForCausalLM.from_pretrained(there)
    monkeypatch.undo()
    (there / "manifest.json").unlink()
    assert AutoModelForCausalLM.from_pretrained(there).config.rms_norm_eps == 1e-3


def test_what_others_call_a_manifest_is_not_ours(given: Path, tmp_path: Path) -> None:
    there = shutil.copytree(given / "float", tmp_path / "float")
    deep, infinite = "[" * 100_000, '{"files": {"a": {"bytes": Infinity, "sha256": ""}}}'
    for text in ('{"name": "an app", "files": []}', "not JSON", '{"files": {"config.json": 1}}', deep, infinite):
        (there / "manifest.json").write_text(text)
        tt.load(str(there), Rtn(), RULES)
    for name in ("saved", "saved/dense", "pruned"):  # ours, damaged
        there = shutil.copytree(given / name, tmp_path / name.replace("/", "-"))
        (there / "manifest.json").write_text((there / "manifest.json").read_text()[:-9])
        with pytest.raises(UserError, match=r"manifest.json: not valid JSON"):
            tt.load(str(there), Rtn(), None if name == "saved" else RULES)


@pytest.mark.parametrize("name", ["saved", "checkpoint-4"])
def test_saving_over_a_saved_model_by_transformers(given: Path, tmp_path: Path, name: str) -> None:
    """Its manifest speaks of what was there; what is there then is a folder without one."""
    there = shutil.copytree(given / "saved", tmp_path / name)
    model, _ = tt.load(str(given / "float"), Rtn(), [exported.everywhere(bits=3, group=32)])
    model.save_pretrained(there)
    again = AutoModelForCausalLM.from_pretrained(there)
    assert torch.equal(exported.logits(again), exported.logits(model))


def test_large_files_are_read_once_on_a_machine(given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = shutil.copytree(given / "saved", tmp_path / "saved")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LEAST_BYTES", 10_000)
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", 0.0)
    read: list[str] = []
    real = hashes.sha256
    monkeypatch.setattr(hashes, "sha256", lambda file: read.append(file.name) or real(file))
    for _ in range(2):
        hashes._known.clear()  # as another process
        whole.check(there)
    assert read.count("model.safetensors") == 1
    assert read.count("config.json") == 2
    flip(there / "model.safetensors")
    with pytest.raises(UserError, match="is not what was written"):
        whole.check(there)


def test_of_several_processes_the_first_on_a_machine_reads(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = shutil.copytree(given / "saved", tmp_path / "saved")
    flip(there / "model.safetensors")
    for name, value in {
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "here",
        "MASTER_PORT": "1",
        "RANK": "3",
        "LOCAL_RANK": "1",
    }.items():
        monkeypatch.setenv(name, value)
    whole.check(there)
    monkeypatch.setenv("LOCAL_RANK", "0")  # the first of the second machine
    with pytest.raises(UserError, match="its SHA-256 differs"):
        whole.check(there)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with (there / "model.safetensors").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(UserError, match="bytes, and had"):
        whole.check(there)


def test_verify_names_what_does_not_belong(given: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """What a reader would take is refused, in an adapter's base, too; the rest is only named."""
    there = shutil.copytree(given / "adapted/peft", tmp_path / "peft")
    (there / "notes.txt").write_text("mine")
    assert tt.verify(there) > 8  # those of the base among them
    assert "peft: notes.txt: not of this model, and nothing that a reader takes" in caplog.text
    for name in (
        "base/adapter_config.json",
        "base/extra.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        "base/tokenizer.model",
    ):
        (there / name).write_text("{}")
        with pytest.raises(UserError, match=f"{name}: does not belong"):
            tt.verify(there)
        (there / name).unlink()
    flip(there / "base/model.safetensors")
    with pytest.raises(UserError, match=r"base/model\.safetensors: is not what was written"):
        tt.verify(there)


def test_equal_tensors_are_equal_files(given: Path, tmp_path: Path) -> None:
    """`save_file` writes several keys of metadata in an order of its own."""
    metadata = {
        json.loads(_header(given / name))["__metadata__"].keys() == {"format"}
        for name in ("saved", "adapted", "pruned")
    }
    assert metadata == {True}
    tensors = load_file(given / "saved" / "model.safetensors")
    save_file(tensors, tmp_path / "again.safetensors", {"format": "pt"})
    assert (tmp_path / "again.safetensors").read_bytes() == (given / "saved/model.safetensors").read_bytes()


def _header(folder: Path) -> bytes:
    content = (folder / "model.safetensors").read_bytes()
    return content[8 : 8 + int.from_bytes(content[:8], "little")]
