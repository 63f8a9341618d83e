"""Memory of fine-tuning LLaMA-2-7B on a CPU: how much loading takes, how much a training step takes, and what was planned.

The model has LLaMA-2-7B's shapes and random weights: bytes and seconds do not depend on what a weight is. `make` writes it
in bfloat16 (13.5 GB), `run` loads it by every method in turn, quantizing while it reads, and takes training steps:

    row     a process of its own, alone on the machine
    load    `loading.load`, as a recipe does it; embedding, norms and head stay in bfloat16
    step    1 x 512 tokens, each block recomputed in backward, chunked loss, AdamW on what is trained; one warm-up step
            (not timed, but its memory counts) and one that is timed

Memory is *anonymous* resident memory, read from /proc/self/status every 10 ms: the kernel keeps a high-water mark for all
resident pages only, and those of mapped files can be dropped at any time, so they stand beside it (`file_bytes`, at the
moment of the peak). `resident_peak_bytes` is the kernel's mark, files and all, which no sampling can miss. Everything holds
the interpreter and the libraries of a whole run, trl included: `libraries_bytes` says how much; `planned_bytes` is without.
Pages of the checkpoint leave the page cache when the model is loaded, so that they do not compete with it.

How fast loading is, is measured on a slice of the model that fits into the page cache: the median of three loads, and of as
many plain reads of its files into fresh memory (`read_seconds`), in turn, after one of each; `load_ratio` is the quotient.

    python benchmarks/memory/seven_b.py make /data/7b      the checkpoint; --layers 4 makes a slice of it
    python benchmarks/memory/seven_b.py run /data/7b --slice /data/7b-4      every row, into benchmarks/results/7b.json
    python benchmarks/memory/seven_b.py paper              13B and 70B as `memory.plan` sees them, into the same file

A row is written as soon as it is measured, and replaces only the row of its name: what failed is repeated by --rows.
"""

import argparse
import gc
import json
import logging
import multiprocessing
import os
import statistics
import sys
import threading
import time
import warnings
import zlib
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from importlib import import_module
from itertools import product
from math import ceil, prod
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM, LlamaConfig

from trimtab import methods
from trimtab.kernels import heap
from trimtab.memory import process
from trimtab.memory.peak import peak_of_training
from trimtab.models import load as loading
from trimtab.models.head import Head
from trimtab.models.sources import open_source
from trimtab.recipe import rules
from trimtab.training.loss import chunked_cross_entropy

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.speed.step import environment

SHAPES = {  # hidden, MLP, layers, heads, KV heads
    "7b": (4096, 11008, 32, 32, 32),
    "13b": (5120, 13824, 40, 40, 40),
    "70b": (8192, 28672, 80, 64, 8),
}
FIELDS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
VOCABULARY, TOKENS = 32000, 512
STEPS, SLICE_LOADS = 1, 3
SHARD_BYTES, SAMPLE_SECONDS = 2_000_000_000, 0.01
OUT = Path(__file__).parents[1] / "results" / "7b.json"


# ---- rows -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    label: str
    aim_bytes: int
    """Anonymous memory that training must not exceed, interpreter and libraries included."""
    method: str
    options: dict[str, Any]
    grid: dict[str, Any] | None = None
    """Of every linear layer but the head; None is the method's own."""

    def prepared(self) -> tuple[Any, Any]:
        """The method and the rules."""
        every = [{"match": "lm_head", "grid": None}, {"match": "*", "grid": self.grid}]  # `*` would take the head too
        return methods.make(self.method, **self.options), rules.parse_rules(every if self.grid else None)


def _lr_qat(label: str, aim_bytes: int, group: int | None, storage: str) -> Row:
    grid = {"bits": 4, "group": group, "zero": "symmetric"}
    return Row(f"lr-qat, int4 {label}, rank 32", aim_bytes, "lr-qat", {"rank": 32, "storage": storage}, grid)


_NF4 = {"codebook": "nf4", "group": 64, "double_quant": True}

