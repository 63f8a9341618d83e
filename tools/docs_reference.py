"""Parts of the site that are read from trimtab itself: recipe fields, commands, and what a method's page has in tables."""

import dataclasses
import inspect
import json
import re
from pathlib import Path
from typing import Any

import typer.main

from trimtab import methods
from trimtab.cli import app
from trimtab.quant.activations import Activations, KvCache
from trimtab.quant.grid import CodebookGrid, Grid
from trimtab.recipe.changing import Change
from trimtab.recipe.explain import documented
from trimtab.recipe.fields import Block, SourceBlock
from trimtab.recipe.recipe import Recipe
from trimtab.recipe.rules import Rule

ROOT = Path(__file__).parents[1]
Rows = list[tuple[str, ...]]


def table(header: tuple[str, ...], rows: Rows) -> list[str]:
    """A table of Markdown."""
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *(f"| {' | '.join(row)} |" for row in escaped), ""]


# ---- recipes --------------------------------------------------------------------------------------------------------


def written(annotation: Any) -> str:
    """A type as a person would write it in YAML: `int or null`, `sft, dpo, kto or grpo`, `list of int`."""
    arguments = getattr(annotation, "__args__", ())
    origin = getattr(annotation, "__origin__", None)
    name = getattr(origin, "__name__", "")
    if type(annotation).__name__ == "_LiteralGenericAlias":
        return ", ".join("true" if a is True else "false" if a is False else f"`{a}`" for a in arguments)
    if hasattr(annotation, "__metadata__"):
        return written(arguments[0])
    if name in ("tuple", "list"):
        return f"list of {written(arguments[0])}"
    if name == "dict":
        return "mapping"
    if arguments:
        return " or ".join(dict.fromkeys(written(a) for a in arguments))
    plain = {bool: "true, false", str: "text", int: "whole number", float: "number", type(None): "null"}
    return plain.get(annotation, "mapping")


def field_row(key: str, field: Any) -> tuple[str, ...]:
    """Key, type with its default, and meaning with whether `--resume` lets it change."""
    if field.is_required():
        default = "required"
    else:
        value = field.get_default(call_default_factory=True)
        default = "`{}`" if isinstance(value, Block) else f"`{value if isinstance(value, str) else json.dumps(value)}`"
    may = any(isinstance(mark, Change) for mark in field.metadata)
    meaning = (field.description or "") + (" *May change on `--resume`.*" if may else "")
    return f"`{key}`", f"{written(field.annotation)}; {default}", meaning


def block_of(annotation: Any) -> type[Block] | None:
    """The block that a key holds, or may hold."""
    options = getattr(annotation, "__args__", (annotation,))
    return next((o for o in options if isinstance(o, type) and issubclass(o, Block)), None)


HEADER = ("key", "type; default", "meaning")


def recipe() -> str:
    """Every key of a recipe, block by block."""
    top = [field_row(name, f) for name, f in Recipe.model_fields.items() if block_of(f.annotation) is None]
    lines = ["## Top level", "", *table(HEADER, top)]
    for name, field in Recipe.model_fields.items():
        block = block_of(field.annotation)
        if block is None:
            continue
        lines += [f"## `{name}`", "", block.__doc__ or "", "", *([field.description, ""] if field.description else [])]
        lines += table(HEADER, [field_row(f"{name}.{key}", value) for key, value in block.model_fields.items()])
    rows = [field_row(key, value) for key, value in SourceBlock.model_fields.items()]
    lines += ["## An entry of `data.path`", "", SourceBlock.__doc__ or "", "", *table(HEADER, rows)]
    for title, kind in (
        ("An entry of `rules`", Rule),
        ("`grid`", Grid),
        ("`grid` with a codebook", CodebookGrid),
        ("`activations`", Activations),
        ("`kv`", KvCache),
    ):
        lines += [f"## {title}", "", summary(kind), "", *table(("key", "default", "meaning"), options(kind))]
    return "\n".join(lines)


