"""What every command of `trimtab` does, as one call: the command line is a thin skin over these functions.

    import trimtab as tt

    tt.plan("small.yaml")                         what training will need, before anything is loaded
    metrics = tt.run("small.yaml", ["train.steps=500"])
    tt.evaluate("runs/small", data="heldout.jsonl").perplexity
    tt.export("runs/small", "gguf")
    print(tt.chat("runs/small").answer("What is a trim tab?"))

The same thing has the same name everywhere: `path` is a model (a directory, a .gguf file, a hub id), `recipe` a file, a
mapping or a `Recipe`, `data` text in the forms of a recipe's `data.path`, `out` where something is written. What needs an
extra that is not installed says so in one line before any work is done.

`prepare`, `load`, `fold` and `save`, the parts of a run for people's own training loops, are in `models` and `formats`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.errors import UserError
from trimtab.extras import require, require_library
from trimtab.recipe.recipe import Recipe, as_recipe

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search
    from trimtab.evaluation.chat import Sampling, Talk
    from trimtab.evaluation.harness import Difference, Score
    from trimtab.evaluation.serving import Served
    from trimtab.formats.export import Report
    from trimtab.memory.peak import Plan
    from trimtab.pipeline.stages import Observer
    from trimtab.pruning import Pruned
    from trimtab.training.overview import Overview

AnyPath = str | os.PathLike[str]
AnyRecipe = Recipe | Mapping[str, Any] | AnyPath
"""A recipe, its values, or its file."""


def plan(recipe: AnyRecipe, overrides: Sequence[str] = (), *, memory: str | int | None = None) -> "Plan":
    """Predict the memory that a recipe's training needs; nothing is loaded but names and shapes.

    Args:
        recipe: a file, a mapping or a `Recipe`; or a model alone (a directory, a config.json, a .gguf file, a hub id, of
            which only the config is fetched), which is planned with the defaults.
        overrides: `key=value` with dotted keys, for example `train.micro_batch=2`.
        memory: what there is for training, `24GiB`: `.settings` are then those that fit.

    Returns:
        Bytes by what they are for; `.total` is the predicted peak above the interpreter and its libraries, `.sizes` are
        those of the tuned model by format. Of a recipe with a `prune` block it is the plan of the pruned model where that
        is there, else of the whole one.
    """
    from trimtab.formats.file_size import parse_bytes
    from trimtab.pipeline import planning

    chosen, notes = planning.to_plan(recipe, overrides)
    return replace(planning.plan(chosen, None if memory is None else parse_bytes(memory, "memory")), notes=notes)


def overview(recipe: AnyRecipe, overrides: Sequence[str] = ()) -> "Overview":
    """What training will see of a recipe's data: rows, tokens, what is learned of them, and the first example.

    Args:
        recipe: a file, a mapping or a `Recipe`; its model's tokenizer is read, and no weight.
        overrides: `key=value` with dotted keys, for example `data.loss=last`.
    """
    chosen = as_recipe(recipe, overrides)
    require("`trimtab data`", "train")
    from trimtab.pipeline.looking import look

    return look(chosen)


def run(
    recipe: AnyRecipe,
    overrides: Sequence[str] = (),
    *,
    overwrite: bool = False,
    resume: bool = False,
    show: "Observer | None" = None,
) -> dict[str, Any]:
    """Carry out a recipe: prune and search if it says so, then quantize, tune, fold, save, reload and compare.

    Args:
        recipe: a file, a mapping or a `Recipe`.
        overrides: `key=value` with dotted keys.
        overwrite: replace what an earlier run left in the output directory.
        resume: continue from its last checkpoint.
        show: told what happens (`trimtab.report.terminal.Terminal()` prints it); None for silence.

    Returns:
        The metrics, as written to `metrics.json` in the output directory.

    Raises:
        UserError: for anything the user can mend; nothing is then left half-written.
    """
    from trimtab.pipeline import stages

    return stages.run(as_recipe(recipe, overrides), overwrite=overwrite, resume=resume, show=show)


def search(recipe: AnyRecipe, overrides: Sequence[str] = (), *, show: "Observer | None" = None) -> "Search":
    """Search bits per layer within the recipe's budget; after an interruption the same call resumes it.

    Args:
        recipe: a file, a mapping or a `Recipe` with a `search` block.
        overrides: `key=value` with dotted keys.
        show: told when a trial begins or ends; None for silence.

    Returns:
        The search: `.front(search.ledger.trials())` is the Pareto front. Tables, pictures and a recipe for every point
        are in `<output>/search`.
    """
    chosen = as_recipe(recipe, overrides)
    if chosen.search is None:
        raise UserError(f"{chosen.name}: search: missing; write for example search: {{budget: 90MiB}}")
    from trimtab.pipeline import stages

    return stages.search(chosen, show=show)


@dataclass(frozen=True)
class Evaluation:
    """Perplexity on held-out data."""

    perplexity: float
    tokens: int
    """Tokens in all windows."""
    data: str
    split: str
    block_tokens: int
    """Tokens in a window."""


def evaluate(
    path: str,
    data: str | None = None,
    *,
    split: str | None = None,
    block_tokens: int | None = None,
    tokens: int | None = None,
) -> Evaluation:
    """Perplexity of a model, saved by trimtab or in float, on held-out data.

    Args:
        path: the model.
        data: held-out data, in the forms of a recipe's `data.path`; None for what the model's own recipe names.
        split: of a hub data set or of `pydoc-topics`; None for the recipe's, or `train` where `data` is given.
        block_tokens: length of a window; None for the recipe's, or 1024.
        tokens: at most this many; None for the recipe's, or all where `data` is given.
    """
    require_library("`trimtab eval`", "datasets")
    from trimtab.data.rows import load_rows
    from trimtab.data.sequences import check_tokens, length_of, token_windows
    from trimtab.evaluation.perplexity import perplexity
    from trimtab.models.load import load_as_it_is
    from trimtab.models.positions import check_length
    from trimtab.recipe.inputs import held_out
    from trimtab.recipe.texts import held_out as held_out_rows

    for option, value in (("block_tokens", block_tokens), ("tokens", tokens)):
        if value is not None and value < 2:
            raise UserError(f"{option}: {value} tokens predict nothing; give at least 2")
    if data is None:
        block = held_out(Path(path))
        if block is not None and split is not None:
            block = block.model_copy(update={"eval_split": split})
        rows = None if block is None else held_out_rows(block)
        if block is None or rows is None:
            raise UserError(f"{path}: its recipe names no held-out data; pass --data")
        data, split = block.eval_path or f"rows held out of {block.named}", block.eval_split
        tokens = block.eval_tokens if tokens is None else tokens
        most = block.block_tokens if block_tokens is None else block_tokens
        model, tokenizer = load_as_it_is(path)
        block_tokens = most if block.eval_path else max(2, length_of(rows, tokenizer, most))
    else:
        split, block_tokens = "train" if split is None else split, 1024 if block_tokens is None else block_tokens
        rows = load_rows(data, split=split)
        model, tokenizer = load_as_it_is(path)
    windows = token_windows(rows, tokenizer, block_tokens=block_tokens, limit_tokens=tokens)
    check_tokens(windows, tokenizer, model.config.get_text_config().vocab_size, data)
    check_length(model, block_tokens, "block_tokens")
    return Evaluation(perplexity(model, windows), windows.numel(), data, split, block_tokens)


@dataclass(frozen=True)
class Accuracies:
    """Scores of one model or two, and the second's differences from the first."""

    scores: "dict[str, list[Score]]"
    """By path."""
    differences: "list[Difference]"
    out: str
    """The JSON file that holds them."""


