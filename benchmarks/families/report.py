"""docs/models.md from results/families.jsonl; `benchmarks/report.py` writes it."""

import re
from typing import Any

from benchmarks.files import RESULTS, read

FILE = RESULTS / "families.jsonl"
_STAGES = ("prepare", "train", "fold", "reload")
_EXPORTS = (
    *("dense", "dense in transformers", "compressed-tensors", "compressed-tensors in transformers"),
    *("gptq", "awq", "gguf", "gguf in llama.cpp", "mlx"),
)


def page() -> list[str]:
    """Everything below the title."""
    rows = read(FILE)
    if not rows:
        return ["Not measured yet; `python benchmarks/families/every.py` does that, family by family."]
    whole = [r for r in rows if all(r.get(stage) == "yes" for stage in _STAGES)]
    faults = [r["family"] for r in rows if any(str(v).startswith("FAULT") for v in r.values())]
    refused = [r for r in rows if str(r.get("prepare", "")).startswith("no")]
    named = f" ({', '.join(faults)})" if faults else ""
    lines = [
        "## Every causal family of the installed transformers",
        "",
        "For each family, a tiny random model was prepared for LR-QAT at 4 bits, trained for two steps, folded, saved,",
        "read back and exported. *fold* is yes where the folded model has the trained one's logits bit for bit, and",
        "training moved codes; *reload* is yes where the saved model has them, too. A number in brackets stands for a",
        "reason in the list below the table, and an empty cell was not tried. `python benchmarks/families/every.py` made",
        "the table; `docs/families.md` shows for each family whether its float model is loaded bit for bit.",
        "",
        f"{len(whole)} of {len(rows)} families pass every stage from *prepare* to *reload*; {len(refused)} are refused "
        f"before anything is read; in {len(faults)} a stage fails without a message of ours{named}.",
        "",
        "| family | low-bit layers | stays in float | " + " | ".join((*_STAGES, *_EXPORTS)) + " |",
        "|---" * (3 + len(_STAGES) + len(_EXPORTS)) + "|",
    ]
    reasons: dict[str, int] = {}

    def cell(row: dict[str, Any], stage: str) -> str:
        said = row.get(stage)
        if said is None or said == "yes":
            return said or ""
        return f"({reasons.setdefault(_general(said, row['family']), len(reasons) + 1)})"

    for row in rows:
        stays = ", ".join(text for text in row.get("float", ()) if "no rule gives it a grid" not in text)
        cells = [cell(row, stage) for stage in (*_STAGES, *_EXPORTS)]
        lines.append(f"| {row['family']} | {row.get('layers', '')} | {stays} | {' | '.join(cells)} |")
    return [*lines, "", *(f"{number}. {reason}" for reason, number in reasons.items())]


def _general(said: str, family: str) -> str:
    """A reason without the family's own name and numbers of layers, so that families share it."""
    text = said.removeprefix("no: ").removeprefix("export: ").replace("|", "/")
    text = re.sub(rf"'{re.escape(family)}[\w-]*'|\b{re.escape(family)} models", "FAMILY models", text)
    return re.sub(r"\b\d+ layers", "layers", text)
