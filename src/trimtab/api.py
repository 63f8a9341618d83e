"""What every command of `trimtab` does, as one call: the command line is a thin skin over these functions.

The same thing has the same name everywhere: `path` is a model (a directory, a .gguf file, a hub id), `recipe` a file, a
mapping or a `Recipe`, `data` text in the forms of a recipe's `data.path`, and `out` the place to write to. A function that
needs an extra which is not installed says so in one line before any work is done. The parts of a run for your own training
loop (`prepare`, `load`, `fold`, `save`) are in `models` and `formats`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from trimtab.devices import resolve
from trimtab.errors import UserError
from trimtab.extras import require, require_library
from trimtab.recipe.recipe import Recipe, as_recipe

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search
    from trimtab.evaluation.chat import Sampling, Talk
    from trimtab.evaluation.serving import Served
    from trimtab.formats.export import Report
    from trimtab.memory.peak import Plan
    from trimtab.pipeline.evaluating import Accuracies, Evaluation
    from trimtab.pipeline.stages import Observer
    from trimtab.pruning import Pruned
    from trimtab.training.overview import Overview

AnyPath = str | os.PathLike[str]
AnyRecipe = Recipe | Mapping[str, Any] | AnyPath
"""A recipe, its values, or its file."""
Device = str | torch.device


def _on(overrides: Sequence[str], device: Device | None) -> Sequence[str]:
    """The overrides, with a device in place of the recipe's where one is named."""
    return overrides if device is None else (*overrides, f"model.device={device}")


def plan(
    recipe: AnyRecipe,
    overrides: Sequence[str] = (),
    *,
    memory: str | int | None = None,
    probe: bool = False,
    device: Device | None = None,
) -> "Plan":
    """Predict the memory that a recipe's training needs; nothing is loaded but names and shapes.

    Args:
        recipe: a file, a mapping or a `Recipe`; or a model alone (a directory, a config.json, a .gguf file, a hub id, of
            which only the config is fetched), which is planned with the defaults.
        overrides: `key=value` with dotted keys, for example `train.micro_batch=2`.
        memory: memory for training, `24GiB`; `.settings` of the result then lists what fits into it.
        probe: whether to train layers of random weights for ten seconds, which measures `.speed`.
        device: the device to plan for, in place of the recipe's; the plan is compared with its free memory.

    Returns:
        The planned bytes by purpose. `.total` is the predicted peak above the interpreter and its libraries, `.sizes` has
        the size of the tuned model in each format. A recipe with a `prune` block is planned for the pruned model if that
        exists already, else for the whole one.

    Examples:
        >>> tt.plan("small.yaml", memory="24GiB").total
    """
    from trimtab.formats.file_size import parse_bytes
    from trimtab.pipeline import planning

    chosen, notes = planning.to_plan(recipe, _on(overrides, device))
    found = replace(planning.plan(chosen, None if memory is None else parse_bytes(memory, "memory")), notes=notes)
    return replace(found, speed=planning.probed(chosen, found.total + found.beside)) if probe else found


