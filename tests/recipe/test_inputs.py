"""What a saved recipe says of what was read: hub ids with their commits, files with their hashes."""

import os
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from huggingface_hub.errors import OfflineModeIsEnabled

import tiny
from trimtab.data import hashes
from trimtab.data.located import files_of
from trimtab.data.rows import PYDOC_TOPICS, load_rows
from trimtab.errors import UserError
from trimtab.models import located
from trimtab.models.sources import resolve
from trimtab.recipe import inputs, recipe


def test_a_model_of_the_hub_is_pinned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Any]] = []

    def fetch(repo: str, *, revision: str | None, **_: Any) -> str:
        asked.append((repo, revision))
        return str(tmp_path / "snapshots" / (revision or "c0ffee"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    tiny.model(tmp_path / "snapshots/c0ffee")
    pinned = located.pinned("owner/name")
    assert pinned == "owner/name@c0ffee"
    assert resolve(pinned) == tmp_path / "snapshots/c0ffee"
    assert located.pinned(pinned) == pinned
    assert asked == [("owner/name", None), ("owner/name", "c0ffee"), ("owner/name", "c0ffee")]
    names = {file.name for file in located.files_of(pinned)}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names


def test_a_data_set_of_the_hub_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, whole = list[str](), "c0ffee" + 34 * "0"

    class Api:
        def dataset_info(self, repo: str, revision: str = "main") -> Any:
            asked.append(revision)
            if repo == "owner/away":
                raise OfflineModeIsEnabled("offline")
            return type("Info", (), {"sha": whole})

    def fetch(repo: str, *, split: str, revision: str | None = None) -> list[dict[str, str]]:
        return [{"text": f"{repo} {split} {revision}"}]

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", fetch)
    assert located.pinned_data("owner/name") == f"owner/name@{whole}"
    assert located.pinned_data("owner/name@c0ffee") == f"owner/name@{whole}"  # which may be a branch, too
    assert located.pinned_data(f"owner/name@{whole}") == f"owner/name@{whole}"
    assert asked == ["main", "c0ffee"]
    assert located.pinned_data("owner/away") == "owner/away"
    assert located.pinned_data(PYDOC_TOPICS) == PYDOC_TOPICS
    assert load_rows("owner/name@c0ffee", split="test")["text"][0] == "owner/name test c0ffee"
    assert load_rows("owner/name")["text"][0] == "owner/name train None"


def test_what_changed_is_named(tmp_path: Path) -> None:
    tiny.text(tmp_path / "a.jsonl")
    tiny.text(tmp_path / "b.jsonl")
    before = inputs.mark(files_of(str(tmp_path)), tmp_path)
    assert sorted(before) == ["a.jsonl", "b.jsonl"]
    assert inputs.changes(before, inputs.mark(files_of(str(tmp_path)), tmp_path)) == ""
    tiny.text(tmp_path / "c.jsonl")
    assert inputs.changes(before, inputs.mark(files_of(str(tmp_path)), tmp_path)) == "c.jsonl was added"
    (tmp_path / "c.jsonl").unlink()
    tiny.text(tmp_path / "b.jsonl", 41)
    assert inputs.changes(before, inputs.mark(files_of(str(tmp_path)), tmp_path)) == "b.jsonl has changed"
    (tmp_path / "b.jsonl").unlink()
    assert inputs.changes(before, inputs.mark(files_of(str(tmp_path)), tmp_path)) == "b.jsonl is gone"
    assert [file.name for file in files_of(PYDOC_TOPICS)] == ["topics.py"]


def test_the_block_is_read_back(tmp_path: Path) -> None:
    """As it was written, and refused where somebody wrote something else."""
    marks = {"data.path": inputs.mark([tiny.text(tmp_path / "t.jsonl")], tmp_path / "t.jsonl")}
    values = tiny.recipe(tmp_path / "m", tmp_path / "t.jsonl", tmp_path / "out")
    written = recipe.from_dict(values).model_copy(update={"inputs": marks})
    file = tmp_path / "r.yaml"
    file.write_text(written.to_yaml())
    assert recipe.read(file).inputs == marks
    assert recipe.read(file).to_yaml() == written.to_yaml()
    assert "inputs" not in recipe.from_dict(values).to_yaml()
    with pytest.raises(UserError, match=r"inputs\.data\.path.*"):
        recipe.from_dict(values | {"inputs": {"data.path": {"t.jsonl": {"bytes": "many", "sha256": ""}}}})


def test_a_large_file_is_read_once_on_a_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as nothing was written into it, whatever its times were set to; a change of a moment ago is not relied on."""
    file, read = tmp_path / "model.safetensors", list[Path]()
    real = hashes.sha256
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "LEAST_BYTES", 8)
    monkeypatch.setattr(hashes, "sha256", lambda file: (read.append(file), real(file))[1])
    file.write_bytes(b"a" * 100)
    assert hashes.kept(file) == hashes.kept(file) == real(file)
    assert len(read) == 2
    monkeypatch.setattr(hashes, "_SETTLED_SECONDS", -1.0)
    assert hashes.kept(file) == hashes.kept(file) == real(file)
    assert len(read) == 3
    about = file.stat()
    file.write_bytes(b"b" * 100)
    os.utime(file, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert hashes.kept(file) == real(file)
    assert len(read) == 4
    for kept in (tmp_path / "cache" / "hashes").iterdir():
        kept.write_text("{")
    assert hashes.kept(file) == real(file)
    assert len(read) == 5
    folder = tmp_path / "cache" / "hashes"
    assert (folder.stat().st_mode & 0o777, next(folder.iterdir()).stat().st_mode & 0o777) == (0o700, 0o600)
    for path in (folder, folder.parent, next(folder.iterdir())):
        path.chmod(0o777)
        before = len(read)
        assert hashes.kept(file) == real(file)
        assert len(read) == before + 1  # what others can write is not relied on
        path.chmod(0o700)
    read[5:] = []
    small = tmp_path / "small"
    small.write_bytes(b"a")
    assert hashes.kept(small) == hashes.kept(small) == real(small)
    assert len(read) == 7
