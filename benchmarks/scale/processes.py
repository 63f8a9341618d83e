"""One process against two on one CPU, a thread each: seconds of a step, and the peak memory of the first process.

A random Llama of 8 blocks, hidden 256, with 49,152 tokens, by LR-QAT in 4 bits; micro-batches of 2 x 256 tokens, four to an
optimizer step in all, so two processes have half of the work each. What is measured is what several processes cost: sums of
gradients and, with fsdp, gathering every block three times. Two processes on two cores are no measure of how fast eight
GPUs are. The rows of a round come one after another, and only rows of one round are compared.

    python benchmarks/scale/processes.py                writes benchmarks/results/processes.json, after each round
    python benchmarks/scale/processes.py --rounds 1 --steps 2 --out /tmp/processes.json
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "results" / "processes.json"
ROWS: dict[str, dict[str, Any]] = {
    "one": {},
    "two, ddp": {"processes": 2, "shard": "ddp"},
    "two, fsdp": {"processes": 2, "shard": "fsdp"},
}


def model_of(folder: Path) -> Path:
    """A random model with the tokenizer of the tests."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    import tiny

    config = LlamaConfig(
        vocab_size=49152, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
        tie_word_embeddings=True, bos_token_id=tiny.EOS, eos_token_id=tiny.EOS, pad_token_id=tiny.EOS,
    )  # fmt: skip
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def measured(folder: Path, name: str, train: dict[str, Any], steps: int) -> dict[str, Any]:
    """A row: one run."""
    import yaml

    recipe = {
        "model": {"path": str(folder / "model")},
        "method": {"name": "lr-qat", "rank": 8},
        "rules": [{"match": "*", "grid": {"bits": 4, "group": 64}}],
        "data": {"path": str(folder / "data.jsonl"), "block_tokens": 256},
        "train": {"steps": steps, "batch_tokens": 2048, "micro_batch": 2, "warmup": 0.0, **train},
        "evaluate": {"parity": False},
        "output": str(folder / name.replace(", ", "-")),
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trimtab", "run", str(file), "--overwrite"]
    subprocess.run(command, env=environment, check=True)
    found = json.loads((Path(recipe["output"]) / "metrics.json").read_text())
    return {
        "seconds_a_step": found["train_seconds"] / steps,
        "load_peak_bytes": found["load_peak_memory_bytes"],
        "peak_bytes": found["peak_memory_bytes"],
        "losses": found["losses"],
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
    import tiny

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model_of(folder / "model")
        tiny.text(folder / "data.jsonl", rows=2000)
        rounds: list[dict[str, Any]] = []
        for _ in range(options.rounds):
            rounds.append({row: measured(folder, row, train, options.steps) for row, train in ROWS.items()})
            options.out.write_text(json.dumps({"steps": options.steps, "rounds": rounds}, indent=1) + "\n")


if __name__ == "__main__":
    main()
