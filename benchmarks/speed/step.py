"""How long one training step takes and how much memory it needs, against peft and bitsandbytes, all in one run.

Every row fine-tunes the same model: a Llama of 135M parameters (30 layers, hidden 576, MLP 1536, 9 heads of 64, 3 of them
KV heads, vocabulary 49,152, tied) with random weights of a fixed seed, in bfloat16, on one fixed batch of 4 x 256 tokens,
no activation checkpointing, fused AdamW on the adapters. Each library's rows use the loss that it trains with: trimtab's
in chunks, which never holds all logits, transformers' own for peft. The embedding and the tied head are the same dense
bfloat16 matrix everywhere, so rows differ by that, by their linear layers, and by nothing else.

A machine that others use too gives times that drift by more than the differences in question (`others_cpus` says how many
CPUs they kept busy during a median step). So times are *paired*:

    workers        A  B  C        one process a row, started once, each with its model and optimizer, asleep on a pipe
    round 1        A, B, C        the parent wakes one, it runs one step, says how long that took and sleeps again
    round 2        B, C, A        every round starts one row later, so that no row always follows the same neighbour
    ...
    ratio of B     median over rounds of (B's seconds / A's seconds in the same round)

Only one process computes at any moment. The reference A is `lora-peft` (or the first row, if that was not asked for).

Memory is the kernel's high-water mark of a worker's resident set, reset just before its first step. It holds the
interpreter and libraries too; what those take is in `libraries_bytes`, and what is resident before the first step in
`loaded_bytes`.

    peft rows       adapters in bfloat16 (`autocast_adapter_dtype=False`), the fastest that peft does here: its default
                    keeps them, and their activations, in float32 (row `lora-peft-float32`)
    torchao rows    want torchao, which is not a part of the development environment, since transformers imports it
                    wherever it finds it: pip install --no-deps --target DIR torchao==0.18.0, then PYTHONPATH=DIR
    ROW+compiled    (--compiled adds one to each row) every decoder layer through torch.compile, peft's by
                    `layer.compile()`, ours as `train.compile` does it; `first_step_seconds` holds what compiling took
    products        no model: only the matrix products that any method needs (x W^T and dy W of every linear layer and the
                    head), one after another; `products-trained` adds dy^T x of the linear layers

    python benchmarks/speed/step.py                       all rows, 9 rounds, writes benchmarks/results/step.json
    python benchmarks/speed/step.py --shape 1b            four layers of 1B shapes, writes step_1b.json
    python benchmarks/speed/step.py --compiled            each row twice, writes step_compiled.json
    python benchmarks/speed/step.py --dtype float32       for processors that multiply bfloat16 slowly
    python benchmarks/speed/step.py --rows lora-peft lr-qat --rounds 5 --out /tmp/step.json
    python benchmarks/speed/step.py --profile qlora       where a step's time goes, by torch's profiler; writes nothing
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

# torch and everything built on it is imported in the workers, each only what its row needs.

SHAPES: dict[str, dict[str, Any]] = {
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
    "1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "max_position_embeddings": 2048,
    },
}
"""A whole small model, and four layers of a model of a billion parameters."""
SHAPES["135m-10"] = {**SHAPES["135m"], "num_hidden_layers": 10}
"""A third of the small model, for machines on which twenty whole ones do not fit."""
SHAPE = SHAPES["135m"]
DTYPE = "bfloat16"
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BATCH, TOKENS = 4, 256
REFERENCE = "lora-peft"
BNB = "qlora-peft"
OUT = Path(__file__).parents[1] / "results" / "step.json"
PATIENCE_SECONDS = 600
"""How long a worker may take to start, or for one step."""


# ---- rows -------------------------------------------------------------------------------------------------------


Step = Callable[[], float]
"""Runs one step and returns its loss."""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    label: str
    setup: Callable[..., tuple[Step, int]]
    """Builds what the worker runs; returns the step and the number of trainable parameters."""
    options: dict[str, Any]
    imports: tuple[str, ...] = ()
    """Libraries of this row, loaded before memory is first read."""


def _float_model() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, attn_implementation="sdpa", use_cache=False)
    return LlamaForCausalLM(config).to(getattr(torch, DTYPE)).train()


def _nf4_layers(model: Any) -> None:
    """bitsandbytes' Linear4bit in place of every linear layer but the head."""
    import bitsandbytes as bnb
    import torch

    for name, layer in list(model.named_modules()):
        if name.rpartition(".")[2] not in LINEAR_LAYERS:
            continue
        new = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=getattr(torch, DTYPE),
            compress_statistics=True,
            quant_type="nf4",
        )
        new.weight = bnb.nn.Params4bit(
            layer.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4", blocksize=64, module=new
        )
        model.set_submodule(name, new.to("cpu"))  # quantizes
        assert new.weight.quant_state.nested
        assert new.weight.dtype == torch.uint8
    model.is_loaded_in_4bit = True  # what peft asks before it takes its bitsandbytes path


