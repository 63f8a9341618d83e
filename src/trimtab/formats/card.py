"""`README.md`: the model card of every folder that holds a model, made of the files beside it.

The head is the metadata that hubs read (base_model, library_name, tags, datasets); what only this machine has, a model or a
text by its path, is named there by no one.
"""

from dataclasses import fields
from pathlib import Path
from typing import Any

from trimtab.errors import UserError
from trimtab.formats.manifest import read_json
from trimtab.models.card import hub_id, metadata
from trimtab.models.held import Held, held
from trimtab.models.layout import auto_class
from trimtab.models.sources import read_config
from trimtab.recipe.recipe import Recipe, from_text, read
from trimtab.words import STAGES
from trimtab.words import perplexity as ppl

_RULES = 8
"""Rules that a card shows; a searched model has hundreds."""


def card(folder: Path, name: str, recipe_text: str | None = None) -> str | None:
    """The text of a folder's README.md; None where it holds no model.

    Args:
        folder: with a model's files, and recipe.yaml, metrics.json, parity.json and export.json where there are such.
        name: of the folder, when it is in its place.
        recipe_text: of the recipe, where it is in no file there.
    """
    try:
        own = next((h for h in held(folder) if folder in (h.path, h.path.parent)), None)
    except UserError:
        return None
    if own is None:
        return None
    recipe = _recipe(folder, recipe_text)
    title = name if recipe is None else recipe.name if own.format == "native" else f"{recipe.name}, {own.format}"
    found = [_metadata(own, recipe), f"# {title}\n", _summary(own, recipe), _quality(folder), _use(folder, own)]
    found += [] if recipe is None else [_made(recipe)]
    return "\n".join(part for part in found if part)


def _recipe(folder: Path, text: str | None) -> Recipe | None:
    try:
        if text is not None:
            return from_text(text)
        return read(folder / "recipe.yaml") if (folder / "recipe.yaml").is_file() else None
    except UserError:  # of an earlier release, or by hand: then the card says less
        return None


def _metadata(own: Held, recipe: Recipe | None) -> str:
    if recipe is None:
        return metadata(own.format, None)
    sources = () if recipe.data is None else recipe.data.sources
    tags, texts = [recipe.method.name, *_bits(recipe)], [source.path for source in sources]
    return metadata(own.format, recipe.model.path, tags, texts)


def _bits(recipe: Recipe) -> list[str]:
    """`3-bit` for every width that the rules name."""
    grids = [rule.grid for rule in recipe.rules or []] or [recipe.method.grid]
    return sorted({f"{grid.bits}-bit" for grid in grids if grid is not None and not isinstance(grid, str)})


def _summary(own: Held, recipe: Recipe | None) -> str:
    if recipe is None:
        return f"A language model in trimtab's {own.format} format.\n"
    base = hub_id(recipe.model.path)
    of = f"[{base}](https://huggingface.co/{base})" if base else f"`{Path(recipe.model.path).name}`"
    how = recipe.method.name
    trained = f"tuned by `{how}` for {recipe.train.steps} steps" if recipe.train.steps else f"quantized by `{how}`"
    form = "trimtab's own format" if own.format == "native" else f"the `{own.format}` format"
    return (
        f"{of}, {trained} with trimtab, in {form}. What was trained is what is stored: codes are never rounded again.\n"
    )


def _quality(folder: Path) -> str:
    metrics, export = read_json(folder / "metrics.json"), read_json(folder / "export.json")
    rows = [(f"perplexity, {words}", ppl(metrics["perplexity"][key])) for key, words in STAGES.items()
            if metrics.get("perplexity", {}).get(key) is not None]  # fmt: skip
    rows += [(f"{task}", f"{v:.4f} ± {e:.4f}") for task, (v, e, _) in metrics.get("tasks", {}).items()]
    if "max_logit_difference" in metrics:
        rows.append(("largest logit difference, trained to reloaded", f"{metrics['max_logit_difference']:.3g}"))
    if export:
        rows.append((f"export, {export['kind']}: relative weight error", f"{export['relative_error']:.3g}"))
    if not rows:
        return ""
    lines = ["## Measured\n", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows), ""]
    return "\n".join(lines)


def _use(folder: Path, own: Held) -> str:
    if own.format == "native":
        kind = auto_class(read_config(folder)).__name__
        code = [
            "```python", "import trimtab  # teaches transformers to read it: pip install trimtab",
            f"from transformers import {kind}, AutoTokenizer", "",
            f'model = {kind}.from_pretrained("PATH")', 'tokenizer = AutoTokenizer.from_pretrained("PATH")',
            "```\n", "```", "trimtab chat PATH",
            "trimtab export PATH --format compressed-tensors    # vLLM; or gguf for llama.cpp, mlx", "```\n",
        ]  # fmt: skip
        return "\n".join(["## Use\n", *code])
    if own.engine is None:
        return ""
    file = own.path.name if own.path != folder else "."
    command = Held(own.format, Path(file), own.rank).line()
    return "\n".join(["## Use\n", "In this folder:\n", "```", command, "```\n"])


def _made(recipe: Recipe) -> str:
    """What decides the result, without the paths of this machine; recipe.yaml, where it is, has all of it."""
    options = {f.name: getattr(recipe.method, f.name) for f in fields(recipe.method) if f.init}
    rows = [("base", hub_id(recipe.model.path) or Path(recipe.model.path).name)]
    rows.append(("method", ", ".join([recipe.method.name, *(f"{k} {v}" for k, v in options.items())])))
    rows += [("layers", f"`{rule.match}`: {_grid(rule.grid)}") for rule in (recipe.rules or [])[:_RULES]]
    more = len(recipe.rules or []) - _RULES
    rows += [("", f"and {more} rules more")] if more > 0 else []
    if recipe.data is not None and recipe.train.steps:
        train = recipe.train
        rows.append(
            ("data", ", ".join(hub_id(source.path) or Path(source.path).name for source in recipe.data.sources))
        )
        rows.append(("training", f"{train.steps} steps of {train.batch_tokens} tokens, {train.schedule} schedule"))
    lines = ["## Made by\n", "| | |", "|---|---|", *(f"| {what} | {value} |" for what, value in rows), ""]
    return "\n".join(lines)


def _grid(grid: Any) -> str:
    return "float" if grid is None or isinstance(grid, str) else grid.describe()
