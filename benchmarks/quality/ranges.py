"""What rounding does to a model's matrices, by grid: how far each weight moves, and how much larger a matrix becomes.

    error = |W' - W| / |W|          size = <W', W> / <W, W> - 1          over all linear layers but the head

An error that follows the weight (size) does more harm than one of the same length that does not. The model is the demo's,
whose weights lie on 4-bit levels with real zeros in blocks of 32. Writes benchmarks/results/ranges.json.

    python benchmarks/quality/ranges.py
"""

import json
from pathlib import Path

import torch

from trimtab.layers.weights import AffineWeight
from trimtab.models.load import load_float
from trimtab.quant.grid import Grid

OUT = Path(__file__).parents[1] / "results" / "ranges.json"
MODEL = "smollm2-135m"
GRIDS = [Grid(3, group, zero) for group in (32, 64) for zero in ("symmetric", "integer", "real")]  # type: ignore[arg-type]


def main() -> None:
    model = load_float(MODEL, dtype=torch.float32)
    weights = [p.data for n, p in model.named_parameters() if n.endswith("_proj.weight")]
    rows = []
    for grid in GRIDS:
        error = along = whole = 0.0
        for w in weights:
            moved = AffineWeight.quantize(w, grid).dequantize(torch.float32) - w
            error += moved.square().sum().item()
            along += (moved * w).sum().item()
            whole += w.square().sum().item()
        rows.append(
            {"grid": grid.describe(), "error": round((error / whole) ** 0.5, 4), "size": round(along / whole, 4)}
        )
        print(rows[-1], flush=True)
    OUT.write_text(json.dumps({"model": MODEL, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
