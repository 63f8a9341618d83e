"""What the site is built from, put together in build/docs-source: the pages of docs/, and what is read from the source.

    python tools/docs_site.py            writes build/docs-source; `make docs` and mkdocs's hook call it

Pages keep their text, but for three things:

* `<!-- generated: NAME ARGUMENT -->` is replaced by what that generator writes (`GENERATED`);
* README.md, CONTRIBUTING.md, CHANGELOG.md, ... become pages of the site, and links to them and to other files of the
  repository are rewritten: a source file is named instead of linked, since the site does not hold it;
* a tutorial gets its notebook beside it, and a link to it.

A file is written only where its text has changed, so that a server which watches the folder does not build in circles.
"""

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import docs_errors
import docs_notebooks

ROOT = Path(__file__).parents[1]
OUT = ROOT / "build" / "docs-source"
PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "RELEASING.md": "releasing.md",
    "SECURITY.md": "security.md",
}
"""Files of the repository's top that are pages of the site."""


def generators() -> dict[str, Callable[..., str]]:
    """What writes a generated part, by its name in the mark."""
    import docs_reference  # it loads torch

    return {
        "errors": docs_errors.markdown,
        "recipe": docs_reference.recipe,
        "commands": docs_reference.commands,
        "method": docs_reference.method,
    }


def filled(text: str, made: dict[str, Callable[..., str]]) -> str:
    """A page with its marks replaced."""

    def replace(mark: re.Match[str]) -> str:
        name, *arguments = mark.group(1).split()
        return made[name](*arguments)

    return re.sub(r"^<!-- generated: (.*?) -->$", replace, text, flags=re.MULTILINE)


def relinked(text: str, page: str, at: str) -> str:
    """Links of a page that stands in the repository as `page` and on the site as `at`."""

    def replace(link: re.Match[str]) -> str:
        words, target, anchor = link.group(1), link.group(2), link.group(3) or ""
        if "://" in target or target.startswith("mailto:"):
            return link.group(0)
        inside = (ROOT / page).parent.joinpath(target).resolve().relative_to(ROOT).as_posix()
        if inside in PAGES or inside.startswith("docs/"):
            there = PAGES.get(inside, inside.removeprefix("docs/"))
            return f"[{words}]({'../' * at.count('/')}{there}{anchor})"
        if not (ROOT / inside).exists():
            raise SystemExit(f"{page}: links to {target}, which is not there")
        return f"{words} (`{inside}`)" if inside not in words else words

    return re.sub(r"\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)", replace, text)


def write(path: Path, content: bytes) -> None:
    """Write a file unless it holds that already."""
    if not path.is_file() or path.read_bytes() != content:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def assembled() -> dict[str, bytes]:
    """Every file of the site's source by its path there."""
    made = generators()
    pages = {page: at for page, at in PAGES.items() if (ROOT / page).is_file()}
    files: dict[str, bytes] = {}
    for path in sorted((ROOT / "docs").rglob("*")):
        at = path.relative_to(ROOT / "docs").as_posix()
        if path.suffix == ".md":
            pages[f"docs/{at}"] = at
        elif path.is_file():
            files[at] = path.read_bytes()
    for page, at in pages.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        if at.startswith("tutorials/") and not at.endswith("index.md"):
            name = Path(at).stem
            files[f"tutorials/{name}.ipynb"] = docs_notebooks.notebook(text).encode()
            text = text.replace("\n\n", f"\n\n[This page as a notebook]({name}.ipynb){{ download }}\n\n", 1)
            files[at] = filled(text, made).encode()
        else:
            files[at] = filled(relinked(text, page, at), made).encode()
    return files


def main() -> None:
    """Write what has changed, and remove what is no longer there."""
    files = assembled()
    for at, content in files.items():
        write(OUT / at, content)
    for path in sorted(OUT.rglob("*"), reverse=True):
        if path.is_file() and path.relative_to(OUT).as_posix() not in files:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            shutil.rmtree(path)


if __name__ == "__main__":
    main()
