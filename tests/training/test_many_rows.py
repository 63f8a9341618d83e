"""Rows that are too many for memory: mapped or not, in one process or two, streamed or not, training sees the same."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import psutil
import pytest
import yaml

import tiny
import trimtab as tt
from trimtab.data import portions, split, stored
from trimtab.data import rows as reading
from trimtab.data.rows import Place
from trimtab.data.sources import Source, place_of
from trimtab.errors import UserError
from trimtab.pipeline.checks import gather
from trimtab.recipe.recipe import Recipe, from_dict
from trimtab.training import labelled, preferred, streaming, tokenizing
from trimtab.training.build import build
from trimtab.training.tokenizing import Row, worked
from trimtab.training.trainer import packed

TEXTS = [{"text": f"{i} plus {i + 1} is {2 * i + 1}" + " and so on" * (i % 7)} for i in range(90)]
PAIRS = [{"prompt": f"{i} plus {i}: ", "completion": f"{2 * i}" * (i % 5), "id": i} for i in range(90)]
TALKS = [
    {
        "messages": [
            {"role": "user", "content": f"What is {i}?"},
            {"role": "assistant", "content": f"It is {i}." * (i % 4)},
        ]
    }
    for i in range(90)
]
BETTER = [{"prompt": f"{i}: ", "chosen": f"{i}" * (1 + i % 9), "rejected": f"not {i}" * 3} for i in range(60)]
JUDGED = [{"prompt": f"{i}: ", "completion": f"{i}" * (1 + i % 9), "label": i % 3 > 0} for i in range(60)]
CASES: dict[str, tuple[list[Any], dict[str, Any], str]] = {
    "texts": (TEXTS, {"holdout": 0.1}, "sft"),
    "texts-whole": (TEXTS, {"packing": "none", "holdout": 0}, "sft"),
    "pairs": (PAIRS, {"ignore": ["id"], "packing": "bfd"}, "sft"),
    "pairs-wrapped": (PAIRS, {"ignore": ["id"], "packing": "wrapped"}, "sft"),
    "talks": (TALKS, {"loss": "last"}, "sft"),
    "better": (BETTER, {}, "dpo"),
    "judged": (JUDGED, {}, "kto"),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.model(tmp_path_factory.mktemp("model") / "model")


def recipe_of(folder: Path, model: Path, rows: list[Any], objective: str = "sft", **data: Any) -> Recipe:
    file = tiny.jsonl(folder / "rows.jsonl", *rows)
    values = tiny.recipe(model, file, folder / "out")
    values["data"] = {"path": str(file), "block_tokens": 32, **data}
    values["train"]["objective"] = objective
    return from_dict(values).with_its_rates()


def seen(recipe: Recipe) -> dict[str, Any]:
    """All that training sees of its data."""
    given = gather(recipe, True, False)
    found = {"ids": given.labelled.sequences[:], "end": given.labelled.end, "notes": given.notes}
    found |= {"held out": None if given.held_out is None else given.held_out.tolist()}
    found |= {"features": given.labelled.sequences.features, "mapped": stored.mapped(given.labelled.sequences)}
    if recipe.train.objective == "sft":
        found["packed"] = packed(build(recipe, given), given.tokenizer, recipe, given.labelled)[0][:]
    return found


@pytest.mark.parametrize("case", CASES)
def test_training_sees_the_same_of_many_rows(
    case: str, model: Path, rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In memory, in files, and from files that are there: then no row is converted, tokenized or compared again."""
    rows, data, objective = CASES[case]
    recipe = recipe_of(tmp_path, model, rows, objective, **data)
    with monkeypatch.context() as patch:
        for limit in ("LARGE_BYTES", "SOUGHT_BYTES"):
            patch.setattr(stored, limit, 1 << 30)
        few = seen(recipe)
    monkeypatch.setattr(portions, "PORTION_ROWS", 7)
    assert not few.pop("mapped")
    many = seen(recipe)
    assert many.pop("mapped")
    assert many == few
    monkeypatch.setattr(tokenizing, "portions", lambda *_: pytest.fail("tokenized again"))
    monkeypatch.setattr(reading, "convert", lambda *_: pytest.fail("converted again"))
    again = seen(recipe)
    assert again.pop("mapped")
    assert again == few


