"""Searches against the truth: hypervolume after 10, 20, 40, 80 trials, as a share of the best any set of that size reaches.

Bytes against log KL, reference point: the largest bytes, the worst uniform width. Sensitivity passes are charged as trials
(a pass over a quarter of the tokens as a quarter). Needs a table of `benchmarks/search/truth.py`. Rows {method, trials,
seed, hypervolume_ratio} go to benchmarks/results/search.json, of the second table to search_smollm2.json.

    python benchmarks/search/search.py [--table smollm2-135m] [--methods ours random ...]
    python benchmarks/report.py search                            docs/search.md
"""

import argparse
import json
import math
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from trimtab.bit_search.additive import front
from trimtab.bit_search.hypervolume import expected_gain, hypervolume, pareto
from trimtab.bit_search.proposal import Problem, Tried, propose

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.files import RESULTS
from benchmarks.search.truth import TABLES

TRIALS = (10, 20, 40, 80)
PRIOR = "fisher"
"""The sensitivities that ours, greedy and the integer program start from."""


class Truth:
    """A stored table."""

    def __init__(self, file: str) -> None:
        found = np.load(RESULTS / file)
        self.bytes_UC, self.fixed = found["bytes_UC"], int(found["fixed_bytes"])
        self.units, self.choices = self.bytes_UC.shape
        self.kl, self.size = found["kl"].astype(float), found["bytes"].astype(float)
        self.prior = {n: np.maximum(found[f"{n}_cost"], 0) for n in ("exact", "exact_quarter", "fisher")}
        self.passes = {n: float(found[f"{n}_passes"]) for n in self.prior}
        uniform = [self.index((c,) * self.units) for c in range(self.choices)]
        self.reference = float(self.size.max()), float(np.log(self.kl[uniform].max()))

    def index(self, configuration: tuple[int, ...]) -> int:
        return int(np.ravel_multi_index(configuration, (self.choices,) * self.units))

    def cost(self, seed: int, prior: str = PRIOR) -> np.ndarray:
        """The additive prior (units, choices): that of the seed where it is drawn at random."""
        found = self.prior[prior]
        return found if found.ndim == 2 else found[seed % len(found)]

    def hypervolume(self, tried: list[tuple[int, ...]]) -> float:
        rows = [self.index(c) for c in tried]
        return hypervolume(self.size[rows], np.log(self.kl[rows]), self.reference) if rows else 0.0

    def best(self, count: int) -> np.ndarray:
        """The largest hypervolume of any set of 1, 2 .. count configurations: a path over the true front."""
        cost = np.log(self.kl)
        kept = pareto(self.size, cost)
        kept = kept[cost[kept] < self.reference[1]]
        x, height = self.size[kept], self.reference[1] - cost[kept]
        # gain[i, j]: what i contributes when j is the next point of the set (the last column: no next).
        edges = np.append(x, self.reference[0])
        gain = np.where(edges[None] > x[:, None], (edges[None] - x[:, None]) * height[:, None], -np.inf)
        value = gain[:, -1]
        found = [value.max()]
        for _ in range(count - 1):
            value = np.maximum(value, (gain[:, :-1] + value[None]).max(1))
            found.append(value.max())
        return np.array(found)


Sequence = list[tuple[int, ...]]
"""Configurations in the order in which they are tried."""


def ours(truth: Truth, trials: int, seed: int, prior: str = PRIOR) -> Sequence:
    tried: list[Tried] = []
    problem = Problem(truth.cost(seed, prior), truth.bytes_UC, truth.fixed)
    for _ in range(trials - math.ceil(truth.passes[prior])):
        found = propose(problem, tried, seed=seed)
        tried.append(Tried(found, float(truth.kl[truth.index(found)])))
    return [t.configuration for t in tried]


def random(truth: Truth, trials: int, seed: int) -> Sequence:
    rows = np.random.default_rng(seed).choice(len(truth.kl), trials, replace=False)
    return [tuple(int(c) for c in np.unravel_index(r, (truth.choices,) * truth.units)) for r in rows]


def by_prediction(truth: Truth, pool: Sequence, trials: int, prior_UC: np.ndarray) -> Sequence:
    """A pool in the order of the hypervolume that the prior predicts each to add."""
    rows = np.array(pool)
    size = Problem(prior_UC, truth.bytes_UC, truth.fixed).sizes(rows).astype(float)
    cost = np.log(np.maximum(prior_UC[np.arange(truth.units), rows].sum(1), 1e-9))
    reference = truth.reference[0], float(cost.max())
    chosen: list[int] = []
    for _ in range(min(trials, len(pool))):
        gain = expected_gain(size, cost, np.zeros(len(pool)), (size[chosen], cost[chosen]), reference)
        gain[chosen] = -1
        chosen.append(int(gain.argmax()))
    return [pool[i] for i in chosen]


