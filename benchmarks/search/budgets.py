"""The best model within a budget, against the truth: how much worse than the best that fits, after so many trials.

Budgets lie evenly between the smallest and the largest uniform width. A search begins, as a real one does, with the uniform
widths that fit; they and the sensitivity pass are charged as trials. Rows {method, trials, gap_percent, found} are over
budgets and seeds: KL above the best in percent (median and mean), and the share of searches that found the best itself.

    python benchmarks/search/budgets.py [--table smollm2-135m] && python benchmarks/report.py search
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trimtab.bit_search.additive import front
from trimtab.bit_search.proposal import Problem, Tried, propose

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS
from benchmarks.search.search import PRIOR, Sequence, Truth
from benchmarks.search.truth import TABLES

TRIALS = (10, 15, 20, 30)
SHARES = tuple(np.arange(1, 10) / 10)


def start(truth: Truth, budget: int) -> Sequence:
    """The uniform widths that fit, the largest last."""
    every = [(c,) * truth.units for c in range(truth.choices)]
    return [c for c in every if truth.size[truth.index(c)] <= budget]


def ours(truth: Truth, budget: int, trials: int, seed: int) -> Sequence:
    fits = start(truth, budget)
    problem = Problem(truth.cost(seed), truth.bytes_UC, truth.fixed, budget, fits[-1])
    tried = [Tried(c, float(truth.kl[truth.index(c)]), proposed=False) for c in fits]
    while len(tried) < trials and (found := propose(problem, tried, seed=seed)) is not None:
        tried.append(Tried(found, float(truth.kl[truth.index(found)])))
    return [t.configuration for t in tried]


def integer_program(truth: Truth, budget: int, trials: int, seed: int) -> Sequence:
    """The uniform widths, then the additive optimum alone."""
    found = front(truth.bytes_UC, truth.cost(seed), fixed=truth.fixed)
    return [*start(truth, budget), found.configuration(found.within(budget))]


def random(truth: Truth, budget: int, trials: int, seed: int) -> Sequence:
    fits = start(truth, budget)
    rows = np.random.default_rng(seed).permutation(np.flatnonzero(truth.size <= budget))[: trials - len(fits)]
    return [*fits, *(tuple(int(c) for c in np.unravel_index(r, (truth.choices,) * truth.units)) for r in rows)]


METHODS: dict[str, Callable[[Truth, int, int, int], Sequence]] = {
    "ours": ours,
    "integer program alone": integer_program,
    "random": random,
}


def gaps(truth: Truth, name: str, budget: int, seed: int) -> list[float]:
    """Percent of KL above the best that fits, after each of `TRIALS`."""
    charge = 0 if name == "random" else math.ceil(truth.passes[PRIOR])
    tried = METHODS[name](truth, budget, max(TRIALS) - charge, seed)
    kl = truth.kl[[truth.index(c) for c in tried]]
    return [100 * float(kl[: n - charge].min() / truth.kl[truth.size <= budget].min() - 1) for n in TRIALS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="stories260k")
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    name = TABLES[arguments.table].file
    truth = Truth(name)
    low, high = (truth.size[truth.index((c,) * truth.units)] for c in (0, truth.choices - 1))
    rows = []
    for method in METHODS:
        every = [
            gaps(truth, method, int(low + share * (high - low)), seed)
            for share in SHARES
            for seed in range(arguments.seeds)
        ]
        for n, gap in zip(TRIALS, np.array(every).T, strict=True):
            found = {"gap_percent": round(float(np.median(gap)), 2), "mean_gap_percent": round(float(gap.mean()), 2)}
            rows.append({"method": method, "trials": n, **found, "found": round(float((gap <= 1e-9).mean()), 3)})
            print(rows[-1], flush=True)
    about = {"budgets": len(SHARES), "seeds": arguments.seeds}
    file = RESULTS / name.replace("search_truth", "search_budgets").replace(".npz", ".json")
    file.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