def test_another_template_or_length_is_tokenized_anew(model: Path, rows_cache: Path, tmp_path: Path) -> None:
    ids = []
    for more in ({}, {"template": "chatml"}, {"template": "chatml", "loss": "full"}, {"block_tokens": 32}):
        recipe = recipe_of(tmp_path, model, TALKS, **{"block_tokens": 64, **more})
        ids.append(gather(recipe, False, False).labelled)
    assert ids[0].sequences[:] != ids[1].sequences[:]
    assert ids[1].sequences["labels"][:] != ids[2].sequences["labels"][:]
    assert ids[3].counts.cut > ids[0].counts.cut


def test_what_is_parted_is_counted_of_the_rows_at_hand(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stand-ins may be many though the sequences are few; then they are stored, as those of these rows alone."""
    notes = {}
    for kind in ("few", "many"):
        if kind == "many":
            monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
            monkeypatch.setattr(stored, "LARGE_BYTES", 0)
            monkeypatch.setattr(labelled, "mapped", lambda _: False)
        for rows in (PAIRS, [{**row, "prompt": f"{row['prompt']}again: "} for row in PAIRS[:50]]):
            recipe = recipe_of(tmp_path, model, rows, ignore=["id"], packing="wrapped")
            said = [line for line in gather(recipe, True, False).notes if "without its prompt" in line]
            notes[kind, len(rows)] = said
    assert notes["many", 90] == notes["few", 90]
    assert notes["many", 50] == notes["few", 50]
    assert len({str(said) for said in notes.values()}) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", ["talks", "better"])
def test_two_processes_tokenize_as_one(case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, data, objective = CASES[case]
    monkeypatch.setattr(portions, "PORTION_ROWS", 7)
    one, two = (seen(recipe_of(tmp_path, model, rows, objective, num_proc=n, **data)) for n in (1, 2))
    assert one == two


@pytest.mark.slow
def test_the_first_bad_row_is_named_whoever_sees_it(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both processes find one; the message is that of one process."""
    monkeypatch.setattr(portions, "PORTION_ROWS", 2)
    bad = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "mood": "bad"}]}
    recipe = recipe_of(tmp_path, model, [*TALKS[:5], bad, *TALKS[5:8], bad], num_proc=2)
    with pytest.raises(UserError, match=r"data, row 6 \(.*rows\.jsonl, line 6\): .*'mood' of message 2"):
        gather(recipe, False, False)


def ends(rows: Any) -> Any:
    """Of one row the process is killed, as the system kills it for want of memory."""
    if any(row.values["text"] == "fatal" for row in rows):
        os.kill(os.getpid(), signal.SIGKILL)
    return len(rows)


def waits(rows: Any) -> None:
    """Says which process it is in, and stays."""
    print(os.getpid(), flush=True)
    time.sleep(600)


def rows_like(*texts: str) -> Iterator[Row]:
    return (Row(number, {"text": text}, Place("rows.jsonl", "train", number)) for number, text in enumerate(texts, 1))


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portions, "PORTION_ROWS", 1)
    with pytest.raises(UserError, match=r"^data\.num_proc: one of 2 processes that tokenize was ended, .*; lower it$"):
        list(worked(ends, rows_like("a", "fatal", "b"), 2))


@pytest.mark.slow
def test_they_end_with_whoever_started_them() -> None:
    """Even if that is killed, and cannot tell them."""
    code = "import test_many_rows as t; list(t.worked(t.waits, t.rows_like('a'), 2))"
    paths = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-c", f"if __name__ == '__main__':\n    {code}"]
    with subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": paths}, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        worker = int(parent.stdout.readline())
        parent.kill()
    until = time.monotonic() + 30
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.1)


# ---- streaming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["texts", "texts-whole", "pairs", "talks"])
def test_a_stream_is_its_first_rows(case: str, model: Path, tmp_path: Path) -> None:
    """Those that training needs, and no more: with one row less there would not be enough."""
    rows, data, _ = CASES[case]
    recipe = recipe_of(tmp_path, model, rows, streaming=True, **data)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 3})})
    given = gather(recipe, True, False)
    assert given.texts is not None
    assert given.overview is not None
    taken = given.texts.sources[0].limit
    assert taken is not None
    assert 0 < taken < len(rows)
    assert recipe.data is not None
    whole = recipe.model_copy(update={"data": recipe.data.model_copy(update={"streaming": False, "limit": taken})})
    assert seen(whole) == seen(recipe)
    fewer = whole.model_copy(update={"data": whole.data and whole.data.model_copy(update={"limit": taken - 1})})
    assert used(gather(fewer, True, False)) < 3 * 128 <= used(given)


