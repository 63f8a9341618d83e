"""The performance model: a Gaussian process on what the additive prior gets wrong.

Write P = sum_u p_u for the prior's cost of a configuration and w_u = p_u / P for the share that unit u has in it. If errors
of units add up in the logits, then to second order the KL to the float model is a quadratic form in them,

    KL = sum_u p_u (1 + d_u)  +  sum_{u != v} rho_uv sqrt(p_u p_v)

(d: how wrong the prior is about a unit at a width; rho: how much two errors point the same way). Divided by P, and
log(1 + x) taken as x:

    log KL = log P  +  sum_u w_u d_u  +  sum_{u != v} rho_uv sqrt(w_u w_v)

which is linear in the unknowns. With normal d and rho it is a Gaussian process whose covariance has a closed form,

    k(x, x') = a^2 + b^2 z z' + c^2 exp(-(z - z')^2 / 2)                        z = log P: offset, slope, bend
             + h^2 (share of units with the same width)                         what has nothing to do with the prior
             + d^2 sum_u m_u w_u w'_u                                           m_u: 1 for the same width, 1/2 for another
             + e^2 [ (sum_u m_u sqrt(w_u w'_u))^2 - sum_u m_u^2 w_u w'_u ]      pairs of units

so a handful of trials corrects the prior where it matters: units that carry much of the error. c, d, e, h and the noise are
chosen by the marginal likelihood. Quality after tuning is modelled the same way, with a slope far from 1. Trials of other
lengths are a quality of their own with an offset and a slope between them.

Road not taken: kernels on the widths themselves (Hamming, Matern on log2 bits; Optuna's sampler). They must learn
from trials what sensitivities already say. Regression trees and small MLPs want more trials than a search has.

Legend: n trials, m candidates, U units.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
_OTHER_WIDTH = 0.5
"""m_u for different widths: a unit that is worse than thought at 2 bits tends to be so at 3."""
_GRID = {
    "bend": (0.03, 0.1, 0.3, 1.0),
    "main": (0.0, 0.03, 0.06, 0.1, 0.2),
    "unit": (0.03, 0.1, 0.3, 1.0),
    "pair": (0.03, 0.1, 0.3, 1.0),
    "noise": (1e-3, 1e-2, 0.03, 0.1),
}

_PARTS = ("bend", "main", "unit", "pair")


@dataclass(frozen=True)
class Scales:
    """Standard deviations of the parts, in units of log quality."""

    offset: float = 5.0
    slope: float = 0.5
    bend: float = 0.1
    main: float = 0.06
    unit: float = 0.3
    pair: float = 0.1
    noise: float = 1e-2
    rung_offset: float = 1.0
    rung_slope: float = 0.3


@dataclass(frozen=True)
class Points:
    """Configurations as the model sees them."""

    choices: NDArray[np.int64]
    """(n, U)."""
    share: Floats
    """w: (n, U)."""
    log_prior: Floats
    """z: (n,)."""
    rung: NDArray[np.int64]
    """Length of the trial, as a number from 0: (n,)."""


def points(
    cost_UC: Floats, configurations: Sequence[Sequence[int]] | NDArray[np.int64], rung: Sequence[int] | int = 0
) -> Points:
    """Features of configurations under a prior.

    Args:
        cost_UC: the prior, not negative.
        configurations: n rows of U choices.
        rung: of each, or of all.
    """
    chosen = np.asarray(configurations, np.int64).reshape(-1, len(cost_UC))
    cost = cost_UC[np.arange(len(cost_UC)), chosen]
    # What costs nothing (all units in float) has a share and a logarithm all the same.
    total = np.maximum(cost.sum(1), 1e-6 * max(float(cost_UC.max()), 1e-30))
    return Points(chosen, cost / total[:, None], np.log(total), np.broadcast_to(np.asarray(rung), len(chosen)))


def covariance(a: Points, b: Points, scales: Scales, center: float) -> Floats:
    """k(a, b), without noise: (n, m)."""
    z, y = a.log_prior[:, None] - center, b.log_prior[None] - center
    unit, pair, diagonal, equal = (np.zeros((len(z), y.shape[1])) for _ in range(4))
    for u in range(a.choices.shape[1]):
        same_width = a.choices[:, None, u] == b.choices[None, :, u]
        like = np.where(same_width, 1.0, _OTHER_WIDTH)
        equal += same_width / a.choices.shape[1]
        product = a.share[:, None, u] * b.share[None, :, u]
        unit += like * product
        pair += like * np.sqrt(product)
        diagonal += like**2 * product
    k = scales.offset**2 + scales.slope**2 * z * y + scales.bend**2 * np.exp(-((z - y) ** 2) / 2)
    k += scales.main**2 * equal + scales.unit**2 * unit + scales.pair**2 * (pair**2 - diagonal)
    same = (a.rung[:, None] == b.rung[None]) & (a.rung[:, None] > 0)
    return np.asarray(k + same * (scales.rung_offset**2 + scales.rung_slope**2 * z * y))


@dataclass(frozen=True)
class Model:
    """A posterior."""

    seen: Points
    scales: Scales
    center: float
    chol: Floats
    weights: Floats
    """(K + noise)^-1 (y - z), (n,)."""

    def predict(self, x: Points) -> tuple[Floats, Floats]:
        """Mean and standard deviation of log quality (without noise), each (m,)."""
        k = covariance(self.seen, x, self.scales, self.center)
        mean = x.log_prior + k.T @ self.weights
        explained = np.linalg.solve(self.chol, k)
        variance = _diagonal(x, self.scales, self.center) - (explained**2).sum(0)
        return mean, np.sqrt(np.maximum(variance, 1e-12))

    def corrections(self, shape: tuple[int, int]) -> Floats:
        """Posterior mean of d for every unit and choice (U, C): the logarithm of what the prior's costs are off by."""
        units, choices = shape
        found = np.zeros(shape)
        for c in range(choices):
            like = np.where(self.seen.choices == c, 1.0, _OTHER_WIDTH)
            found[:, c] = self.scales.unit**2 * ((like * self.seen.share).T @ self.weights)
        assert found.shape[0] == units
        return found