def harness(
    path: str,
    other: str | None = None,
    *,
    tasks: Sequence[str] = ("piqa", "arc_easy"),
    data: str | None = None,
    limit: int | None = None,
    out: str | None = None,
) -> Accuracies:
    """Accuracies by lm-evaluation-harness on local files, with standard errors; of two models, paired differences.

    Args:
        path: the model.
        other: a second one, asked the same items.
        tasks: names in `trimtab.evaluation.harness.TASKS`.
        data: the directory that holds <task>/<split>.jsonl in the data sets' original fields.
        limit: items of each task, spread evenly; None for all.
        out: JSON file; None for `harness.json` in `path`.
    """
    require("`trimtab harness`", "eval")
    from trimtab.evaluation import harness as asking
    from trimtab.formats.manifest import add
    from trimtab.models.load import load_as_it_is

    asking.check_tasks(tasks, data)
    if out is None and not Path(path).is_dir():
        raise UserError(f"{path}: is no directory to write harness.json into; pass --out")
    file = out or str(Path(path) / "harness.json")
    asking.check_out(file)
    paths = (path,) if other is None else (path, other)
    scores = {name: asking.run(*load_as_it_is(name), tasks, data or "", limit=limit) for name in paths}
    found = [] if other is None else asking.differences(scores[path], scores[other])
    asking.write(file, scores, found)
    if out is None:
        add(Path(path), ("harness.json",))
    return Accuracies(scores, found, file)


