"""The command line: `trimtab run|plan|eval|harness|export|parity|verify|formats|prune|search|chat|methods|recipe`.

Bad input ends in one line on stderr and exit status 2; anything else that goes wrong keeps its traceback. Heavy libraries
are imported when a command needs them, so `trimtab --help` is quick. The only file that imports typer.
"""

import logging
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import typer

from trimtab.errors import UserError
from trimtab.extras import require, require_library

app = typer.Typer(
    help="Fine-tune a quantized language model, and get back exactly the model you trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from trimtab import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _every(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    """Fine-tune a quantized language model, and get back exactly the model you trained."""


_RecipeFile = Annotated[str, typer.Argument(help="Recipe file (YAML).", metavar="RECIPE")]
_Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: train.steps=10 ...", metavar="[KEY=VALUE]...")]
_Directory = Annotated[str, typer.Argument(help="Directory of a saved model.", metavar="DIR")]


def _quiet() -> None:
    """Leave the terminal to our own progress and messages."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


@app.command()
def run(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output directory.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")] = False,
) -> None:
    """Quantize, tune, fold, save, and compare."""
    _quiet()
    from trimtab.pipeline import stages as chain
    from trimtab.recipe.recipe import read
    from trimtab.report.terminal import Terminal

    parsed, terminal = read(recipe, overrides or ()), Terminal()
    try:
        chain.run(parsed, overwrite=overwrite, resume=resume, show=terminal)
    finally:
        terminal.close()


@app.command()
def plan(recipe: _RecipeFile, overrides: _Overrides = None) -> None:
    """Predict the memory that a recipe's training needs; loads nothing."""
    _quiet()
    from trimtab.memory import plan as planning
    from trimtab.memory import process
    from trimtab.models.sources import open_source
    from trimtab.pipeline import stages as chain
    from trimtab.recipe.recipe import read
    from trimtab.report.terminal import Terminal

    parsed, terminal = read(recipe, overrides or ()), Terminal()
    planned = chain.pruned_already(parsed)
    if planned.prune is not None:
        terminal.say("prune: not done yet, so this is the plan of the whole model; what is left will take less")
    if planned.search is not None:
        terminal.say("search: this is the plan of the recipe's own rules; search.budget_training bounds every trial's")
    model = open_source(planned.model.path).layout()
    terminal.plan(planning.plan(planned, model), process.available_bytes())


@app.command("eval")
def evaluate(
    directory: _Directory,
    path: Annotated[str | None, typer.Option("--data", help="Held-out data; default: the recipe's.")] = None,
    split: Annotated[str, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = "train",
    block_tokens: Annotated[int, typer.Option(help="Window length.")] = 1024,
    tokens: Annotated[int | None, typer.Option(help="At most this many tokens.")] = None,
) -> None:
    """Perplexity of a saved model on held-out data."""
    _quiet()
    require("`trimtab eval`", "eval")
    from trimtab.data import sequences as data
    from trimtab.evaluation.perplexity import perplexity
    from trimtab.models.load import load_as_it_is
    from trimtab.recipe.recipe import read
    from trimtab.report.terminal import Terminal

    model, tokenizer = load_as_it_is(directory)
    saved = Path(directory) / "recipe.yaml"
    if path is None:
        block = read(saved).data if saved.is_file() else None
        if block is None or block.eval_path is None:
            raise UserError(f"{directory}: its recipe names no held-out data; pass --data")
        path, split = block.eval_path, block.eval_split
        block_tokens, tokens = block.block_tokens, tokens or block.eval_tokens
    rows = data.load_rows(path, split=split)
    blocks = data.token_blocks(rows, tokenizer, block_tokens=block_tokens, limit_tokens=tokens)
    value = perplexity(model, blocks)
    Terminal().say(f"perplexity {value:.4f} on {blocks.numel()} tokens of {path} ({split}), windows of {block_tokens}")


@app.command()
def harness(
    directory: _Directory,
    other: Annotated[
        str | None, typer.Argument(help="A second model, paired with the first.", metavar="[DIR2]")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")] = "piqa,arc_easy",
    path: Annotated[str | None, typer.Option("--data", help="Directory that holds <task>/<split>.jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task, spread evenly; default: all.")] = None,
    out: Annotated[str | None, typer.Option(help="JSON file; default: harness.json in DIR.")] = None,
) -> None:
    """Accuracies with standard errors on local files; with two models, their paired differences."""
    _quiet()
    from trimtab.evaluation import harness as asking
    from trimtab.models.load import load_as_it_is
    from trimtab.report.terminal import Terminal

    names = [name.strip() for name in tasks.split(",")]
    asking.check_tasks(names, path)
    if out is None and not Path(directory).is_dir():
        raise UserError(f"{directory}: is no directory to write harness.json into; pass --out")
    terminal, scores = Terminal(), {}
    for model in (directory,) if other is None else (directory, other):
        scores[model] = asking.run(*load_as_it_is(model), names, path or "", limit=limit)
        terminal.rows(model, ("task", "metric", "accuracy", "items"), asking.rows(scores[model]))
    found = [] if other is None else asking.differences(scores[directory], scores[other])
    if other is not None:
        header = ("task", "metric", "difference", "only first / only second right", "p")
        terminal.rows(f"{other} minus {directory}, on the same items", header, asking.difference_rows(found))
    file = out or str(Path(directory) / "harness.json")
    asking.write(file, scores, found)
    terminal.say(f"written to {file}")


@app.command()
def export(
    directory: _Directory,
    format_: Annotated[str, typer.Option("--format", help="Format to write; see `trimtab formats`.")],
    out: Annotated[Path | None, typer.Option(help="Where to; default: DIR/<format>.")] = None,
    engine: Annotated[str | None, typer.Option(help="The one engine that must run it; default: all.")] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Round what the format does not hold to the nearest that it does.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Size of a safetensors file.")] = "5GB",
) -> None:
    """Write a saved model in another format, from its codes."""
    _quiet()
    from trimtab.formats import export as exporting
    from trimtab.report.terminal import Terminal

    options = exporting.Options(
        engine=engine, allow_lossy=allow_lossy, overwrite=overwrite, max_shard_size=max_shard_size
    )
    Terminal().exported(exporting.export(directory, format_, out, options))


@app.command()
def parity(
    directory: Annotated[str, typer.Argument(help="Exported directory.", metavar="DIR")],
    engine: Annotated[str, typer.Option(help="transformers, vllm, llama.cpp or mlx.")],
    python: Annotated[str | None, typer.Option(help="Python of the engine's environment.")] = None,
    trained: Annotated[str | None, typer.Option(help="Model saved by trimtab; default: the directory above.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out text; default: the recipe's.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare on.")] = 512,
) -> None:
    """Compare what an engine computes from an exported model with the trained one."""
    _quiet()
    require_library("`trimtab parity`", "datasets")
    from trimtab.evaluation import serving
    from trimtab.report.terminal import Terminal

    found = serving.parity(directory, engine, python=python, trained=trained, path=data, tokens=tokens)
    rows = [(name.replace("_", " "), f"{value:.6g}" if isinstance(value, float) else str(value))
            for name, value in vars(found).items()]  # fmt: skip
    Terminal().rows("served = trained", ("", ""), rows)


@app.command()
def formats() -> None:
    """List the formats, what they can hold, and what each engine runs of them."""
    _quiet()
    from trimtab.formats import ALL
    from trimtab.formats.declaration import HEADER, table
    from trimtab.report.terminal import Terminal

    Terminal().rows("", HEADER, table(ALL))


@app.command()
def verify(directory: _Directory) -> None:
    """Compare every file of a saved or exported model with the hashes in its manifest."""
    from trimtab.formats.directory import verify as verify_files
    from trimtab.report.terminal import Terminal

    Terminal().say(f"{verify_files(Path(directory))} files are what was written")


@app.command()
def chat(
    directory: _Directory,
    prompt: Annotated[str | None, typer.Option(help="Answer this one question and stop.")] = None,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
) -> None:
    """Talk to a saved model."""
    _quiet()
    from trimtab.models.load import load_as_it_is
    from trimtab.pipeline.run import answer
    from trimtab.report.terminal import Terminal

    terminal = Terminal()
    model, tokenizer = load_as_it_is(directory)
    if prompt is not None:
        terminal.say(answer(model, tokenizer, prompt, tokens))
        return
    terminal.say("an empty line ends the conversation")
    while question := terminal.console.input("> ").strip():
        terminal.say(answer(model, tokenizer, question, tokens))


@app.command()
def prune(
    model: Annotated[str, typer.Argument(help="Directory, .gguf file, hub id, or smollm2-135m.")],
    out: Annotated[str, typer.Option(help="New directory.")],
    ratio: Annotated[float | None, typer.Option(help="Share of the parameters to remove, at least: 0.3.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Or the largest size of what is left: 200MiB.")] = None,
    drop_layers: Annotated[int | None, typer.Option(help="Or a number of whole layers to drop.")] = None,
    what: Annotated[str, typer.Option(help="What gives way to a ratio or size: widths or layers.")] = "widths",
    importance: Annotated[str, typer.Option(help="taylor, magnitude or random.")] = "taylor",
    keep: Annotated[str, typer.Option(help="Layers not to drop, which decide the widths: 0,1,-1.")] = "",
    count_embeddings: Annotated[bool, typer.Option(help="A ratio of all parameters, embeddings included.")] = False,
    multiple_of: Annotated[int, typer.Option(help="Of MLP widths: the largest group size to be used.")] = 64,
    path: Annotated[str, typer.Option("--data", help="Calibration text.")] = "pydoc-topics",
    split: Annotated[str, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = "train",
    tokens: Annotated[int, typer.Option(help="Calibration tokens, at most.")] = 8192,
    block_tokens: Annotated[int, typer.Option(help="Length of a calibration window.")] = 256,
    dtype: Annotated[str, typer.Option(help="Of the pruned model: bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of random importance.")] = 0,
) -> None:
    """Take attention heads and MLP channels, or whole layers, out of a float model; writes an ordinary checkpoint."""
    _quiet()
    require_library("`trimtab prune`", "datasets")
    from trimtab.formats.file_size import parse_bytes
    from trimtab.pruning import Options, prune_checkpoint
    from trimtab.report.terminal import Terminal

    options = Options(
        ratio=ratio,
        target_bytes=None if size is None else parse_bytes(size, "--bytes"),
        layers=drop_layers,
        what=what,  # type: ignore[arg-type]
        importance=importance,  # type: ignore[arg-type]
        count_embeddings=count_embeddings,
        multiple_of=multiple_of,
        keep=_whole_numbers(keep, "--keep"),
        seed=seed,
    )
    done = prune_checkpoint(
        model, out, options, text=path, split=split, tokens=tokens, block_tokens=block_tokens, dtype=dtype
    )
    Terminal().pruned(done, out)


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option}: {text!r} is no list of layer numbers; write 0,1,-1") from None


@app.command()
def search(recipe: _RecipeFile, overrides: _Overrides = None) -> None:
    """Search widths per layer within a budget; Ctrl-C stops, and the same command goes on."""
    _quiet()
    from trimtab.pipeline import stages as chain
    from trimtab.recipe.recipe import read
    from trimtab.report.terminal import Terminal

    terminal = Terminal()
    parsed = read(recipe, overrides or ())
    if parsed.search is None:
        raise UserError(f"{recipe}: search: missing; write for example search: {{budget: 90MiB}}")
    try:
        terminal.searched(chain.search(parsed, show=terminal))
    except KeyboardInterrupt:
        terminal.say(f"stopped; go on with `trimtab search {recipe}`")
        raise SystemExit(130) from None
    finally:
        terminal.close()


@app.command()
def methods() -> None:
    """List the methods and their options."""
    from trimtab.methods import ALL
    from trimtab.report.terminal import Terminal

    rows = []
    for method in ALL:
        names = ", ".join((method.name, *method.aliases))
        grid = "float" if method.grid is None else method.grid.describe()
        options = ", ".join(f"{f.name}={f.default}" for f in fields(method))
        rows.append((names, grid, method.summary, options))
    Terminal().rows("", ("method", "default grid", "", "options"), rows)


@app.command()
def recipe(
    explain: Annotated[bool, typer.Option("--explain", help="Explain every field.")] = False,
) -> None:
    """Print a recipe to start from; with --explain, what every field means."""
    from trimtab.recipe.explain import explanation
    from trimtab.recipe.recipe import EXAMPLE

    sys.stdout.write(explanation() if explain else EXAMPLE)


def main() -> None:
    """Run the command line; the console script."""
    try:
        app(standalone_mode=True)
    except UserError as error:
        line = " ".join(part.strip() for part in str(error).splitlines() if part.strip())
        sys.stderr.write(f"error: {line}\n")
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
