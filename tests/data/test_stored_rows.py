"""Rows that are too many for memory: the same rows, from files of the cache that no kill and no second run harms."""

import errno
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny
from trimtab.data import rows as reading
from trimtab.data import split, stored
from trimtab.data.rows import load_rows, rows_until, unused_keys
from trimtab.data.sources import ORIGIN, Source, mixed
from trimtab.errors import UserError

TEXTS = [f"{i} and {i * i} and what is behind it, number {i}" for i in range(2500)]
TALK = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def entries(rows_cache: Path) -> list[str]:
    return sorted(entry.name for entry in rows_cache.iterdir())


def aged(folder: Path, seconds: float) -> None:
    """As if everything in it were that old."""
    old = time.time() - seconds
    for path in (*folder.iterdir(), folder):
        os.utime(path, (old, old))


def file_of(folder: Path, *rows: Any, name: str = "rows.jsonl") -> str:
    return str(tiny.jsonl(folder / name, *rows))


def test_few_rows_stay_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    assert not stored.mapped(load_rows(file_of(tmp_path, {"text": "a"})))
    assert not (tmp_path / "cache").exists()


def test_many_rows_are_mapped_and_found_again(
    rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path, *({"text": text, "id": i} for i, text in enumerate(TEXTS)))
    with monkeypatch.context() as patch:
        for limit in ("LARGE_BYTES", "SOUGHT_BYTES"):
            patch.setattr(stored, limit, 1 << 30)
        few = load_rows(file)
    rows = load_rows(file)
    assert (stored.mapped(few), stored.mapped(rows)) == (False, True)
    assert rows[:] == few[:]
    assert (rows.features, unused_keys(rows)) == (few.features, "id")
    monkeypatch.setattr(reading, "convert", lambda *_: pytest.fail("read again"))
    again = load_rows(file)
    assert again[:] == few[:]
    assert unused_keys(again) == "id"
    assert len(entries(rows_cache)) == 1


def test_another_content_or_setting_is_another_entry(rows_cache: Path, tmp_path: Path) -> None:
    """Of the same name and size, too."""
    file = file_of(tmp_path, {"text": "a", "more": "b"}, {"text": "c", "more": "d"})
    assert load_rows(file, ignore=["more"])["text"][:] == ["a", "c"]
    assert load_rows(file, ignore=["more"], limit=1)["text"][:] == ["a"]
    assert load_rows(file, columns={"prompt": "text", "completion": "more"})["completion"][:] == ["b", "d"]
    file_of(tmp_path, {"text": "x", "more": "b"}, {"text": "c", "more": "d"})
    assert load_rows(file, ignore=["more"])["text"][:] == ["x", "c"]
    assert len(entries(rows_cache)) == 4


def test_a_bad_row_is_named_and_nothing_is_left(rows_cache: Path, tmp_path: Path) -> None:
    """It stands behind rows that were written already."""
    file = file_of(tmp_path, *({"text": text} for text in TEXTS), {"text": "a", "more": "b"})
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2501: the key 'more' would be dropped"):
        load_rows(file)
    assert entries(rows_cache) == []


