"""Small ways to break a C file: one token changed at a time, outside comments, strings and what the preprocessor reads."""

import re
from collections.abc import Iterator

_CHANGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"(?<![<>=!\-+*/&|])<(?![<=])", ("<=",)), (r"(?<!<)<=", ("<",)),
    (r"(?<![>\-<])>(?![>=])", (">=",)), (r"(?<!>)>=", (">",)),
    (r"==", ("!=",)), (r"!=", ("==",)), (r"&&", ("||",)), (r"\|\|", ("&&",)), (r"<<", (">>",)), (r">>", ("<<",)),
    (r"(?<= )\+(?= )", ("-",)), (r"(?<= )-(?= )", ("+",)), (r"(?<= )\*(?= )", ("/",)), (r"(?<= )/(?= )", ("*",)),
    (r"(?<= )%(?= )", ("/",)), (r"(?<= )&(?= )", ("|",)), (r"(?<= )\|(?= )", ("&",)), (r"(?<= )\^(?= )", ("|",)),
    (r"\+=", ("-=",)), (r"-=", ("+=",)), (r"\|=", ("&=",)), (r"&=", ("|=",)), (r"!(?=[a-zA-Z(])", ("",)),
    (r"\bfminf\b", ("fmaxf",)), (r"\bfmaxf\b", ("fminf",)), (r"\brintf?\b", ("floorf",)), (r"\bfabsf\b", ("",)),
    (r"\bcontinue;", (";",)), (r"\bbreak;", (";",)),
)  # fmt: skip
_NUMBER = re.compile(r"(?<![\w.\]])\d+(?:\.\d+)?f?(?![\w.])")


def _blanked(source: str) -> str:
    """The source with comments, strings and preprocessor lines as spaces, so that positions stay."""
    pattern = re.compile(r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\])*"|^[ \t]*#[^\n]*(?:\\\n[^\n]*)*', re.S | re.M)
    return pattern.sub(lambda m: re.sub(r"[^\n]", " ", m.group()), source)


def breaks(source: str) -> Iterator[tuple[int, str, str]]:
    """(line, change in words, the whole source so changed) of every break."""
    blank = _blanked(source)
    lines = source.splitlines()

    def made(start: int, end: int, new: str) -> tuple[int, str, str]:
        line = blank.count("\n", 0, start) + 1
        column = start - (blank.rfind("\n", 0, start) + 1)
        now = lines[line - 1][:column] + new + lines[line - 1][column + end - start :]
        return line, now.strip(), source[:start] + new + source[end:]

    for pattern, instead in _CHANGES:
        for match in re.finditer(pattern, blank):
            for new in instead:
                yield made(match.start(), match.end(), new)
    for match in _NUMBER.finditer(blank):
        text = match.group()
        if "." in text:
            value = float(text.rstrip("f"))
            yield made(match.start(), match.end(), f"{value * 2 if value else 1.0}f")
        else:
            for value in {int(text) + 1, max(0, int(text) - 1)} - {int(text)}:
                yield made(match.start(), match.end(), str(value))
