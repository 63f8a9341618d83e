"""A memory plan for people: tables and lines, at most 80 columns wide."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from trimtab.memory.peak import Plan
from trimtab.memory.settings import Settings
from trimtab.memory.speed import Speed
from trimtab.words import duration

_PARTS = {
    "codes": "codes, scales, zeros",
    "float_parameters": "float parameters",
    "adapters": "trainable parameters",
    "gradients": "gradients",
    "optimizer": "optimizer (AdamW)",
    "activations": "activations kept for backward",
    "temporary": "temporary (one layer, one chunk of logits)",
    "teacher": "the teacher",
    "before": "before it: asking the teacher, a calibrated start (not added)",
    "apart": "of these never at once (subtracted)",
}
_SHOWN_IF_ANY = ("teacher", "before", "apart")
_ROWS = 12
"""Settings that are shown."""
_WIDTH = 78


class Shown(NamedTuple):
    """A table."""

    title: str
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def tables(plan: Plan, available: int, size: Callable[[float], str]) -> Iterator[Shown | str]:
    """What to show of a plan, in order: tables and lines.

    Args:
        plan: the plan.
        available: bytes that are free here.
        size: bytes in words.
    """
    rows = [
        (label, size(getattr(plan, key)))
        for key, label in _PARTS.items()
        if key not in _SHOWN_IF_ANY or getattr(plan, key)
    ]
    rows += [("total, above the interpreter and its libraries", size(plan.total))]
    rows += [("trainable parameters", f"{plan.trainable:,}")]
    yield Shown("predicted peak of training", ("", ""), rows)
    memory, where = _memory(plan, available)
    needed = plan.total + plan.beside
    verdict, apart = ("fits", "left") if needed <= memory else ("does not fit", "too much")
    beside = f", with {size(plan.beside)} for context and libraries" if plan.beside else ""
    yield f"memory {where}: {size(memory)}: {verdict}{beside}, {size(abs(memory - needed))} {apart}"
    if plan.sizes:
        held = [(name, size(found)) for name, found in plan.sizes.items() if isinstance(found, int)]
        yield Shown("tuned model by format", ("", ""), held)
        for name, found in plan.sizes.items():
            if isinstance(found, str):
                yield f"  {name}: no ({_short(found, _WIDTH - len(name) - 9)})"
    if plan.settings is not None:
        yield from _settings(plan.settings, memory, size)
    if plan.speed is not None:
        yield speed(plan.speed)


def _memory(plan: Plan, available: int) -> tuple[int, str]:
    """What there is, and where: as it was given, on the plan's device, or here."""
    if plan.memory is not None:
        return plan.memory, "given"
    if plan.free is not None:
        return plan.free, f"free on {plan.device}"
    return available, "free here" if plan.device in ("auto", "cpu") else f"free here ({plan.device} is not)"


def _settings(found: Settings, memory: int, size: Callable[[float], str]) -> Iterator[Shown | str]:
    if not found.rows:
        yield f"nothing fits into {size(memory)}: the least that was tried takes {size(found.least)}"
    else:
        rows = [
            (
                row.method,
                row.grid.removesuffix(" symmetric"),
                "-" if row.rank is None else str(row.rank),
                str(row.block_tokens),
                str(row.micro_batch),
                size(row.total),
                size(row.file_bytes),
            )
            for row in found.rows[:_ROWS]
        ]
        more = len(found.rows) - len(rows)
        title = f"what fits into {size(memory)}" + (f" (the first {_ROWS}; {more} more)" if more else "")
        yield Shown(title, ("method", "grid", "rank", "length", "batch", "memory", "file"), rows)
        yield "more bits first, then longer sequences, then your method, then those that fold;"
        yield "in a row the largest rank, then the largest batch; nothing above the recipe's"
    for line in found.left_out:
        yield f"left out: {_short(line, _WIDTH - 10)}"


def speed(found: Speed | str) -> str:
    """What a probe found, in a line."""
    if isinstance(found, str):
        return f"speed not tried: {found}"
    about = f"about {found.tokens_per_second:.0f} tokens a second ({found.how})"
    if found.seconds is None:
        return f"{about}; how many steps the epochs are, `trimtab data` counts"
    return f"{about}: all steps take {duration(found.seconds)}"


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 4]} ..."
