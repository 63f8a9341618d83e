"""What `memory.plan` predicts for a training step against what the step takes: every method, two shapes of model.

    llama   tied embedding of 32,000 rows (stored in 8 bits, so that the head is made from it), MLP 2.75 x hidden, no biases
    qwen2   untied float head of 16,000 rows, biases on q, k and v, few KV heads, few but wide layers: MLP 5.4 x hidden

Weights are random and of a fixed seed, the compute dtype is bfloat16. A row is a process of its own, forked from one that
has only imported the libraries. It trains a model of a few thousand weights first, so that what libraries make on first
use is there, drops it, hands freed pages back and reads what is resident: that much is no part of a plan. Then it
prepares the model, as a recipe would, and takes two optimizer steps of two micro-batches each (gradients are there while
the second one goes forward) of 2 x 256 tokens, with the chunked loss and AdamW. Resident is anonymous memory, read every
5 ms; `ratio` is planned / measured.

    python benchmarks/memory.py                                all rows, writes benchmarks/results/memory.json
    python benchmarks/memory.py --rows qlora qat --models llama --out /tmp/memory.json
"""

import argparse
import gc
import json
import multiprocessing
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "results" / "memory.json"
BATCH, TOKENS, STEPS, MICRO_BATCHES = 2, 256, 2, 2
SAMPLE_SECONDS = 0.005
PATIENCE_SECONDS = 600

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen2": {
        "model_type": "qwen2",
        "vocab_size": 16000,
        "hidden_size": 640,
        "intermediate_size": 3456,
        "num_hidden_layers": 4,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    },
}
TINY = {"vocab_size": 64, "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}

_NF4 = {"codebook": "nf4", "group": 64, "double_quant": True}
_REAL = {"bits": 4, "group": 32, "zero": "real"}
_INT3 = {"bits": 3, "group": 32, "zero": "integer"}
_CHANNEL = {"bits": 4, "group": None, "zero": "symmetric"}
_EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
# name -> method, grid of every linear layer, options
ROWS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "lora": ("lora", "float", {"rank": 16}),
    "qlora": ("qlora", _NF4, {"rank": 16}),
    "qa-lora": ("qa-lora", _REAL, {"rank": 16}),
    "q-bara": ("q-bara", _NF4, {"rank": 16}),
    "qa-hira": ("qa-hira", _REAL, {}),
    "qa-blora": ("qa-blora", _REAL, {"rank": 16}),
    "peqa": ("peqa", _REAL, {}),
    "lr-qat": ("lr-qat", _INT3, {"rank": 32}),
    "lr-qat-channel": ("lr-qat", _CHANNEL, {"rank": 32}),
    "lr-qat-float": ("lr-qat", _INT3, {"rank": 32, "storage": "bf16"}),
    "qat": ("qat", _INT3, {}),
}


# ---- a row's process ----------------------------------------------------------------------------------------------


def _config(shape: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    options = dict(shape)
    return AutoConfig.for_model(options.pop("model_type"), **options, attn_implementation="sdpa", use_cache=False)


def _about(name: str, tied: bool) -> tuple[Any, list[dict[str, Any]]]:
    """The method, and the rules as a recipe has them."""
    from trimtab import methods

    method, grid, options = ROWS[name]
    return methods.make(method, **options), [*([_EMBEDDING] if tied else []), {"match": "*", "grid": grid}]


def planned(name: str, shape: dict[str, Any], checkpointing: bool) -> Any:
    """What `memory.plan` says of a row."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from trimtab import memory
    from trimtab.rules import parse_rules

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(_config(shape))
    method, rules = _about(name, shape["tie_word_embeddings"])
    return memory.plan(
        model.train(),
        method,
        parse_rules(rules),
        micro_batch=BATCH,
        block_tokens=TOKENS,
        dtype=torch.bfloat16,
        checkpointing=checkpointing,
    )


def train(name: str, shape: dict[str, Any], checkpointing: bool, watch: bool = True) -> int:
    """Prepare a model and train it for two steps; returns the largest resident memory of the steps, if watched."""
    import torch
    from transformers import AutoModelForCausalLM

    import trimtab
    from trimtab import memory
    from trimtab.loss import summed_loss

    torch.manual_seed(0)
    config = _config(shape)
    method, rules = _about(name, shape["tie_word_embeddings"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model = trimtab.prepare(model, method, rules)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    gc.collect()
    memory.trim()
    peak, done = [memory.resident_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.append(memory.resident_bytes())

    sampler = threading.Thread(target=sample)
    if watch:
        sampler.start()
    for _ in range(STEPS):
        for _ in range(MICRO_BATCHES):
            (summed_loss(model, ids, input_ids=ids) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    done.set()
    if watch:
        sampler.join()
    return max(peak)


def measure(name: str, model: str, checkpointing: bool) -> dict[str, Any]:
    """A row; call it in a process of its own."""
    import torch

    from trimtab import memory
    from trimtab.kernels import workspace

    torch.set_num_threads(1)
    shape = MODELS[model]
    predicted = planned(name, shape, checkpointing)
    train(name, {**shape, **TINY, "num_key_value_heads": 1}, checkpointing, watch=False)
    workspace.clear()
    gc.collect()
    memory.trim()
    before = memory.resident_bytes()
    measured = train(name, shape, checkpointing) - before
    return {
        "name": name,
        "model": model,
        "checkpointing": checkpointing,
        "planned_bytes": predicted.total,
        "measured_bytes": measured,
        "ratio": predicted.total / measured,
        "libraries_bytes": before,
        "parts": {k: v for k, v in vars(predicted).items() if k != "trainable"},
    }


def _work(pipe: Connection, *row: Any) -> None:
    pipe.send(measure(*row))


# ---- the run ------------------------------------------------------------------------------------------------------


def measure_all(rows: list[tuple[str, str, bool]]) -> list[dict[str, Any]]:
    """Every row in turn, each in a process forked from one that has the libraries."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "accelerate", "trimtab", "trimtab.loss"])
    found = []
    for row in rows:
        pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, *row), daemon=True)
        process.start()
        theirs.close()
        if not pipe.poll(PATIENCE_SECONDS):
            raise RuntimeError(f"{row}: no answer in {PATIENCE_SECONDS} s")
        try:
            found.append(pipe.recv())
        except EOFError:
            raise RuntimeError(f"{row}: its process died; what it said is above") from None
        process.join(30)
        print(_line(found[-1]), flush=True)
    return found


def _line(row: dict[str, Any]) -> str:
    recomputed = "recomputed" if row["checkpointing"] else ""
    planned_mb, measured_mb = row["planned_bytes"] / 1e6, row["measured_bytes"] / 1e6
    return f"{row['name']:16}{row['model']:8}{recomputed:12}{planned_mb:9.1f}{measured_mb:9.1f}{row['ratio']:8.3f}"


def main() -> None:
    """Parse arguments, measure, write and print."""
    parser = argparse.ArgumentParser(description="Planned against measured memory of training.")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="MODEL")
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file (default {OUT})")
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(f"{'':36}{'planned':>9}{'measured':>9}{'ratio':>8}\n{'':36}{'MB':>9}{'MB':>9}")
    rows = measure_all([(n, m, c) for m in args.models for n in args.rows for c in (False, True)])
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"batch": [BATCH, TOKENS], "models": MODELS, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
