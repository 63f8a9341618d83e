"""Numbers in words, the same in a terminal and on a page. Imports nothing."""


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
