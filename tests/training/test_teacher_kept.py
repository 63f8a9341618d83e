"""A teacher's cache on disk: kills at any write, full disks, damage, two runs at once. No model says it."""

import errno
import multiprocessing
import os
import shutil
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from trimtab.errors import UserError
from trimtab.formats.directory import to_oneself
from trimtab.formats.manifest import verify
from trimtab.training import filling, teacher_cache
from trimtab.training.divergence import TopTargets
from trimtab.training.filling import Filling
from trimtab.training.teacher_cache import NUMBER, Cache, Key

K = 3
KEY = Key("model", "rows", "words", 8, "all", "wrapped", "trl", 0, "float32", 1.0, K)
OTHER = replace(KEY, seed=1)
SEQUENCES = [{"input_ids": [i, *range(5 + i % 3)], "labels": [i, *range(5 + i % 3)]} for i in range(23)]
LIVE: Any = SimpleNamespace(
    model=SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=99)))
)
FILES = ["first.npy", "ids.npy", "log_probs.npy", "teacher.json"]


def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
    longest = max(len(row["labels"]) for row in rows)
    labels = torch.full((len(rows), longest), -100)
    for at, row in enumerate(rows):
        labels[at, : len(row["labels"])] = torch.tensor(row["labels"])
    return {"labels": labels, "of": [row["input_ids"][0] for row in rows]}