def overview(recipe: AnyRecipe, overrides: Sequence[str] = ()) -> "Overview":
    """Show what training will see of a recipe's data: rows, tokens, the part that is learned, and the first example.

    Args:
        recipe: a file, a mapping or a `Recipe`; its model's tokenizer is read, and no weight.
        overrides: `key=value` with dotted keys, for example `data.loss=last`.

    Returns:
        The counts, the warnings, and the first example as pieces of text, each marked as learned or not.

    Examples:
        >>> tt.overview("small.yaml", ["data.loss=last"])
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
    device: Device | None = None,
    show: "Observer | None" = None,
) -> dict[str, Any]:
    """Carry out a recipe: prune and search if it says so, then quantize, tune, fold, save, reload and compare.

    Args:
        recipe: a file, a mapping or a `Recipe`.
        overrides: `key=value` with dotted keys.
        overwrite: replace what an earlier run left in the output directory.
        resume: continue from the last checkpoint of that earlier run.
        device: the device to compute on, in place of the recipe's.
        show: an observer of the run (`trimtab.report.terminal.Terminal()` prints it); None for silence.

    Returns:
        The metrics, as written to `metrics.json` in the output directory.

    Raises:
        UserError: for anything the user can fix; nothing is then left half-written.

    Examples:
        >>> metrics = tt.run("small.yaml", ["train.steps=500"])
    """
    from trimtab.pipeline import stages

    return stages.run(as_recipe(recipe, _on(overrides, device)), overwrite=overwrite, resume=resume, show=show)


def search(
    recipe: AnyRecipe,
    overrides: Sequence[str] = (),
    *,
    device: Device | None = None,
    show: "Observer | None" = None,
) -> "Search":
    """Search bits per layer within the recipe's budget; after an interruption the same call resumes it.

    Args:
        recipe: a file, a mapping or a `Recipe` with a `search` block.
        overrides: `key=value` with dotted keys.
        device: the device to compute on, in place of the recipe's.
        show: an observer of trials; None for silence.

    Returns:
        The search: `.front(search.ledger.trials())` is the Pareto front. Tables, pictures and a recipe for every point
        are in `<output>/search`.

    Examples:
        >>> tt.search("small.yaml", ["search.budget=80MiB"])
    """
    chosen = as_recipe(recipe, _on(overrides, device))
    if chosen.search is None:
        raise UserError(f"{chosen.name}: search: missing; write for example search: {{budget: 90MiB}}")
    from trimtab.pipeline import stages

    return stages.search(chosen, show=show)


def evaluate(
    path: str,
    data: str | None = None,
    *,
    split: str | None = None,
    block_tokens: int | None = None,
    tokens: int | None = None,
    device: Device = "auto",
) -> "Evaluation":
    """Measure the perplexity of a model on held-out data.

    Args:
        path: the model, saved by trimtab or in float.
        data: held-out data, in the forms of a recipe's `data.path`; None for what the model's own recipe names.
        split: split of a hub data set or of `pydoc-topics`; None for the recipe's, or `train` where `data` is given.
        block_tokens: length of a window; None for the recipe's, or 1024.
        tokens: measure on at most this many tokens; None for the recipe's number, or all where `data` is given.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N, mps or xpu.

    Examples:
        >>> tt.evaluate("runs/small", data="heldout.jsonl").perplexity
    """
    require_library("`trimtab eval`", "datasets")
    from trimtab.pipeline import evaluating

    return evaluating.perplexity(path, data, split, block_tokens, tokens, resolve(device, "device"))


def harness(
    path: str,
    other: str | None = None,
    *,
    tasks: Sequence[str] = ("piqa", "arc_easy"),
    data: str | None = None,
    limit: int | None = None,
    out: str | None = None,
    device: Device = "auto",
) -> "Accuracies":
    """Measure accuracies with lm-evaluation-harness on local files, with their standard errors.

    Args:
        path: the model.
        other: a second model, which is asked the same items; the result then has their paired differences, too.
        tasks: names in `trimtab.evaluation.harness.TASKS`.
        data: the directory that holds <task>/<split>.jsonl in the data sets' original fields.
        limit: items of each task, spread evenly; None for all.
        out: JSON file; None for `harness.json` in `path`.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N, mps or xpu.

    Examples:
        >>> tt.harness("runs/small", "base", tasks=["piqa"], data="tasks")
    """
    require("`trimtab harness`", "eval")
    from trimtab.pipeline import evaluating

    return evaluating.accuracies(path, other, tasks, data, limit, out, resolve(device, "device"))


def export(
    path: str,
    format: str = "same",
    out: AnyPath | None = None,
    *,
    engine: str | None = None,
    allow_lossy: bool = False,
    overwrite: bool = False,
    max_shard_size: str | int = "5GB",
    device: Device = "auto",
) -> "Report":
    """Write a model that trimtab saved in another format, from its stored codes.

    Args:
        path: a directory that trimtab saved.
        format: a name in `trimtab formats`, for example `compressed-tensors`; `same` is the one that its base came in.
        out: the folder to write; None for `<path>/<format>`.
        engine: the one engine that must run the result; None for any that reads the format.
        allow_lossy: round values that the format does not hold to the nearest that it holds, instead of refusing.
        overwrite: replace an earlier export.
        max_shard_size: largest size of a safetensors file.
        device: auto, cpu, cuda, ...; stored codes do not depend on it, the last bits of a merged adapter may.

    Raises:
        UserError: naming the first layer that the format cannot hold, the cause and the remedy.

    Examples:
        >>> tt.export("runs/small", "gguf")
    """
    from trimtab.formats import export as exporting

    options = exporting.Options(
        engine=engine, allow_lossy=allow_lossy, overwrite=overwrite, max_shard_size=max_shard_size
    )
    target = None if out is None else Path(out)
    return exporting.export(path, format, target, options, resolve(device, "device"))


def parity(
    path: str,
    engine: str,
    *,
    python: str | None = None,
    trained: str | None = None,
    data: str | None = None,
    tokens: int = 512,
    device: Device = "auto",
) -> "Served":
    """Compare what an engine computes from an exported directory with the model that was trained.

    Args:
        path: the exported directory.
        engine: transformers, vllm, llama.cpp or mlx.
        python: Python of the engine's own environment; None for TRIMTAB_<ENGINE>_PYTHON, or the running Python.
        trained: the directory that trimtab saved; None for the one that holds `path`.
        data: held-out text; None for what the recipe names.
        tokens: the number of tokens to compare on.
        device: device of the trained model, and of the engine transformers; other engines choose for themselves.

    Returns:
        The differences of log-probabilities, the agreement of the likeliest tokens, and both perplexities.

    Examples:
        >>> tt.parity("runs/small/gguf", "llama.cpp", python="llama-env/bin/python")
    """
    require_library("`trimtab parity`", "datasets")
    from trimtab.evaluation import serving
    from trimtab.formats.manifest import add

    where = resolve(device, "device")
    served = serving.parity(path, engine, python=python, trained=trained, path=data, tokens=tokens, device=where)
    add(Path(path), (f"parity-{engine}.json",))
    return served


def verify(path: AnyPath) -> int:
    """Compare every file of a saved or exported model with the hashes in its manifest, and count the files.

    Args:
        path: the folder.

    Returns:
        The number of files that are what was written.

    Raises:
        UserError: naming the first file that is missing, changed or foreign.

    Examples:
        >>> tt.verify("runs/small")
    """
    from trimtab.formats.manifest import verify as verify_files

    return verify_files(Path(path))


def chat(
    path: str,
    *,
    system: str | None = None,
    sampling: "Sampling | None" = None,
    engine: str = "auto",
    device: Device = "auto",
) -> "Talk":
    """Open a model to talk to: `.answer(question)` answers once; `.say(question)` streams, and remembers until `.reset()`.

    Args:
        path: a run's folder, a saved or exported model, a .gguf file, a hub id, or a PEFT LoRA that names its base.
        system: the system prompt.
        sampling: `trimtab.evaluation.chat.Sampling`; None takes the likeliest token each time, for 256 tokens at most.
        engine: auto, transformers or llama.cpp.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N, mps or xpu; llama.cpp chooses for itself.

    Examples:
        >>> tt.chat("runs/small").answer("What is a trim tab?")
    """
    from trimtab.evaluation.chat import Sampling
    from trimtab.pipeline.talking import talk

    how = sampling or Sampling()
    return talk(path, system=system, sampling=how, engine=engine, device=resolve(device, "device"))


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
    device: Device = "auto",
) -> "Pruned":
    """Remove attention heads and MLP channels, or whole layers, from a float model, and write an ordinary checkpoint.

    Give exactly one of `ratio`, `bytes` and `layers`.

    Args:
        path: the float model.
        out: a new directory.
        ratio: share of the parameters to remove, at least.
        bytes: the largest size of the pruned model, for example `200MiB`.
        layers: the number of whole layers to drop.
        what: what is removed for a ratio or size: widths (heads and channels) or layers.
        importance: taylor, magnitude or random.
        keep: layers not to drop, which decide the widths; negative numbers count from the end.
        count_embeddings: whether the ratio counts the embeddings as well.
        multiple_of: MLP widths are a multiple of this: the largest group size to be used.
        data: calibration set, in the forms of a recipe's `data.path`.
        split: split of the calibration set.
        tokens: calibrate on at most this many tokens.
        block_tokens: length of a calibration window, in tokens.
        dtype: dtype of the pruned model: bfloat16, float16 or float32.
        seed: seed of random importance.
        device: auto (a GPU if there is one), cpu, cuda, cuda:N, mps or xpu.

    Returns:
        What was removed.

    Examples:
        >>> tt.prune("base", "smaller", ratio=0.2)
    """
    from trimtab.formats.file_size import parse_bytes
    from trimtab.pruning import Options, prune_checkpoint

    how: Any = {"what": what, "importance": importance, "count_embeddings": count_embeddings, "seed": seed}
    target = None if bytes is None else parse_bytes(bytes, "--bytes")
    options = Options(ratio=ratio, target_bytes=target, layers=layers, multiple_of=multiple_of, keep=tuple(keep), **how)
    if options.reads_text:
        require_library("pruning on a calibration set", "datasets")
    text = {"text": data, "split": split, "tokens": tokens, "block_tokens": block_tokens}
    where = resolve(device, "device")
    return prune_checkpoint(path, out, options, **text, dtype=dtype, device=where)  # type: ignore[arg-type]
