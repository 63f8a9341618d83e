"""What a proposal costs: seconds an ask, beside Optuna's samplers, beside a trial, and what sensitivities take.

Made-up problems of the size of the truth table's (8 units, 3 widths) and of SmolLM2-135M's (120 fusion groups, 4 widths),
after 10 and 40 trials. Goes to benchmarks/results/search_cost.json.

    python benchmarks/search/cost.py
"""

import json
import statistics
import time
import warnings
from pathlib import Path

import numpy as np
import optuna

from trimtab.bit_search.proposal import Problem, Tried, propose

RESULTS = Path(__file__).parents[1] / "results"
SAMPLERS = ("NSGAIISampler", "TPESampler", "GPSampler")
AFTER, REPEATS = (10, 40), 3


def problem(units: int, choices: int) -> Problem:
    draw = np.random.default_rng(0)
    weight = draw.integers(50_000, 400_000, size=(units, 1))
    bits = np.array([2, 3, 4, 8][:choices])
    return Problem(draw.gamma(1.0, size=(units, 1)) * 4.0**-bits, weight * bits // 8, 0)


def history(given: Problem, count: int) -> list[Tried]:
    draw = np.random.default_rng(1)
    units, choices = given.bytes_UC.shape
    rows = draw.integers(choices, size=(count, units))
    costs = given.cost_UC[np.arange(units), rows].sum(1) * draw.lognormal(0, 0.1, count)
    return [Tried(tuple(map(int, r)), float(c)) for r, c in zip(rows, costs, strict=True)]


def ours(given: Problem, tried: list[Tried]) -> float:
    took = []
    for seed in range(REPEATS):
        started = time.perf_counter()
        propose(given, tried, seed=seed)
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def optunas(name: str, given: Problem, tried: list[Tried]) -> float:
    warnings.simplefilter("ignore")
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    units, choices = given.bytes_UC.shape
    space = {f"u{u}": optuna.distributions.IntDistribution(0, choices - 1) for u in range(units)}
    study = optuna.create_study(directions=["minimize"] * 2, sampler=getattr(optuna.samplers, name)(seed=0))
    for t in tried:
        values = [float(given.sizes(np.array([t.configuration]))[0]), float(np.log(t.quality or 1.0))]
        params = dict(zip(space, t.configuration, strict=True))
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, values=values))  # type: ignore[arg-type]
    took = []
    for _ in range(1 if name == "GPSampler" else REPEATS):
        started = time.perf_counter()
        study.ask(space)  # type: ignore[arg-type]
        took.append(time.perf_counter() - started)
    return statistics.median(took)


def main() -> None:
    rows = []
    for units, choices in ((8, 3), (120, 4)):
        given = problem(units, choices)
        for count in AFTER:
            tried = history(given, count)
            rows.append({"sampler": "ours", "units": units, "after": count, "seconds": ours(given, tried)})
            for name in SAMPLERS:
                if name == "GPSampler" and units > 8:
                    continue  # minutes an ask
                rows.append({"sampler": name, "units": units, "after": count, "seconds": optunas(name, given, tried)})
            print(rows[-4:], flush=True)
    truth = np.load(RESULTS / "search_truth.npz")
    passes = {n: float(truth[f"{n}_passes"]) for n in ("exact", "exact_quarter", "fisher")}
    found = {"rows": rows, "trial_seconds": float(truth["seconds_each"]), "passes": passes}
    (RESULTS / "search_cost.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
