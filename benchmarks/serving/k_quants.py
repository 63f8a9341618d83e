"""Q4_K_M files from the wild, tuned on the very grids that they have, and written back: what llama.cpp makes of them.

    TRIMTAB_LLAMA_CPP_PYTHON=.venv-llama/bin/python python benchmarks/serving/k_quants.py FILE... [--methods lr-qat qa-hira]

A row for each file and method goes into results/k_quants.jsonl as it ends; rows that stand there are left alone. The
engine's noise is its difference from the untuned file.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from benchmarks.files import RESULTS, add, read, say
from benchmarks.serving.read_gguf import matrices
from trimtab.data.rows import load_rows
from trimtab.data.sequences import token_windows
from trimtab.evaluation import serving
from trimtab.layers.weights import AffineWeight
from trimtab.models.load import load, load_float
from trimtab.models.transformers_bridge import quant_layers
from trimtab.pipeline.stages import run
from trimtab.recipe import recipe

FILE = RESULTS / "k_quants.jsonl"
RULES = [{"match": "model.embed_tokens", "grid": "same"}, {"match": "*", "grid": "same"}]
LENGTH, ROWS = 128, 64


def tuned(path: Path, method: str, steps: int, tokens: int, out: Path) -> dict[str, Any]:
    """A run on a file's own grids, and what llama.cpp computes of what it wrote."""
    values: dict[str, Any] = {
        "model": {"path": str(path)},
        "method": method,
        "rules": RULES,
        "train": {"steps": steps},
        "evaluate": {"parity": False},
        "export": ["same"],
        "output": str(out),
    }
    if steps:
        values["data"] = {"path": "pydoc-topics", "block_tokens": LENGTH, "limit": ROWS}
        values["train"] |= {"batch_tokens": 2 * LENGTH, "micro_batch": 2}
    run(recipe.from_dict(values))
    model, tokenizer = load(str(out))
    written = out / "gguf" / "model.gguf"
    windows = token_windows(
        load_rows("pydoc-topics", split="test"), tokenizer, block_tokens=LENGTH, limit_tokens=tokens
    )
    expected, computed = (
        serving.model_logprobs(model, windows),
        serving.engine_logprobs(written.parent, "llama.cpp", windows),
    )
    served = serving.compare("llama.cpp", expected, computed, windows)
    kinds, _, differing = matrices(written)
    bases = {n: layer.base for n, layer in quant_layers(model).items()}
    del model
    start, reread = (load_float(str(p), dtype=torch.float32) for p in (path, written))
    moved = total = unlike = 0
    for name, base in bases.items():
        assert isinstance(base, AffineWeight), name
        folded = base.dequantize(torch.float32)
        unlike += not torch.equal(reread.get_submodule(name).weight, folded)  # type: ignore[arg-type]
        moved += int((start.get_submodule(name).weight != folded).sum())  # type: ignore[arg-type,union-attr]
        total += folded.numel()
    return {
        "steps": steps,
        "types": dict(kinds),
        "bytes": written.stat().st_size,
        "file_bytes": path.stat().st_size,
        "not_as_gguf_reads": len(differing),
        "not_as_folded": unlike,
        "weights_moved": moved / total,
        "top1_agreement": served.top1_agreement,
        "rms_logprob": served.rms_logprob,
        "perplexity": served.perplexity_trained,
        "perplexity_served": served.perplexity_served,
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--methods", nargs="+", default=["lr-qat", "qa-hira"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=1024)
    options = parser.parse_args()
    for path in options.files:
        for method in ("rtn", *options.methods):  # the untuned file first: the others are held against it
            key = {"model": path.stem, "method": method}
            if any(key.items() <= row.items() for row in read(FILE)):
                continue
            with tempfile.TemporaryDirectory() as temporary:
                steps = 0 if method == "rtn" else options.steps
                row = key | tuned(path.resolve(), method, steps, options.tokens, Path(temporary) / "run")
            add(FILE, row)
            say(str(row))


if __name__ == "__main__":
    main()