def _diagonal(x: Points, scales: Scales, center: float) -> Floats:
    z = x.log_prior - center
    squares = (x.share**2).sum(1)
    pair = x.share.sum(1) ** 2 - squares
    rung = (x.rung > 0) * (scales.rung_offset**2 + scales.rung_slope**2 * z**2)
    parts = scales.offset**2 + scales.slope**2 * z**2 + scales.bend**2 + scales.main**2 + scales.unit**2 * squares
    return np.asarray(parts + scales.pair**2 * pair + rung)


def fit(seen: Points, log_quality: Floats) -> Model:
    """The posterior after these trials, its scales by coordinate ascent on the marginal likelihood."""
    center = float(seen.log_prior.mean())
    parts = _parts(seen, center)
    best, value = Scales(), -np.inf
    for _ in range(2):
        before = best
        for name, options in _GRID.items():
            for option in options:
                tried = replace(best, **{name: option})
                found = _evidence(parts, seen, log_quality, tried)
                if found > value:
                    best, value = tried, found
        if best == before:
            break
    return posterior(seen, log_quality, best, center)


def posterior(seen: Points, log_quality: Floats, scales: Scales, center: float) -> Model:
    """The posterior for given scales."""
    k = covariance(seen, seen, scales, center) + scales.noise**2 * np.eye(len(log_quality))
    chol = np.linalg.cholesky(k)
    residual = log_quality - seen.log_prior
    weights = np.linalg.solve(chol.T, np.linalg.solve(chol, residual))
    return Model(seen, scales, center, np.asarray(chol), np.asarray(weights, np.float64))


def _parts(seen: Points, center: float) -> dict[str, Floats]:
    """Covariances of each part at scale 1."""
    none = Scales(**dict.fromkeys(asdict(Scales()), 0.0))
    found = {name: covariance(seen, seen, replace(none, **{name: 1.0}), center) for name in _PARTS}
    found["fixed"] = covariance(seen, seen, replace(Scales(), **dict.fromkeys(_PARTS, 0.0)), center)
    return found


def _evidence(parts: dict[str, Floats], seen: Points, log_quality: Floats, scales: Scales) -> float:
    """Log marginal likelihood, up to a constant, and a weak pull of each scale to its default (deviation: a factor e^2)."""
    k = parts["fixed"] + scales.noise**2 * np.eye(len(log_quality))
    pull = 0.0
    for name in _GRID:
        value, default = getattr(scales, name), getattr(Scales(), name)
        k = k + (value**2 * parts[name] if name in parts else 0)
        pull += float(np.log(max(value, 0.01) / default) ** 2) / 8
    chol = np.linalg.cholesky(k)
    white = np.linalg.solve(chol, log_quality - seen.log_prior)
    return float(-0.5 * white @ white - np.log(np.diag(chol)).sum() - pull)
