"""The one exception that speaks to a user.

A `UserError` says what is wrong, where (layer, file, line, key) and what to do about it, in one line. The command line
prints it and exits with status 2; everything else is a bug and keeps its traceback.
"""

from difflib import get_close_matches


class UserError(ValueError):
    """Bad input, described in one line for the person who gave it."""


class Diverged(UserError):
    """A loss, or what is trained, is no longer finite."""


def nearest(word: str, known: list[str]) -> str:
    """A ` (did you mean 'x'?)` suffix naming the known word nearest to `word`, or nothing."""
    matches = get_close_matches(word, known, n=1, cutoff=0.5)
    return f" (did you mean {matches[0]!r}?)" if matches else ""
