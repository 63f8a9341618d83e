"""What `memory.plan` predicts for a training step against what the step takes: every method, two shapes of model.

    llama   tied embedding of 32,000 rows (stored in 8 bits, so that the head is made from it), MLP 2.75 x hidden, no biases
    qwen2   untied float head of 16,000 rows, biases on q, k and v, few KV heads, few but wide layers: MLP 5.4 x hidden
    small   for the tests, and only where asked for

Weights are random and of a fixed seed, the compute dtype is bfloat16. A row is a process of its own, forked from one that
has only imported the libraries. It trains one layer of the model first, so that what libraries make on first use is there
(oneDNN keeps 0.6 MB for every shape of a product), drops it, hands freed pages back and reads what is resident: that
much is not a part of a plan. Then it prepares the model, as a recipe would, and takes two optimizer steps, the
second of two micro-batches (gradients are there while its second one goes forward), of 2 x 256 tokens, with the chunked
loss and AdamW. Resident is anonymous memory, read every 5 ms; `ratio` is planned / measured.

What is measured is what lives: tensors above 64 kB go back to the system when they are freed. By default glibc keeps many
of them (`default_malloc_bytes`); with models of this size, whose tensors all lie below its 32 MB, that is the worst case.

A row is written as soon as it is measured, and replaces the one of its name.

    python benchmarks/memory/memory.py                                all rows, writes benchmarks/results/memory.json
    python benchmarks/memory/memory.py --rows qlora qat --models llama --out /tmp/memory.json
    python benchmarks/memory/memory.py --single --out /tmp/single.json      every optimizer step of one micro-batch
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import threading
import time
import warnings
from dataclasses import asdict
from itertools import product
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

OUT = Path(__file__).parents[1] / "results" / "memory.json"
BATCH, TOKENS = 2, 256
MICRO_BATCHES = (1, 2)
"""Of each optimizer step: in the last, gradients and the optimizer's state are there while a batch goes forward."""
SAMPLE_SECONDS = 0.005
PATIENCE_SECONDS = 600
_M_MMAP_THRESHOLD = -3
"""Of malloc.h: allocations from this size on are mapped, and unmapped when freed."""

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
    "small": {
        "model_type": "llama",
        "vocab_size": 8000,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    },
}

_NF4 = {"codebook": "nf4", "group": 64, "double_quant": True}
_REAL = {"bits": 4, "group": 32, "zero": "real"}
_INT3 = {"bits": 3, "group": 32, "zero": "integer"}
_CHANNEL = {"bits": 4, "group": None, "zero": "symmetric"}
_EMBEDDING = {"match": "model.embed_tokens", "grid": {"bits": 8, "group": 32}}
_HEAD = {"match": "lm_head", "grid": None}
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
    return methods.make(method, **options), [_EMBEDDING if tied else _HEAD, {"match": "*", "grid": grid}]


def planned(name: str, shape: dict[str, Any], checkpointing: bool, micro_batches: int = MICRO_BATCHES[-1]) -> Any:
    """What `memory.plan` says of a row."""
    import torch
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    from trimtab.memory.peak import peak_of_training
    from trimtab.recipe.rules import parse_rules

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(_config(shape))
    method, rules = _about(name, shape["tie_word_embeddings"])
    return peak_of_training(
        model.train(),
        method,
        parse_rules(rules),
        micro_batch=BATCH,
        block_tokens=TOKENS,
        dtype=torch.bfloat16,
        checkpointing=checkpointing,
        micro_batches=micro_batches,
    )


