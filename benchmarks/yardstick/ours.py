"""One of our rows of the yardstick, in a process of its own: read, started, tuned, folded, and written as float weights."""

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from safetensors.torch import load_file

import trimtab as tt
from benchmarks.quality.rates import train
from trimtab.layers.rates import default

STEPS, WINDOWS = 96, 2
"""Of tuning, and the windows in each."""
RANKS = {"lr-qat": 32, "lora": 32}


def start_of(name: str, job: dict[str, Any], tokens: torch.Tensor) -> Any:
    """What levels begin as: None for round-to-nearest, or what calibration tokens say; blocks are found once."""
    if name == "block":
        return tt.Blockwise(tokens=tokens, kept=Path(job["blocks"]))
    return tt.Gptq(tokens=tokens) if name else None


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    texts = load_file(job["texts"])
    name, _, start = job["method"].partition(" from ")
    if name in ("gptq", "block"):
        name, start = "rtn", name
    method = tt.methods.make(name, **({"rank": RANKS[name]} if name in RANKS else {}))
    grid = {"bits": job["bits"], "group": job["group"], "zero": "integer"}
    rules = None if job["bits"] is None else [{"match": "*", "grid": grid}]
    begin = start_of(start, job, texts["train"][: job["calibration"]])
    model, tokenizer = tt.load(job["base"], method, rules, dtype=torch.float32, start=begin)
    if any(p.requires_grad for p in model.parameters()):
        train(model, texts["train"], default(method.kind, STEPS, job["bits"]), STEPS, batch=WINDOWS)
        tt.fold(model)
    saved = Path(job["out"]).with_name("saved")
    tt.save(model, saved, tokenizer)
    tt.export(str(saved), "dense", Path(job["out"]))


if __name__ == "__main__":
    main()
