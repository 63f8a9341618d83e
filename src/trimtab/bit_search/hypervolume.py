"""Hypervolume of a front of (bytes, cost), both to be small, and its expected gain from a trial not yet made.

    HV = area of the points that some point of the front dominates, within bytes <= r_b and cost <= r_c

A candidate's bytes b are known, only its cost Y ~ N(mu, sigma^2) is not. Let f(x) be the lowest cost that the front
reaches with at most x bytes (r_c where it reaches none). The candidate gains the area between its horizontal line and f,

    EHVI = E integral_b^{r_b} max(f(x) - Y, 0) dx
         = sum_k width_k [ (f_k - mu) Phi(t_k) + sigma phi(t_k) ]              t_k = (f_k - mu) / sigma

over the steps k of f to the right of b: a closed form, with one dimension fewer than general EHVI needs.
"""

import math

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def pareto(size: Floats, cost: Floats) -> NDArray[np.int64]:
    """Indices of the points that no other dominates, by ascending size; of equals the first."""
    order = np.lexsort((cost, size))
    ahead = np.concatenate(([np.inf], np.minimum.accumulate(cost[order])[:-1])) if len(order) else np.zeros(0)
    return np.asarray(order[cost[order] < ahead], np.int64)


def hypervolume(size: Floats, cost: Floats, reference: tuple[float, float]) -> float:
    """Area dominated by these points within the reference point (bytes, cost)."""
    edges, heights = _horizon((size, cost), reference)
    return float(((edges[2:] - edges[1:-1]) * (reference[1] - heights[1:])).sum())


def _horizon(points: tuple[Floats, Floats], reference: tuple[float, float]) -> tuple[Floats, Floats]:
    """The step function f: k + 1 heights, of which the first is r_c, and the k + 2 edges between them."""
    size, cost = points
    kept = pareto(size, cost)
    kept = kept[(size[kept] < reference[0]) & (cost[kept] < reference[1])]
    return np.concatenate(([-np.inf], size[kept], [reference[0]])), np.concatenate(([reference[1]], cost[kept]))


_erf = np.vectorize(math.erf, otypes=[float])


def expected_gain(
    size_m: Floats, mean_m: Floats, deviation_m: Floats, front: tuple[Floats, Floats], reference: tuple[float, float]
) -> Floats:
    """EHVI of candidates.

    Args:
        size_m: their bytes.
        mean_m: means of their cost.
        deviation_m: its standard deviations.
        front: bytes and costs of trials made; need not be sorted, nor free of dominated ones.
        reference: r_b, r_c.
    """
    edges, heights = _horizon(front, reference)
    width_mk = np.maximum(edges[None, 1:] - np.maximum(edges[None, :-1], size_m[:, None]), 0.0)
    gap_mk = heights[None] - mean_m[:, None]
    sigma = np.maximum(deviation_m, 1e-12)[:, None]
    t = gap_mk / sigma
    upper = 0.5 * (1 + _erf(t / math.sqrt(2)))
    density = np.exp(-0.5 * t**2) / math.sqrt(2 * math.pi)
    return np.asarray((width_mk * (gap_mk * upper + sigma * density)).sum(1))