def _peft(rank: int, nf4: bool, float32: bool = False, compiled: bool = False) -> tuple[Step, int]:
    import peft

    model = _float_model()
    if nf4:
        _nf4_layers(model)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    made = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    for layer in model.model.layers if compiled else ():
        layer.compile()
    return _training(made)


def _torchao(rank: int | None) -> tuple[Step, int]:
    """Fake quantization of the weights: under peft's LoRA with this rank, or with every linear weight trained."""
    import peft
    import torch
    from torchao.quantization import quantize_
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

    model = _float_model()
    grid = QATConfig(weight_config=IntxFakeQuantizeConfig(torch.int4, group_size=64), step="prepare")
    quantize_(model, grid, lambda layer, name: name.rpartition(".")[2] in LINEAR_LAYERS)
    if rank is None:
        for name, p in model.named_parameters():
            p.requires_grad_(any(part in name for part in LINEAR_LAYERS))
        return _training(model)
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM")
    return _training(peft.get_peft_model(model, config, autocast_adapter_dtype=False))


def _trimtab(
    method: str, grid: dict[str, Any] | None = None, compiled: bool = False, **options: Any
) -> tuple[Step, int]:
    import trimtab

    # `*` names neither the embedding nor a tied head, so both stay dense, as does everything without a rule.
    rules = None if grid is None else [{"match": "*", "grid": grid}]
    model = trimtab.prepare(_float_model(), trimtab.methods.make(method, **options), rules)
    if compiled:
        from trimtab.training.compiling import CompiledForward

        for layer in model.model.layers:
            layer.forward = CompiledForward(layer)
    return _training(model, ours=True)


def _training(model: Any, ours: bool = False) -> tuple[Step, int]:
    import torch

    if ours:
        from trimtab.training.loss import summed_loss

    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=True)
    ids = torch.randint(SHAPE["vocab_size"], (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))

    counted = BATCH * (TOKENS - 1)

    def step() -> float:
        loss = summed_loss(model, ids, input_ids=ids) / counted if ours else model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in trained)


def _products(trained: bool) -> tuple[Step, int]:
    import torch

    h, kv = SHAPE["hidden_size"], SHAPE["num_key_value_heads"] * SHAPE["head_dim"]
    mlp = SHAPE["intermediate_size"]
    layer = [(h, h), (kv, h), (kv, h), (h, h), (mlp, h), (mlp, h), (h, mlp)]
    shapes = layer * SHAPE["num_hidden_layers"] + [(SHAPE["vocab_size"], h)]
    weights = [torch.randn(n, k, dtype=torch.bfloat16) for n, k in shapes]
    inputs = {n: torch.randn(BATCH * TOKENS, n, dtype=torch.bfloat16) for n in {n for shape in shapes for n in shape}}

    @torch.no_grad()
    def step() -> float:
        for w in weights:
            x, dy = inputs[w.shape[1]], inputs[w.shape[0]]
            torch.nn.functional.linear(x, w)
            dy @ w
            if trained and w is not weights[-1]:
                dy.t() @ x
        return 0.0

    return step, 0