def used(given: Any) -> int:
    """Tokens that training can take of its rows."""
    lengths = [len(ids) for ids in given.labelled.sequences["input_ids"]]
    most = {"wrapped": max(lengths), "bfd": 32, "none": 32}[given.overview.packing]
    return sum(32 if given.overview.packing == "none" else min(length, most) for length in lengths)


def test_a_streamed_run_says_how_many_rows_it_took(model: Path, tmp_path: Path) -> None:
    """In the recipe beside the model, by which the same rows are read again; whatever stands behind them."""
    recipe = recipe_of(tmp_path, model, [*TEXTS[:30], "this is no row"], streaming=True, holdout=0.1)
    changed = {"train": recipe.train.model_copy(update={"steps": 2})}
    recipe = recipe.model_copy(update=changed | {"evaluate": recipe.evaluate.model_copy(update={"parity": False})})
    metrics = tt.run(recipe)
    saved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert saved["data"]["streaming"] is True
    assert 0 < saved["data"]["limit"] < 30
    assert tt.overview(recipe).rows <= saved["data"]["limit"]
    assert tt.evaluate(tmp_path / "out").perplexity == pytest.approx(metrics["perplexity"]["tuned"])


@pytest.mark.parametrize("least", [20, 500])
def test_the_saved_recipe_takes_the_same_rows(
    least: int, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no share set, too: a share of many is held out, none of few; either way as many rows are read again."""
    monkeypatch.setattr(split, "ROWS", least)
    monkeypatch.setattr(streaming, "ROWS", least)
    monkeypatch.setattr(streaming, "share_of", lambda content: 0.0 if len(content) % 3 == 0 else 0.5)
    recipe = recipe_of(tmp_path, model, TEXTS, streaming=True)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"steps": 8})})
    first = streaming.streamed(recipe).data
    assert first is not None
    assert first.limit is not None
    held = 0.02 if first.limit >= least else 0.0
    again = recipe.model_copy(update={"data": first.model_copy(update={"holdout": held})})
    assert (found := streaming.streamed(again).data) is not None
    assert found.limit == first.limit
    assert (held > 0) == (least == 20), first.limit


def test_a_stream_that_ends_early_is_seen_more_than_once(model: Path, tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path, model, TEXTS[:3], streaming=True)
    overview = tt.overview(recipe)
    assert overview.rows == 3
    assert overview.epochs > 1


class Stream:
    """A data set of the hub that breaks where nobody should read."""

    def __init__(self, rows: list[Any], most: int) -> None:
        self.rows, self.most, self.given = rows, most, 0

    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            if self.given == self.most:
                raise ConnectionError("the line is dead")
            self.given += 1
            yield row


def test_the_hub_streams(model: Path, rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At one commit, asked once: the second time all is there; what breaks off is told."""
    asked: list[dict[str, Any]] = []
    streams: list[Stream] = []

    def load_dataset(path: str, **options: Any) -> Stream:
        asked.append({"path": path, **options})
        streams.append(Stream(TEXTS, most))
        return streams[-1]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr("trimtab.training.streaming.pinned_data", lambda path: f"{path}@{'a' * 40}")
    values = tiny.recipe(model, Path("owner/name"), tmp_path / "out")
    values["data"] = {"path": "owner/name", "block_tokens": 32, "streaming": True, "holdout": 0}
    recipe = from_dict(values).with_its_rates()
    most = 2
    with pytest.raises(UserError, match=r"owner/name@a+: the hub broke off \(ConnectionError: the line is dead\)"):
        gather(recipe, False, False)
    most = 60
    first = gather(recipe, False, False)
    assert asked[-1] == {"path": "owner/name", "split": "train", "revision": "a" * 40, "streaming": True}
    assert first.texts is not None
    assert first.texts.sources[0].limit == len(first.rows) < 60
    most = 0
    second = gather(recipe, False, False)
    assert second.labelled.sequences[:] == first.labelled.sequences[:]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"train": {"epochs": 1, "steps": None}},
            "and an epoch has all rows; give train.steps instead of train.epochs",
        ),
        ({"train": {"steps": 0}}, "and there are no steps; set it to false"),
        ({"train": {"objective": "dpo"}}, "with objective: sft; set it to false"),
        ({"data": {"path": ["a.jsonl", "b.jsonl"]}}, "of one source; name one in data.path"),
        ({"search": {"budget": "1MB"}}, "search reads rows of its own: set it to false"),
    ],
)
def test_what_does_not_stream(more: dict[str, Any], says: str, model: Path, tmp_path: Path) -> None:
    values = tiny.recipe(model, tmp_path / "rows.jsonl", tmp_path / "out")
    values["data"]["streaming"] = True
    for block, changes in more.items():
        values[block] = {k: v for k, v in {**values.get(block, {}), **changes}.items() if v is not None}
    with pytest.raises(UserError, match=rf"data\.streaming: .*{says}"):
        from_dict(values)


