"""The command line: a thin skin over `trimtab.api`, which does what a command says, and `report.terminal`, which shows it.

Heavy libraries load when a command needs them, so `trimtab --help` is quick. Errors that a user can fix are printed in
one line; everything else keeps its traceback. The only file that imports typer.
"""

import logging
import os
import sys
from typing import Annotated, Any

import typer

import trimtab
from trimtab import ending, faults, ranks, surroundings
from trimtab.words import whole_numbers

app = typer.Typer(
    help="Fine-tune a quantized language model, and get back exactly the model you trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_RecipeFile = Annotated[str, typer.Argument(help="Recipe file (YAML).", metavar="RECIPE")]
_Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="Values that replace the recipe's: train.steps=10 ...", metavar="[KEY=VALUE]..."),
]
_Model = Annotated[str, typer.Argument(help="Directory of a saved model.", metavar="DIR")]
_NAMES = "auto (a GPU if there is one), cpu, cuda, cuda:N, mps, xpu"
_Device = Annotated[str, typer.Option(help=f"Where to compute: {_NAMES}.")]
_RecipeDevice = Annotated[str | None, typer.Option("--device", help="Device in place of the recipe's model.device.")]
_ENDED = 130
_NOTHING = "stopped before anything was begun: run the same command again"
_shown: list[Any] = []
"""Terminals that a command has drawn on, to be left as they were."""


