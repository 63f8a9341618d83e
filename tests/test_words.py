"""The English of pages, docstrings, comments and messages: idioms that a reader of the field would stumble over, and what
is written instead. Names in code spans are left alone, and so are docs/log.md and CHANGELOG.md, which are history.
"""

import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INSTEAD = {
    r"\banew\b": "again, over, from scratch",
    r"\b(go|goes|going|went|gone) on\b": "continue, resume",
    r"(?<!here )\b(is|was) no (list|path|key|grid|value|size|name|method|folder|file|entry|number|multiple)\b": "not a",
    r"\bcame to (a|this|its|it)\b": "reached, ended",
    r"\bwhoever\b": "the caller, the reader, the process that",
    r"\bof anybody\b": "untrusted",
    r"\btrained parameters\b": "trainable parameters",
    r"\bin few bits\b": "quantized",
    r"\bnumbers of (a|the|one) (model|block|layer)\b": "parameters",
    r"\b(is|are|was|were|been|be) parted\b": "sharded",
    r"\bmend(s|ed|ing)? (it|them|this|that)\b": "fix",
    r"\b(can|may|will|cannot) mend\b": "fix",
    r"\bas they came\b": "unchanged",
    r"\bof one's own\b": "your own",
    r"\bno matter of\b": "a matter that does not",
}
"""An idiom, and words for it."""


def prose_of(path: Path) -> Iterator[tuple[int, str]]:
    """(line, text) of what is written for people: a page without its code, or a module's strings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        hidden = re.sub(r"```.*?```", lambda block: "\n" * block[0].count("\n"), text, flags=re.DOTALL)
        yield from enumerate(hidden.splitlines(), 1)
        return
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and re.search(r"\s", token.string)):
            yield from enumerate(token.string.splitlines(), token.start[0])


def idioms(line: str) -> list[str]:
    """The idioms of a line, each with what to write."""
    shown = re.sub(r"`[^`]*`", "", line)
    return [
        f"{found[0]!r}: write {words}"
        for pattern, words in INSTEAD.items()
        if (found := re.search(pattern, shown, re.IGNORECASE))
    ]


PAGES = [p for p in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")] if p.name not in ("log.md", "CHANGELOG.md")]
MODULES = [*(ROOT / "src").rglob("*.py"), *(ROOT / "tools").glob("*.py")]


@pytest.mark.parametrize("paths", [PAGES, MODULES], ids=["pages", "modules"])
def test_words_are_those_of_the_field(paths: list[Path]) -> None:
    assert paths
    found = [
        f"{path.relative_to(ROOT)}:{line}: {said}"
        for path in sorted(paths)
        for line, text in prose_of(path)
        for said in idioms(text)
    ]
    assert found == []


def test_idioms_are_found(tmp_path: Path) -> None:
    assert idioms("It is made anew.") == ["'anew': write again, over, from scratch"]
    assert all(map(idioms, ("Training goes on from there", "Whoever asks", "the layer is parted")))
    assert not idioms("`parted` is a module, and `whoever` a name")
    module = tmp_path / "a.py"
    module.write_text('"""Made\n\nanew."""\nanew = 1  # of anybody\nkey = "parted"\n')
    assert [line for line, text in prose_of(module) for _ in idioms(text)] == [3, 4]
    page = tmp_path / "a.md"
    page.write_text("a\n```\nmade anew\n```\nmade anew\n")
    assert [line for line, text in prose_of(page) for _ in idioms(text)] == [5]