def greedy(truth: Truth, trials: int, seed: int) -> Sequence:
    """From the widest down, each time the unit that costs least for the bytes it saves."""
    cost, now = truth.cost(seed), [truth.choices - 1] * truth.units
    path = [tuple(now)]
    while any(now):
        rates = [
            (cost[u, c - 1] - cost[u, c]) / (truth.bytes_UC[u, c] - truth.bytes_UC[u, c - 1]) if c else np.inf
            for u, c in enumerate(now)
        ]
        now[int(np.argmin(rates))] -= 1
        path.append(tuple(now))
    return by_prediction(truth, path, trials - math.ceil(truth.passes[PRIOR]), cost)


def integer_program(truth: Truth, trials: int, seed: int) -> Sequence:
    found = front(truth.bytes_UC, truth.cost(seed), fixed=truth.fixed)
    pool = [found.configuration(i) for i in range(len(found.bytes))]
    return by_prediction(truth, pool, trials - math.ceil(truth.passes[PRIOR]), truth.cost(seed))


def uniform(truth: Truth, trials: int, seed: int) -> Sequence:
    return [(c,) * truth.units for c in reversed(range(truth.choices))]


def optunas(make: Callable[[int], object]) -> Callable[[Truth, int, int], Sequence]:
    def search(truth: Truth, trials: int, seed: int) -> Sequence:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        warnings.simplefilter("ignore")
        study = optuna.create_study(directions=["minimize"] * 2, sampler=make(seed))  # type: ignore[arg-type]
        tried: Sequence = []

        def objective(trial: "optuna.Trial") -> tuple[float, float]:
            chosen = tuple(trial.suggest_int(f"u{u}", 0, truth.choices - 1) for u in range(truth.units))
            tried.append(chosen)
            row = truth.index(chosen)
            return float(truth.size[row]), float(np.log(truth.kl[row]))

        study.optimize(objective, n_trials=trials)
        return tried

    return search


def _sampler(name: str, **options: object) -> Callable[[int], object]:
    def make(seed: int) -> object:
        import optuna

        return getattr(optuna.samplers, name)(seed=seed, **options)

    return make


METHODS: dict[str, Callable[[Truth, int, int], Sequence]] = {
    "ours": ours,
    "integer program alone": integer_program,
    "greedy": greedy,
    "uniform widths": uniform,
    "random": random,
    "NSGA-II": optunas(_sampler("NSGAIISampler", population_size=10)),
    "TPE": optunas(_sampler("TPESampler")),
    "GP (Optuna)": optunas(_sampler("GPSampler")),
}
POOLED = ("integer program alone", "greedy", "uniform widths")
"""Those that know a few configurations only, and make no further trials."""
CHARGED = ("ours", "integer program alone", "greedy")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", choices=TABLES, default="stories260k")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--trials", type=int, default=max(TRIALS))
    arguments = parser.parse_args()
    name = TABLES[arguments.table].file
    truth, file = Truth(name), RESULTS / name.replace("search_truth", "search").replace(".npz", ".json")
    best, every = truth.best(max(TRIALS)), range(arguments.seeds)
    pools = {m: max(len(METHODS[m](truth, len(truth.kl), s)) for s in every) for m in POOLED}
    for method in arguments.methods:
        charge = math.ceil(truth.passes[PRIOR]) if method in CHARGED else 0
        for seed in range(arguments.first_seed, arguments.seeds):
            started = time.perf_counter()
            tried = METHODS[method](truth, arguments.trials, seed)
            seconds = time.perf_counter() - started
            rows = json.loads(file.read_text())["rows"] if file.exists() else []
            rows = [r for r in rows if (r["method"], r["seed"]) != (method, seed)]
            for trials in (n for n in TRIALS if n <= arguments.trials):
                value = truth.hypervolume(tried[: max(trials - charge, 0)]) / best[trials - 1]
                rows.append({"method": method, "trials": trials, "seed": seed, "hypervolume_ratio": round(value, 5)})
            print(method, seed, f"{seconds:.1f} s", [r["hypervolume_ratio"] for r in rows[-4:]], flush=True)
            about = {"prior": PRIOR, "passes": truth.passes, "true_front": len(pareto(truth.size, truth.kl))}
            about["for_99_percent_of_40"] = int((best < 0.99 * best[39]).sum()) + 1
            about["pools"] = pools
            lines = ",\n".join(json.dumps(r) for r in rows)
            file.write_text(f'{{"about": {json.dumps(about)},\n"rows": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    main()
