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


def _blanked(source: str, preprocessed: bool = True) -> str:
    """The source with comments, strings and preprocessor lines as spaces, so that positions stay."""
    pattern = r'/\*.*?\*/|//[^\n]*|"(?:\\.|[^"\\])*"' + (r"|^[ \t]*#[^\n]*(?:\\\n[^\n]*)*" if preprocessed else "")
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", " ", m.group()), source, flags=re.S | re.M)


def function_at(source: str, line: int) -> str:
    """The function that a line stands in, or the last one before it."""
    head = re.compile(r"(?:#define |\w[^(;]*?)(\w+)\(")  # a macro with arguments counts as one
    heads = (head.match(text) for text in source.splitlines()[:line] if not text.endswith(";"))
    return next((found.group(1) for found in reversed([*heads]) if found), "")


def entries_of(source: str) -> dict[str, set[str]]:
    """Functions of a file, and for each the entry points (not static) from which it can be reached."""
    blank = _blanked(source, preprocessed=False)
    bodies: dict[str, str] = {}
    for number, text in enumerate(blank.splitlines(), 1):
        name = function_at(blank, number)
        bodies[name] = bodies.get(name, "") + text + "\n"
    entries = set(re.findall(r"^void (\w+)\(", blank, re.M))
    reached: dict[str, set[str]] = {name: set() for name in bodies}
    for entry in entries:
        ahead = [entry]
        while ahead:
            name = ahead.pop()
            if entry not in reached[name]:
                reached[name].add(entry)
                ahead += [n for n in re.findall(r"\w+", bodies[name]) if n in bodies]
    return reached


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
