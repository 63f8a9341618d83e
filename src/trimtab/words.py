"""Numbers in words, the same in a terminal, on a page and in a model's card; and words as numbers. Imports no library."""

from collections.abc import Sequence

from trimtab.errors import UserError

STAGES = {"float": "float, untuned", "rounded": "rounded, before tuning", "tuned": "tuned, folded, reloaded"}
"""The models that a run measures, by their keys in metrics.json."""


def size(count: float) -> str:
    """Bytes for people, in powers of 1000 as disks are sold: `83.1 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def duration(seconds: float) -> str:
    """Seconds for people: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def perplexity(value: float) -> str:
    """A perplexity as tables show it; one of a ruined model in powers of ten."""
    return f"{value:.2f}" if value < 1e4 else f"{value:.2e}"


def whole_numbers(text: str, option: str) -> tuple[int, ...]:
    """The numbers of a list with commas; a `UserError` that names the option where it is none."""
    try:
        return tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise UserError(f"{option}: {text!r} is not a list of layer numbers; write 0,1,-1") from None


def beyond(dtype: object) -> str:
    """What is to be said of numbers that are not finite in float16, which holds few; "" for other dtypes."""
    if str(dtype).removeprefix("torch.") != "float16":
        return ""
    return " (float16 holds none above 65,504, and what is larger becomes infinite there: use bfloat16 or float32)"


def and_more(names: Sequence[str], shown: int = 3) -> str:
    """The first of several names, the others counted."""
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