_PEFT, _BNB = ("transformers", "peft"), ("transformers", "peft", "bitsandbytes")
_AO = ("transformers", "peft", "torchao")
_OURS = ("transformers", "trimtab")
_INT3 = {"bits": 3, "group": 32, "zero": "integer"}
_INT4 = {"bits": 4, "group": None, "zero": "symmetric"}
_INT4_G64 = {"bits": 4, "group": 64, "zero": "symmetric"}

ROWS = {
    "lora-peft": Row("peft LoRA, dense bf16, rank 16", _peft, {"rank": 16, "nf4": False}, _PEFT),
    "lora-peft-float32": Row("  its float32 adapters", _peft, {"rank": 16, "nf4": False, "float32": True}, _PEFT),
    "qlora-peft": Row("peft + bitsandbytes QLoRA, NF4 g64 double", _peft, {"rank": 16, "nf4": True}, _BNB),
    "qlora": Row("trimtab qlora, NF4 g64 double, rank 16", _trimtab, {"method": "qlora", "rank": 16}, _OURS),
    "q-bara": Row("trimtab q-bara, NF4 g64 double, rank 16", _trimtab, {"method": "q-bara", "rank": 16}, _OURS),
    "qa-hira": Row("trimtab qa-hira, int4 g32 real", _trimtab, {"method": "qa-hira"}, _OURS),
    "lr-qat": Row(
        "trimtab lr-qat, int3 g32 integer, fixed8, rank 32",
        _trimtab,
        {"method": "lr-qat", "rank": 32, "grid": _INT3},
        _OURS,
    ),
    "lr-qat-channel": Row(
        "trimtab lr-qat, int4 channel symmetric, rank 32",
        _trimtab,
        {"method": "lr-qat", "rank": 32, "grid": _INT4},
        _OURS,
    ),
    "lr-qat-g64": Row(
        "trimtab lr-qat, int4 g64 symmetric, rank 32",
        _trimtab,
        {"method": "lr-qat", "rank": 32, "grid": _INT4_G64},
        _OURS,
    ),
    "qat-lora-torchao": Row("torchao QAT + peft LoRA, int4 g64, rank 32", _torchao, {"rank": 32}, _AO),
    "qat-torchao": Row("torchao full QAT, int4 g64", _torchao, {"rank": None}, _AO),
    "products": Row("matrix products alone", _products, {"trained": False}),
    "products-trained": Row("  with those of weight gradients", _products, {"trained": True}),
}
COMPILED = {
    f"{name}+compiled": Row(f"{row.label}, compiled", row.setup, {**row.options, "compiled": True}, row.imports)
    for name, row in ROWS.items()
    if row.setup in (_peft, _trimtab)
}
ROWS |= COMPILED


# ---- a worker ---------------------------------------------------------------------------------------------------