def _version(asked: bool) -> None:
    if asked:
        sys.stdout.write(f"trimtab {trimtab.__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def _terminal() -> Any:
    """The terminal, left to our own progress and messages."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if "transformers" in sys.modules:  # else it reads the variables above, when a command needs it
        sys.modules["transformers"].utils.logging.disable_progress_bar()
    from trimtab.report.terminal import Terminal

    _shown.append(Terminal())
    _shown[-1].wait("loading libraries")
    return _shown[-1]


@app.command()
def run(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output directory.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")] = False,
    device: _RecipeDevice = None,
) -> None:
    """Quantize, tune, fold, save and compare a model; Ctrl-C finishes and saves the step, `--resume` continues."""
    stopped: Any = None
    try:
        with ending.held():
            terminal = _terminal()
            from trimtab.pipeline.starting import started

        on_device = [] if device is None else ["--device", device]
        flags = [f"--{name}" for name, on in (("overwrite", overwrite), ("resume", resume)) if on]
        status = started(recipe, overrides or (), [*flags, *on_device])
        if status is not None:
            raise SystemExit(status)
        with ending.held():
            from trimtab.pipeline import stages  # noqa: F401 what the run begins with, loaded whole
            from trimtab.pipeline.stopped import stopped

        how: dict[str, Any] = {"overwrite": overwrite, "resume": resume, "device": device}
        trimtab.run(recipe, overrides or (), **how, show=terminal)
    except KeyboardInterrupt:
        # Libraries that are half loaded are not asked.
        _last_word(stopped(recipe, overrides or ()) if stopped else _NOTHING)
        raise SystemExit(ending.status()) from None


@app.command()
def plan(
    recipe: Annotated[
        str, typer.Argument(help="Recipe file, or a model: directory, config.json, .gguf, hub id.", metavar="RECIPE")
    ],
    overrides: _Overrides = None,
    memory: Annotated[str | None, typer.Option(help="Memory to plan for, 24GiB: lists the settings that fit.")] = None,
    probe: Annotated[bool, typer.Option(help="Train random layers for ten seconds, to predict the speed.")] = True,
    device: _RecipeDevice = None,
) -> None:
    """Predict the memory, sizes and time of a recipe's training, without loading a weight."""
    terminal = _terminal()
    terminal.say(f"planning {recipe}" + ("" if memory is None else f" for {memory}"))
    found = trimtab.plan(recipe, overrides or (), memory=memory, probe=probe, device=device)
    for note in found.notes:
        terminal.say(note)
    terminal.plan(found)


@app.command()
def data(recipe: _RecipeFile, overrides: _Overrides = None) -> None:
    """Show what training will see: rows, tokens, the part that is learned, and the first example."""
    _terminal().data(trimtab.overview(recipe, overrides or ()))


@app.command("eval")
def evaluate(
    path: _Model,
    data: Annotated[str | None, typer.Option(help="Held-out data; default: what the recipe names.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Window length; default: the recipe's, or 1024.")] = None,
    tokens: Annotated[int | None, typer.Option(help="Use at most this many tokens.")] = None,
    device: _Device = "auto",
) -> None:
    """Measure the perplexity of a saved model on held-out data."""
    terminal = _terminal()
    found = trimtab.evaluate(path, data, split=split, block_tokens=block_tokens, tokens=tokens, device=device)
    where = f"{found.tokens} tokens of {found.data} ({found.split}), windows of {found.block_tokens}"
    terminal.say(f"perplexity {found.perplexity:.4f} on {where}")


@app.command()
def harness(
    path: _Model,
    other: Annotated[
        str | None, typer.Argument(help="A second model, paired with the first.", metavar="[DIR2]")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, separated by commas.")] = "piqa,arc_easy",
    data: Annotated[str | None, typer.Option(help="Directory that holds <task>/<split>.jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task, spread evenly; default: all.")] = None,
    out: Annotated[str | None, typer.Option(help="JSON file; default: harness.json in DIR.")] = None,
    device: _Device = "auto",
) -> None:
    """Measure accuracies with standard errors on local files, and the paired differences of two models."""
    terminal = _terminal()
    names = [name.strip() for name in tasks.split(",")]
    terminal.accuracies(trimtab.harness(path, other, tasks=names, data=data, limit=limit, out=out, device=device))


@app.command()
def export(
    path: _Model,
    format_: Annotated[
        str, typer.Option("--format", help="Format (see `trimtab formats`); same: that of the base.")
    ] = "same",
    out: Annotated[str | None, typer.Option(help="Output folder; default: DIR/<format>.")] = None,
    engine: Annotated[str | None, typer.Option(help="Engine that must run it; default: any that reads it.")] = None,
    allow_lossy: Annotated[bool, typer.Option("--allow-lossy", help="Round what the format cannot hold.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest size of a safetensors file.")] = "5GB",
    device: _Device = "auto",
) -> None:
    """Write a saved model in another format, from its stored codes."""
    terminal = _terminal()
    options: dict[str, Any] = {"engine": engine, "allow_lossy": allow_lossy, "overwrite": overwrite}
    terminal.exported(trimtab.export(path, format_, out, **options, max_shard_size=max_shard_size, device=device))


@app.command()
def parity(
    path: Annotated[str, typer.Argument(help="Exported directory.", metavar="DIR")],
    engine: Annotated[str, typer.Option(help="Engine to ask: transformers, vllm, llama.cpp or mlx.")],
    python: Annotated[str | None, typer.Option(help="Python of the engine's environment.")] = None,
    trained: Annotated[str | None, typer.Option(help="Model saved by trimtab; default: the directory above.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out text; default: the recipe's.")] = None,
    tokens: Annotated[int, typer.Option(help="Compare on this many tokens.")] = 512,
    device: _Device = "auto",
) -> None:
    """Compare what an engine computes from an exported model with what the trained model computes."""
    terminal = _terminal()
    on: dict[str, Any] = {"data": data, "tokens": tokens, "device": device}
    terminal.served(trimtab.parity(path, engine, python=python, trained=trained, **on))


@app.command()
def formats() -> None:
    """List the formats, what each of them can hold, and which of it each engine runs."""
    terminal = _terminal()
    from trimtab.formats import ALL
    from trimtab.formats.table import HEADER, table

    terminal.rows("", HEADER, table(ALL))


@app.command()
def verify(path: _Model) -> None:
    """Compare every file of a saved or exported model with the hashes in its manifest."""
    _terminal().say(f"{trimtab.verify(path)} files are what was written")


@app.command()
def chat(
    path: Annotated[
        str, typer.Argument(help="Folder of a run, model or export, .gguf file, or hub id.", metavar="DIR")
    ],
    prompt: Annotated[str | None, typer.Option(help="Answer this one question and stop.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    tokens: Annotated[int, typer.Option(help="Largest length of an answer, in tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Temperature; 0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the tokens of this total probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from this many tokens; 0 for all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Sample from tokens this likely, relative to the best.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1, repeated tokens become less likely.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampling.")] = None,
    engine: Annotated[str, typer.Option(help="Engine: auto, transformers, or llama.cpp for GGUF.")] = "auto",
    device: _Device = "auto",
) -> None:
    """Talk to a model; /reset forgets, /system TEXT sets the system prompt, an empty line ends."""
    terminal = _terminal()
    from trimtab.evaluation.chat import Sampling

    drawn: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": top_k, "min_p": min_p, "seed": seed}
    sampling = Sampling(tokens=tokens, repetition_penalty=repetition_penalty, **drawn)
    talk = trimtab.chat(path, system=system, sampling=sampling, engine=engine, device=device)
    if prompt is not None:
        terminal.pieces(talk.say(prompt))
    else:
        terminal.converse(talk)


@app.command()
def serve(
    path: Annotated[str, typer.Argument(help="Folder of a run or export, or a .gguf file.", metavar="DIR")],
    engine: Annotated[
        str | None, typer.Option(help="Engine: vllm, llama.cpp or mlx-lm; default: the folder's.")
    ] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; default: the engine's own.")] = None,
    start: Annotated[bool, typer.Option("--run", help="Start the engine instead of printing the command.")] = False,
) -> None:
    """Print the command that serves what a folder holds, or run it."""
    from pathlib import Path

    from trimtab.models.held import serving, start_serving

    found = serving(Path(path), engine)
    if start:
        start_serving(found[0], port)
    for held in found:
        sys.stdout.write(f"{held.line(port)}\n")


@app.command()
def compare(
    first: Annotated[str, typer.Argument(help="Directory, .gguf file, hub id, or PEFT adapter.", metavar="A")],
    second: Annotated[str, typer.Argument(help="The model that it is compared with.", metavar="B")],
    data: Annotated[str, typer.Option(help="Text to compare on, in the forms of a recipe's data.path.")],
    adapter_a: Annotated[str | None, typer.Option(help="PEFT adapter that acts beside A.")] = None,
    adapter_b: Annotated[str | None, typer.Option(help="PEFT adapter that acts beside B.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = "train",
    tokens: Annotated[int, typer.Option(help="Use at most this many tokens.")] = 8192,
    block_tokens: Annotated[int, typer.Option(help="Length of a window, in tokens.")] = 512,
    dtype: Annotated[str, typer.Option(help="Dtype to compute in: bfloat16, float16 or float32.")] = "bfloat16",
    device: _Device = "auto",
    out: Annotated[str | None, typer.Option(help="Output folder; default: runs/compare-A-B.")] = None,
) -> None:
    """Compare two models on one text, in a table and a report: KL divergence, agreement, perplexities and sizes."""
    terminal = _terminal()
    beside: dict[str, Any] = {"first_adapter": adapter_a, "second_adapter": adapter_b, "out": out, "dtype": dtype}
    on: dict[str, Any] = {"split": split, "tokens": tokens, "block_tokens": block_tokens, "device": device}
    terminal.compared(trimtab.compare(first, second, data, **beside, **on, say=terminal.say))


@app.command()
def report(
    path: Annotated[str, typer.Argument(help="Folder of a run, a search or a comparison.", metavar="DIR")],
) -> None:
    """Write report.html again, with the exports and checks that were made since."""
    _terminal().say(f"written to {trimtab.write_report(path)}")


@app.command()
def push(
    path: Annotated[str, typer.Argument(help="Folder of a run, a saved model or an export.", metavar="DIR")],
    repo: Annotated[str, typer.Argument(help="Repository of the hub; created if missing.", metavar="OWNER/NAME")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to upload to; default: the main one.")] = None,
    message: Annotated[str, typer.Option(help="Commit message.")] = "Upload by trimtab",
) -> None:
    """Upload a model and its card to the hub."""
    terminal = _terminal()
    about: dict[str, Any] = {"private": private, "revision": revision, "message": message}
    terminal.say(f"at {trimtab.push(path, repo, **about, say=terminal.say)}")


@app.command()
def prune(
    path: Annotated[str, typer.Argument(help="Directory, .gguf file, hub id, or smollm2-135m.", metavar="MODEL")],
    out: Annotated[str, typer.Option(help="New directory for the pruned model.")],
    ratio: Annotated[float | None, typer.Option(help="Share of the parameters to remove, at least: 0.3.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Or the largest size of the result: 200MiB.")] = None,
    drop_layers: Annotated[int | None, typer.Option(help="Or drop this many whole layers.")] = None,
    what: Annotated[str, typer.Option(help="What is removed for a ratio or size: widths or layers.")] = "widths",
    importance: Annotated[str, typer.Option(help="Importance: taylor, magnitude or random.")] = "taylor",
    keep: Annotated[str, typer.Option(help="Layers that are not dropped, and that decide the widths: 0,1,-1.")] = "",
    count_embeddings: Annotated[bool, typer.Option(help="Count embeddings in the ratio.")] = False,
    multiple_of: Annotated[int, typer.Option(help="Make MLP widths multiples of this, the largest group.")] = 64,
    data: Annotated[str, typer.Option(help="Calibration set.")] = "pydoc-topics",
    split: Annotated[str, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = "train",
    tokens: Annotated[int, typer.Option(help="Calibrate on at most this many tokens.")] = 8192,
    block_tokens: Annotated[int, typer.Option(help="Length of a calibration window, in tokens.")] = 256,
    dtype: Annotated[str, typer.Option(help="Dtype of the pruned model: bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Seed of random importance.")] = 0,
    device: _Device = "auto",
) -> None:
    """Remove attention heads and MLP channels, or whole layers, from a float model; the result is a float checkpoint."""
    terminal = _terminal()
    much: dict[str, Any] = {"ratio": ratio, "bytes": size, "layers": drop_layers, "what": what}
    how: dict[str, Any] = {"importance": importance, "keep": whole_numbers(keep, "--keep"), "seed": seed}
    text: dict[str, Any] = {"data": data, "split": split, "tokens": tokens, "block_tokens": block_tokens}
    shape: dict[str, Any] = {"count_embeddings": count_embeddings, "multiple_of": multiple_of, "dtype": dtype}
    shape["device"] = device
    terminal.pruned(trimtab.prune(path, out, **much, **how, **text, **shape), out)


@app.command()
def search(recipe: _RecipeFile, overrides: _Overrides = None, device: _RecipeDevice = None) -> None:
    """Search for the bits of each layer within a budget; the same command resumes a search that was stopped."""
    terminal = _terminal()
    try:
        terminal.searched(trimtab.search(recipe, overrides or (), device=device, show=terminal))
    except KeyboardInterrupt:
        from trimtab.recipe.recipe import read

        folder = read(recipe, overrides or ()).out
        terminal.say(f"stopped; resume with `trimtab search {recipe}`; `trimtab report {folder}` shows what was found")
        raise SystemExit(ending.status()) from None


@app.command()
def methods() -> None:
    """List the methods and their options."""
    terminal = _terminal()
    from trimtab.methods import table

    terminal.rows("", ("method", "default grid", "", "options"), table())


@app.command()
def recipe(
    explain: Annotated[bool, typer.Option("--explain", help="Explain every field.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of a recipe, for editors.")] = False,
) -> None:
    """Print a recipe to start from, the meaning of every field, or the JSON schema of recipes."""
    _terminal()
    from trimtab.recipe.explain import explanation
    from trimtab.recipe.recipe import EXAMPLE
    from trimtab.recipe.schema import schema_text

    _leave()
    sys.stdout.write(schema_text() if schema else explanation() if explain else EXAMPLE)


def main() -> None:
    """Run the command line; the console script."""
    try:
        with faults.told(_leave), surroundings.settled(), ending.listening():
            app(standalone_mode=True)
    except SystemExit as left:  # typer has its own status of what was ended by a signal
        raise (SystemExit(ending.status()) if left.code == _ENDED else left) from None
    finally:
        _leave()


def _last_word(line: str) -> None:
    """What is said when a signal has ended a command: where nothing is drawn any more."""
    _leave()
    if ranks.is_first():
        sys.stdout.write(f"{line}\n")


def _leave() -> None:
    while _shown:
        _shown.pop().close()


if __name__ == "__main__":
    main()
