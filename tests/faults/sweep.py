"""A hundred kills of each command, and its disk full, failing or read-only: what `make faults` runs.

    python tests/faults/sweep.py [--points 100] [--disks 34] [--operations save prune] [--out FILE]

The whole result is one JSON file, of which docs/reliability.md is made.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from faults import shim
from faults.asking import FAULTS, Asking, points
from faults.operations import OPERATIONS

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "faults.json"


def main() -> None:
    """Sweep, and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=100, help="kills of each command")
    parser.add_argument("--disks", type=int, default=34, help="points of each failure of a disk")
    parser.add_argument("--operations", nargs="*", default=list(OPERATIONS), choices=list(OPERATIONS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if shim.MISSING:
        parser.error(shim.MISSING)
    found = json.loads(args.out.read_text()) if args.out.exists() else {}
    failed = 0
    with tempfile.TemporaryDirectory() as folder, Asking(Path(folder)) as asking:
        for operation in args.operations:
            began, calls = time.monotonic(), asking(operation)["calls"]
            row = {"calls": calls}
            for fault in FAULTS:
                tried = points(calls, args.points if fault == "killed" else args.disks)
                problems = []
                for at in tried:
                    answer = asking(operation, at, fault)
                    if answer["problem"]:
                        problems.append({"at": at, "call": answer["call"], "problem": answer["problem"]})
                        print(f"{operation}, {fault} at call {at} ({answer['call']}): {answer['problem']}", flush=True)
                row[fault] = {"points": len(tried), "problems": problems}
                failed += len(problems)
            print(f"{operation}: {row['calls']} calls, {time.monotonic() - began:.0f} s", flush=True)
            found[operation] = row
            args.out.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
