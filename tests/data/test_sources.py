"""Several sources as one: what each row is of, how often it counts, what is held out, and what is nearly the same."""

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import tiny
from trimtab.data.rows import unused_keys
from trimtab.data.sources import ORIGIN, Source, mixed, place_of
from trimtab.data.split import ROWS, SHARE, apart, content_of, near_duplicates, share_of
from trimtab.errors import UserError


def texts(count: int, words: int = 30, seed: int = 0) -> list[str]:
    """Texts that have nothing in common but their words."""
    draw = random.Random(seed)
    names = [f"word{i}" for i in range(400)]
    return [" ".join(draw.choices(names, k=words)) for _ in range(count)]


def file_of(folder: Path, name: str, rows: list[Any]) -> str:
    return str(tiny.jsonl(folder / name, *({"text": row} if isinstance(row, str) else row for row in rows)))


# ---- several ----------------------------------------------------------------------------------------------------


def test_one_source_is_as_it_was(tmp_path: Path) -> None:
    found = mixed([Source(file_of(tmp_path, "a.jsonl", ["a", "b"]))])
    assert (found.rows.column_names, found.counts, found.held_out) == (["text"], (2,), None)
    assert found.notes() == ()


def test_every_row_knows_its_place(tmp_path: Path) -> None:
    """Two forms of conversations and two files, so that a complaint names the right line of the right one."""
    one = file_of(tmp_path, "a.jsonl", [{"question": "a", "answer": "b", "source": "x"}])
    talk = {"messages": [{"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "name": "n"}], "id": 1}
    two = file_of(tmp_path, "b.jsonl", ["", talk, talk][1:])
    found = mixed([Source(one), Source(two, limit=1, weight=2)])
    assert found.counts == (1, 1)
    assert [row["completion"][0]["content"] for row in found.rows] == ["b", "d", "d"]
    assert found.rows[0]["rendering"] == "{}"
    assert unused_keys(found.rows) == "id, source"
    places = [str(place_of(found.sources, n, row[ORIGIN])) for n, row in enumerate(found.rows, start=1)]
    assert places == [f"row 1 ({one}, line 1)", f"row 1 ({two}, line 1)", f"row 1 ({two}, line 1)"]


def test_rows_of_different_kinds(tmp_path: Path) -> None:
    one, two = file_of(tmp_path, "a.jsonl", ["a"]), file_of(tmp_path, "b.jsonl", [{"question": "a", "answer": "b"}])
    three = file_of(tmp_path, "c.jsonl", [{"prompt": "a", "completion": "b"}])
    with pytest.raises(
        UserError, match=r"b\.jsonl are \{prompt, completion\} of messages, those of .*a\.jsonl \{text\}"
    ):
        mixed([Source(one), Source(two)])
    with pytest.raises(UserError, match=r"c\.jsonl are \{prompt, completion\}, those of .*b\.jsonl .* of messages"):
        mixed([Source(two), Source(three)])


def test_weights(tmp_path: Path) -> None:
    """A half is every second row, whichever run: chosen by what rows hold."""
    rows = texts(400)
    one, two = file_of(tmp_path, "a.jsonl", rows), file_of(tmp_path, "b.jsonl", [f"{row} b" for row in rows])
    found = mixed([Source(one, weight=2.5), Source(two, weight=0.25)])
    times = Counter(found.rows["text"])
    some = [times[row] for row in rows]
    assert set(some) == {2, 3}
    assert abs(some.count(3) - 200) < 50
    assert abs(sum(times[f"{row} b"] for row in rows) - 100) < 40
    assert mixed([Source(one, weight=2.5), Source(two, weight=0.25)]).rows["text"] == found.rows["text"]
    with pytest.raises(UserError, match="the weights leave no row to train on"):
        mixed([Source(file_of(tmp_path, "c.jsonl", ["a"]), weight=1e-9)])


# ---- what is held out -------------------------------------------------------------------------------------------


def test_a_share_is_held_out_by_what_rows_hold(tmp_path: Path) -> None:
    rows = texts(600)
    found = mixed([Source(file_of(tmp_path, "a.jsonl", rows))], None)
    assert found.held_out is not None
    kept, held_out = found.rows["text"][:], found.held_out["text"][:]
    assert sorted([*kept, *held_out]) == sorted(rows)
    assert abs(len(held_out) - 600 * SHARE) < 12
    assert f"held out: {len(held_out)} of 600 rows" in found.notes()[0]
    shuffled = random.Random(1).sample(
        [*rows, *texts(300, seed=5)], 900
    )  # rows that come and go leave the others there
    again = mixed([Source(file_of(tmp_path, "b.jsonl", shuffled))], SHARE)
    assert again.held_out is not None
    assert set(held_out) <= set(again.held_out["text"])
    assert not set(kept) & set(again.held_out["text"])
    assert mixed([Source(file_of(tmp_path, "c.jsonl", rows[: ROWS - 1]))], None).held_out is None
    assert mixed([Source(file_of(tmp_path, "c.jsonl", rows))], 0).held_out is None


def test_held_out_rows_are_there_once_and_twins_on_one_side(tmp_path: Path) -> None:
    rows = texts(200)
    found = mixed([Source(file_of(tmp_path, "a.jsonl", [*rows, *(row.upper() for row in rows)]), weight=3)], 0.2)
    assert found.held_out is not None
    sides = [{row.lower() for row in part["text"]} for part in (found.rows, found.held_out)]
    assert not sides[0] & sides[1]
    assert len(found.held_out) == 2 * len(sides[1])
    assert len(found.rows) == 6 * len(sides[0])
    assert found.near_duplicates == 0


def test_of_few_rows_one_is_held_out() -> None:
    assert [len(part) for part in apart(["a", "b", "c"], 1e-9)[:2]] == [2, 1]
    with pytest.raises(UserError, match="leaves none of 2 rows to train on"):
        apart(["a", "b"], 0.9999999)


@pytest.mark.parametrize("long", [30, 500])
def test_near_duplicates_are_found(long: int) -> None:
    """A word of thirty changed, a sentence added; not a text of its own with the same words."""
    held_out = texts(40, words=long, seed=1)
    others = texts(150, words=long, seed=2)
    draw = random.Random(3)
    changed = {}
    for number in (3, 7, 31):
        words = held_out[number].split()
        words[draw.randrange(len(words))] = "other"
        changed[number] = " ".join(words)
    changed[12] = held_out[12] + " and so on"
    half = held_out[20][: len(held_out[20]) // 2] + others[0][len(others[0]) // 2 :]
    assert near_duplicates(held_out, [*others[:50], *changed.values(), half, *others[50:]]) == set(changed)


def test_what_many_rows_have_says_nothing() -> None:
    """An instruction that is always the same is longer than what differs: all rows would be near to one another."""
    same = "Say whether the following review is positive or negative, and answer with a single word, please: "
    rows = [same + text for text in texts(300, words=6)]
    split = apart(rows, 0.1)
    assert split.dropped == 0
    assert len(split.held_out) > 15
    twins = [*rows, *(row + " indeed" for row in rows)]  # which may fall on both sides
    assert apart(twins, 0.1).dropped > 20


def test_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rows = texts(200)
    found = mixed([Source(file_of(tmp_path, "a.jsonl", [*rows, *(row + " now" for row in rows)]))], 0.1)
    there = 0 if found.held_out is None else len(found.held_out)
    assert len(found.rows) + there + found.near_duplicates == 400
    assert found.near_duplicates > 20
    assert f"{found.near_duplicates} more were dropped, since nearly the same is trained on" in found.notes()[0]


def test_jaccard_is_what_is_computed() -> None:
    """Against sets of pieces made one by one, at random distances around the threshold."""
    draw, wrong = random.Random(0), 0
    for text in texts(60, words=40, seed=9):
        words = text.split()
        for _ in range(draw.randrange(8)):
            words[draw.randrange(len(words))] = f"x{draw.random()}"
        other = " ".join(words)
        one, two = ({t.encode()[i : i + 20] for i in range(len(t.encode()) - 19)} for t in (text, other))
        near = len(one & two) >= 0.7 * len(one | two)
        wrong += near != bool(near_duplicates([text], [other, *texts(9, seed=4)]))
    assert wrong == 0


def test_a_number_that_follows_from_a_content_alone() -> None:
    numbers = [share_of(text) for text in texts(2000)]
    assert abs(sum(n < 0.25 for n in numbers) / 2000 - 0.25) < 0.04
    assert share_of("a") == share_of("a") != share_of("a", "weight")
    row = {"prompt": [{"role": "user", "content": "A\n b"}], "completion": [{"role": "assistant", "content": "C"}]}
    assert content_of(row) == "a b c"
    assert content_of({"text": "A  b", ORIGIN: {"source": 0, "row": 1}}) == "a b"


def test_rows_keep_their_side_when_one_with_tools_comes(tmp_path: Path) -> None:
    """Its column of rendering is there for all rows then, and says nothing of the others."""
    said = [(f"what is {i} and {i}", f"{2 * i}") for i in range(0, 4000, 97)]
    asked = [{"messages": [{"role": "user", "content": a}, {"role": "assistant", "content": b}]} for a, b in said]
    tools = {**asked[0], "tools": [{"type": "function", "function": {"name": "add"}}]}
    sides = []
    for rows in (asked, [*asked, tools]):
        read = mixed([Source(str(tiny.jsonl(tmp_path / f"{len(rows)}.jsonl", *rows)))], 0.2)
        assert read.held_out is not None
        sides.append({row["prompt"][0]["content"] for row in read.held_out if row.get("rendering") in (None, "{}")})
    assert len(sides[0]) > 3
    assert sides[0] <= sides[1] | {said[0][0]}
    assert sides[1] <= sides[0]


def test_where_every_row_has_a_twin_nothing_is_held_out_unasked(tmp_path: Path) -> None:
    """Else the rows that were dropped for it would be lost to training, for no measurement."""
    draw = random.Random(0)
    texts = [" ".join(f"w{draw.randrange(10**6)}" for _ in range(60)) for _ in range(ROWS // 2)]
    rows = [{"text": f"{text} {end}"} for text in texts for end in ("one", "two")]
    source = Source(str(tiny.jsonl(tmp_path / "a.jsonl", *rows)))
    asked, unasked = mixed([source], SHARE), mixed([source], None)
    assert asked.held_out is None
    assert asked.near_duplicates > 0
    assert (unasked.held_out, unasked.near_duplicates, len(unasked.rows)) == (None, 0, ROWS)
