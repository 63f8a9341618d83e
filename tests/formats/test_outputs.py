"""Outputs by whatever name: home folders, links, whole disks, long names, mount points; all commands ask one place."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tiny
import trimtab as tt
from trimtab import outputs
from trimtab.disk import replace_text
from trimtab.errors import Diverged, UserError
from trimtab.formats.directory import replacing
from trimtab.formats.holding import holding
from trimtab.formats.manifest import add, keeps, kind_of, remove, write_manifest
from trimtab.outputs import output
from trimtab.pipeline.run import run
from trimtab.recipe.recipe import from_dict


def test_what_was_given_becomes_the_folder_that_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "dangling").symlink_to("later/on")
    for given in ("~/real/x", "real/x", "link/x", "./link/../real/x", str(tmp_path / "real" / "x")):
        assert output(given) == tmp_path / "real" / "x"
    assert output("dangling") == tmp_path / "later" / "on"


def _long(folder: Path) -> Path:
    return folder / ("n" * 240)


def _deep(folder: Path) -> Path:
    return folder.joinpath(*["n" * 200] * 20)


def _file(folder: Path) -> Path:
    (folder / "file").write_text("mine")
    return folder / "file"


def _link_to_a_file(folder: Path) -> Path:
    (folder / "to").symlink_to(_file(folder))
    return folder / "to"


def _circle(folder: Path) -> Path:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("a")
    return folder / "a" / "x"


REFUSED: dict[str, tuple[Callable[[Path], Path | str], str]] = {
    "root": (lambda _: "/", "/ is a whole disk"),
    "root by dots": (lambda folder: "/" + "../" * 20, "/ is a whole disk"),
    "empty": (lambda _: " ", "names no folder"),
    "null": (lambda folder: f"{folder}/a\0b", "names no folder"),
    "nobody's home": (lambda _: "~nobody-of-this-name/x", "there is no such home folder"),
    "long": (_long, "the name nnn.* has 240 bytes, and 231 fit"),
    "too long": (lambda folder: folder / ("n" * 300) / "x", "name"),
    "deep": (_deep, "longer than the system takes"),
    "a file": (_file, "file is a file, not a directory"),
    "in a file": (lambda folder: _file(folder) / "x", "file is a file, so .*file/x cannot be made in it"),
    "a link to a file": (_link_to_a_file, "file is a file, not a directory"),
    "in a link to a file": (lambda folder: _link_to_a_file(folder) / "x", "is a file, so"),
    "a mount point": (lambda _: "/proc", "/proc is a mount point.* name a folder in it: /proc/out"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="names of Linux")
@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_no_output_is_refused(tmp_path: Path, name: str) -> None:
    made, said = REFUSED[name]
    with pytest.raises(UserError, match=said) as refused:
        output(made(tmp_path), "--out")
    assert str(refused.value).startswith("--out: ")
    assert not [f.name for f in tmp_path.iterdir() if f.name not in ("file", "to", "a", "b")]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="rights of POSIX")
def test_a_folder_where_this_user_may_not_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root may write everywhere, so the system's answer is given here."""
    monkeypatch.setattr(outputs.os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(UserError, match=rf"output: nothing can be written in {tmp_path} by this user"):
        output(tmp_path / "a" / "b")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, data, and a run, `out`, which only rounds."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    run(from_dict(untrained(folder, folder / "out")))
    return folder


def untrained(folder: Path, out: Path | str) -> dict[str, object]:
    quick = {"method": "rtn", "train": {"steps": 0}, "evaluate": {"parity": False}, "data": {"eval_path": None}}
    return tiny.recipe(folder / "model", folder / "data.jsonl", out, **quick)  # type: ignore[arg-type]


def _search(made: Path, out: Path | str) -> None:
    tt.search(untrained(made, out) | {"search": {"trials": 1}})


def _teach(made: Path, out: Path | str) -> None:
    train = {"steps": 1, "batch_tokens": 64, "micro_batch": 2}
    changes = {"distill": {"teacher": "cached", "cache": str(out)}, "evaluate": {"parity": False}}
    values = tiny.recipe(made / "model", made / "data.jsonl", made / "taught", train=train, **changes)
    tt.run(values, overwrite=True)


WRITERS: dict[str, Callable[[Path, Path | str], object]] = {
    "run": lambda made, out: tt.run(untrained(made, out)),
    "save": lambda made, out: tt.save(tt.load(str(made / "out"))[0], out),
    "export": lambda made, out: tt.export(made / "out", "dense", out),
    "prune": lambda made, out: tt.prune(str(made / "model"), out, ratio=0.3, importance="magnitude"),
    "compare": lambda made, out: tt.compare(
        str(made / "model"), str(made / "out"), str(made / "data.jsonl"), out=out, tokens=64, block_tokens=32
    ),
    "search": _search,
    "teacher": _teach,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_command_asks(made: Path, writer: str) -> None:
    with pytest.raises(UserError, match=r"(output|--out|path|distill\.cache): / is a whole disk"):
        WRITERS[writer](made, "/")


@pytest.mark.parametrize("writer", [w for w in WRITERS if w != "search"])
def test_a_link_stays_and_leads_to_what_was_written(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: str
) -> None:
    """`~` is home, and of a link that leads nowhere yet the folder that it names is made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("disk/there")
    WRITERS[writer](made, "~/link")
    assert (tmp_path / "link").is_symlink()
    assert kind_of(tmp_path / "disk" / "there") is not None
    assert {f.name for f in (tmp_path / "disk").iterdir()} == {"there"}
    assert not Path("~").exists()


# ---- what the dead leave ------------------------------------------------------------------------------------------------


KILLED = """
import os, sys
from pathlib import Path
from trimtab.formats.directory import replacing
with replacing(Path(sys.argv[1]), "export", overwrite=True) as folder:
    (folder / "half").write_text("x")
    os._exit(9)
"""


def test_the_staging_folder_of_the_dead_goes_and_that_of_the_living_stays(tmp_path: Path) -> None:
    """The lock's holder knows that all others are dead; a process's number does not, which may be another machine's."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    left = [f.name for f in tmp_path.iterdir() if f.is_dir()]
    assert len(left) == 1
    assert left[0].startswith(".out.writing-")
    with holding(tmp_path / "out"):  # the living
        with pytest.raises(UserError, match="is writing it"), replacing(tmp_path / "out", "export"):
            pass
        assert [f.name for f in tmp_path.iterdir() if f.is_dir()] == left
    (tmp_path / ".out-2.writing-abcdefgh").mkdir()  # of another output
    with replacing(tmp_path / "out", "export") as folder:
        (folder / "a").write_text("a")
    assert {f.name for f in tmp_path.iterdir()} == {"out", ".out-2.writing-abcdefgh"}


def test_without_locks_nobody_knows_who_is_dead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from trimtab.formats import holding as room

    def none(*_: object, **__: object) -> bool:
        raise OSError(errno.ENOSYS, "none here")

    monkeypatch.setattr(room, "lock_descriptor", none)
    (tmp_path / ".out.writing-abcdefgh").mkdir()
    with pytest.warns(UserWarning, match="no flock"), replacing(tmp_path / "out", "export") as folder:
        (folder / "a").write_text("a")
    assert (tmp_path / ".out.writing-abcdefgh").exists()


def test_a_file_that_was_being_written_is_in_nobodys_way(tmp_path: Path) -> None:
    """Half of a report, or of a manifest, in a folder of ours."""
    write_manifest(tmp_path, "run")
    for name in (".report.html.writing-1", ".manifest.json.writing-77"):
        (tmp_path / name).write_text("ha")
    assert not keeps(tmp_path, "run")
    replace_text(tmp_path / "report.html", "whole")
    add(tmp_path, ["report.html"])
    assert not keeps(tmp_path, "run")
    remove(tmp_path)
    assert not tmp_path.exists()


@pytest.mark.skipif(os.name == "nt", reason="asking for a process there ends it")
def test_what_a_killed_process_left_of_a_file_goes_with_the_next_writing(tmp_path: Path) -> None:
    """Of this file, by a process of this machine that is no more: who writes it now, here or elsewhere, keeps theirs."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here, file = socket.gethostname(), tmp_path / "a[1].yaml"
    left = tmp_path / f".a[1].yaml.writing-{here}-{ended.pid}"
    others = [
        tmp_path / f".a[1].yaml.writing-{here}-{os.getppid()}",
        tmp_path / f".a[1].yaml.writing-elsewhere-{ended.pid}",
        tmp_path / f".b.yaml.writing-{here}-{ended.pid}",
    ]
    for path in (left, *others):
        path.write_text("ha")
    replace_text(file, "whole")
    assert sorted(tmp_path.iterdir()) == sorted([file, *others])
    assert file.read_text() == "whole"


def test_a_run_that_ends_in_nan_has_not_removed_the_one_before(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trimtab.training.trainer import _Trainer

    real = _Trainer.compute_loss

    def loss(self: _Trainer, *args: object, **kwargs: object) -> object:
        return real(self, *args, **kwargs) * (float("nan") if self.state.global_step == 3 else 1.0)  # type: ignore[arg-type]

    out, train = tmp_path / "out", {"steps": 4, "save_steps": 2}
    run(from_dict(untrained(made, out)))
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    monkeypatch.setattr(_Trainer, "compute_loss", loss)
    values = tiny.recipe(made / "model", made / "data.jsonl", out, train=train, evaluate={"parity": False})
    with pytest.raises(Diverged, match=r"the last good checkpoint is .*out\.unfinished/checkpoints/checkpoint-2"):
        run(from_dict(values), overwrite=True)
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    monkeypatch.undo()
    run(from_dict(values), resume=True)
    assert (out / "checkpoints" / "checkpoint-4").is_dir()
