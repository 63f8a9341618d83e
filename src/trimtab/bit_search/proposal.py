"""What to try next: expected hypervolume improvement over the neighbourhood of the fronts.

    candidates = the additive fronts, of the prior and of the prior as trials have corrected it
               + one and two edits of the observed front + one edit of the best candidates so far
    proposal   = the candidate of largest EHVI that fits the budget and was not tried

The first few proposals are the prior's alone (the integer program's, in the order of what each should add): before there
is something to learn from, expected improvement mostly asks where the model is unsure.

The budget is a hard constraint: what exceeds it is never a candidate, so it is never proposed, whatever the model thinks.
Who names one wants the best within it, not a front down to ruins: there a search counts hypervolume only below the cost of
the best uniform model that fits (`Problem.bound`), and as if each gain held far beyond the budget (`_BEYOND`): what it
brings at the budget decides, the rest of the front breaks ties.
Configurations that other workers are trying count as tried, with the cost that the model predicts.

The code knows nothing of storage, processes or models: numbers in, a configuration out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trimtab.bit_search import surrogate
from trimtab.bit_search.additive import Configuration, front
from trimtab.bit_search.hypervolume import expected_gain, pareto

Floats = NDArray[np.float64]
_FRONT_POINTS, _EDITS, _ROUNDS = 600, 1200, 3
_ASKED = 30
_WARM = 7
"""Proposals that are the prior's alone."""
_BEYOND = 4
"""The reference point lies this many times the range of bytes beyond a budget."""


@dataclass(frozen=True)
class Tried:
    """A configuration that was, or is being, tried."""

    configuration: Configuration
    quality: float | None
    """The lower the better, positive; None while it runs or if it failed."""
    rung: int = 0
    """0 for a trial of the length that proposals are for; longer ones only teach."""
    failed: bool = False
    proposed: bool = True
    """Whether it came from here; uniform widths do not."""


@dataclass(frozen=True)
class Problem:
    """What is searched over."""

    cost_UC: Floats
    """The additive prior, not negative."""
    bytes_UC: NDArray[np.int64]
    fixed_bytes: int
    budget: int | None = None
    """Most bytes that a proposal may have."""
    bound: Configuration | None = None
    """What costs no less than this is of no interest; None for the smallest configuration, or worse where seen."""

    def sizes(self, configurations: NDArray[np.int64]) -> NDArray[np.int64]:
        """Bytes of configurations (m, U): (m,)."""
        return np.asarray(self.fixed_bytes + self.bytes_UC[np.arange(len(self.bytes_UC)), configurations].sum(1))


def propose(
    problem: Problem,
    tried: Sequence[Tried],
    *,
    seed: int = 0,
    admits: Callable[[Configuration], bool] = lambda _: True,
) -> Configuration | None:
    """The configuration to try next.

    Args:
        problem: space, prior and budget.
        tried: trials of every state, in any order.
        seed: of the random edits; the same arguments give the same proposal.
        admits: a further constraint, asked of few candidates: the best and, if it takes none of these, the smallest.

    Returns:
        None if nothing is left to try, or `admits` takes none of those that it is asked of.
    """
    seen = {t.configuration for t in tried if t.rung == 0}
    draw = np.random.default_rng([seed, len(tried)])
    finished = [t for t in tried if t.quality is not None]
    model = _fitted(problem, finished)
    known, sizes, costs = _known(problem, tried, model)
    reference = _reference(problem, model, costs)
    score = _scorer(problem, model, (sizes, costs), reference)
    pool = _pool(problem, model, known[pareto(sizes, costs)], draw)
    pool = _new(problem, pool, seen)
    if not len(pool):
        pool = _new(problem, _anything(problem, draw), seen)
    values = score(pool)
    for _ in range(_ROUNDS):
        best = pool[np.argsort(-values)[:8]]
        more = _new(problem, _edits(best, problem.bytes_UC.shape[1], draw), seen | set(map(tuple, pool.tolist())))
        if not len(more):
            break
        pool, values = np.concatenate([pool, more]), np.concatenate([values, score(more)])
    # Where nothing is expected to gain, what is predicted to cost least.
    by_gain = np.lexsort((_predict(problem, model, pool)[0], -values))
    by_size = np.argsort(problem.sizes(pool), kind="stable")
    for i in [*by_gain[:_ASKED], *by_size[:_ASKED]]:
        configuration = tuple(int(c) for c in pool[i])
        if admits(configuration):
            return configuration
    return None


def _fitted(problem: Problem, finished: Sequence[Tried]) -> surrogate.Model | None:
    if sum(t.proposed for t in finished) < _WARM:
        return None
    seen = surrogate.points(problem.cost_UC, [t.configuration for t in finished], [t.rung for t in finished])
    return surrogate.fit(seen, np.log([max(t.quality or 0.0, 1e-12) for t in finished]))