def test_what_another_version_stored_is_made_again(
    rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = file_of(tmp_path, {"text": "a"})
    load_rows(file)
    monkeypatch.setattr(reading, "of_code", lambda: "another")
    load_rows(file)
    assert len(entries(rows_cache)) == 2


def test_what_templates_are_given_is_stored_where_a_late_row_has_it(rows_cache: Path, tmp_path: Path) -> None:
    late = {**TALK, "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}]}
    rows = load_rows(file_of(tmp_path, TALK, late))
    assert [bool(json.loads(row["rendering"])) for row in rows] == [False, True]
    assert load_rows(file_of(tmp_path, TALK, TALK, name="plain.jsonl")).column_names == ["prompt", "completion"]


def test_the_split_of_many_rows_is_that_of_few(
    rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, several sources, near duplicates in classes of a few pieces; the second time nothing is compared."""
    draw = random.Random(0)
    words = [" ".join(draw.choices([f"word{i}" for i in range(400)], k=30)) for _ in range(700)]
    texts = [*words[:600], *(f"{text} indeed" for text in words[:300])]
    file = file_of(tmp_path, *({"text": text} for text in texts))
    other = file_of(tmp_path, *({"text": text} for text in words[600:]), name="other.jsonl")
    sources = [Source(file, weight=1.5), Source(other, weight=0.5)]
    with monkeypatch.context() as patch:
        for limit in ("LARGE_BYTES", "SOUGHT_BYTES"):
            patch.setattr(stored, limit, 1 << 30)
        few = mixed(sources, 0.1)
    monkeypatch.setattr(split, "_AT_ONCE", 500)
    cut, pieces = list[str](), split._pieces
    monkeypatch.setattr(split, "_pieces", lambda text: (cut.append(text), pieces(text))[1])
    many = mixed(sources, 0.1)
    assert stored.mapped(many.rows)
    assert not stored.mapped(few.rows)
    assert many.near_duplicates == few.near_duplicates > 20
    assert max(Counter(cut).values()) <= 3, "twice for the index, whatever the number of classes, and to be looked for"
    assert many.rows[:] == few.rows[:]
    assert few.held_out is not None
    assert many.held_out is not None
    assert many.held_out[ORIGIN][:] == few.held_out[ORIGIN][:]
    monkeypatch.setattr(split, "apart", lambda *_: pytest.fail("compared again"))
    assert mixed(sources, 0.1).rows[ORIGIN][:] == few.rows[ORIGIN][:]


def test_the_first_of_two_runs_is_kept(rows_cache: Path, tmp_path: Path) -> None:
    """The second one was at work when the first one was done."""
    from datasets import Features, Value

    features = Features({"text": Value("string")})

    def parts() -> Any:
        yield {"text": ["a"]}
        if not (rows_cache / "key").exists():
            first = stored.collect(features, [{"text": ["a", "b"]}], lambda: "key")
            assert first.rows["text"][:] == ["a", "b"]
        yield {"text": ["b"]}

    assert stored.collect(features, parts(), lambda: "key", lambda: {"by": "second"}).about == {}
    assert entries(rows_cache) == ["key"]


KILLED = """
import os, sys
from trimtab.data import stored
from datasets import Features, Value
stored.LARGE_BYTES = 0
def parts():
    yield {"text": ["a"]}
    os.kill(os.getpid(), 9)
stored.collect(Features({"text": Value("string")}), parts(), lambda: "key")
"""


def test_a_killed_run_leaves_nothing_that_is_read(rows_cache: Path) -> None:
    from datasets import Features, Value

    environment = {**os.environ, "TRIMTAB_CACHE": str(rows_cache.parent)}
    done = subprocess.run([sys.executable, "-c", KILLED], env=environment, check=False)
    assert done.returncode == -9
    (left,) = entries(rows_cache)
    assert left.endswith(stored._NEW)
    assert stored.find("key") is None
    features = Features({"text": Value("string")})
    stored.collect(features, [{"text": ["a"]}], lambda: "key")
    assert entries(rows_cache) == sorted(["key", left])  # it may be another run's that is at work
    aged(rows_cache / left, 2 * stored._DAY)
    with open(rows_cache / left / stored._ROWS, "ab") as file:
        file.write(b"more")
    stored.collect(features, [{"text": ["a"]}], lambda: "more")
    assert entries(rows_cache) == sorted(["key", left, "more"])  # it is being written
    aged(rows_cache / left, 2 * stored._DAY)
    stored.collect(features, [{"text": ["b"]}], lambda: "other")
    assert entries(rows_cache) == ["key", "more", "other"]


def test_what_nobody_used_for_a_month_goes(rows_cache: Path) -> None:
    for name in ("old", "used", "new"):
        stored.store(name, {"rows": [1]}, {})
        if name != "new":
            aged(rows_cache / name, 2 * stored._MONTH)
            if name == "used":
                assert stored.find("used") is not None
    assert entries(rows_cache) == ["new", "used"]


def test_a_removal_that_was_killed_is_finished(rows_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And meanwhile nothing is read of what is left."""
    stored.store("old", {"rows": [1]}, {})
    aged(rows_cache / "old", 2 * stored._MONTH)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)
        stored.store("new", {"rows": [1]}, {})
    assert stored.find("old") is None
    assert len(entries(rows_cache)) == 2
    stored.store("newer", {"rows": [1]}, {})
    assert entries(rows_cache) == ["new", "newer"]


def without_last_part(held: bytes) -> bytes:
    """A stream of two parts of one size that ends between them, without the mark of its end."""
    head, end = 8 + int.from_bytes(held[4:8], "little"), 8
    return held[: head + (len(held) - head - end) // 2]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("rows.arrow", None), ("rows.arrow", lambda b: b[: len(b) // 2]), ("rows.arrow", lambda _: b""),
        ("rows.arrow", without_last_part), ("about.json", lambda b: b[:5]), ("about.json", None),
    ],
)  # fmt: skip
def test_what_is_damaged_is_made_again(rows_cache: Path, name: str, damage: Any) -> None:
    from datasets import Features, Value

    def made() -> list[str]:
        parts = [{"text": ["first"]}, {"text": ["second"]}]
        found = stored.collect(Features({"text": Value("string")}), parts, lambda: "key", lambda: {"unused": "id"})
        return list(found.rows["text"])

    made()
    file = rows_cache / "key" / name
    file.unlink() if damage is None else file.write_bytes(damage(file.read_bytes()))
    with pytest.warns(
        UserWarning, match=r"data/key: is damaged \(.*\), so it is made again; it lies in key-\w+\.damaged"
    ):
        assert stored.find("key") is None
    assert stored.find("key") is None  # said once
    assert made() == ["first", "second"]
    found = stored.find("key")
    assert found is not None
    assert list(found.rows["text"]) == ["first", "second"]
    assert len(entries(rows_cache)) == 2


def test_what_is_damaged_while_it_is_made_again_is_replaced(rows_cache: Path) -> None:
    stored.store("key", {"rows": [1]}, {})
    (rows_cache / "key" / "about.json").write_text("{")
    with pytest.warns(UserWarning, match="is damaged"):
        assert stored.store("key", {"rows": [2]}, {}).rows[0]["rows"][:] == [2]


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="Windows")
def test_what_others_can_write_is_not_read(rows_cache: Path) -> None:
    umask = os.umask(0)
    try:
        stored.store("key", {"rows": [1]}, {})
    finally:
        os.umask(umask)
    assert [path.stat().st_mode & 0o077 for path in (rows_cache.parent, rows_cache, rows_cache / "key")] == [0, 0, 0]
    for path in (rows_cache / "key", rows_cache, rows_cache.parent):
        path.chmod(0o770)
        with pytest.raises(
            UserError, match=rf"{path} can be written by other users, and what lies there is .* trusted"
        ):
            stored.find("key")
        path.chmod(0o700)
    assert stored.find("key") is not None
    rows_cache.chmod(0o777)
    with pytest.raises(UserError, match="can be written by other users"):
        stored.store("other", {"rows": [1]}, {})


