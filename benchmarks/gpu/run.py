"""Runs the sections of benchmarks/gpu one after another, each in a process and within its time; see run.sh.

    correct     every Triton kernel against its reference on the device, and the tests of tests/gpu
    kernels     time of each kernel beside a copy of its bytes, and beside bitsandbytes
    steps       a training step of a model with the layers of a 7B one, beside peft and bitsandbytes; memory beside the plan
    generate    tokens per second, and operators per token
    methods     a tiny `trimtab run` of each method, with a GPTQ start, a teacher and exports; parity

Each section writes OUT/NAME.json as it goes; OUT/summary.json says how they ended. The exit status is the number of
sections that failed or ran out of time.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from time import perf_counter

import torch

FOLDER = Path(__file__).parent
SECTIONS = {"correct": 90, "kernels": 45, "steps": 135, "generate": 40, "methods": 150}
"""Seconds that each may take: 460 together, of 480."""
_PATIENCE = 3
"""How much longer each may take in its tiny form, on the busy processor of a CI."""


def main() -> int:
    """Run the sections, and say how they ended."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes for a CPU, in seconds: it shows that all runs")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the results")
    args = parser.parse_args()
    for unknown in set(args.sections) - SECTIONS.keys():
        parser.error(f"{unknown}: no such section; there are {', '.join(SECTIONS)}")
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {args.device}: torch sees no GPU here; --device cpu --tiny shows that the sections run")
    args.out.mkdir(parents=True, exist_ok=True)
    summary, failed = {}, 0
    for name in args.sections or SECTIONS:
        began = perf_counter()
        how = _run(name, args)
        summary[name] = {"ended": how, "seconds": round(perf_counter() - began, 1)}
        failed += how != "well"
        print(f"==== {name}: {how}, {summary[name]['seconds']} s", flush=True)
        (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    return failed


def _run(name: str, args: argparse.Namespace) -> str:
    command = [
        sys.executable,
        str(FOLDER / f"{name}.py"),
        "--device",
        args.device,
        "--out",
        str(args.out / f"{name}.json"),
    ]
    environment = dict(os.environ)
    if args.device == "cpu":  # or accelerate would take a GPU that is there
        environment |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    log, limit = args.out / f"{name}.log", SECTIONS[name] * (_PATIENCE if args.tiny else 1)
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command + ["--tiny"] * args.tiny, stdout=file, stderr=file, timeout=limit, env=environment
            )
        except subprocess.TimeoutExpired:
            return f"out of time after {limit} s; see {log}"
    return "well" if done.returncode == 0 else f"exit status {done.returncode}; see {log}"


if __name__ == "__main__":
    sys.exit(main())
