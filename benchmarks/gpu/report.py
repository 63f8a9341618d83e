"""The section of docs/performance.md on GPUs; `benchmarks/report.py` writes it.

Numbers are those of `benchmarks/gpu/run.sh --out benchmarks/results/gpu`. Until a machine with a GPU has run it, the
section says that none has.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.tables import table

NOTHING = [
    "## On a GPU",
    "",
    "No GPU has run this yet, so every speed on one is unmeasured. What tests show without one: the Triton kernels agree",
    "with their references in Triton's interpreter; compiled for sm_80, sm_90 and gfx942 they spill no registers, levels",
    "and products of several rows have matrix instructions, and every layer of 4096 x 4096 is made by 256 programs or more",
    "(`tests/kernels/test_triton_compiled.py`); a micro-step waits for the device once,",
    "and a step once (`tests/training/test_syncs.py`).",
    "",
    "`benchmarks/gpu/run.sh` measures it where there is one, cut off after eight minutes, and `make test-gpu` tests it.",
]


def gpu(folder: Path) -> list[str]:
    """Correctness, kernels, steps and generation, as far as they were measured.

    Args:
        folder: JSON files by the names of their sections; it need not be there.
    """
    found = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    measured = {name: f for name, f in found.items() if name != "summary" and not f["tiny"]}
    if not measured:
        return NOTHING
    where = next(iter(measured.values()))["environment"]
    lines = [
        "## On a GPU",
        "",
        f"{where.get('gpu', where['device'])}, torch {where['torch']}. `benchmarks/gpu/run.sh`.",
    ]
    for name, section in measured.items():
        lines += ["", f"### {name}", "", *_rows(section["rows"])]
    return lines


def _rows(rows: dict[str, dict[str, Any]]) -> list[str]:
    """Every number that a row holds; what is not a number stays in the file."""
    columns = list(
        dict.fromkeys(k for row in rows.values() for k, v in row.items() if isinstance(v, int | float | str))
    )
    cells = [[name, *(_cell(row.get(column)) for column in columns)] for name, row in rows.items()]
    return table("|".join(["row", *(column.replace("_", " ") for column in columns)]), cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value[:60].replace("|", "/").replace("\n", " ") if isinstance(value, str) else f"{value:,.4g}"


__all__ = ["gpu"]
