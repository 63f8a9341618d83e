"""What README.md and the pages of docs/ say: commands and recipes that trimtab itself reads, names and links that exist,
numbers that scripts made. Nothing is trained: `test_tutorials.py` runs the tutorials.

docs/log.md is left out where it speaks of names that things had.
"""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import typer.main
import yaml

import docs_errors
import docs_site
import trimtab as tt
from trimtab.cli import app
from trimtab.recipe.recipe import as_recipe, from_dict

ROOT = Path(__file__).parents[1]
FILES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in FILES}
MEASURED = "".join(PAGES[f"docs/{name}.md"] for name in ("results", "quality", "performance", "search"))
QUOTING = [
    page for page in PAGES if re.match(r"README|docs/(guide|choosing|quickstart|memory|methods/|tutorials/)", page)
]
"""Pages that take numbers from measured ones."""
BASE = {
    "model": {"path": "a"},
    "method": "lr-qat",
    "data": {"path": "b", "eval_path": "c"},
    "rules": [{"match": "*", "grid": {"bits": 4, "group": 64}}],
}
each_page = pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/log.md"])


def blocks(page: str, *languages: str) -> list[str]:
    """Code blocks of these languages."""
    return [text for kind, text in re.findall(r"```(\w*)\n(.*?)```", PAGES[page], re.DOTALL) if kind in languages]


def commands(page: str) -> list[list[str]]:
    """Every `trimtab ...` line of its code blocks, without comments."""
    lines = [line.split("  #")[0] for block in blocks(page, "", "sh") for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("trimtab ")]


def unknown(arguments: list[str]) -> str:
    """What of a command line does not exist; nothing if all does."""
    group = typer.main.get_command(app)
    command = group.commands.get(arguments[0])  # type: ignore[attr-defined]
    if command is None:
        return arguments[0]
    options = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return next((word for word in arguments[1:] if word.startswith("--") and word not in options), "")


def wrong(arguments: list[str]) -> str:
    """What the command's own parser, or the recipe's, says against a command line; nothing if it would be run."""
    if unknown(arguments):
        return unknown(arguments)
    name, *rest = arguments
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    try:
        command.make_context(name, list(rest))
        overrides = [word for word in rest if re.match(r"[a-z_]+(\.[a-z_]+)*=", word)]
        as_recipe(BASE, overrides)
    except Exception as error:  # noqa: BLE001 whatever it says
        return f"{' '.join(arguments)}: {error or type(error).__name__}"
    return ""


def test_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= 130


@each_page
def test_commands_are_taken(page: str) -> None:
    assert [said for said in map(wrong, commands(page)) if said] == []


@each_page
def test_commands_in_sentences_exist(page: str) -> None:
    found = re.findall(r"`trimtab ([a-z]+)((?: --[a-z-]+)*)", PAGES[page])
    assert [words for words in found if unknown([words[0], *words[1].split()])] == []


@pytest.mark.parametrize(
    "line",
    [
        "rum a.yaml",
        "run a.yaml --no-such",
        "run",
        "plan a.yaml train.stepz=4",
        "eval a --tokens many",
        "run a.yaml x.y=1",
    ],
)
def test_wrong_commands_are_found(line: str) -> None:
    assert wrong(line.split())
    assert not wrong(["run", "a.yaml", "--overwrite", "train.steps=4"])


def test_pages_have_commands() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 50


@each_page
def test_recipes_are_read(page: str) -> None:
    for block in blocks(page, "yaml"):
        from_dict({**BASE, **yaml.safe_load(block)})


def called(source: str) -> list[tuple[str, list[str]]]:
    """Names of trimtab that a snippet uses (`fold`, `methods.LrQat`), with the keywords that it gives them."""
    tree, found = ast.parse(source), []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            found.append((ast.unparse(node.func), [k.arg for k in node.keywords if k.arg]))
        elif isinstance(node, ast.Attribute):
            found.append((ast.unparse(node), []))
    return [(name.removeprefix("tt."), keywords) for name, keywords in found if re.fullmatch(r"tt\.[\w.]+", name)]


def missing(name: str, keywords: list[str]) -> str:
    """What of a name or its keywords trimtab does not have."""
    if name.partition(".")[0] not in tt.__all__:
        return name
    target = tt
    for part in name.split("."):
        if not hasattr(target, part):
            return name
        target = getattr(target, part)
    unknown = set(keywords) - set(inspect.signature(target).parameters) if keywords else set[str]()
    return f"{name}: {', '.join(unknown)}" if unknown else ""


