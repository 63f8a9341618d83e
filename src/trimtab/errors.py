"""The one exception that speaks to a user.

A `UserError` says what is wrong, where (layer, file, line, key) and what to do about it, in one line. The command line
prints it and exits with status 2; everything else is a bug and keeps its traceback.

What it quotes may come from an untrusted file: a value of a million characters, a line break, an escape sequence that
would steer the terminal, half of a surrogate pair that cannot be printed. So a message is made one printable line here.
"""

from difflib import get_close_matches

_LONGEST = 1200
"""Characters of a message; of a longer one the two ends are kept."""


class UserError(ValueError):
    """Bad input, described in one line for the person who gave it.

    Examples:
        >>> try:
        ...     tt.run("small.yaml")
        ... except tt.UserError as error:
        ...     print(error)
    """

    def __init__(self, message: str) -> None:
        super().__init__(in_one_line(message))


def in_one_line(text: str, most: int = _LONGEST) -> str:
    """A text without line breaks, of bounded length, in which what is not printable is written as Python escapes it."""
    text = " ".join(line.strip() for line in text.splitlines() if line.strip())
    if len(text) > most:
        text = f"{text[: most * 2 // 3]} [...] {text[-most // 3 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Diverged(UserError):
    """A loss, or what is trained, is no longer finite."""


def nearest(word: str, known: list[str]) -> str:
    """A ` (did you mean 'x'?)` suffix naming the known word nearest to `word`, or nothing."""
    matches = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