def _resident(field: str) -> int:
    """VmRSS (resident now) or VmHWM (its high-water mark) of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}; this benchmark needs Linux")


def _busy_seconds() -> float:
    """Seconds that all CPUs together have been busy, whether for us or for others."""
    user, nice, system, _, _, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def _use(shape: str, dtype: str) -> None:
    global SHAPE, DTYPE
    SHAPE, DTYPE = SHAPES[shape], dtype


def _work(name: str, shape: str, dtype: str, threads: int, pipe: Connection) -> None:
    """The body of a worker: set up, then one step for each message, until the message is None."""
    import importlib
    import logging
    import warnings

    import torch

    logging.disable(logging.WARNING)  # bitsandbytes on its optional inference kernels
    warnings.simplefilter("ignore", FutureWarning)  # peft on transformers' old names
    torch.set_num_threads(threads)
    _use(shape, dtype)
    row = ROWS[name]
    for library in row.imports:
        importlib.import_module(library)
    libraries = _resident("VmRSS")
    step, trained = row.setup(**row.options)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # give back what only building the model needed
    loaded = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts over
    pipe.send({"trained_parameters": trained, "libraries_bytes": libraries, "loaded_bytes": loaded})
    while pipe.recv() is not None:
        start, cpu, busy = time.perf_counter(), time.process_time(), _busy_seconds()
        loss = step()
        seconds, cpu, busy = time.perf_counter() - start, time.process_time() - cpu, _busy_seconds() - busy
        others = max(0.0, busy - cpu) / seconds
        pipe.send({"seconds": seconds, "loss": loss, "others_cpus": others, "peak_bytes": _resident("VmHWM")})


@dataclass
class Worker:
    """The parent's end of a worker."""

    name: str
    process: Any
    pipe: Connection
    facts: dict[str, Any]
    steps: list[dict[str, float]]

    @classmethod
    def start(cls, name: str, shape: str, dtype: str, threads: int) -> "Worker":
        """Start a process for a row and wait until its model stands."""
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        process = context.Process(target=_work, args=(name, shape, dtype, threads, theirs), daemon=True)
        process.start()
        theirs.close()
        worker = cls(name, process, pipe, {}, [])
        worker.facts = worker.receive()
        return worker

    def receive(self) -> dict[str, Any]:
        """The worker's next answer."""
        if not self.pipe.poll(PATIENCE_SECONDS):
            raise RuntimeError(f"{self.name}: no answer in {PATIENCE_SECONDS} s")
        try:
            return self.pipe.recv()
        except EOFError:
            raise RuntimeError(f"{self.name}: its process died; what it said is above") from None

    def step(self) -> None:
        """Run one step and keep what it took."""
        self.pipe.send("step")
        self.steps.append(self.receive())

    def stop(self) -> None:
        """End the process."""
        self.pipe.send(None)
        self.process.join(30)


# ---- the run ----------------------------------------------------------------------------------------------------


def measure(names: list[str], shape: str, dtype: str, rounds: int, warmup: int, threads: int) -> list[Worker]:
    """Run every row `warmup + rounds` times in turn; the warm-up steps are dropped (not their memory)."""
    workers = []
    for name in names:
        print(f"starting {name}", file=sys.stderr, flush=True)
        workers.append(Worker.start(name, shape, dtype, threads))
    for i in range(warmup + rounds):
        shift = i % len(workers)
        for worker in workers[shift:] + workers[:shift]:
            worker.step()
        seconds = " ".join(f"{worker.steps[-1]['seconds']:.3f}" for worker in workers)
        print(f"{'warm-up' if i < warmup else 'round'} {i + 1}: {seconds}", file=sys.stderr, flush=True)
    for worker in workers:
        worker.stop()
        worker.facts["first_step_seconds"] = worker.steps[0]["seconds"]
        worker.facts["peak_bytes"] = int(worker.steps[-1]["peak_bytes"])
        worker.steps = worker.steps[warmup:]
    return workers


def _paired(worker: Worker, reference: Worker) -> list[float]:
    return [a["seconds"] / b["seconds"] for a, b in zip(worker.steps, reference.steps, strict=True)]


def summarize(workers: list[Worker]) -> list[dict[str, Any]]:
    """One entry a row: medians, paired ratios and bytes."""
    by_name = {worker.name: worker for worker in workers}
    reference = by_name.get(REFERENCE, workers[0])
    rows = []
    for worker in workers:
        seconds, ratios = [s["seconds"] for s in worker.steps], _paired(worker, reference)
        row = {
            "name": worker.name,
            "label": ROWS[worker.name].label.strip(),
            "median_step_seconds": statistics.median(seconds),
            "ratio_to_dense_lora": statistics.median(ratios),
            "ratio_to_dense_lora_range": [min(ratios), max(ratios)],
            "first_loss": worker.steps[0]["loss"],
            "others_cpus": statistics.median(s["others_cpus"] for s in worker.steps),
            "seconds": seconds,
            **worker.facts,
        }
        if BNB in by_name:
            row["ratio_to_bitsandbytes"] = statistics.median(_paired(worker, by_name[BNB]))
        rows.append(row)
    return rows


_VERSIONED = ("torch", "transformers", "peft", "bitsandbytes", "torchao")