def export(
    path: str,
    format: str,
    out: AnyPath | None = None,
    *,
    engine: str | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
) -> "Report":
    """Write a model that trimtab saved in another format, from its stored codes.

    Args:
        path: a directory that trimtab saved.
        format: a name in `trimtab formats`, for example `compressed-tensors`.
        out: where to; None for `<path>/<format>`.
        engine: the one engine that must run the result; None for any that reads the format.
        allow_lossy: round what the format does not hold to the nearest that it holds, instead of refusing.
        overwrite: replace an earlier export.
        max_shard_size: size of a safetensors file.

    Raises:
        UserError: naming the first layer that the format cannot hold, the cause and the remedy.
    """
    from trimtab.formats import export as exporting

    options = exporting.Options(
        engine=engine, allow_lossy=allow_lossy, overwrite=overwrite, max_shard_size=max_shard_size
    )
    return exporting.export(path, format, None if out is None else Path(out), options)


def parity(
    path: str,
    engine: str,
    *,
    python: str | None = None,
    trained: str | None = None,
    data: str | None = None,
    tokens: int = 512,
) -> "Served":
    """Compare what an engine computes from an exported directory with the model that was trained.

    Args:
        path: the exported directory.
        engine: transformers, vllm, llama.cpp or mlx.
        python: Python of the engine's own environment; None for TRIMTAB_<ENGINE>_PYTHON, or ours.
        trained: the directory that trimtab saved; None for the one that holds `path`.
        data: held-out text; None for what the recipe names.
        tokens: how many to compare on.
    """
    require_library("`trimtab parity`", "datasets")
    from trimtab.evaluation import serving
    from trimtab.formats.manifest import add

    served = serving.parity(path, engine, python=python, trained=trained, path=data, tokens=tokens)
    add(Path(path), (f"parity-{engine}.json",))
    return served


def verify(path: AnyPath) -> int:
    """Compare every file of a saved or exported model with the hashes in its manifest; the number of files.

    Raises:
        UserError: naming the first file that is missing, changed or foreign.
    """
    from trimtab.formats.manifest import verify as verify_files

    return verify_files(Path(path))


def chat(path: str, *, system: str | None = None, sampling: "Sampling | None" = None, engine: str = "auto") -> "Talk":
    """A model to talk to: `.answer(question)` alone, or `.say(question)`, piece by piece and remembered until `.reset()`.

    Args:
        path: a run's folder, a saved or exported model, a .gguf file, a hub id, or a PEFT LoRA that names its base.
        system: what the model is told first.
        sampling: `trimtab.evaluation.chat.Sampling`; None for the likeliest token each time, 256 at most.
        engine: auto, transformers or llama.cpp.
    """
    from trimtab.evaluation.chat import Sampling
    from trimtab.pipeline.talking import talk

    return talk(path, system=system, sampling=sampling or Sampling(), engine=engine)


def prune(
    path: str,
    out: AnyPath,
    *,
    ratio: float | None = None,
    bytes: str | int | None = None,
    layers: int | None = None,
    what: str = "widths",
    importance: str = "taylor",
    keep: Iterable[int] = (),
    count_embeddings: bool = False,
    multiple_of: int = 64,
    data: str = "pydoc-topics",
    split: str = "train",
    tokens: int = 8192,
    block_tokens: int = 256,
    dtype: str = "bfloat16",
    seed: int = 0,
) -> "Pruned":
    """Take attention heads and MLP channels, or whole layers, out of a float model; writes an ordinary checkpoint.

    Args:
        path: the float model.
        out: a new directory.
        ratio: share of the parameters to remove, at least; exactly one of `ratio`, `bytes` and `layers`.
        bytes: or the largest size of what is left, for example `200MiB`.
        layers: or a number of whole layers to drop.
        what: what gives way to a ratio or size: widths or layers.
        importance: taylor, magnitude or random.
        keep: layers not to drop, which decide the widths; negative numbers count from the end.
        count_embeddings: whether the ratio is one of all parameters.
        multiple_of: MLP widths are a multiple of this: the largest group size to be used.
        data: calibration set, in the forms of a recipe's `data.path`.
        split: of it.
        tokens: calibration tokens, at most.
        block_tokens: length of a calibration window.
        dtype: of the pruned model: bfloat16, float16 or float32.
        seed: of random importance.
    """
    from trimtab.formats.file_size import parse_bytes
    from trimtab.pruning import Options, prune_checkpoint

    options = Options(
        ratio=ratio,
        target_bytes=None if bytes is None else parse_bytes(bytes, "--bytes"),
        layers=layers,
        what=what,  # type: ignore[arg-type]
        importance=importance,  # type: ignore[arg-type]
        count_embeddings=count_embeddings,
        multiple_of=multiple_of,
        keep=tuple(keep),
        seed=seed,
    )
    if options.reads_text:
        require_library("pruning on a calibration set", "datasets")
    text = {"text": data, "split": split, "tokens": tokens, "block_tokens": block_tokens}
    return prune_checkpoint(path, out, options, **text, dtype=dtype)  # type: ignore[arg-type]