ROWS = {
    "lr-qat-channel": _lr_qat("channel symmetric", 7_000_000_000, None, "int"),
    "lr-qat-g128": _lr_qat("g128 symmetric", 8_000_000_000, 128, "int"),
    "lr-qat-channel-fixed8": _lr_qat("channel symmetric, fixed8", 10_000_000_000, None, "fixed8"),
    "lr-qat-g128-fixed8": _lr_qat("g128 symmetric, fixed8", 11_000_000_000, 128, "fixed8"),
    "qlora": Row("qlora, NF4 g64 double, rank 16", 6_500_000_000, "qlora", {"rank": 16}),
    "q-bara": Row("q-bara, NF4 g64 double, rank 16", 6_500_000_000, "q-bara", {"rank": 16}),
    "qa-hira": Row("qa-hira, NF4 g64 double, repeat 2", 6_500_000_000, "qa-hira", {"repeat": 2}, _NF4),
}


# ---- the checkpoint ---------------------------------------------------------------------------------------------


def _config(size: str, layers: int | None = None) -> Any:
    shape = dict(zip(FIELDS, SHAPES[size], strict=True))
    shape["num_hidden_layers"] = layers or shape["num_hidden_layers"]
    fixed = {"max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "tie_word_embeddings": False}
    return LlamaConfig(**shape, **fixed, vocab_size=VOCABULARY, dtype="bfloat16", architectures=["LlamaForCausalLM"])


def _layers(folder: str) -> int:
    return int(json.loads((Path(folder) / "config.json").read_text())["num_hidden_layers"])


def _on_paper(config: Any) -> Any:
    """The model of a config, on the meta device."""
    with init_empty_weights(include_buffers=False):
        return AutoModelForCausalLM.from_config(config)


def make(folder: Path, layers: int) -> None:
    """Write the checkpoint, one tensor in memory at a time."""
    if any(folder.glob("*.safetensors")):
        raise SystemExit(f"{folder}: already holds safetensors; name another directory")
    folder.mkdir(parents=True, exist_ok=True)
    config = _config("7b", layers)
    shards: list[dict[str, Any]] = [{}]
    for name, parameter in _on_paper(config).named_parameters():
        if 2 * sum(map(prod, [*shards[-1].values(), parameter.shape])) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = tuple(parameter.shape)
    files = {}
    for i, shapes in enumerate(shards):
        file = folder / f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        _write(file, shapes)
        files.update(dict.fromkeys(shapes, file.name))
        print(f"{file.name}: {file.stat().st_size / 1e9:.2f} GB", flush=True)
    index = json.dumps({"metadata": {}, "weight_map": files}, indent=1)
    (folder / "model.safetensors.index.json").write_text(index + "\n")
    config.save_pretrained(folder)


def _write(file: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file: the header's length, the header, the tensors in its order."""
    header, end = dict[str, Any](__metadata__={"format": "pt"}), 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            out.write(_values(name, shape).view(torch.uint8).numpy())
        out.flush()
        os.fsync(out.fileno())
    _drop_pages([file])


def _values(name: str, shape: tuple[int, ...]) -> Any:
    """Bfloat16 numbers for a tensor, flat: ones for a norm, else its layer's random block, turned by an own offset."""
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    parts = name.split(".")
    block = _block(1 + int(parts[2]) if parts[1] == "layers" else 0)
    turns = [zlib.crc32(f"{name} {i}".encode()) % block.numel() for i in range(ceil(prod(shape) / block.numel()))]
    return torch.cat([block.roll(turn) for turn in turns])[: prod(shape)]


@lru_cache(maxsize=1)
def _block(seed: int) -> Any:
    size, generator = prod(SHAPES["7b"][:2]), torch.Generator().manual_seed(seed)
    return torch.empty(size).normal_(0, 0.02, generator=generator).bfloat16()


def _drop_pages(files: list[Path]) -> None:
    """Take files out of the page cache; they stay on the disk."""
    for file in files:
        with file.open("rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# ---- a row's processes ------------------------------------------------------------------------------------------


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, which ends with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def _resident() -> tuple[int, int]:
    """Anonymous and file-mapped resident bytes of this process, at one moment."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    fields = {words[0]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}
    return fields["RssAnon:"], fields["RssFile:"]


class Meter:
    """Watches resident memory while a block runs."""

    def __init__(self) -> None:
        self.peak_bytes, self.file_bytes = 0, 0
        """Largest anonymous memory, and what was mapped of files at that moment."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        done = False
        while not done:
            self.peak_bytes, self.file_bytes = max((self.peak_bytes, self.file_bytes), _resident())
            done = self._ended.wait(SAMPLE_SECONDS)

    def __enter__(self) -> "Meter":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def _quiet(threads: int) -> None:
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)  # bitsandbytes on its optional inference kernels
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)


def _shards(folder: str) -> list[Path]:
    return sorted(Path(folder).glob("*.safetensors"))


def _load(row: Row, folder: str) -> Any:
    """The prepared model, loaded as `pipeline.run` does it."""
    torch.manual_seed(0)
    source: Any = open_source(folder)
    source.tokenizer = lambda: None  # there is none, and random tokens need none
    return loading.load(folder, *row.prepared(), dtype=torch.bfloat16, source=source)[0]


def _stepper(model: Any) -> Callable[[], float]:
    """What takes one training step and returns its loss: what `train.fit` does, without its data and schedules."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, weight_decay=0.0)
    model.train()
    model.gradient_checkpointing_enable()
    head = model.get_output_embeddings().weight.detach()
    ids = torch.randint(VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def take() -> float:
        hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        loss = chunked_cross_entropy(hidden, Head(head), ids[:, 1:].flatten()) / (TOKENS - 1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return take


def measure(name: str, folder: str, threads: int) -> dict[str, Any]:
    """Memory of loading and training, and the seconds of a step."""
    _quiet(threads)
    import_module("trimtab.pipeline.run")  # a run holds all of it
    heap.return_freed()  # as training does (`kernels.tuning`)
    gc.collect()
    heap.trim()
    libraries, start = process.resident_bytes(), time.perf_counter()
    with Meter() as load:
        model = _load(ROWS[name], folder)
    load_seconds = time.perf_counter() - start
    _drop_pages(_shards(folder))
    loaded, take, steps = process.resident_bytes(), _stepper(model), []
    process.reset_peak()
    with Meter() as training:
        for _ in range(1 + STEPS):
            start, cpu = time.perf_counter(), time.process_time()
            loss = take()
            steps.append((time.perf_counter() - start, time.process_time() - cpu, loss))
    seconds, cpu_seconds, losses = zip(*steps, strict=True)
    return {
        "layers": _layers(folder),
        "trained_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "libraries_bytes": libraries,
        "load_peak_bytes": load.peak_bytes,
        "load_file_bytes": load.file_bytes,
        "loaded_bytes": loaded,
        "peak_bytes": training.peak_bytes,
        "file_bytes": training.file_bytes,
        "resident_peak_bytes": process.peak_bytes(),
        "full_load_seconds": load_seconds,
        "step_seconds": statistics.median(seconds[1:]),
        "step_cpu_seconds": statistics.median(cpu_seconds[1:]),
        "seconds": seconds,
        "losses": losses,
    }


def time_load(name: str, folder: str, threads: int) -> dict[str, Any]:
    """Seconds of loading a slice from the page cache, beside those of reading its files."""
    _quiet(threads)
    reading, loading = [], []
    for i in range(1 + SLICE_LOADS):
        start = time.perf_counter()
        for file in _shards(folder):
            file.read_bytes()
        read = time.perf_counter()
        _load(ROWS[name], folder)
        gc.collect()
        if i:  # the first round brings files, libraries and kernels in
            reading.append(read - start)
            loading.append(time.perf_counter() - read)
    _drop_pages(_shards(folder))
    return {
        "load_slice_layers": _layers(folder),
        "load_seconds": statistics.median(loading),
        "read_seconds": statistics.median(reading),
        "load_ratio": statistics.median(loading) / statistics.median(reading),
    }


def planned(name: str, size: str, layers: int | None) -> dict[str, int]:
    """What `memory.plan` says of a row: every item and their total."""
    options = {"micro_batch": 1, "block_tokens": TOKENS, "dtype": torch.bfloat16, "checkpointing": True}
    plan = peak_of_training(_on_paper(_config(size, layers)), *ROWS[name].prepared(), **options)
    return {**asdict(plan), "total": plan.total}


# ---- the commands -----------------------------------------------------------------------------------------------


def _keep(out: Path, **changed: Any) -> None:
    """Replace some keys of the JSON file."""
    content = json.loads(out.read_text()) if out.exists() else {}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(content | changed, indent=1) + "\n")


def run(folder: str, names: list[str], slice_: str | None, threads: int, out: Path) -> None:
    """Measure rows one after another, each written as soon as it is there."""
    rows = {row["name"]: row for row in json.loads(out.read_text()).get("rows", [])} if out.exists() else {}
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    about = {"model": "LLaMA-2-7B shapes, random weights", "batch": [1, TOKENS], "memory_bytes": memory_bytes}
    _keep(out, environment=environment(STEPS, 1, threads) | about)
    columns = ("planned_bytes", "libraries_bytes", "load_peak_bytes", "peak_bytes", "aim_bytes", "file_bytes")
    print(f"{'GB':50}", *(f"{c.removesuffix('_bytes'):>9}" for c in (*columns, "step s", "load/read")))
    for name in names:
        row: dict[str, Any] = {"name": name, "label": ROWS[name].label, "aim_bytes": ROWS[name].aim_bytes}
        row["planned_bytes"] = apart(planned, name, "7b", _layers(folder))["total"]
        row |= {} if slice_ is None else apart(time_load, name, slice_, threads)
        row |= apart(measure, name, folder, threads)
        rows[name] = row
        _keep(out, rows=[rows[n] for n in ROWS if n in rows])
        numbers = *(row[c] / 1e9 for c in columns), row["step_seconds"], row.get("load_ratio", 0)
        print(f"{row['label']:50}", *(f"{number:9.2f}" for number in numbers), flush=True)


def paper(names: list[str], out: Path) -> None:
    """Plan every row for the larger models."""
    entries = []
    for size, name in product(("13b", "70b"), names):
        plan = apart(planned, name, size, None)
        entries.append({"model": size, "name": name, "label": ROWS[name].label, **plan})
        parts = ", ".join(f"{key.replace('_', ' ')} {v / 1e9:.2f}" for key, v in plan.items() if key != "trainable")
        print(f"{size} {ROWS[name].label}: {parts} GB", flush=True)
    _keep(out, planned=entries)


def main() -> None:
    """Parse arguments and carry out a command."""
    parser = argparse.ArgumentParser(description="Memory of fine-tuning a model of LLaMA-2-7B's shapes.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the checkpoint with random weights")
    making.add_argument("folder", type=Path)
    making.add_argument("--layers", type=int, default=SHAPES["7b"][2], help="decoder layers (default 32)")
    running = commands.add_parser("run", help="load it and train, every row in its own process")
    running.add_argument("folder")
    running.add_argument("--slice", help="a checkpoint of few layers, to time loading on")
    running.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of a row (default: all CPUs)")
    for command in (running, commands.add_parser("paper", help="plan 13B and 70B")):
        command.add_argument(
            "--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="ROW", help=str([*ROWS])
        )
        command.add_argument("--out", type=Path, default=OUT, help=f"JSON file (default {OUT})")
    args = parser.parse_args()
    if args.command == "make":
        make(args.folder, args.layers)
    elif args.command == "run":
        run(args.folder, list(dict.fromkeys(args.rows)), args.slice, args.threads, args.out)
    else:
        paper(list(dict.fromkeys(args.rows)), args.out)


if __name__ == "__main__":
    main()
