"""Tokens per second of generation, one sequence at a time, of a folded model against the dense bfloat16 one.

A Llama of 1.1 billion parameters with random weights (hidden 2048, MLP 8192, 16 layers, 32 heads of 64, 8 KV heads,
vocabulary 32,000, tied head) generates greedily from a short prompt. Every row has the same shapes; linear layers differ,
and the head is 8 bits wherever they are quantized. The rows take turns, and `ratio` is the median over rounds of tokens per
second over those of the dense model in the same round.

    python benchmarks/speed/generate.py [--tokens 24] [--rounds 3]     writes benchmarks/results/generate.json
"""

import argparse
import copy
import json
import statistics
import sys
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import trimtab

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.step import environment

OUT = Path(__file__).parents[1] / "results" / "generate.json"
CONFIG = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "tie_word_embeddings": True,
}
GRIDS: dict[str, dict[str, Any] | None] = {
    "dense bfloat16": None,
    "int4 g64 integer zero": {"bits": 4, "group": 64, "zero": "integer"},
    "int4 channel symmetric": {"bits": 4, "group": None, "zero": "symmetric"},
    "int3 g64 integer zero": {"bits": 3, "group": 64, "zero": "integer"},
    "NF4 g64": {"codebook": "nf4", "group": 64},
}


def models() -> dict[str, LlamaForCausalLM]:
    """The dense model and its roundings."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**CONFIG)).to(torch.bfloat16).eval()
    made = {}
    for name, grid in GRIDS.items():
        made[name] = copy.deepcopy(dense)
        if grid is not None:
            rules = [
                {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 64}},
                {"match": "*", "grid": grid},
            ]
            trimtab.prepare(made[name], trimtab.methods.make("rtn"), rules)
    return made


@torch.no_grad()
def tokens_per_second(model: LlamaForCausalLM, tokens: int) -> float:
    """Of the one-token steps alone: the prompt is read before the clock starts."""
    ids = torch.arange(1, 9).unsqueeze(0)
    out = model(input_ids=ids, use_cache=True)
    start = perf_counter()
    for _ in range(tokens):
        ids = out.logits[:, -1:].argmax(-1)
        out = model(input_ids=ids, past_key_values=out.past_key_values, use_cache=True)
    return tokens / (perf_counter() - start)


def main() -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    made = models()
    speed: dict[str, list[float]] = {name: [] for name in made}
    for i in range(args.rounds + 1):
        for name, model in made.items():
            found = tokens_per_second(model, args.tokens if i else 2)
            if i:
                speed[name].append(found)
    dense = speed["dense bfloat16"]
    rows = []
    for name, found in speed.items():
        ratio = statistics.median(a / b for a, b in zip(found, dense, strict=True))
        rows.append({"name": name, "tokens_per_second": statistics.median(found), "ratio": ratio})
        print(f"{name:28}{rows[-1]['tokens_per_second']:8.2f} tokens/s   x {ratio:.2f}")
    about = environment(args.rounds, 1, args.threads) | {"model": CONFIG, "batch": [1, 1]}
    OUT.write_text(json.dumps({"environment": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
