"""The command line: a thin skin over `trimtab.api`, which does what a command says, and `report.terminal`, which shows it.

Heavy libraries load when a command needs them, so `trimtab --help` is quick. Errors that a user can mend are printed in
one line; everything else keeps its traceback. The only file that imports typer.
"""

import logging
import os
import sys
from typing import Annotated, Any

import typer

import trimtab
from trimtab.errors import UserError

app = typer.Typer(
    help="Fine-tune a quantized language model, and get back exactly the model you trained.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_RecipeFile = Annotated[str, typer.Argument(help="Recipe file (YAML).", metavar="RECIPE")]
_Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides: train.steps=10 ...", metavar="[KEY=VALUE]...")]
_Model = Annotated[str, typer.Argument(help="Directory of a saved model.", metavar="DIR")]


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
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    from trimtab.report.terminal import Terminal

    return Terminal()


@app.command()
def run(
    recipe: _RecipeFile,
    overrides: _Overrides = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run in the output directory.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Resume from the last checkpoint.")] = False,
) -> None:
    """Quantize, tune, fold, save, and compare."""
    terminal = _terminal()
    try:
        trimtab.run(recipe, overrides or (), overwrite=overwrite, resume=resume, show=terminal)
    finally:
        terminal.close()


@app.command()
def plan(recipe: _RecipeFile, overrides: _Overrides = None) -> None:
    """Predict the memory that a recipe's training needs; loads nothing."""
    terminal = _terminal()
    found = trimtab.plan(recipe, overrides or ())
    for note in found.notes:
        terminal.say(note)
    terminal.plan(found)


@app.command()
def data(recipe: _RecipeFile, overrides: _Overrides = None) -> None:
    """Show what training will see: rows, tokens, what is learned, the first example; reads no weight."""
    _terminal().data(trimtab.overview(recipe, overrides or ()))


@app.command("eval")
def evaluate(
    path: _Model,
    data: Annotated[str | None, typer.Option(help="Held-out data; default: the recipe's.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = None,
    block_tokens: Annotated[int | None, typer.Option(help="Window length; default: the recipe's, or 1024.")] = None,
    tokens: Annotated[int | None, typer.Option(help="At most this many tokens.")] = None,
) -> None:
    """Perplexity of a saved model on held-out data."""
    terminal = _terminal()
    found = trimtab.evaluate(path, data, split=split, block_tokens=block_tokens, tokens=tokens)
    where = f"{found.tokens} tokens of {found.data} ({found.split}), windows of {found.block_tokens}"
    terminal.say(f"perplexity {found.perplexity:.4f} on {where}")


@app.command()
def harness(
    path: _Model,
    other: Annotated[
        str | None, typer.Argument(help="A second model, paired with the first.", metavar="[DIR2]")
    ] = None,
    tasks: Annotated[str, typer.Option(help="Tasks of lm-evaluation-harness, with commas.")] = "piqa,arc_easy",
    data: Annotated[str | None, typer.Option(help="Directory that holds <task>/<split>.jsonl.")] = None,
    limit: Annotated[int | None, typer.Option(help="Items of each task, spread evenly; default: all.")] = None,
    out: Annotated[str | None, typer.Option(help="JSON file; default: harness.json in DIR.")] = None,
) -> None:
    """Accuracies with standard errors on local files; with two models, their paired differences."""
    terminal = _terminal()
    names = [name.strip() for name in tasks.split(",")]
    terminal.accuracies(trimtab.harness(path, other, tasks=names, data=data, limit=limit, out=out))


@app.command()
def export(
    path: _Model,
    format_: Annotated[str, typer.Option("--format", help="Format to write; see `trimtab formats`.")],
    out: Annotated[str | None, typer.Option(help="Where to; default: DIR/<format>.")] = None,
    engine: Annotated[str | None, typer.Option(help="The one engine that must run it; default: any.")] = None,
    allow_lossy: Annotated[
        bool, typer.Option("--allow-lossy", help="Round what the format does not hold to the nearest that it does.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    max_shard_size: Annotated[str, typer.Option(help="Size of a safetensors file.")] = "5GB",
) -> None:
    """Write a saved model in another format, from its codes."""
    terminal = _terminal()
    options: dict[str, Any] = {"engine": engine, "allow_lossy": allow_lossy, "overwrite": overwrite}
    terminal.exported(trimtab.export(path, format_, out, **options, max_shard_size=max_shard_size))


@app.command()
def parity(
    path: Annotated[str, typer.Argument(help="Exported directory.", metavar="DIR")],
    engine: Annotated[str, typer.Option(help="transformers, vllm, llama.cpp or mlx.")],
    python: Annotated[str | None, typer.Option(help="Python of the engine's environment.")] = None,
    trained: Annotated[str | None, typer.Option(help="Model saved by trimtab; default: the directory above.")] = None,
    data: Annotated[str | None, typer.Option(help="Held-out text; default: the recipe's.")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to compare on.")] = 512,
) -> None:
    """Compare what an engine computes from an exported model with the trained one."""
    terminal = _terminal()
    terminal.served(trimtab.parity(path, engine, python=python, trained=trained, data=data, tokens=tokens))


@app.command()
def formats() -> None:
    """List the formats, what they can hold, and what each engine runs of them."""
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
    path: _Model,
    prompt: Annotated[str | None, typer.Option(help="Answer this one question and stop.")] = None,
    tokens: Annotated[int, typer.Option(help="Longest answer.")] = 256,
) -> None:
    """Talk to a saved model."""
    terminal, loaded = _terminal(), trimtab.chat(path)
    if prompt is not None:
        terminal.say(loaded.answer(prompt, tokens))
        return
    terminal.say("an empty line ends the conversation")
    while question := terminal.console.input("> ").strip():
        terminal.say(loaded.answer(question, tokens))


@app.command()
def prune(
    path: Annotated[str, typer.Argument(help="Directory, .gguf file, hub id, or smollm2-135m.", metavar="MODEL")],
    out: Annotated[str, typer.Option(help="New directory.")],
    ratio: Annotated[float | None, typer.Option(help="Share of the parameters to remove, at least: 0.3.")] = None,
    size: Annotated[str | None, typer.Option("--bytes", help="Or the largest size of what is left: 200MiB.")] = None,
    drop_layers: Annotated[int | None, typer.Option(help="Or a number of whole layers to drop.")] = None,
    what: Annotated[str, typer.Option(help="What gives way to a ratio or size: widths or layers.")] = "widths",
    importance: Annotated[str, typer.Option(help="taylor, magnitude or random.")] = "taylor",
    keep: Annotated[str, typer.Option(help="Layers not to drop, which decide the widths: 0,1,-1.")] = "",
    count_embeddings: Annotated[bool, typer.Option(help="A ratio of all parameters, embeddings included.")] = False,
    multiple_of: Annotated[int, typer.Option(help="Of MLP widths: the largest group size to be used.")] = 64,
    data: Annotated[str, typer.Option(help="Calibration set.")] = "pydoc-topics",
    split: Annotated[str, typer.Option(help="Split of a hub data set or of pydoc-topics.")] = "train",
    tokens: Annotated[int, typer.Option(help="Calibration tokens, at most.")] = 8192,
    block_tokens: Annotated[int, typer.Option(help="Length of a calibration window.")] = 256,
    dtype: Annotated[str, typer.Option(help="Of the pruned model: bfloat16, float16 or float32.")] = "bfloat16",
    seed: Annotated[int, typer.Option(help="Of random importance.")] = 0,
) -> None:
    """Take attention heads and MLP channels, or whole layers, out of a float model; writes an ordinary checkpoint."""
    terminal = _terminal()
    much: dict[str, Any] = {"ratio": ratio, "bytes": size, "layers": drop_layers, "what": what}
    how: dict[str, Any] = {"importance": importance, "keep": _whole_numbers(keep, "--keep"), "seed": seed}
    text: dict[str, Any] = {"data": data, "split": split, "tokens": tokens, "block_tokens": block_tokens}
    shape: dict[str, Any] = {"count_embeddings": count_embeddings, "multiple_of": multiple_of, "dtype": dtype}
    terminal.pruned(trimtab.prune(path, out, **much, **how, **text, **shape), out)


def _whole_numbers(text: str, option: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option}: {text!r} is no list of layer numbers; write 0,1,-1") from None


@app.command()
def search(recipe: _RecipeFile, overrides: _Overrides = None) -> None:
    """Search bits per layer within a budget; Ctrl-C stops it, and the same command resumes it."""
    terminal = _terminal()
    try:
        terminal.searched(trimtab.search(recipe, overrides or (), show=terminal))
    except KeyboardInterrupt:
        terminal.say(f"stopped; resume with `trimtab search {recipe}`")
        raise SystemExit(130) from None
    finally:
        terminal.close()


@app.command()
def methods() -> None:
    """List the methods and their options."""
    terminal = _terminal()
    from trimtab.methods import table

    terminal.rows("", ("method", "default grid", "", "options"), table())


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