def summary(kind: type) -> str:
    """The first paragraph of a class's docstring."""
    return " ".join((inspect.getdoc(kind) or "").split("\n\n")[0].split())


def options(kind: type) -> Rows:
    """Key, default and meaning of a dataclass's fields, those of its bases first."""
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    return [
        (f"`{name}`", f"`{yaml_of(default)}`" if default else "required", said)
        for base in bases
        for name, default, said in documented(base)
    ]


def yaml_of(value: str) -> str:
    """A default as YAML has it."""
    return {"None": "null", "True": "true", "False": "false"}.get(value, value.strip("'"))


# ---- commands -------------------------------------------------------------------------------------------------------


def commands() -> str:
    """Every command with its arguments and options."""
    lines: list[str] = []
    for name, command in sorted(typer.main.get_command(app).commands.items()):  # type: ignore[attr-defined]
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        shown = [str(p.metavar or p.human_readable_name) for p in arguments]
        usage = " ".join(["trimtab", name, *shown, "[OPTIONS]"])
        rows = [(f"`{metavar}`", p.help or "", "") for metavar, p in zip(shown, arguments, strict=True)]
        rows += [
            (
                ", ".join(f"`{o}`{{ .option }}" for o in p.opts),  # in one line: docs/site.css
                p.help or "",
                "" if p.default is None or p.default is False else f"`{p.default}`",
            )
            for p in command.params
            if p.param_type_name == "option"
        ]
        lines += [f"## `{name}`", "", command.help or "", "", "```", usage, "```", ""]
        lines += table(("argument", "meaning", "default"), rows) if rows else []
    return "\n".join(lines)


# ---- a method's page ------------------------------------------------------------------------------------------------


def method(name: str) -> str:
    """What the source and the measurements say of a method: equation, options, trainable parameters, rows."""
    kind = methods.get(name)
    default = "float" if kind.grid is None else kind.grid.describe()
    lines = ["## Equation", "", (inspect.getmodule(kind).__doc__ or "").strip(), "", "## Options", ""]
    lines += [f"`trimtab.methods.{kind.__name__}`; default grid: {default}.", ""]
    lines += table(("key", "default", "meaning"), options(kind))
    lines += ["## Trainable parameters", "", *parameters(kind), "## Measured", "", *measured(name)]
    return "\n".join(lines)


SHAPES = {"576 x 576": (576, 576), "4096 x 4096": (4096, 4096), "14336 x 4096": (14336, 4096)}


def parameters(kind: type[methods.Method]) -> list[str]:
    """Of single layers with the method's defaults."""
    made = kind()
    rows: Rows = []
    for title, shape in SHAPES.items():
        count = made.trainable(kind.grid, shape)
        rows.append((title, f"{count:,}", f"{count / (shape[0] * shape[1]):.2%}"))
    return table(("layer (outputs x inputs)", "trainable", "share of its weights"), rows)


def measured(name: str) -> list[str]:
    """The rows of docs/quality.md that are about a method, beside rounding to nearest on the same grid."""
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    lines: list[str] = []
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, *body = section.splitlines()
        rows = [line for line in body if line.startswith("| ")]
        own = [row for row in rows if re.match(rf"\| \w+(-\w+)?-{re.escape(name)}[ ,]", row)]
        if not own or not rows[0].startswith("| row |"):
            continue
        base = [row for row in rows if re.match(r"\| \w+(-channel)?-rtn ", row) and row not in own]
        lines += [f"{title}:", "", rows[0], "|" + "---|" * (rows[0].count("|") - 1), *base, *own, ""]
    told = "SmolLM2-135M-Instruct, WikiText-2, 32 short steps, held-out perplexity; see [quality](../quality.md)."
    return [told, "", *lines] if lines else ["[Quality](../quality.md) has no row of its own for this method yet.", ""]
