"""Runs beside what people have: nothing of theirs is removed, and the earlier run stays until the new one is whole."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import tiny
import trimtab as tt
from trimtab.data import hashes
from trimtab.errors import UserError
from trimtab.formats import manifest
from trimtab.formats.holding import holding
from trimtab.pipeline import run as running
from trimtab.recipe.recipe import Recipe, as_recipe, read
from trimtab.training import teacher_cache


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, `model`, data, `data.jsonl`, a recipe, `recipe.yaml`, and a run of it, `out`."""
    folder = tmp_path_factory.mktemp("made")
    tiny.model(folder / "model")
    tiny.text(folder / "data.jsonl")
    tiny.write(folder / "recipe.yaml", untrained(folder))
    tt.run(folder / "recipe.yaml")
    return folder


@pytest.fixture
def given(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, with a recipe of relative paths, which is the working directory."""
    monkeypatch.chdir(shutil.copytree(made, tmp_path / "here"))
    tiny.write(tmp_path / "here/recipe.yaml", untrained(Path()))
    return tmp_path / "here"


def untrained(folder: Path, **changes: Any) -> dict[str, Any]:
    """A recipe that only quantizes: seconds."""
    quick = {"method": "rtn", "train": {"steps": 0}, "evaluate": {"parity": False}} | changes
    return tiny.recipe(folder / "model", folder / "data.jsonl", folder / "out", **quick)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---- what is replaced ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume": True}], ids=["plain", "overwrite", "resume"])
def test_an_output_that_is_the_folder_of_a_recipe(given: Path, flags: dict[str, bool]) -> None:
    """`output: .` beside the recipe, and above all inputs: the folder was emptied."""
    before = listing(given.parent)
    for out in (".", "..", "out/.."):
        with pytest.raises(UserError, match=r"is in the output directory|working directory|not empty|no checkpoint"):
            tt.run("recipe.yaml", [f"output={out}"], **flags)
    assert listing(given.parent) == before


@pytest.mark.parametrize(
    "name", ["recipe.yaml", "metrics.json", "checkpoints/mine.txt", "quantization.json", "config.json"]
)
def test_a_folder_is_no_run_by_a_name_in_it(given: Path, name: str) -> None:
    other = given / "other"
    (other / name).parent.mkdir(parents=True)
    (other / name).write_text("mine")
    with pytest.raises(UserError, match=rf"holds {name}, which trimtab did not write"):
        tt.run("recipe.yaml", ["output=other"], overwrite=True)
    assert listing(other) == {name: b"mine"}


INPUTS: dict[str, str] = {
    "model.path": "base/config.json",
    "data.path": "data.jsonl",
    "data.eval_path": "data.jsonl",
    "start.path": "data.jsonl",
    "model.adapter": "adapter/adapter_config.json",
    "evaluate.tasks_data": "tasks/piqa/valid.jsonl",
    "distill.cache": "teacher/teacher.json",
}


@pytest.mark.parametrize("folder", ["out", "out.unfinished"])
@pytest.mark.parametrize("key", INPUTS)
def test_inputs_are_never_in_what_is_removed(given: Path, key: str, folder: str) -> None:
    """Named through a link and `..`, and in the folder where a stopped run lies, too."""
    file = given / folder / INPUTS[key]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    (given / "link").symlink_to(given / folder)
    named = Path("out/../link") / INPUTS[key].partition("/")[0]
    before = listing(given)
    for flags in ({"overwrite": True}, {}):
        with pytest.raises(UserError, match=rf"{key}: .*(is in the output directory|give it one of its own)"):
            tt.run("recipe.yaml", [f"{key}={named}", *(["distill.weight=0.5"] if "distill" in key else [])], **flags)
    assert listing(given) == before


def test_the_recipe_is_an_input(given: Path) -> None:
    with pytest.raises(UserError, match=r"the recipe: .*out/recipe\.yaml is in the output directory"):
        tt.run("out/recipe.yaml", ["output=out"], overwrite=True)
    (given / "out/mine.yaml").write_text((given / "recipe.yaml").read_text())
    with pytest.raises(UserError, match=r"the recipe: .*mine\.yaml is in the output directory"):
        tt.run("out/mine.yaml", ["output=out"], overwrite=True)
    assert (given / "out/mine.yaml").exists()


def test_the_earlier_run_stays_until_the_new_one_is_whole(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = listing(given)
    assert manifest.kind_of(given / "out") == "run"
    for room, step in ((running, "build"), (running, "write_into"), (running.Measuring, "saved")):
        with monkeypatch.context() as patch:
            patch.setattr(room, step, _interrupted)
            with pytest.raises(KeyboardInterrupt):
                tt.run("recipe.yaml", overwrite=True)
        assert listing(given) == before
    tt.run("recipe.yaml", ["rules.1.grid.bits=4"], overwrite=True)
    assert listing(given)["out/model.safetensors"] != before["out/model.safetensors"]
    assert listing(given).keys() == before.keys()


def _interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_what_was_written_into_a_run_later_goes_with_it(given: Path) -> None:
    """Exports and reports of ours; a file in an export that is not ours stays, and so does the run."""
    tt.export("out", "dense")
    (given / "out/dense/notes.md").write_text("mine")
    with pytest.raises(UserError, match=r"holds dense/notes\.md, which trimtab did not write"):
        tt.run("recipe.yaml", overwrite=True)
    (given / "out/dense/notes.md").unlink()
    tt.run("recipe.yaml", overwrite=True)
    assert not (given / "out/dense").exists()


def test_a_changed_file_of_a_run_is_somebodys(given: Path) -> None:
    (given / "out/generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds generation_config\.json, which somebody changed"):
        tt.run("recipe.yaml", overwrite=True)


# ---- stopped runs -----------------------------------------------------------------------------------------------------


def stopped_while_a_teacher_is_cached(given: Path, patch: pytest.MonkeyPatch) -> None:
    def asks(recipe: Recipe, tokenizer: Any, rows: Any, packed: Callable[..., Any], **_: Any) -> None:
        packed(tt.load(recipe.model.path)[0], tokenizer, recipe, rows)  # the trainer makes its folder
        raise KeyboardInterrupt

    patch.setattr(teacher_cache, "ask", asks)


def test_a_run_stopped_before_its_first_checkpoint_is_begun_anew(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while a teacher is cached left a folder that neither a rerun nor `--resume` took."""
    changes = ["output=new", "method={name: lr-qat, rank: 4}", "train.steps=1", "train.save_steps=1", "distill={}"]
    with monkeypatch.context() as patch:
        stopped_while_a_teacher_is_cached(given, patch)
        with pytest.raises(KeyboardInterrupt):
            tt.run("recipe.yaml", changes)
        assert not [f.name for f in given.iterdir() if f.name.startswith("new")]
        patch.setattr(running.Work, "_clear", lambda work: None)  # as if killed
        with pytest.raises(KeyboardInterrupt):
            tt.run("recipe.yaml", changes)
    assert (given / "new.unfinished/checkpoints").is_dir()
    with pytest.raises(UserError, match=r"new\.unfinished/checkpoints holds no checkpoint; run without it"):
        tt.run("recipe.yaml", changes, resume=True)
    assert len(tt.run("recipe.yaml", changes[:-1])["losses"]) == 1
    assert not (given / "new.unfinished").exists()


def test_a_stopped_run_is_only_removed_when_told(given: Path) -> None:
    stopped = given / "out.unfinished"
    checkpoint = stopped / "checkpoints/checkpoint-3"
    checkpoint.mkdir(parents=True)
    for name in ("trainable.safetensors", "optimizer.pt", "scheduler.pt", "recipe.yaml", "versions.json"):
        (checkpoint / name).write_text("as it was written")
    (checkpoint / "trainer_state.json").write_text('{"global_step": 3}')
    manifest.write_manifest(checkpoint, "checkpoint")
    before = listing(given)
    with pytest.raises(UserError, match=r"out\.unfinished is in the way, and trimtab did not write it"):
        tt.run("recipe.yaml", overwrite=True)
    manifest.write_manifest(stopped, "unfinished")
    with pytest.raises(
        UserError, match=r"was stopped, and .*checkpoint-3 is what it reached; pass --resume .*--overwrite"
    ):
        tt.run("recipe.yaml")
    for name in ("thesis.txt", "checkpoints/thesis.txt"):
        (stopped / name).write_text("mine")
        with pytest.raises(UserError, match=rf"out\.unfinished holds {name}, which trimtab did not write"):
            tt.run("recipe.yaml", overwrite=True)
        (stopped / name).unlink()
    (stopped / "manifest.json").unlink()
    assert listing(given) == before
    manifest.write_manifest(stopped, "unfinished")
    tt.run("recipe.yaml", overwrite=True)
    assert not stopped.exists()


def test_two_runs_into_one_output(given: Path) -> None:
    """The second is refused while the first is at it, and so is a save into it."""
    before = listing(given)
    with holding(given / "out"):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .* is writing it"):
            tt.run("recipe.yaml", overwrite=True)
        with pytest.raises(UserError, match="holds a run, which is not replaced by a saved model"):
            tt.save(tt.load("model")[0], Path("model/../out"))
    with holding(given / "saved"), pytest.raises(UserError, match="is writing it"):
        tt.save(tt.load("model")[0], Path("model/../saved"))
    assert listing(given) == before


# ---- the recipe that a run saves --------------------------------------------------------------------------------------


def test_the_saved_recipe_reads_the_same_from_anywhere(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It had relative paths: from another directory another file was read, or none."""
    tt.run("recipe.yaml", ["rules.1.grid.zero=real"], overwrite=True)
    saved = read("out/recipe.yaml")
    assert (saved.model.path, saved.output) == (str(given / "model"), str(given / "out"))
    assert saved.data is not None
    assert saved.data.path == saved.data.eval_path == str(given / "data.jsonl")
    assert saved.inputs is not None
    assert set(saved.inputs) == {"model.path", "data.path", "data.eval_path"}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= saved.inputs["model.path"].keys()
    listed = hashes.sha256(given / "data.jsonl"), (given / "data.jsonl").stat().st_size
    found = saved.inputs["data.path"]["data.jsonl"]
    assert (found.sha256, found.bytes) == listed
    here = tt.evaluate("out")
    elsewhere = given.parent / "elsewhere"
    elsewhere.mkdir()
    tiny.text(elsewhere / "data.jsonl", 200)
    monkeypatch.chdir(elsewhere)
    assert tt.evaluate(str(given / "out")) == here
    assert yaml.safe_load((given / "out/recipe.yaml").read_text())["inputs"]
    report = tt.export(str(given / "out"), "compressed-tensors", elsewhere / "lossy", allow_lossy=True)
    assert (report.kind, set(report.perplexity)) == ("lossy", {"before", "after"})


def test_a_text_that_changed_is_said(given: Path) -> None:
    tt.run("recipe.yaml", ["rules.1.grid.zero=real"], overwrite=True)
    with (given / "data.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more"}) + "\n")
    with pytest.raises(
        UserError, match=r"data\.eval_path: .*data\.jsonl has changed since the model was made; pass --data"
    ):
        tt.evaluate("out")
    assert tt.evaluate("out", "data.jsonl").perplexity > 1
    report = tt.export("out", "compressed-tensors", allow_lossy=True)
    assert (report.kind, report.perplexity) == ("lossy", {})
    assert "data.jsonl has changed" in report.unmeasured
    (given / "data.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.jsonl: is gone since the model was made; pass --data"):
        tt.evaluate("out")
    assert "is gone" in tt.export("out", "compressed-tensors", allow_lossy=True, overwrite=True).unmeasured


def test_options_of_eval_are_honoured_or_refused(given: Path) -> None:
    """`--block-tokens` and `--split` without `--data` were left out."""
    assert tt.evaluate("out").block_tokens == 32
    found = tt.evaluate("out", block_tokens=16, tokens=64)
    assert (found.block_tokens, found.tokens) == (16, 64)
    assert found.perplexity != tt.evaluate("out", tokens=64).perplexity
    with pytest.raises(UserError, match="local data has no split 'test'"):
        tt.evaluate("out", split="test")
    for option in ("block_tokens", "tokens"):
        for value in (1, 0, -5):
            with pytest.raises(UserError, match=rf"{option}: {value} tokens predict nothing"):
                tt.evaluate("out", **{option: value})  # type: ignore[arg-type]
    with pytest.raises(UserError, match="no split ''"):
        tt.evaluate("out", split="")


def test_going_on_reads_the_same_files(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any directory by the recipe that was saved; what changed is named."""
    trained = {"method": {"name": "lr-qat", "rank": 4}, "train": {"steps": 1, "save_steps": 1}}
    tiny.write(given / "trained.yaml", untrained(Path(), **trained))
    tt.run("trained.yaml", ["output=tuned"])
    monkeypatch.chdir(given.parent)
    assert len(tt.run(given / "tuned/recipe.yaml", resume=True)["losses"]) == 1
    assert len(tt.run(given / "tuned/recipe.yaml", ["train.steps=2"], resume=True)["losses"]) == 2
    kept = sorted(f.name for f in (given / "tuned/checkpoints").iterdir())
    assert kept == ["checkpoint-1", "checkpoint-2"]
    before = listing(given)
    for file, key in (("data.jsonl", r"data\.(eval_)?path"), ("model/config.json", r"model\.path")):
        (given / file).write_text((given / file).read_text() + "\n")
        with pytest.raises(UserError, match=rf"--resume: {key}: {Path(file).name} has changed since the run began"):
            tt.run(given / "tuned/recipe.yaml", ["train.steps=3"], resume=True)
        (given / file).write_bytes(before[file])
    assert listing(given) == before


def test_a_recipe_keeps_its_file_and_its_teacher(given: Path) -> None:
    recipe = as_recipe("recipe.yaml", ["distill={}"])
    assert recipe.file == str(given / "recipe.yaml")
    assert recipe.moved(given / "x").teacher_cache == recipe.teacher_cache == Path("out-teacher")


def test_a_file_that_comes_into_a_run_that_is_made(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Notes that somebody keeps beside the checkpoints while a run goes on: they stay where they are."""
    notes = given / "new.unfinished/notes.txt"
    made_by_now = running.Work.finish

    def finish(work: Any) -> None:
        notes.write_text("mine")
        made_by_now(work)

    monkeypatch.setattr(running.Work, "finish", finish)
    tt.run("recipe.yaml", ["output=new"])
    assert (given / "new/model.safetensors").is_file()
    assert listing(notes.parent) == {"notes.txt": b"mine"}
    with pytest.raises(UserError, match=r"new\.unfinished is in the way, and trimtab did not write it"):
        tt.run("recipe.yaml", ["output=new"], overwrite=True)


def test_an_earlier_run_is_read_once_to_see_that_nobody_changed_it(
    given: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be many gigabytes, and is looked at again until the moment in which it goes."""
    read: list[Path] = []
    real = hashes.sha256
    monkeypatch.setattr(hashes, "_TICK_SECONDS", -1.0)  # the fixture has written it a moment ago
    monkeypatch.setattr(hashes, "sha256", lambda file: (read.append(file), real(file))[1])
    tt.run("recipe.yaml", overwrite=True)
    weights = [file for file in read if file == (given / "out/model.safetensors").resolve()]
    assert len(weights) == 1