@each_page
def test_python_calls_what_there_is(page: str) -> None:
    uses = [use for block in blocks(page, "python") for use in called(block)]
    uses += [(name, []) for name in re.findall(r"`tt\.([a-zA-Z_.]+)", PAGES[page])]
    assert [said for use in uses if (said := missing(*use))] == []


def test_wrong_calls_are_found() -> None:
    assert [missing(*use) for use in called("tt.no(1)")] == ["no", "no"]
    assert "rang" in missing(*called("tt.methods.LrQat(rang=3)")[0])
    assert not missing(*called("tt.methods.LrQat(rank=3)")[0])


@pytest.mark.parametrize("page", QUOTING)
def test_numbers_are_measured(page: str) -> None:
    """Every number with two decimals in the text or in a table stands in a page that a script wrote."""
    prose = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
    found = set(re.findall(r"(?<![\d./])\d{1,3}\.\d\d+(?:e\+\d+)?(?![\d.])", prose)) - {"3.11"}
    assert sorted(number for number in found if number not in MEASURED) == []


def anchors(text: str) -> set[str]:
    """What the headings of a page are linked by."""
    titles = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page: str) -> None:
    """To a file that is there, and to a heading in it."""
    targets = re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL))
    for target, anchor in targets:
        if "://" in target:
            continue
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in anchors(path.read_text(encoding="utf-8")), f"{page}: {target}#{anchor}"


# ---- the site -------------------------------------------------------------------------------------------------------


def listed(entries: list[object]) -> list[str]:
    """The pages of a navigation."""
    found: list[str] = []
    for entry in entries:
        for value in entry.values() if isinstance(entry, dict) else [entry]:
            found += listed(value) if isinstance(value, list) else [str(value)]
    return found


def test_every_page_is_in_the_navigation() -> None:
    nav = listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    pages = {page.removeprefix("docs/") for page in PAGES if page.startswith("docs/")}
    assert len(nav) == len(set(nav))
    assert set(nav) == pages | {at for page, at in docs_site.PAGES.items() if (ROOT / page).is_file()}


def test_generated_parts_are_made() -> None:
    made = docs_site.generators()
    for page, text in PAGES.items():
        for name in re.findall(r"^<!-- generated: (\w+)", text, re.MULTILINE):
            assert name in made, page
    assert "train.evaluate_steps" in made["recipe"]()
    assert "--allow-lossy" in made["commands"]()
    assert "w3-lr-qat |" in made["method"]("lr-qat")
    assert "35.76" in made["method"]("lr-qat")


def test_every_public_name_has_its_reference() -> None:
    assert set(re.findall(r"::: trimtab\.(\w+)", PAGES["docs/api.md"])) | {"methods"} == set(tt.__all__)
    assert {f"docs/methods/{method.name}.md" for method in tt.methods.ALL} <= set(PAGES)


def test_messages_are_listed() -> None:
    messages = [line for said in docs_errors.by_heading().values() for line in said]
    assert len(messages) > 500
    assert any("no such recipe file" in line for line in messages)
    assert list(docs_errors.messages("raise UserError(f'{a.b}: {x[0]} of {f(1)}; write it again')")) == [
        "<b>: <x> of …; write it again"
    ]


def test_links_out_of_the_site_are_named() -> None:
    assert docs_site.relinked("[a](docs/guide.md#grids)", "README.md", "index.md") == "[a](guide.md#grids)"
    assert docs_site.relinked("[a](../README.md)", "docs/guide.md", "guide.md") == "[a](index.md)"
    assert docs_site.relinked("[a](../quality.md)", "docs/methods/rtn.md", "methods/rtn.md") == "[a](../quality.md)"
    assert (
        docs_site.relinked("[a](src/trimtab/api.py)", "CONTRIBUTING.md", "contributing.md")
        == "a (`src/trimtab/api.py`)"
    )
    with pytest.raises(SystemExit, match="not there"):
        docs_site.relinked("[a](src/no.py)", "README.md", "index.md")


def test_broken_links_end_the_build() -> None:
    """mkdocs counts the warnings that it prints; with --quiet it prints none."""
    assert "$(MKDOCS) build --strict\n" in (ROOT / "Makefile").read_text()
    assert set(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["validation"].values()) == {"warn"}
