"""The surrogate against dense float64 algebra, EHVI against Monte Carlo, proposals against their budget."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.bit_search import proposal, surrogate
from trimtab.bit_search.hypervolume import expected_gain, hypervolume, pareto
from trimtab.bit_search.proposal import Problem, Tried, propose
from trimtab.bit_search.surrogate import Scales


def prior(units: int = 5, choices: int = 3) -> np.ndarray:
    draw = np.random.default_rng(0)
    return draw.gamma(1.0, size=(units, 1)) * 4.0 ** -np.arange(1, choices + 1)


def features(cost: np.ndarray, configuration: tuple[int, ...], rung: int, scales: Scales) -> np.ndarray:
    """Explicit features of one configuration, weighted: their inner product is the covariance but for the bend."""
    units, choices = cost.shape
    p = cost[np.arange(units), list(configuration)]
    share, z = p / p.sum(), math.log(p.sum())
    # m_u = L L^T over choices: 1 on the diagonal, 1/2 elsewhere.
    factor = np.linalg.cholesky(np.full((choices, choices), 0.5) + 0.5 * np.eye(choices))
    single = np.concatenate(
        [scales.unit * math.sqrt(share[u]) * math.sqrt(share[u]) * factor[c] for u, c in enumerate(configuration)]
    )
    halves = [math.sqrt(share[u]) * factor[c] for u, c in enumerate(configuration)]
    pairs = [
        scales.pair * math.sqrt(2) * np.outer(halves[u], halves[v]).ravel()
        for u, v in itertools.combinations(range(units), 2)
    ]
    flag = float(rung > 0)
    line = np.array([scales.offset, scales.slope * z, flag * scales.rung_offset, flag * scales.rung_slope * z])
    main = scales.main / math.sqrt(units) * np.concatenate([np.eye(choices)[c] for c in configuration])
    return np.concatenate([line, main, single, *pairs])


def test_the_posterior_is_bayesian_regression_on_explicit_features() -> None:
    """(Phi^T Phi / n^2 + I)^-1 Phi^T y / n^2 in float64, with the prior's logarithm as mean; the bend left out."""
    cost, draw = prior(), np.random.default_rng(1)
    every = [tuple(map(int, draw.integers(3, size=5))) for _ in range(14)]
    rungs = [i % 2 for i in range(14)]
    scales = Scales(bend=0.0, main=0.2, unit=0.4, pair=0.3, noise=0.05)
    y = draw.normal(size=9)
    model = surrogate.posterior(surrogate.points(cost, every[:9], rungs[:9]), y, scales, center=0.0)
    mean, deviation = model.predict(surrogate.points(cost, every[9:], rungs[9:]))
    phi = np.stack([features(cost, c, r, scales) for c, r in zip(every, rungs, strict=True)])
    z = np.array([math.log(cost[np.arange(5), list(c)].sum()) for c in every])
    precision = phi[:9].T @ phi[:9] / scales.noise**2 + np.eye(phi.shape[1])
    weights = np.linalg.solve(precision, phi[:9].T @ (y - z[:9]) / scales.noise**2)
    np.testing.assert_allclose(mean, phi[9:] @ weights + z[9:], rtol=1e-6)
    variance = np.einsum("ij,ij->i", phi[9:], np.linalg.solve(precision, phi[9:].T).T)
    np.testing.assert_allclose(deviation, np.sqrt(variance), rtol=1e-5)


def test_a_unit_that_is_worse_than_its_prior_is_found_out() -> None:
    """Unit 2 costs five times what the prior says: after 25 trials the correction and predictions say so."""
    cost, draw = prior(), np.random.default_rng(2)
    truth = cost.copy()
    truth[2] *= 5
    every = draw.integers(3, size=(60, 5))
    y = np.log(truth[np.arange(5), every].sum(1))
    model = surrogate.fit(surrogate.points(cost, every[:25]), y[:25])
    corrections = model.corrections(cost.shape).mean(1)
    assert corrections.argmax() == 2
    mean, _ = model.predict(surrogate.points(cost, every[25:]))
    from_prior = np.log(cost[np.arange(5), every[25:]].sum(1))
    assert np.abs(mean - y[25:]).mean() < 0.3 * np.abs(from_prior - from_prior.mean() - y[25:] + y[25:].mean()).mean()


# ---- hypervolume ----------------------------------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=8))
def test_hypervolume_counts_dominated_cells(found: list[tuple[int, int]]) -> None:
    size, cost = np.array([p[0] for p in found], float), np.array([p[1] for p in found], float)
    cells = sum(any(s <= x and c <= y for s, c in found) for x in range(10) for y in range(8))
    assert hypervolume(size, cost, (10.0, 8.0)) == cells
    kept = {(size[i], cost[i]) for i in pareto(size, cost)}
    assert kept == {p for p in found if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in found)}


