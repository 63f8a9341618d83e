"""Folders of ours: what a manifest lets go of, one writer at a time, and nothing lost that somebody else put there."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from trimtab.errors import UserError
from trimtab.formats import directory, manifest
from trimtab.formats.directory import replacing
from trimtab.formats.holding import holding
from trimtab.formats.manifest import Kind, keeps


def written(out: Path, kind: Kind = "export", text: str = "ours") -> Path:
    """A folder of ours: two files and one in a folder."""
    with replacing(out, kind, overwrite=True) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "b.txt").write_text(text)
        (folder / "in").mkdir()
        (folder / "in/c.txt").write_text(text)
    return out


def put(file: Path, text: str = "mine") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    assert manifest.kind_of(out) == "export"
    assert manifest.verify(out) == 3
    with replacing(out, "export", overwrite=True) as folder:
        put(folder / "only.txt", "new")
        assert (out / "a.txt").read_text() == "ours"
    assert sorted(f.name for f in out.iterdir()) == ["manifest.json", "only.txt"]
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(os.name == "nt", reason="no folder is synced there")
def test_all_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a loss of power leaves a folder that looks whole, of empty files; and the earlier one is gone by then."""
    done: list[tuple[str, int]] = []
    fsync, replace = os.fsync, os.replace

    def synced(number: int) -> None:
        fsync(number)
        done.append(("synced", os.fstat(number).st_ino))

    def renamed(old: Path, new: Path) -> None:
        replace(old, new)
        if new.parent == tmp_path:
            done.append(("renamed", new.stat().st_ino))

    out = written(tmp_path / "out")
    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    written(out, text="later")
    aside, put = (at for at, (what, _) in enumerate(done) if what == "renamed")
    assert {("synced", path.stat().st_ino) for path in (out, *out.rglob("*"))} <= set(done[:aside])
    assert ("synced", tmp_path.stat().st_ino) in done[put:], "the name itself is not"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda out: put(out / "thesis.txt"), r"holds thesis\.txt, which trimtab did not write"),
        (lambda out: put(out / "deep/er/thesis.txt"), r"holds deep/er/thesis\.txt, which trimtab did not write"),
        (lambda out: put(out / "in/recipe.yaml"), r"holds in/recipe\.yaml, which trimtab did not write"),
        (lambda out: (out / "link").symlink_to(out.parent), r"holds link, which trimtab did not write"),
        (lambda out: put(out / "a.txt", "edited"), r"holds a\.txt, which somebody changed since"),
        (lambda out: put(out / "a.txt", "OURS"), r"holds a\.txt, which somebody changed since"),
        (lambda out: (out / "manifest.json").unlink(), r"holds a\.txt, b\.txt, in/c\.txt, which trimtab did not write"),
        (lambda out: put(out / "manifest.json", "{}"), r"not a manifest"),
        (lambda out: manifest.write_manifest(out, "run"), r"holds a run, which is not replaced by an export"),
    ],
    ids=["file", "deep", "in ours", "link", "edited", "as long", "no manifest", "another manifest", "another kind"],
)
def test_what_is_not_ours_stays(tmp_path: Path, spoil: object, complaint: str) -> None:
    out = written(tmp_path / "out")
    spoil(out)  # type: ignore[operator]
    before = {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    with pytest.raises(UserError, match=complaint):
        written(out)
    assert {f: f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()} == before


@pytest.mark.parametrize("where", ["files", "also"])
@pytest.mark.parametrize("name", ["../mine.txt", "in/../../mine.txt", "/mine.txt", ""])
def test_a_manifest_lists_nothing_outside_its_folder(tmp_path: Path, name: str, where: str) -> None:
    """It may come from anywhere, with a model that somebody made, and what it lists is removed."""
    out, mine = written(tmp_path / "out"), put(tmp_path / "mine.txt")
    name = str(mine) if name.startswith("/") else name
    values = json.loads((out / manifest.MANIFEST).read_text(encoding="utf-8"))
    values[where] = (
        {**values["files"], name: {"bytes": 4, "sha256": ""}} if where == "files" else [*values["also"], name]
    )
    manifest.write_json(out / manifest.MANIFEST, values)
    for touch in (lambda: written(out), lambda: manifest.verify(out), lambda: manifest.remove(out)):
        with pytest.raises(UserError, match="outside its folder"):
            touch()
    assert mine.read_text() == "mine"
    assert (out / "a.txt").read_text() == "ours"


def test_a_file_that_comes_while_a_folder_is_written(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    with pytest.raises(UserError, match=r"holds late\.txt"), replacing(out, "export", overwrite=True):
        put(out / "late.txt")
    assert (out / "late.txt").read_text() == "mine"
    assert (out / "a.txt").read_text() == "ours"


def test_what_was_listed_later_and_what_is_gone(tmp_path: Path) -> None:
    """A report of ours may come, and a checkpoint may be removed by hand: neither is in the way, nor missed."""
    out = written(tmp_path / "out")
    put(out / "report.json")
    assert keeps(out, "export")
    manifest.add(out, (name for name in ["report.json", "in/c.txt"]))
    (out / "in/c.txt").unlink()
    assert not keeps(out, "export")
    assert manifest.verify(out) == 2
    written(out, text="again")
    assert not (out / "report.json").exists()


def test_the_earlier_folder_is_there_whenever_its_writer_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two renames, too: then the next writer puts it back, or takes away what is left of it."""
    out, real, left = written(tmp_path / "out"), os.replace, [0]

    def killed(source: str, target: str) -> None:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        real(source, target)

    for at in (1, 2, 3):
        left[0] = at
        with monkeypatch.context() as patch:
            patch.setattr(directory.os, "replace", killed)
            with pytest.raises(KeyboardInterrupt):
                written(out, text="half")
        with pytest.raises(UserError, match="not empty"), replacing(out, "export"):
            pass
        assert (out / "a.txt").read_text() == "ours"
    with monkeypatch.context() as patch:
        patch.setattr(directory, "remove", lambda _: None)
        written(out, text="new")
    assert (tmp_path / ".out.old").is_dir()
    written(out, text="newer")
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    assert (out / "a.txt").read_text() == "newer"


def test_the_working_directory_and_files_are_no_outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path / "out")
    (tmp_path / "out/in").chmod(0o755)
    for here in (tmp_path / "out", tmp_path / "out/in"):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match="is the working directory"):
            written(tmp_path / "out")
    with pytest.raises(UserError, match="is a file, not a directory"):
        written(tmp_path / "out/a.txt")


def test_a_link_to_a_folder_is_that_folder(tmp_path: Path) -> None:
    written(tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    written(tmp_path / "link/../link", text="new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real/a.txt").read_text() == "new"


# ---- one writer at a time -------------------------------------------------------------------------------------------


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "new/deep/out"
    with holding(out):
        for same in (out, out.parent / ".." / "deep" / "out"):
            with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is writing it; wait"):
                written(same)
        with holding(out.with_name("other")):
            pass
    assert not (tmp_path / "new").exists()  # not even the folders above it
    written(out)
    assert [f.name for f in out.parent.iterdir()] == ["out"]


def test_the_lock_of_a_killed_process_is_none(tmp_path: Path) -> None:
    out = tmp_path / "out"
    ours, theirs = os.pipe()
    other = os.fork()
    if not other:
        with holding(out):
            os.write(theirs, b"held")
            time.sleep(60)
        os._exit(0)
    assert os.read(ours, 4) == b"held"
    with pytest.raises(UserError, match=rf"process {other} on .* is writing it"):
        written(out)
    os.kill(other, signal.SIGKILL)
    os.waitpid(other, 0)
    assert (tmp_path / ".out.lock").exists()
    written(out)
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