def environment(rounds: int, warmup: int, threads: int) -> dict[str, Any]:
    """What a reader needs to judge the numbers."""
    import torch

    info = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in info)}
    flags = fields.get("flags", "").split()
    return {
        "cpu": fields.get("model name", platform.processor()),
        "cpus": os.cpu_count(),
        "bfloat16_instructions": [f for f in ("amx_bf16", "avx512_bf16") if f in flags],
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "load_average": os.getloadavg(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in _VERSIONED if find_spec(name)},
        "model": SHAPE,
        "dtype": DTYPE,
        "batch": [BATCH, TOKENS],
        "rounds": rounds,
        "warmup_rounds": warmup,
        "malloc": {k: v for k, v in os.environ.items() if k.startswith("MALLOC_") or k == "LD_PRELOAD"},
    }


def profile(name: str, threads: int) -> str:
    """The operations of one step of a row, by their own time."""
    import torch

    torch.set_num_threads(threads)
    step, _ = ROWS[name].setup(**ROWS[name].options)
    for _ in range(2):
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        step()
    return found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    lines = [
        f"{'':52}{'step':>8}{'x dense':>9}{'range':>13}{'x bnb':>7}{'peak':>7}{'loaded':>8}{'libs':>6}{'trained':>9}",
        f"{'':52}{'s':>8}{'LoRA':>9}{'':>13}{'':>7}{'MB':>7}{'MB':>8}{'MB':>6}{'M':>9}",
    ]
    for r in rows:
        low, high = r["ratio_to_dense_lora_range"]
        bnb = f"{r['ratio_to_bitsandbytes']:7.2f}" if "ratio_to_bitsandbytes" in r else f"{'-':>7}"
        peak, loaded, libraries = (r[f"{k}_bytes"] / 1e6 for k in ("peak", "loaded", "libraries"))
        lines.append(
            f"{ROWS[r['name']].label:52}{r['median_step_seconds']:8.3f}{r['ratio_to_dense_lora']:9.2f}"
            f"{f'{low:.2f}-{high:.2f}':>13}{bnb}{peak:7.0f}{loaded:8.0f}{libraries:6.0f}"
            f"{r['trained_parameters'] / 1e6:9.2f}"
        )
    return "\n".join(lines)


def main() -> None:
    """Parse arguments, measure, write and print."""
    parser = argparse.ArgumentParser(
        description="Time and memory of one training step, paired with peft and bitsandbytes."
    )
    parser.add_argument("--rounds", type=int, default=9, help="steps of each row that count (default 9)")
    parser.add_argument("--warmup", type=int, default=2, help="steps of each row before those (default 2)")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=list(ROWS),
        default=[n for n, row in ROWS.items() if n not in COMPILED and all(map(find_spec, row.imports))],
        metavar="ROW",
        help=", ".join(ROWS),
    )
    parser.add_argument("--compiled", action="store_true", help="each row also with its decoder layers compiled")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default=DTYPE, help=f"of the model (default {DTYPE})"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of each worker (default 2)")
    parser.add_argument("--shape", choices=list(SHAPES), default="135m", help="model (default 135m)")
    parser.add_argument(
        "--out",
        type=Path,
        help=f"JSON file (default {OUT}, beside it with the shape, `compiled` and the dtype in its name)",
    )
    parser.add_argument("--profile", choices=list(ROWS), metavar="ROW", help="only profile one step of this row")
    args = parser.parse_args()
    _use(args.shape, args.dtype)
    if args.profile:
        print(profile(args.profile, args.threads))
        return
    if args.rounds < 1 or args.warmup < 0 or args.threads < 1:
        parser.error("--rounds and --threads must be at least 1, --warmup at least 0")
    names = [name for row in dict.fromkeys(args.rows) for name in (row, f"{row}+compiled")[: 2 if args.compiled else 1]]
    suffixes = (
        [args.shape.replace("-", "_")] * (args.shape != "135m")
        + ["compiled"] * args.compiled
        + [args.dtype] * (args.dtype != "bfloat16")
    )
    out = args.out or OUT.with_stem("_".join(["step", *suffixes]))
    names = [name for name in names if name in ROWS]
    rows = summarize(measure(names, args.shape, args.dtype, args.rounds, args.warmup, args.threads))
    result = {"environment": environment(args.rounds, args.warmup, args.threads), "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