@pytest.mark.parametrize("count", [0, 1, 5])
def test_expected_gain_is_that_of_monte_carlo(count: int) -> None:
    draw, reference = np.random.default_rng(count), (10.0, 4.0)
    made = draw.uniform(0, 11, count), draw.uniform(-1, 5, count)
    size, mean, deviation = (
        np.array([0.5, 3.0, 8.0, 11.0]),
        np.array([1.0, 0.2, 3.9, -1.0]),
        np.array([0.3, 1.0, 0.8, 0.5]),
    )
    found = expected_gain(size, mean, deviation, made, reference)
    before = hypervolume(*made, reference)
    for i in range(4):
        ys = mean[i] + deviation[i] * draw.standard_normal(8000)
        gains = [hypervolume(np.append(made[0], size[i]), np.append(made[1], y), reference) - before for y in ys]
        assert found[i] == pytest.approx(np.mean(gains), abs=4 * np.std(gains) / math.sqrt(8000) + 1e-9)


# ---- proposals ------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(1, 4), st.floats(0, 1), st.integers(0, 1000))
def test_no_proposal_exceeds_the_budget_or_repeats(units: int, choices: int, share: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = np.sort(draw.integers(1, 1000, size=(units, choices)), axis=1)
    cost = np.sort(draw.gamma(1.0, size=(units, choices)), axis=1)[:, ::-1]
    low, high = 7 + int(sizes.min(1).sum()), 7 + int(sizes.max(1).sum())
    problem = Problem(cost, sizes, 7, budget=low + int(share * (high - low)))
    tried: list[Tried] = []
    for i in range(6):
        found = propose(problem, tried, seed=seed)
        if found is None:
            break
        assert 7 + sizes[np.arange(units), list(found)].sum() <= problem.budget
        assert found not in {t.configuration for t in tried}
        quality = None if i == 2 else float(cost[np.arange(units), list(found)].sum() * draw.lognormal(0, 0.3))
        tried.append(Tried(found, quality, failed=i == 2))
    within = (
        sum(
            7 + sizes[np.arange(units), list(c)].sum() <= problem.budget
            for c in itertools.product(range(choices), repeat=units)
        )
        if choices**units <= 4096
        else 6
    )
    assert len(tried) == min(6, within)


def test_a_constraint_is_asked_and_kept() -> None:
    problem = Problem(prior(), np.tile([10, 20, 40], (5, 1)), 0)
    found = propose(problem, [], admits=lambda c: c[0] == 1)
    assert found is not None
    assert found[0] == 1
    assert propose(problem, [], admits=lambda c: False) is None


def test_under_a_bound_only_what_is_better_is_proposed() -> None:
    """As long as the prior knows of anything better that fits; without one, small and bad configurations come, too."""
    draw = np.random.default_rng(0)
    sizes = np.tile([20, 30, 40, 50, 80], (8, 1)) * draw.integers(5, 15, size=(8, 1))
    cost = draw.lognormal(0, 1.5, size=(8, 1)) * 4.0 ** -np.array([[2, 3, 4, 5, 8]])
    bound = (2,) * 8
    limit = cost[:, 2].sum()

    def first(bound: tuple[int, ...] | None) -> list[float]:
        problem, tried, costs = Problem(cost, sizes, 0, budget=int(sizes[:, 2].sum()), bound=bound), list[Tried](), []
        for _ in range(6):
            found = propose(problem, tried)
            assert found is not None
            costs.append(float(cost[np.arange(8), list(found)].sum()))
            tried.append(Tried(found, costs[-1]))
        return costs

    assert max(first(bound)) < limit
    assert max(first(None)) > limit


@pytest.mark.parametrize("seed", range(6))
def test_under_a_budget_the_best_within_it_comes_first(seed: int) -> None:
    """To where a smaller configuration's gain over all of its bytes is the greater: B/(B + 1) of the way, B = `_BEYOND`."""
    draw = np.random.default_rng(seed)
    sizes = np.tile([20, 30, 40, 50, 80], (6, 1)) * draw.integers(5, 15, size=(6, 1))
    cost = draw.lognormal(0, 1.5, size=(6, 1)) * 4.0 ** -np.array([[2, 3, 4, 5, 8]])
    bound, budget = (2,) * 6, int(sizes[:, 2].sum())
    every = list(itertools.product(range(5), repeat=6))
    within = [c for c in every if sizes[np.arange(6), list(c)].sum() <= budget]
    best = min(math.log(cost[np.arange(6), list(c)].sum()) for c in within)
    limit = math.log(cost[:, 2].sum())
    found = propose(Problem(cost, sizes, 0, budget=budget, bound=bound), [])
    assert found is not None
    ours = math.log(cost[np.arange(6), list(found)].sum())
    assert limit - ours >= 0.8 * (limit - best) > 0


def test_uniform_trials_do_not_end_the_warm_up() -> None:
    """Only as many proposals as `_WARM` do."""
    problem = Problem(prior(), np.tile([10, 20, 40], (5, 1)), 0)
    every = list(itertools.product(range(3), repeat=5))[: proposal._WARM]
    fitted = [
        proposal._fitted(problem, [Tried(c, 1.0 + i, proposed=p) for i, c in enumerate(every)]) for p in (True, False)
    ]
    assert fitted[0] is not None
    assert fitted[1] is None