def train(
    name: str,
    shape: dict[str, Any],
    checkpointing: bool,
    micro_batches: tuple[int, ...] = MICRO_BATCHES,
    watch: bool = True,
) -> int:
    """Prepare a model and train it for two steps; returns the largest resident memory of the steps, if watched."""
    import torch
    from transformers import AutoModelForCausalLM

    import trimtab
    from trimtab.kernels.heap import trim
    from trimtab.memory.process import resident_bytes
    from trimtab.training.loss import summed_loss

    torch.manual_seed(0)
    config = _config(shape)
    method, rules = _about(name, shape["tie_word_embeddings"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).train()
    model = trimtab.prepare(model, method, rules)
    if checkpointing:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(config.vocab_size, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    gc.collect()
    trim()
    peak, done = [resident_bytes()], threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.append(resident_bytes())

    sampler = threading.Thread(target=sample)
    if watch:
        sampler.start()
    for count in micro_batches:
        for _ in range(count):
            (summed_loss(model, ids, input_ids=ids) / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad()
    done.set()
    if watch:
        sampler.join()
    return max(peak)


def measure(
    name: str, model: str, checkpointing: bool, give_back: bool, micro_batches: tuple[int, ...]
) -> tuple[Any, int, int]:
    """What is planned, measured and held by libraries; call it in a process of its own."""
    import torch

    from trimtab.kernels import workspace
    from trimtab.kernels.heap import trim
    from trimtab.memory.process import resident_bytes

    torch.set_num_threads(1)
    if give_back:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 1 << 16)
    shape = MODELS[model]
    predicted = planned(name, shape, checkpointing, micro_batches[-1])
    train(name, {**shape, "num_hidden_layers": 1}, checkpointing, micro_batches, watch=False)
    workspace.clear()
    gc.collect()
    trim()
    before = resident_bytes()
    return predicted, train(name, shape, checkpointing, micro_batches) - before, before


def _work(pipe: Connection, *arguments: Any) -> None:
    pipe.send(measure(*arguments))


# ---- the run ------------------------------------------------------------------------------------------------------


def _apart(*arguments: Any) -> tuple[Any, int, int]:
    """`measure` in a process forked from one that has only imported the libraries."""
    context = multiprocessing.get_context("forkserver")
    models = [f"transformers.models.{name}.modeling_{name}" for name in ("llama", "qwen2")]
    context.set_forkserver_preload(["torch._dynamo", "accelerate", "trimtab", "trimtab.training.loss", *models])
    pipe, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    if not pipe.poll(PATIENCE_SECONDS):
        raise RuntimeError(f"{arguments}: no answer in {PATIENCE_SECONDS} s")
    try:
        found: tuple[Any, int, int] = pipe.recv()
    except EOFError:
        raise RuntimeError(f"{arguments}: its process died; what it said is above") from None
    process.join(30)
    return found


def row(
    name: str, model: str, checkpointing: bool, default_malloc: bool, micro_batches: tuple[int, ...]
) -> dict[str, Any]:
    """One line of the table."""
    predicted, measured, libraries = _apart(name, model, checkpointing, True, micro_batches)
    found = {
        "name": name,
        "model": model,
        "checkpointing": checkpointing,
        "planned_bytes": predicted.total,
        "measured_bytes": measured,
        "ratio": predicted.total / measured,
        "default_malloc_bytes": _apart(name, model, checkpointing, False, micro_batches)[1] if default_malloc else None,
        "libraries_bytes": libraries,
        "parts": {k: v for k, v in asdict(predicted).items() if k != "trainable"},
    }
    print(_line(found), flush=True)
    return found


def _line(row: dict[str, Any]) -> str:
    kept = row["default_malloc_bytes"]
    line = f"{row['name']:16}{row['model']:8}{'recomputed' if row['checkpointing'] else '':12}"
    line += f"{row['planned_bytes'] / 1e6:9.1f}{row['measured_bytes'] / 1e6:10.1f}{row['ratio']:8.3f}"
    return line + (f"{'-':>10}" if kept is None else f"{kept / 1e6:10.1f}")


def _key(row: dict[str, Any]) -> tuple[int, int, bool]:
    return list(MODELS).index(row["model"]), list(ROWS).index(row["name"]), row["checkpointing"]


def main() -> None:
    """Parse arguments, measure, write and print."""
    parser = argparse.ArgumentParser(description="Planned against measured memory of training.")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS)[:2])
    parser.add_argument(
        "--single", action="store_true", help="one micro-batch in every step; needs an --out of its own"
    )
    parser.add_argument("--once", action="store_true", help="leave the default heap out")
    parser.add_argument("--pause", type=float, default=0.0, help="seconds between two rows (default 0)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"JSON file (default {OUT})")
    args = parser.parse_args()
    if args.single and args.out == OUT:
        parser.error("--single: name an --out of its own")
    micro_batches = (1, 1) if args.single else MICRO_BATCHES
    print(f"{'':36}{'planned':>9}{'measured':>10}{'ratio':>8}{'default':>10}\n{'MB':>45}{'MB':>10}{'heap':>18}")
    about = {"batch": [BATCH, TOKENS], "micro_batches": micro_batches, "models": MODELS}
    rows = {_key(r): r for r in json.loads(args.out.read_text())["rows"]} if args.out.exists() else {}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for model, name, checkpointing in product(args.models, args.rows, (False, True)):
        found = row(name, model, checkpointing, not args.once, micro_batches)
        rows[_key(found)] = found
        args.out.write_text(json.dumps({**about, "rows": [rows[k] for k in sorted(rows)]}, indent=1) + "\n")
        time.sleep(args.pause)


if __name__ == "__main__":
    main()