def says(_: Any, live: Any, batch: dict[str, Any], width: int) -> TopTargets:
    """Numbers that tell sequence and position, none of them zero."""
    counts = (batch["labels"][:, 1:] != -100).sum(1).tolist()
    rows = [(100 * of + at + 1) for of, count in zip(batch["of"], counts, strict=True) for at in range(count)]
    return TopTargets(
        torch.tensor(rows).half()[:, None].expand(-1, width + 1), torch.tensor(rows).int()[:, None].expand(-1, width)
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_ask", says)
    monkeypatch.setattr(teacher_cache, "_RECORD_SECONDS", -1.0)  # a record after every batch


def fill(folder: Path, key: Key = KEY) -> Cache:
    with to_oneself(folder, waits=lambda _: None):
        cache = Cache(folder, key)
        if not cache.complete:
            cache.fill(LIVE, SEQUENCES, collate, at_once=2)
    return cache


def is_right(folder: Path, key: Key = KEY) -> None:
    """Every row is what the teacher said of it."""
    teacher = Cache(folder, key).teacher(SEQUENCES)
    for number, row in enumerate(SEQUENCES):
        found = teacher.targets({NUMBER: [number], "input_ids": torch.zeros(1)})
        assert found.ids[:, 0].tolist() == [100 * number + at + 1 for at in range(len(row["labels"]) - 1)]
        assert found.log_probs.shape == (len(row["labels"]) - 1, K + 1)
        assert torch.equal(found.log_probs[:, 0], found.ids[:, 0].half())


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the cache's own runs after it."""


def killed_at(patch: pytest.MonkeyPatch, point: int, how: Callable[[], None]) -> Callable[[], int]:
    """Ends at the n-th write, half done, or rename or sync; how many there were is what it gives."""
    count = 0

    def comes(cut: Callable[[], None] = lambda: None) -> None:
        nonlocal count
        count += 1
        if count >= point:  # and at all that follow: `finally` does nothing after SIGKILL
            if count == point:
                cut()
            how()

    write, replace_, sync = Filling._write, os.replace, os.fsync

    def half(self: Filling, name: str, content: Any) -> None:
        comes(lambda: write(self, name, content[: len(content) // 2]))
        write(self, name, content)

    patch.setattr(Filling, "_write", half)
    patch.setattr(os, "replace", lambda *names: (comes(), replace_(*names))[1])
    patch.setattr(os, "fsync", lambda number: (comes(), sync(number))[1])
    return lambda: count


def raises() -> None:
    raise Killed


def test_a_kill_at_any_point(tmp_path: Path) -> None:
    """What continues from there asks for nothing that was recorded, and ends with the same bytes."""
    fill(tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        points = killed_at(patch, 10**9, raises)
        fill(tmp_path / "counted")
    assert points() > 60
    for point in range(1, points() + 1, 3):
        folder = tmp_path / str(point)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, point, raises)
            with pytest.raises(Killed):
                fill(folder)
        if folder.exists():
            assert verify(folder) == len(FILES)  # under its name it is whole
        fill(folder)
        is_right(folder)
        for name in FILES:
            assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        assert not folder.with_name(f"{point}.unfinished").exists()


def test_a_full_disk(tmp_path: Path) -> None:
    """One line, whichever write it is; what was recorded is kept, and it goes on when there is room."""

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        points = killed_at(patch, 10**9, full)
        fill(tmp_path / "counted")
    for point in range(1, points() + 1, 3):
        folder = tmp_path / str(point)
        with pytest.MonkeyPatch.context() as patch:
            killed_at(patch, point, full)
            with pytest.raises((UserError, OSError), match="No space left on device") as said:
                fill(folder)
        assert isinstance(said.value, UserError), point
        assert "distill.cache" in str(said.value)
        fill(folder)
        is_right(folder)


def test_what_was_asked_before_a_write_that_failed_is_not_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one write fails, between the two files of the last batch; the record is written all the same."""
    write, asked = Filling._write, list[int]()

    def fails(self: Filling, name: str, content: Any) -> None:
        if name == "ids" and self.done + 2 >= len(SEQUENCES):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, name, content)

    with monkeypatch.context() as patch:
        patch.setattr(Filling, "_write", fails)
        with pytest.raises(UserError, match="No space left"):
            fill(tmp_path / "cache")
    monkeypatch.setattr(Cache, "_ask", lambda *about: (asked.extend(about[2]["of"]), says(*about))[1])
    fill(tmp_path / "cache")
    is_right(tmp_path / "cache")
    assert 0 < len(asked) <= 2


def test_a_first_file_that_was_never_written_is_made_again(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "save", lambda *_: raises())
        with pytest.raises(Killed):
            fill(tmp_path / "cache")
    fill(tmp_path / "cache")
    is_right(tmp_path / "cache")


def test_a_disk_that_cannot_hold_it_is_said_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling.shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    monkeypatch.setattr(Cache, "_ask", lambda *_: pytest.fail("the teacher is asked"))
    with pytest.raises(UserError, match=r"distill\.cache: .*needs 0 MB more, and its disk has 0 MB left; make room"):
        fill(tmp_path / "cache")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink], ids=["cut", "flip", "gone"])
@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_damage_is_seen_and_mended(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    fill(tmp_path / "cache")
    damage(tmp_path / "cache" / name)
    found = Cache(tmp_path / "cache", KEY)
    assert not found.complete
    assert found.damage
    with pytest.raises(UserError, match="is not complete"):
        found.teacher(SEQUENCES)
    fill(tmp_path / "cache")
    is_right(tmp_path / "cache")


@pytest.mark.parametrize("name", FILES)
def test_damage_of_what_is_not_finished_is_seen_too(tmp_path: Path, name: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        killed_at(patch, 40, raises)
        with pytest.raises(Killed):
            fill(tmp_path / "cache")
    assert Cache(tmp_path / "cache", KEY).done > 4
    file = tmp_path / "cache.unfinished" / name
    content = bytearray(file.read_bytes())
    content[-3 if name != "first.npy" else -8] ^= 4
    file.write_bytes(content[:200] if name == "ids.npy" else content)
    fill(tmp_path / "cache")
    is_right(tmp_path / "cache")


def test_readers_of_one_that_is_made_anew_read_on(tmp_path: Path) -> None:
    """Another run's: it was truncated under them."""
    fill(tmp_path / "cache")
    teacher = Cache(tmp_path / "cache", KEY).teacher(SEQUENCES)
    before = teacher.targets({NUMBER: [5], "input_ids": torch.zeros(1)}).ids
    assert Cache(tmp_path / "cache", OTHER).differs == ["seed"]
    fill(tmp_path / "cache", OTHER)
    assert torch.equal(teacher.targets({NUMBER: [5], "input_ids": torch.zeros(1)}).ids, before)
    is_right(tmp_path / "cache", OTHER)
    with pytest.raises(UserError, match=r"another run made it again, with another seed.*have one of their own"):
        Cache(tmp_path / "cache", KEY).teacher(SEQUENCES)


def test_one_of_an_earlier_version_is_made_anew(tmp_path: Path) -> None:
    fill(tmp_path / "cache")
    (tmp_path / "cache" / "manifest.json").unlink()
    assert Cache(tmp_path / "cache", KEY).damage == "it has no hashes, so an earlier version made it"
    fill(tmp_path / "cache")
    is_right(tmp_path / "cache")


def test_somebody_elses_files_stay(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    np.save(tmp_path / "cache" / "ids.npy", np.arange(3))
    with pytest.raises(UserError, match=r"holds ids\.npy, which no cache has"):
        fill(tmp_path / "cache")
    assert np.load(tmp_path / "cache" / "ids.npy").tolist() == [0, 1, 2]
    (tmp_path / "new.unfinished").mkdir()
    (tmp_path / "new.unfinished" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"new\.unfinished holds thesis\.txt"):
        fill(tmp_path / "new")


def test_of_two_at_once_one_asks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other waits, says for whom, and asks for nothing."""
    asked, began, go_on = [], threading.Event(), threading.Event()

    def slowly(self: Any, live: Any, batch: dict[str, Any], width: int) -> TopTargets:
        asked.append(threading.get_ident())
        began.set()
        assert go_on.wait(20)
        return says(self, live, batch, width)

    monkeypatch.setattr(Cache, "_ask", slowly)
    first = threading.Thread(target=fill, args=(tmp_path / "cache",))
    first.start()
    assert began.wait(20)
    said: list[str] = []

    def waits(text: str) -> None:
        said.append(text)
        go_on.set()

    with to_oneself(tmp_path / "cache", waits=waits):
        assert Cache(tmp_path / "cache", KEY).complete
    first.join()
    assert said == [
        f"{tmp_path / 'cache'}: process {os.getpid()} on {os.uname().nodename} is writing it; waiting for that"
    ]
    assert len(set(asked)) == 1
    is_right(tmp_path / "cache")


@pytest.mark.slow
def test_many_processes_with_two_keys(tmp_path: Path) -> None:
    """Each ends with a cache that was whole when it looked."""
    context = multiprocessing.get_context("fork")
    runs = [context.Process(target=_fills, args=(tmp_path / "cache", i % 2)) for i in range(6)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(120)
    assert [run.exitcode for run in runs] == [0] * 6
    assert [f.name for f in tmp_path.iterdir()] == ["cache"]
    assert shutil.disk_usage(tmp_path).free > 0


def _fills(folder: Path, other: int) -> None:
    key = OTHER if other else KEY
    for _ in range(5):
        with to_oneself(folder, waits=lambda _: None):
            cache = Cache(folder, key)
            if not cache.complete:
                cache.fill(LIVE, SEQUENCES, collate, at_once=2)
            is_right(folder, key)
