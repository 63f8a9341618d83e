"""What tuning repairs of a rounding: loss after a short tuning, with one part of every layer at another width.

SmolLM2-135M pruned by 30 %, as in `tuned.py`, LR-QAT at 4 bits but for q/k/v, o, gate/up or down of all layers,
which are at 3 or at 5. Beside the change of the loss on held-out text after the steps stands what sensitivities (Fisher)
say of the divergence before tuning. If what is left of a divergence D(b) after tuning is proportional to D(b) * step(b)^p,
the ratio of the two is the same for every row at the right p; the report says what one ratio misses.

Every finished row is kept in benchmarks/results/search_repair.json: the command can be stopped and repeated.

    python benchmarks/search/repair.py --data DIR             DIR as for tuned.py (about 15 minutes of one core)
    python benchmarks/report.py search                        docs/search.md
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS, say
from benchmarks.search import tuned
from benchmarks.search.tuned_process import PARTS

BITS, OTHERS, STEPS, TOKENS, SENSITIVITY_TOKENS = 4, (3, 5), 4, 8192, 16384
POWERS = (0.0, 0.5, 1.0, 1.5, 2.0)
FILE = RESULTS / "search_repair.json"


def prepared(data: Path, work: Path) -> Any:
    """A search over 3, 4 and 5 bits in each part of each layer; only its parts are used."""
    from trimtab.bit_search.searching import Search
    from trimtab.recipe.recipe import from_dict

    study = tuned.Study(tuned.SCALES, RESULTS, data, work, math.inf)
    cell = next(c for c in tuned.CELLS if c.name == f"wikitext-{max(tuned.RATIOS)}-uniform-{BITS}")
    rate = 1e-2, 1e-3
    values = study.recipe(cell, rate, 0, choosing=True, steps=study.scales[cell.task].steps)
    values |= {"rules": tuned.rules(cell.row, study.scales[cell.task].group), "output": str(work / "repair")}
    values |= {"evaluate": {"parity": False}, "method": values["method"] | {"rank": 32, "alpha": 32.0}}
    values["search"] = {
        "units": "fusion", "bits": (OTHERS[0], BITS, OTHERS[1]), "objective": "tuned", "steps": STEPS, "tokens": TOKENS,
        "sensitivity_tokens": SENSITIVITY_TOKENS,
    }  # fmt: skip
    return Search(from_dict(values))


def measure(data: Path, work: Path) -> None:
    """Fill the file."""
    found = json.loads(FILE.read_text()) if FILE.exists() else {"rows": []}
    search = prepared(data, work)
    if "divergence" not in found:
        found["divergence"] = divergence(search)
    trial = search.bench.objective()
    for part, bits in [("", BITS), *((part, bits) for part in PARTS for bits in OTHERS)]:
        if any((row["part"], row["bits"]) == (part, bits) for row in found["rows"]):
            continue
        chosen = [search.space.bits.index(bits if of == part else BITS) for of in parts(search)]
        row = {"part": part, "bits": bits, "bytes": search.space.bytes(tuple(chosen))}
        row["loss"] = trial(search.space.rules(tuple(chosen)), STEPS)
        found["rows"].append(row)
        FILE.write_text(json.dumps(found, indent=1) + "\n")
        say(f"{part or 'all'} at {bits} bits: {row['loss']:.4f}")


def parts(search: Any) -> list[str]:
    """The part that each unit is."""
    return [next(p for p, names in PARTS.items() if unit.layers[0].endswith(names[0])) for unit in search.space.units]


def divergence(search: Any) -> dict[str, dict[int, float]]:
    """What sensitivities say of a part at a width, summed over layers."""
    from trimtab.bit_search import sensitivity
    from trimtab.models.load import load_float

    model = load_float(search.recipe.model.path, dtype=search.recipe.dtype)
    blocks = search.bench.windows(search.bench.rows, SENSITIVITY_TOKENS)
    cost_UC = sensitivity.fisher(model, search.space.units, search.space.placements, blocks).cost_UC
    of = parts(search)
    return {
        part: {
            bits: float(sum(cost_UC[u, c] for u, p in enumerate(of) if p == part))
            for c, bits in enumerate(search.space.bits)
        }
        for part in PARTS
    }


def report() -> list[str]:
    """The section of docs/search.md."""
    if not FILE.exists():
        return []
    found = json.loads(FILE.read_text())
    base = next((r["loss"] for r in found["rows"] if not r["part"]), None)
    rows = [r for r in found["rows"] if r["part"]]
    if base is None or not rows:
        return []

    def change(row: dict[str, Any], power: float) -> float:
        of = found["divergence"][row["part"]]
        return float(of[str(row["bits"])] * 2 ** (power * (BITS - row["bits"])) - of[str(BITS)])

    def moved(row: dict[str, Any]) -> float:
        return float(row["loss"] - base)

    def misfit(power: float) -> float:
        """What one factor for all rows leaves of the changes, as a share of their root mean square."""
        pairs = [(moved(r), change(r, power)) for r in rows]
        factor = sum(y * x for y, x in pairs) / sum(x * x for _, x in pairs)
        return math.sqrt(sum((y - factor * x) ** 2 for y, x in pairs) / sum(y * y for y, _ in pairs))

    return [
        "",
        "## What tuning repairs",
        "",
        f"SmolLM2-135M pruned by 30 %, LR-QAT at {BITS} bits, one part of every layer at another width: how the held-out",
        f"loss ({TOKENS:,} tokens) changes after {STEPS} steps, what sensitivities say of the divergence before, and the",
        "ratio of the two, also if divergence is multiplied with the width's step first.",
        "`python benchmarks/search/repair.py --data DIR`.",
        "",
        "| part | bits | loss | divergence | ratio | ratio with the step |",
        "|---|---|---|---|---|---|",
        *(
            f"| {r['part']} | {r['bits']} | {moved(r):+.3f} | {change(r, 0):+.3f} | {moved(r) / change(r, 0):.2f} |"
            f" {moved(r) / change(r, 1):.2f} |"
            for r in rows
        ),
        "",
        "What one ratio for all rows misses, of the root mean square of the changes, by the power of the step: "
        + ", ".join(f"{p:g}: {misfit(p):.0%}" for p in POWERS)
        + ".",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wikitext2/ and sentence_polarity/")
    parser.add_argument("--work", type=Path, default=Path("runs/search_tuned"))
    arguments = parser.parse_args()
    measure(arguments.data, arguments.work)


if __name__ == "__main__":
    main()
