"""What README.md and the guide say: commands that exist, recipes that are read, numbers that scripts made, links."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

import trimtab as tt
from trimtab.cli import app
from trimtab.recipe.recipe import from_dict

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/guide.md")}
MEASURED = "".join((ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
                   for name in ("results", "quality", "performance", "search"))  # fmt: skip
each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page: str, language: str) -> list[str]:
    """Code blocks of that language."""
    return [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", PAGES[page], re.DOTALL) if kind == language]


def commands(page: str) -> list[list[str]]:
    """Every `trimtab ...` line of its code blocks, without comments."""
    lines = [line.split("  #")[0] for block in blocks(page, "") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("trimtab ")]


def unknown(arguments: list[str]) -> str:
    """What of a command line does not exist; nothing if all does."""
    group = typer.main.get_command(app)
    command = group.commands.get(arguments[0])  # type: ignore[attr-defined]
    if command is None:
        return arguments[0]
    options = {name for parameter in command.params for name in parameter.opts}
    return next((word for word in arguments[1:] if word.startswith("--") and word not in options), "")


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 130


@each_page
def test_commands_exist(page: str) -> None:
    found = commands(page)
    assert found
    assert [arguments for arguments in found if unknown(arguments)] == []


@each_page
def test_commands_in_sentences_exist(page: str) -> None:
    found = re.findall(r"`trimtab ([a-z]+)((?: --[a-z-]+)*)", PAGES[page])
    assert [words for words in found if unknown([words[0], *words[1].split()])] == []


def test_unknown_commands_are_found() -> None:
    assert unknown(["rum", "a.yaml"]) == "rum"
    assert unknown(["run", "a.yaml", "--no-such"]) == "--no-such"
    assert unknown(["run", "a.yaml", "--overwrite"]) == ""


@each_page
def test_recipes_are_read(page: str) -> None:
    base = {
        "model": {"path": "a"},
        "method": "lr-qat",
        "data": {"path": "b", "eval_path": "c"},
        "rules": [{"match": "*", "grid": {"bits": 4, "group": 64}}],
    }
    for block in blocks(page, "yaml"):
        from_dict({**base, **yaml.safe_load(block)})


def test_python_names_public_functions() -> None:
    for block in blocks("README.md", "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "tt":
                assert node.attr in tt.__all__
    assert set(re.findall(r"`tt\.([a-z_]+)", PAGES["README.md"] + PAGES["docs/guide.md"])) <= set(tt.__all__)


@each_page
def test_numbers_are_measured(page: str) -> None:
    """Every number with two decimals in the text or in a table stands in a page that a script wrote."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    found = set(re.findall(r"(?<![\d./])\d{1,3}\.\d\d+(?:e\+\d+)?(?![\d.])", prose)) - {"3.11"}
    assert sorted(number for number in found if number not in MEASURED) == []


@each_page
def test_links_lead_somewhere(page: str) -> None:
    targets = [t for t in re.findall(r"\]\(([^)#]+)\)", PAGES[page]) if "://" not in t]
    assert [t for t in targets if not ((ROOT / page).parent / t).exists()] == []
