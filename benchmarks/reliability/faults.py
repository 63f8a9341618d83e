"""The table of docs/reliability.md about faults of the machine, from what `make faults` found, between its marks."""

from typing import Any

from benchmarks.tables import table

WHAT = {
    "train": "a run over an earlier one: checkpoints, best model, fold, save, export",
    "fold": "`--resume` of a run whose training was over",
    "save": "`tt.save` over an earlier save, in several files",
    "export": "exports to dense, GGUF and compressed-tensors",
    "search": "`trimtab search`: study, tables, points, figures",
    "prune": "`trimtab prune`",
    "teacher": "filling a teacher's cache",
}
FAULTS = ("killed", "full disk", "failing disk", "read-only disk")


def disturbed(found: dict[str, Any]) -> list[str]:
    """Of each command and fault: how many points held, of how many."""
    rows = []
    for operation, row in found.items():
        cells = [f"{row[f]['points'] - len(row[f]['problems'])} of {row[f]['points']}" for f in FAULTS]
        rows.append([operation, WHAT[operation], str(row["calls"]), *cells])
    return table(f"command | what it is | calls | {' | '.join(FAULTS)}", rows)
