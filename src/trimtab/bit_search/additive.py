"""The exact optimum of an additive model: which choice for every unit, for every budget at once.

    minimise  sum_u cost[u, c_u]   subject to   sum_u bytes[u, c_u] <= budget            (a multiple-choice knapsack)

Solved for all budgets in one sweep (Nemhauser and Ullmann): the Pareto front of the first u + 1 units is the front of the
first u, shifted by each choice of unit u, with what is dominated thrown away. No rounding and no relaxation, so the answer
is that of an integer program, and its only cost is the length of the front. Where sizes are so irregular that fronts grow
too long, `step` rounds every size up to a multiple: still never over a budget, and optimal for the rounded sizes.

Road not taken: Lagrange multipliers reach only the convex hull of the front, which leaves gaps in budgets that a few large
units make.
"""

from dataclasses import dataclass

import numpy as np

from trimtab.errors import UserError

Configuration = tuple[int, ...]
"""A choice for every unit, by index."""


@dataclass(frozen=True)
class Front:
    """The Pareto front of an additive model, by ascending bytes and descending cost."""

    bytes: np.ndarray
    """(P,) int64."""
    cost: np.ndarray
    """(P,) float64."""
    steps: tuple[tuple[np.ndarray, np.ndarray], ...]
    """For each unit, of every point of its front: its choice, and the point of the front before that it came from."""

    def configuration(self, point: int) -> Configuration:
        """The choices that reach a point."""
        chosen = []
        for choice, parent in reversed(self.steps):
            chosen.append(int(choice[point]))
            point = int(parent[point])
        return tuple(reversed(chosen))

    def within(self, budget: int) -> int:
        """The best point of at most `budget` bytes.

        Raises:
            UserError: if there is none.
        """
        point = int(np.searchsorted(self.bytes, budget, side="right")) - 1
        if point < 0:
            raise UserError(
                f"budget: {budget:,} bytes are less than the smallest configuration, {self.bytes[0]:,} bytes"
            )
        return point


def front(bytes_UC: np.ndarray, cost_UC: np.ndarray, *, fixed: int = 0, step: int = 1) -> Front:
    """The whole Pareto front.

    Args:
        bytes_UC: integers (units, choices).
        cost_UC: floats (units, choices); infinity forbids a choice.
        fixed: bytes that every configuration has.
        step: sizes are rounded up to multiples of it.
    """
    sizes = -(-bytes_UC.astype(np.int64) // step) * step
    total, cost = np.array([fixed], np.int64), np.zeros(1)
    steps = []
    for size_C, cost_C in zip(sizes, cost_UC, strict=True):
        usable = np.flatnonzero(np.isfinite(cost_C))
        all_bytes = (total[None] + size_C[usable, None]).ravel()
        all_cost = (cost[None] + cost_C[usable, None]).ravel()
        order = np.lexsort((all_cost, all_bytes))
        ahead = np.concatenate(([np.inf], np.minimum.accumulate(all_cost[order])[:-1]))
        kept = order[all_cost[order] < ahead]
        steps.append((usable[kept // len(total)], kept % len(total)))
        total, cost = all_bytes[kept], all_cost[kept]
    return Front(total, cost, tuple(steps))
