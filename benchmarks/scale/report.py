"""The tables of docs/scale.md, between its marks; `benchmarks/report.py` writes them."""

from collections.abc import Callable
from statistics import median
from typing import Any

from benchmarks.files import DOCS
from benchmarks.tables import between_marks, table

COLUMNS = {
    "codes": "codes", "float_parameters": "float", "trained": "trained, gradients, moments",
    "activations": "activations", "temporary": "gathered and temporary", "beside": "context",
}  # fmt: skip


def paper(found: dict[str, Any]) -> list[str]:
    """One of eight GPUs, in GB."""
    rows = []
    for row in found["rows"]:
        parts = row["parts"] | {"beside": row["beside"]}
        parts["trained"] = parts["adapters"] + parts["gradients"] + parts["optimizer"] - parts["apart"]
        cells = [f"{parts[name] / 1e9:.2f}" for name in COLUMNS]
        total = f"{(row['total'] + row['beside']) / 1e9:.1f}"
        rows.append([row["row"], *cells, total, f"{row['trainable'] / 1e6:.0f}"])
    return table(f"method | {' | '.join(COLUMNS.values())} | GB in all | trained, million", rows)


def processes(found: dict[str, Any]) -> list[str]:
    """Two processes over one: medians over rounds, of the quotients within a round."""
    rows = []
    for name in ("one", "two, ddp", "two, fsdp"):
        steps, quotients, loads, peaks = [], [], [], []
        for round_ in found["rounds"]:
            one, this = round_["one"], round_[name]
            steps.append(this["seconds_a_step"])
            quotients.append(this["seconds_a_step"] / one["seconds_a_step"])
            loads.append(this["load_peak_bytes"])
            peaks.append(this["peak_bytes"])
        spread = f"{median(quotients):.2f} ({min(quotients):.2f} to {max(quotients):.2f})"
        memory = [f"{median(bytes_) / 1e6:.0f}" for bytes_ in (loads, peaks)]
        rows.append([name, f"{median(steps):.2f}", "1" if name == "one" else spread, *memory])
    return table("processes | s a step | x one (least to most) | MB after loading | MB at the peak", rows)


def rows(measured: list[dict[str, Any]]) -> list[str]:
    """Memory by the size of a file of rows."""
    made = [
        [
            f"{row['megabytes']:g} MB",
            row["process"],
            f"{row['extra_bytes'] / 1e9:.3f}",
            f"{row['mapped_bytes'] / 1e9:.3f}",
            f"{row['seconds']:.0f}",
        ]
        for row in sorted(measured, key=lambda row: (row["megabytes"], row["process"]))
    ]
    slopes = []
    for process in ("first", "other"):
        own = sorted((r["megabytes"], r["extra_bytes"]) for r in measured if r["process"] == process)
        if len(own) > 1:
            slopes.append(f"{(own[-1][1] - own[0][1]) / (own[-1][0] - own[0][0]) / 1e6:.2f} bytes ({process})")
    grows = ["", f"Of every further byte of text, memory grows by {' and '.join(slopes)}."] if slopes else []
    return [*table("JSON lines | process | extra memory, GB | mapped, GB | seconds", made), *grows]


SECTIONS: dict[str, Callable[[Any], list[str]]] = {"rows": rows, "70b": paper, "processes": processes}


def page(read: dict[str, Any]) -> str:
    """docs/scale.md, with its tables made again; one whose numbers are not there stays as it is."""
    return between_marks(DOCS / "scale.md", SECTIONS, read)