class Hub:
    """A data set of the hub that moves on between two questions; counts what is fetched."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rows: list[Any]) -> None:
        self.commits = iter("abcdef")
        self.asked: list[dict[str, Any]] = []
        self.streams: list[Stream] = []
        self._rows = rows
        monkeypatch.setattr(datasets, "load_dataset", self._load)
        monkeypatch.setattr(streaming, "pinned_data", self._pinned)

    def _load(self, path: str, **options: Any) -> Stream:
        self.asked.append({"path": path, **options})
        self.streams.append(Stream(self._rows, len(self._rows)))
        return self.streams[-1]

    def _pinned(self, path: str) -> str:
        return path if "@" in path else f"{path}@{next(self.commits) * 40}"


def hub_recipe(model: Path, folder: Path, **data: Any) -> Recipe:
    values = tiny.recipe(model, Path("owner/name"), folder / "out")
    values["data"] = {"path": "owner/name", "block_tokens": 32, "streaming": True, "holdout": 0, **data}
    return from_dict(values).with_its_rates()


def test_a_row_of_a_stream_is_named_without_fetching_the_rest(
    model: Path, rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", "mood": "bad"}]}
    hub = Hub(monkeypatch, [*TALKS[:2], bad, *TALKS])
    with pytest.raises(UserError, match=r"row 3 \(owner/name@a+, row 3\): .*'mood' of message 2"):
        gather(hub_recipe(model, tmp_path), False, False)
    assert all(asked.get("streaming") for asked in hub.asked)
    assert max(stream.given for stream in hub.streams) == 3
    place = place_of([Source("owner/name", stream=True)], 2)
    assert str(place) == "row 2 (owner/name, row 2)"
    assert hub.asked[-1]["streaming"]


def test_all_processes_read_one_commit(
    model: Path, rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first asks; what it hears stands in the recipe that every process gathers by."""
    Hub(monkeypatch, TEXTS)
    seen_by: list[Recipe] = []

    def stop(recipe: Recipe, *_: Any) -> None:
        seen_by.append(recipe)
        raise UserError("enough")

    monkeypatch.setattr("trimtab.pipeline.checks.gather", stop)
    with pytest.raises(UserError, match="enough"):
        tt.run(hub_recipe(model, tmp_path))
    assert seen_by[0].data is not None
    assert seen_by[0].data.path == "owner/name@" + "a" * 40
    assert streaming.at_one_commit(seen_by[0]) == seen_by[0]


@pytest.mark.parametrize("revision", [None, "c0ffee", "main"])
def test_a_stream_without_a_commit_is_refused(
    revision: str | None, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, TEXTS)
    monkeypatch.setattr(streaming, "pinned_data", lambda path: path)
    with pytest.raises(UserError, match=r"data\.streaming: the hub did not say at which commit owner/name.* is"):
        gather(hub_recipe(model, tmp_path, revision=revision), False, False)


def test_what_a_stream_takes_is_asked_anew_of_other_code(
    model: Path, rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, TEXTS)
    recipe = hub_recipe(model, tmp_path)
    first = streaming.streamed(recipe)
    asked: list[Any] = []
    real = streaming._Enough.__call__
    monkeypatch.setattr(streaming._Enough, "__call__", lambda self, row: (asked.append(row), real(self, row))[1])
    Hub(monkeypatch, TEXTS)
    assert streaming.streamed(recipe) == first
    assert not asked
    monkeypatch.setattr(labelled, "version", lambda name: f"another {name}")
    Hub(monkeypatch, TEXTS)
    assert streaming.streamed(recipe) == first
    assert asked


def test_the_key_of_preferences_is_made_once(
    model: Path, rows_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hashes all rows."""
    made: list[str] = []
    real = preferred.key_of_tokens
    monkeypatch.setattr(preferred, "key_of_tokens", lambda *given: (made.append("key"), real(*given))[1])
    gather(recipe_of(tmp_path, model, BETTER, "dpo"), True, False)
    assert len(made) == 1
