"""Pictures of a search: the front among all trials, and the bits of every unit. The only file that imports matplotlib."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trimtab.bit_search.ledger import Trial

if TYPE_CHECKING:
    from trimtab.bit_search.searching import Search

_MB = 1e6


def _figure(width: float, height: float) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(figsize=(width, height), layout="constrained")


def draw_front(search: "Search", trials: Sequence[Trial], front: Sequence[Trial], file: Path) -> None:
    """All finished trials, the longer ones apart, uniform widths, the front, and the float model as the baseline."""
    figure, axes = _figure(7, 4.5)
    done = [t for t in trials if t.state == "complete"]
    uniform = [t for t in done if t.wish.kind == "uniform" and t.wish.steps == search.steps]
    rest = [t for t in done if t not in front and t not in uniform]
    short, longer = ([t for t in rest if (t.wish.steps == search.steps) == same] for same in (True, False))
    length = f", {search.steps} steps" if search.steps else ""
    axes.scatter(*_xy(short), s=14, c="0.7", label=f"trials{length}")
    if longer:
        axes.scatter(*_xy(longer), s=14, c="tab:blue", alpha=0.4, label=f"trials, {search.block.promote} steps")
    axes.scatter(*_xy(uniform), s=40, marker="s", c="tab:orange", label=f"uniform widths{length}", zorder=3)
    for t in uniform:
        x, y = _xy([t])
        label = search.space.label(t.wish.configuration[0])
        axes.annotate(
            f"{label} bits" if label.isdecimal() else label,
            (x[0], y[0]),
            xytext=(5, 5),
            textcoords="offset points",
            fontsize=8,
        )
    axes.plot(*_xy(front), "o-", ms=4, lw=1, c="tab:blue", label="front", zorder=4)
    if search.budget is not None:
        axes.axvline(search.budget / _MB, c="tab:red", lw=1, ls="--", label="budget")
    name = f"float model, untuned: {search.float_bytes / _MB:.3g} MB"
    loss = search.ledger.noted("float_quality")
    if loss is None:  # KL 0 by definition
        axes.plot([], [], ls="", label=name)
    else:
        axes.axhline(loss, c="tab:green", lw=1, ls=":", label=name)
    axes.margins(x=0.08)
    axes.set_xlabel("stored weights, MB")
    tuned = search.block.objective == "tuned"
    axes.set_ylabel("held-out loss, nats per token" if tuned else "KL to the float model, nats per token")
    axes.set_yscale("linear" if tuned else "log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    _save(figure, file)


def _xy(trials: Sequence[Trial]) -> tuple[list[float], list[float]]:
    return [(t.bytes or 0) / _MB for t in trials], [t.quality or 0.0 for t in trials]


def draw_bits(search: "Search", front: Sequence[Trial], file: Path) -> None:
    """Bits of every unit (columns) of every point of the front (rows, the smallest at the bottom)."""
    bits = np.array([[search.space.bits[c] for c in t.wish.configuration] for t in front])
    units = [re.sub(r"^\D*", "", u.name) for u in search.space.units]  # from the number of the layer on
    figure, axes = _figure(max(5, 0.16 * len(units) + 2), max(2.5, 0.22 * len(front) + 1.6))
    widths = sorted(set(search.space.bits))
    shades = np.searchsorted(widths, bits)
    image = axes.imshow(shades, aspect="auto", origin="lower", cmap="viridis", vmin=-0.5, vmax=len(widths) - 0.5)
    every = max(1, len(units) // 40)
    axes.set_xticks(range(0, len(units), every), units[::every], rotation=90, fontsize=7)
    axes.set_yticks(range(len(front)), [f"{(t.bytes or 0) / _MB:.3g} MB" for t in front], fontsize=7)
    bar = figure.colorbar(image, ax=axes, ticks=range(len(widths)))
    bar.ax.set_yticklabels([f"{w} bits" for w in widths])
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    from matplotlib import pyplot as plt

    figure.savefig(file, dpi=150)
    plt.close(figure)
