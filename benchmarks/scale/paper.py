"""70 billion parameters on eight GPUs of 24 GB: what `trimtab plan` says of one of them. Nothing is measured.

The model is a config alone, of Llama-3.1-70B's shapes, in a folder of its own; each row is `trimtab.plan` of a recipe with
`train.processes: 8` and `train.shard: fsdp`, micro-batches of one sequence. The plan is of any machine: no
processor's own buffers are in it (TRIMTAB_TUNE=0), and of a GPU's memory the share that its context and libraries take.

    python benchmarks/scale/paper.py                writes benchmarks/results/70b.json
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

import trimtab

OUT = Path(__file__).parents[1] / "results" / "70b.json"
PROCESSES, TOKENS = 8, 1024
PARTS = (
    "codes", "float_parameters", "adapters", "gradients", "optimizer", "activations", "temporary", "before", "apart",
)  # fmt: skip
INT4 = {"bits": 4, "zero": "symmetric"}
NF4 = {"codebook": "nf4", "group": 64, "double_quant": True}
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lr-qat, group 128": ({"name": "lr-qat", "rank": 32}, {**INT4, "group": 128}),
    "lr-qat, channel": ({"name": "lr-qat", "rank": 32}, {**INT4, "group": None}),
    "lr-qat, channel, `storage: int`": ({"name": "lr-qat", "rank": 32, "storage": "int"}, {**INT4, "group": None}),
    "qlora": ({"name": "qlora", "rank": 32}, NF4),
    "q-bara": ({"name": "q-bara", "rank": 32}, NF4),
}


def config() -> LlamaConfig:
    """Llama-3.1-70B's."""
    return LlamaConfig(
        vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=131072, tie_word_embeddings=False, dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def planned(folder: Path, method: dict[str, Any], grid: dict[str, Any]) -> dict[str, Any]:
    """The plan of one of the processes, in bytes."""
    recipe = {
        "model": {"path": str(folder), "device": "cuda"},
        "method": method,
        "rules": [{"match": "*", "grid": grid}],
        "data": {"path": "pydoc-topics", "block_tokens": TOKENS},
        "train": {
            "processes": PROCESSES, "shard": "fsdp", "micro_batch": 1, "batch_tokens": 4 * PROCESSES * TOKENS,
        },
    }  # fmt: skip
    plan = trimtab.plan(recipe)
    native = plan.sizes["native"]
    parts = {name: getattr(plan, name) for name in PARTS}
    return {"parts": parts, "beside": plan.beside, "total": plan.total, "trainable": plan.trainable, "native": native}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    os.environ["TRIMTAB_TUNE"] = "0"
    rows = []
    with tempfile.TemporaryDirectory() as name:
        config().save_pretrained(name)
        for label, asked in ROWS.items():
            rows.append({"row": label, **planned(Path(name), *asked)})
            print(f"{label}: {(rows[-1]['total'] + rows[-1]['beside']) / 1e9:.1f} GB", flush=True)
    found = {"processes": PROCESSES, "tokens": TOKENS, "rows": rows}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