def _predict(problem: Problem, model: surrogate.Model | None, pool: NDArray[np.int64]) -> tuple[Floats, Floats]:
    """Mean and deviation of log quality; while it is warming up the prior, taken at its word."""
    x = surrogate.points(problem.cost_UC, pool, 0)
    if model is None:
        return x.log_prior, np.zeros(len(pool))
    return model.predict(x)


def _known(
    problem: Problem, tried: Sequence[Tried], model: surrogate.Model | None
) -> tuple[NDArray[np.int64], Floats, Floats]:
    """Trials as long as proposals, with predicted costs of those that still run: configurations, bytes, log quality."""
    some = [t for t in tried if t.rung == 0 and not t.failed]
    chosen = np.array([t.configuration for t in some], np.int64).reshape(len(some), len(problem.cost_UC))
    guess = _predict(problem, model, chosen)[0]
    # Predictions of the prior compare with each other only.
    costs = [
        g if t.quality is None or model is None else np.log(max(t.quality, 1e-12))
        for t, g in zip(some, guess, strict=True)
    ]
    return chosen, problem.sizes(chosen).astype(float), np.array(costs)


def _reference(problem: Problem, model: surrogate.Model | None, costs: Floats) -> tuple[float, float]:
    """The largest bytes within reach, under a budget more, and the predicted cost of the bound."""
    bound = problem.bytes_UC.argmin(1) if problem.bound is None else np.array(problem.bound)
    cost = _predict(problem, model, bound[None])[0][0]
    largest = problem.fixed_bytes + int(problem.bytes_UC.max(1).sum())
    worst = cost if problem.bound is not None else max([cost, *costs])
    if problem.budget is None or problem.budget >= largest:
        return float(largest) + 1.0, float(worst)
    smallest = problem.fixed_bytes + int(problem.bytes_UC.min(1).sum())
    return problem.budget + 1.0 + _BEYOND * (problem.budget - smallest), float(worst)


def _scorer(
    problem: Problem,
    model: surrogate.Model | None,
    made: tuple[Floats, Floats],
    reference: tuple[float, float],
) -> Callable[[NDArray[np.int64]], Floats]:
    def score(pool: NDArray[np.int64]) -> Floats:
        mean, deviation = _predict(problem, model, pool)
        return expected_gain(problem.sizes(pool).astype(float), mean, deviation, made, reference)

    return score


def _pool(
    problem: Problem, model: surrogate.Model | None, observed: NDArray[np.int64], draw: np.random.Generator
) -> NDArray[np.int64]:
    choices = problem.bytes_UC.shape[1]
    fronts = [_additive(problem, problem.cost_UC)]
    if model is not None:
        factor = np.exp(np.clip(model.corrections(problem.cost_UC.shape), -2, 2))
        fronts.append(_additive(problem, problem.cost_UC * factor))
    near = _edits(observed, choices, draw)
    return np.concatenate([*fronts, near, _edits(near[: _EDITS // 2], choices, draw)])


def _additive(problem: Problem, cost_UC: Floats) -> NDArray[np.int64]:
    """The front of an additive model, thinned out."""
    spread = int((problem.bytes_UC.max(1) - problem.bytes_UC.min(1)).sum())
    found = front(problem.bytes_UC, cost_UC, fixed=problem.fixed_bytes, step=max(spread // 2000, 1))
    wanted = np.unique(np.linspace(0, len(found.bytes) - 1, _FRONT_POINTS).astype(int))
    return np.array([found.configuration(int(i)) for i in wanted], np.int64)


def _edits(configurations: NDArray[np.int64], choices: int, draw: np.random.Generator) -> NDArray[np.int64]:
    """All configurations that differ in one unit, or as many of them as are wanted, at random."""
    count, units = configurations.shape
    every = count * units * (choices - 1)
    picked = np.arange(every) if every <= _EDITS else draw.choice(every, _EDITS, replace=False)
    row, rest = picked // (units * (choices - 1)) if every else picked, picked % max(units * (choices - 1), 1)
    unit, shift = rest // max(choices - 1, 1), rest % max(choices - 1, 1) + 1
    made = configurations[row].copy()
    made[np.arange(len(made)), unit] = (made[np.arange(len(made)), unit] + shift) % choices
    return made


def _new(problem: Problem, pool: NDArray[np.int64], seen: set[Configuration]) -> NDArray[np.int64]:
    """Each once, within the budget, and not seen."""
    pool = np.unique(pool, axis=0)
    if problem.budget is not None:
        pool = pool[problem.sizes(pool) <= problem.budget]
    return pool[[tuple(row) not in seen for row in pool.tolist()]] if len(pool) else pool


def _anything(problem: Problem, draw: np.random.Generator) -> NDArray[np.int64]:
    """When every neighbour was tried: the whole space if it is small, else many at random."""
    units, choices = problem.bytes_UC.shape
    if units * np.log(choices) < np.log(20_000):
        return np.stack(np.meshgrid(*[np.arange(choices)] * units, indexing="ij"), -1).reshape(-1, units)
    return draw.integers(choices, size=(5000, units))
