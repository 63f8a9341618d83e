"""What is left of a model after pruning, before any tuning: perplexity by ratio and by measure of importance.

Taylor, magnitude and random choose heads and MLP channels (uniform widths); block influence drops whole layers. The model
is SmolLM2-135M (its dequantized 4-bit file), calibrated on WikiText-2's training part and measured on its test part. A row
is written to benchmarks/results/pruning.json as soon as it is measured; what stands there is not run again.

    python benchmarks/pruning/pruning.py --data DIR && python benchmarks/report.py search

DIR holds train.part.txt and test.raw.txt.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.evaluation.perplexity import perplexity
from trimtab.models.load import load_float, open_source
from trimtab.pruning import Options, prune

RESULTS = Path(__file__).parents[1] / "results"
MODEL = "smollm2-135m"
RATIOS = (0.2, 0.3)
WAYS: dict[str, dict[str, Any]] = {
    "taylor": {"importance": "taylor"},
    "magnitude": {"importance": "magnitude"},
    "random": {"importance": "random"},
    "block influence": {"what": "layers"},
}
CALIBRATION_TOKENS, CALIBRATION_WINDOW = 8192, 256
TEST_TOKENS, WINDOW = 16384, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--multiple-of", type=int, default=64)
    parser.add_argument("--out", type=Path, default=RESULTS / "pruning.json")
    arguments = parser.parse_args()
    source = open_source(arguments.model)
    assert source is not None
    tokenizer = source.tokenizer()

    def blocks(file: str, tokens: int, window: int) -> torch.Tensor:
        rows = load_rows(str(arguments.data / file))
        return token_windows(rows, tokenizer, block_tokens=window, limit_tokens=tokens)

    test = blocks("test.raw.txt", TEST_TOKENS, WINDOW)
    calibration = blocks("train.part.txt", CALIBRATION_TOKENS, CALIBRATION_WINDOW)
    todo = [("none", 0.0), *((way, ratio) for ratio in RATIOS for way in WAYS)]
    rows = json.loads(arguments.out.read_text())["rows"] if arguments.out.exists() else []
    for way, ratio in todo:
        if any((r["way"], r["ratio"]) == (way, ratio) for r in rows):
            continue
        model = load_float(arguments.model, dtype=torch.bfloat16, source=source)
        row: dict[str, Any] = {"way": way, "ratio": ratio, "parameters": sum(p.numel() for p in model.parameters())}
        if ratio:
            started = time.process_time()
            options = Options(ratio=ratio, multiple_of=arguments.multiple_of, **WAYS[way])
            done = prune(model, options, calibration)
            row |= {
                "parameters": done.parameters,
                "groups": done.widths.groups,
                "channels": done.widths.channels,
                "layers": done.layers,
                "cpu_seconds": round(time.process_time() - started, 1),
            }
        rows.append(row | {"perplexity": perplexity(model, test)})
        about = {"model": arguments.model, "test": [TEST_TOKENS, WINDOW], "calibration": CALIBRATION_TOKENS}
        arguments.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
        print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
