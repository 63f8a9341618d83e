"""Hostile input by the thousand: what each change of each artefact leads to, counted, and every failure by a name.

    make fuzz                                   3,450 cases, and benchmarks/results/fuzz.json (an hour on one core)
    make fuzz ARGS="--cases 500 --seed 7"       others
    make fuzz ARGS="--case float:17 -v"         this one again, with its traceback
    make fuzz ARGS="--only gguf --cases 1000"   one target
    make fuzz ARGS="--again lines.jsonl"        those that were bad in a run with --lines

Ends with status 1 if a case was neither refused in one line nor read as it may be.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from fuzz.artefacts import TARGETS, names, spoil
from fuzz.trial import BAD, Bench, Case, Result, attempt, try_all

ROOT = Path(__file__).parents[2]
OUTCOMES = ("refused", "same", "legal", *BAD)


def cases(count: int, seed: int, only: Sequence[str] = ()) -> list[Case]:
    """So many cases, spread evenly over targets."""
    chosen = names(only)
    return [Case(chosen[i % len(chosen)], i // len(chosen), seed) for i in range(count)]


def _named(name: str, seed: int) -> Case:
    target, _, number = name.partition(":")
    return Case(target, int(number), seed)


def tally(results: Sequence[Result]) -> dict[str, dict[str, int]]:
    """Outcomes by target."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for result in results:
        found[result.case.partition(":")[0]][result.outcome] += 1
    return {target: dict(counts) for target, counts in sorted(found.items())}


def _show(results: Sequence[Result], seed: int) -> None:
    for target, counts in tally(results).items():
        print(f"{target:12}", "  ".join(f"{outcome} {counts.get(outcome, 0)}" for outcome in OUTCOMES))
    kinds: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for result in results:
        if result.outcome in BAD:
            kinds[result.outcome, result.kind].append(result)
    for (outcome, kind), alike in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"\n{len(alike)} x {outcome}: {kind}")
        for result in alike[:4]:
            print(f"    --case {result.case} --seed {seed}    {result.file}: {result.change[:90]}")
            print(f"        {result.message[:200]!r}")


def _again(case: Case) -> None:
    """One case in this process, with its traceback."""
    target = TARGETS[case.target]
    bench = Bench(Path(tempfile.mkdtemp(prefix="fuzz-")))
    place = bench.copy(case.target, "case")
    file, what = spoil(target, place, random.Random(f"{case.seed} {case}"))
    print(f"{place / file}: {what}")
    print(target.read(place, file), "of", bench.right(case.target, file))
    print(attempt(bench, case))


def main() -> int:
    """Try, and write what came of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=3450, help="how many (3450)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", nargs="*", default=[], choices=list(TARGETS), metavar="TARGET", help=", ".join(TARGETS)
    )
    parser.add_argument("--minutes", type=float, help="no case is begun after so many")
    parser.add_argument("--case", help="one case by its name")
    parser.add_argument("--again", type=Path, metavar="LINES", help="a run's JSON lines: its bad cases once more")
    parser.add_argument("--out", type=Path, help="JSON of what came of it (benchmarks/results/fuzz.json)")
    parser.add_argument("--lines", type=Path, help="JSON lines of every result")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case:
        _again(_named(args.case, args.seed))
        return 0
    wanted, good = cases(args.cases, args.seed, args.only), list[Result]()
    if args.again:
        known = [Result(**json.loads(line)) for line in args.again.read_text().splitlines()]
        wanted = [_named(r.case, args.seed) for r in known if r.outcome in BAD]
        good = [r for r in known if r.outcome not in BAD]
    results = [*good, *_tried(wanted, args)]
    _show(results, args.seed)
    if args.out:
        _write(args.out, results, args.seed)
    return int(any(r.outcome in BAD for r in results))


def _tried(wanted: Sequence[Case], args: argparse.Namespace) -> list[Result]:
    begun, results = time.monotonic(), list[Result]()
    deadline = None if args.minutes is None else begun + 60 * args.minutes
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        for result in try_all(Path(folder), wanted, deadline):
            results.append(result)
            if args.lines:
                with args.lines.open("a") as file:
                    file.write(json.dumps(result._asdict()) + "\n")
            if len(results) % 100 == 0:
                bad = sum(r.outcome in BAD for r in results)
                print(
                    f"{len(results)} cases, {bad} of them bad, {time.monotonic() - begun:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    return results


def _write(file: Path, results: Sequence[Result], seed: int) -> None:
    about = {
        "cases": len(results),
        "seed": seed,
        "seconds": round(sum(r.seconds for r in results)),
        "targets": tally(results),
        "bad": [r._asdict() for r in results if r.outcome in BAD],
    }
    file.write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