def test_a_disk_that_fills_up_is_said(rows_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the end is written, too, and before an array in a file is written to, which would end the process."""
    import pyarrow

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(pyarrow.RecordBatchStreamWriter, "close", full)
        with pytest.raises(UserError, match=r"cannot be stored there \(No space left"):
            stored.store("key", {"rows": [1]}, {})
    assert entries(rows_cache) == []
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(UserError, match=r"cannot be stored there \(No space left"), stored.scratch() as room:
        room(5, np.int32)


def test_all_is_on_the_disk_before_it_has_its_name(rows_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def rename(new: Path, whole: Path) -> None:
        synced.append("renamed")
        new.rename(whole)

    monkeypatch.setattr(stored, "sync", lambda path: synced.append(path.name))
    monkeypatch.setattr(stored, "_rename", rename)
    stored.store("key", {"rows": [1]}, {})
    assert synced[:2] == ["rows.arrow", "about.json"]
    assert synced[2].endswith(stored._NEW)
    assert synced[3] == "renamed"


def test_a_cache_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"file/data: the rows cannot be stored there .*; make room, or name another"):
        stored.store("key", {"rows": [1]}, {})


def test_scratch_is_in_a_file_only_if_large(rows_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with stored.scratch() as room:
        large = room(5, np.int32)
        large[:] = 1
        assert isinstance(large, np.memmap)
        monkeypatch.setattr(stored, "LARGE_BYTES", 21)
        assert not isinstance(room(5, np.int32), np.memmap)


def test_rows_until_there_are_enough(rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No row behind them is read, or even looked at; they are stored as those of that limit."""
    file = file_of(tmp_path, *({"text": text} for text in TEXTS[:20]), "this is no row")
    seen: list[str] = []

    def enough(row: dict[str, Any]) -> bool:
        seen.append(row["text"])
        return len(seen) == 7

    options = Source(file, stream=True).options
    assert rows_until(enough, lambda: ["seven"], file, **options) == 7
    monkeypatch.setattr(reading, "convert", lambda *_: pytest.fail("read again"))
    assert load_rows(file, limit=7, stream=True)["text"][:] == TEXTS[:7] == seen
    assert rows_until(lambda _: pytest.fail("asked again"), lambda: ["seven"], file, **options) == 7


def test_of_few_rows_nobody_asks_what_they_follow_from(tmp_path: Path) -> None:
    file = file_of(tmp_path, {"text": "a"}, {"text": "b"})
    options = Source(file, stream=True).options
    assert rows_until(lambda _: True, lambda: pytest.fail("asked"), file, **options) == 1
