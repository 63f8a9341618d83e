"""The tables of docs/reliability.md, between its marks; `benchmarks/report.py` writes them."""

from collections.abc import Callable
from typing import Any

from benchmarks.files import DOCS
from benchmarks.reliability.faults import disturbed
from benchmarks.tables import between_marks, table

OUTCOMES = {
    "refused": "refused in one line",
    "same": "read, same numbers",
    "legal": "read, other numbers that are legal",
    "other": "read, other numbers",
    "exception": "another exception",
    "hang": "no end",
    "died": "process ended",
}
READ_BY = {
    "float": "a float folder, `chat`",
    "tied": "a float folder with a tied head, `load` (which rounds it)",
    "sharded": "a float folder in four files with an index, `chat`",
    "native": "a saved model without its manifest, `load`",
    "verify": "a saved model, `verify`",
    "export": "a saved model, `export`",
    "gptq": "a GPTQ folder, `load`",
    "compressed": "a folder of compressed-tensors, `load`",
    "gguf": "a GGUF file, `load`",
    "gguf-chat": "a GGUF file, `chat`",
    "adapter": "a PEFT adapter beside its base, `compare`",
    "data": "rows (JSON, JSON lines, CSV, Parquet, text) and chat templates, `data`",
    "eval": "held-out rows, `eval`",
    "plan": "a recipe, `plan`",
    "config": "a config.json, `plan`",
    "recipe": "a recipe, `data`",
}


def hostile(found: dict[str, Any]) -> list[str]:
    """Outcomes by what was changed and how it was read, of `make fuzz`."""
    rows, targets = [], found["targets"]
    for name in [*(n for n in READ_BY if n in targets), *(n for n in targets if n not in READ_BY)]:
        counts = targets[name]
        rows.append([READ_BY.get(name, name), str(sum(counts.values())), *(str(counts.get(o, 0)) for o in OUTCOMES)])
    whole = [sum(counts.get(o, 0) for counts in targets.values()) for o in OUTCOMES]
    rows.append(["**all**", str(found["cases"]), *map(str, whole)])
    lines = table(f"changed, and read by | cases | {' | '.join(OUTCOMES.values())}", rows)
    took = f"reading them took {found['seconds'] / 60:.0f} minutes of one core"
    lines += ["", f"{found['cases']:,} cases of seed {found['seed']}; {took}."]
    for one in found["bad"]:
        lines.append(
            f"* `--case {one['case']} --seed {found['seed']}`: {one['file']}, {one['change'][:80]}: {one['kind']}"
        )
    return lines


SECTIONS: dict[str, Callable[[Any], list[str]]] = {"fuzz": hostile, "faults": disturbed}


def page(read: dict[str, Any]) -> str:
    """docs/reliability.md, with its tables made again; one whose numbers are not there stays as it is."""
    return between_marks(DOCS / "reliability.md", SECTIONS, read)
